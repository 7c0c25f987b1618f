"""Checkpoints: writing them beside training, reading them into any layout."""
