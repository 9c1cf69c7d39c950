"""Pictures of Gaussians."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from trellis.renderers.camera import Cameras
from trellis.representations.gaussians import Gaussians
from trellis_kernels import rasterize_gaussians

Color = tuple[float, float, float]


class GaussianImages(NamedTuple):
    """Pictures by V cameras."""

    colors: Tensor
    """``[V, 3, H, W]`` sRGB before the background, not clamped above."""
    alphas: Tensor
    """``[V, H, W]`` in [0, 1]."""
    depths: Tensor
    """``[V, H, W]`` expected depth in world units: the mean over what is seen times its alpha."""


def render_gaussians(
    gaussians: Gaussians,
    cameras: Cameras,
    resolution: int = 512,
    background: Color | Tensor = (0.0, 0.0, 0.0),
    ssaa: int = 1,
    colors: Tensor | None = None,
) -> GaussianImages:
    """Render Gaussians for each camera.

    Args:
        gaussians: G Gaussians; they decide device and dtype.
        cameras: V cameras.
        resolution: pixels per side of the result.
        background: sRGB, one color or ``[V, 3]``.
        ssaa: supersampling: renders `ssaa` times as many pixels per side and averages (bilinear, antialiased).
        colors: ``[G, 3]`` to be drawn instead of those of `gaussians`.

    Returns:
        Colors, alphas and depths.

    Raises:
        ValueError: if `resolution` or `ssaa` is not positive.
    """
    if resolution < 1 or ssaa < 1:
        raise ValueError(f"resolution and ssaa must be at least 1; got {resolution} and {ssaa}")
    means = gaussians.means
    cameras = cameras.to(means)
    size = resolution * ssaa
    drawn = rasterize_gaussians(
        means,
        gaussians.quats,
        gaussians.scales,
        gaussians.opacities,
        gaussians.colors if colors is None else colors,
        cameras.extrinsics,
        cameras.intrinsics,
        size,
        size,
        torch.as_tensor(background).to(means),
        gaussians.config.filter_kernel_size_2d,
    )
    images = torch.cat([drawn.colors, drawn.alphas[..., None], drawn.depths[..., None]], -1).permute(0, 3, 1, 2)
    if ssaa > 1:
        shape = (resolution, resolution)
        images = interpolate(images, shape, mode="bilinear", align_corners=False, antialias=True)
    return GaussianImages(images[:, :3], images[:, 3], images[:, 4])
