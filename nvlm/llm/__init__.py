"""The language model from Megatron-Core parts."""
