"""The frozen vision path: the encoders, pixel shuffle, which rank encodes which tile."""
