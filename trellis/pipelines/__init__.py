"""Image or text in, a 3D asset out."""
