"""Reads and maps weights between Hugging Face names and Megatron modules."""
