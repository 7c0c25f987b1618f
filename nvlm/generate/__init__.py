"""Text generation: sampling, decoding with a key-value cache, streaming, the Python API."""
