"""The three fusion architectures; base.py holds what they share."""
