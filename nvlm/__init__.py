"""NVLM-D, NVLM-X and NVLM-H on Megatron-Core."""
