"""Runs of a sweep side by side, resumable, with a live table. No torch."""
