"""Models and their checkpoints: loaded from deltas, saved as deltas."""
