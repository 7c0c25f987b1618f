"""NVLM-D: every tile in the text stream (NVLM section 4.2)."""
