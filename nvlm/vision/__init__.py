"""The frozen vision path: encoders, pixel shuffle, and the distribution of tiles over ranks."""
