"""Benchmarks: how records become questions with references. No torch."""
