"""Evaluation: greedy answers to held-out records, exact match, the report page."""
