"""A run's folder on disk: where it is, who owns it, what it holds."""
