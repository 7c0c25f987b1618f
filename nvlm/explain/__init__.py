"""Where NVLM-X and NVLM-H look: gated cross-attention by tile for each answer token."""
