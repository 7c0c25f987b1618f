"""Attention masks, and the kernels that apply them."""
