"""From a checkpoint to a folder that others can load."""
