"""From records on disk to packed batches. Imports neither Megatron nor torch.distributed."""
