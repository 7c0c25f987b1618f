"""A vision tower in transformers' layout: what SigLIP and CLIP share."""
