"""The frozen vision path: InternViT, pixel shuffle."""
