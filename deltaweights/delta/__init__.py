"""A delta on disk: opening it, its shards, the lazy view of its target, chains of deltas."""
