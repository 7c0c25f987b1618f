"""Turns records on disk into packed batches. Imports neither Megatron nor torch.distributed."""
