"""What a reader of deltas must accept and refuse, for readers in any language: see README.md."""
