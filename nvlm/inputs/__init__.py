"""The inputs of a run: the sources of its weights, whether they fit, and identities of inputs by content."""
