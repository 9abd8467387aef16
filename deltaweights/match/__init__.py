"""Which base tensor each target tensor is compared with, and which tensors of a target are duplicates."""
