"""Optimizer, loop, checkpoints, metrics."""
