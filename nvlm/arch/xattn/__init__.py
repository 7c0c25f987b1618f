"""NVLM-X: tile tags in the text stream, tiles by gated cross-attention (NVLM section 4.3)."""
