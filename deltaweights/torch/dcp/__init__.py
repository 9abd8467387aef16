"""Storage for torch.distributed.checkpoint: sharded states as deltas."""
