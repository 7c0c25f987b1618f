"""The three fusion architectures; base.py holds the model that they share."""
