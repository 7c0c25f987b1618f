"""Greedy answers on held-out records, exact match, the report page."""
