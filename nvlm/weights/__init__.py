"""Weights between Hugging Face names and Megatron modules."""
