"""The vision encoders, a folder each."""
