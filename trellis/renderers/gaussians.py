"""Pictures of Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis.renderers.camera import Cameras
from trellis.renderers.canvas import Background, Canvas, VolumeImages
from trellis.representations.gaussians import Gaussians
from trellis_kernels import rasterize_gaussians


def render_gaussians(
    gaussians: Gaussians,
    cameras: Cameras,
    resolution: int = 512,
    background: Background = 0.0,
    ssaa: int = 1,
    colors: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> VolumeImages:
    """Render Gaussians for each camera.

    Differentiable in everything that the Gaussians hold, in `colors`, the extrinsics and the background. What is
    nearer than 0.2 is left out; near and far of the cameras do not matter.

    Args:
        gaussians: G Gaussians; they decide device and dtype.
        cameras: V cameras.
        resolution: pixels per side of the result.
        background: see `Background`; of as many channels as the colors.
        ssaa: supersampling: renders `ssaa` times as many pixels per side and averages (bilinear, antialiased).
        colors: ``[G, C]`` or ``[V, G, C]`` to be drawn instead of those of `gaussians`: any features, or colors that
            depend on the camera such as ``spherical_harmonics(coefficients, gaussians.means - center)``.
        generator: for ``background="random"``.

    Returns:
        Colors ``[V, C, H, W]``, alphas, depths and median depths ``[V, H, W]``.

    Raises:
        ValueError: if `resolution` or `ssaa` is not positive, or a shape does not fit.
    """
    means = gaussians.means
    painted = gaussians.colors if colors is None else colors
    canvas = Canvas.create(cameras, means, resolution, ssaa, background, painted.shape[-1], generator)
    shape = (gaussians.quats, gaussians.scales, gaussians.opacities)

    def draw(some: Canvas, rows: slice) -> tuple[Tensor, ...]:
        return rasterize_gaussians(
            means,
            *shape,
            painted[rows] if painted.ndim == 3 else painted,
            some.cameras.extrinsics,
            some.cameras.intrinsics,
            some.samples,
            some.samples,
            some.background,
            gaussians.config.filter_kernel_size_2d,
        )

    return VolumeImages(*canvas.draw(draw))
