"""From 3D objects to training data: sources, renders, voxels, features, latents, in the official folder layout."""
