"""From images or text to 3D Gaussians, radiance fields and meshes."""
