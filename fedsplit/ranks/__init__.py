"""Several processes that compute one trunk together, by torch.distributed."""
