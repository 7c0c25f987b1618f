"""Checkpoints: written while training continues, loaded into any parallel layout."""
