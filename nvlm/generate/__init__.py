"""Text from a model: sampling, decoding with cached keys, conversations, the command line."""
