"""Gaussian splatting: images of 3D Gaussians, and colors that depend on the direction of view."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from trellis_kernels.gaussians import reference
from trellis_kernels.gaussians.harmonics import spherical_harmonics
from trellis_kernels.operator import Operator
from trellis_kernels.shapes import FLOATS, expect

__all__ = ["RasterizedGaussians", "rasterize_gaussians", "spherical_harmonics"]

MAX_EXTENT = 16384  # pixels per side


class RasterizedGaussians(NamedTuple):
    """Images of V cameras; dtype that of the means."""

    colors: Tensor
    """``[V, H, W, C]`` in front of the background, not clamped."""
    alphas: Tensor
    """``[V, H, W]`` in [0, 1]: share of each pixel that is not background."""
    depths: Tensor
    """``[V, H, W]``: expected depth ``sum_i w_i z_i`` in world units, 0 where nothing is seen; not divided by alpha."""


def rasterize_gaussians(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    background: Tensor,
    kernel_size: float = 0.1,
) -> RasterizedGaussians:
    """Draw Gaussians with the mip filter, front to back, for several cameras.

        w_i = alpha_i prod_{j<i} (1 - alpha_j),   color = sum_i w_i color_i + (1 - sum_i w_i) background

    where ``alpha_i = min(0.99, o_i exp(-1/2 d^T S_i^-1 d))``, d the distance in pixels to the projected mean, S_i the
    projected covariance plus ``kernel_size`` on its diagonal and o_i the opacity, lowered by as much as the filter
    widened the footprint. Gaussians are drawn in order of camera depth (equal depths: in order of index). Left out
    are Gaussians nearer than 0.2, tiles of 16 pixels farther than 3 standard deviations, alphas below 1/255, and what
    would bring the transmittance below 1e-4; near and far planes do not clip. Pixel centers are at whole numbers plus
    one half of a pixel. Not differentiable yet: calling backward raises NotImplementedError.

    Args:
        means: ``[G, 3]`` float. Centers in world units. Its dtype is the dtype of every other float argument; half
            precision is computed in float32 and rounded once; float64 is for the CPU only.
        quats: ``[G, 4]`` unit quaternions (w, x, y, z).
        scales: ``[G, 3]`` standard deviations in world units.
        opacities: ``[G]`` in [0, 1].
        colors: ``[G, C]``, any number of channels, any range.
        extrinsics: ``[V, 4, 4]`` world to camera; x right, y down, z forward.
        intrinsics: ``[V, 3, 3]`` normalised by the image size: focal lengths and principal point of a picture whose
            sides have length 1, origin in its top left corner. Skew is ignored.
        width: pixels, 1 to 16384.
        height: pixels, 1 to 16384.
        background: ``[C]`` or ``[V, C]``.
        kernel_size: variance in pixels^2 of the filter, at least 0.

    Returns:
        Colors ``[V, H, W, C]``, alphas ``[V, H, W]`` and expected depths ``[V, H, W]``.

    Raises:
        ValueError, TypeError: if a shape, dtype or size is not the one above, or there is no kernel for the dtype.

    Source:
        Kerbl et al. 2023, "3D Gaussian Splatting", sec. 5-6; Yu et al. 2024, "Mip-Splatting", sec. 4.2. The official
        code mirrors a principal point off the middle in y; here it is where `intrinsics` says.
    """
    dtype = means.dtype
    expect(
        means=(means, "G 3", FLOATS),
        quats=(quats, "G 4", dtype),
        scales=(scales, "G 3", dtype),
        opacities=(opacities, "G", dtype),
        colors=(colors, "G C", dtype),
        extrinsics=(extrinsics, "V 4 4", dtype),
        intrinsics=(intrinsics, "V 3 3", dtype),
        background=(background, "V C" if background.ndim == 2 else "C", dtype),
    )
    if not (1 <= width <= MAX_EXTENT and 1 <= height <= MAX_EXTENT):
        raise ValueError(f"width and height must be in 1..{MAX_EXTENT}; got {width} and {height}")
    if not kernel_size >= 0:
        raise ValueError(f"kernel_size must be at least 0; got {kernel_size}")
    if background.ndim == 1:
        background = background.expand(len(extrinsics), -1)
    images, depths, transmittances, _ = _forward(
        means, quats, scales, opacities, colors, extrinsics, intrinsics, background, width, height, kernel_size
    )
    return RasterizedGaussians(images, 1 - transmittances, depths)


# Beside the images, what a backward needs: the transmittance left at each pixel, and the index of the Gaussian that
# contributed last (-1: none). With the depth order, which is a function of the inputs, they allow the blending of a
# pixel to be undone from back to front.
_forward = Operator(
    "rasterize_gaussians(Tensor means, Tensor quats, Tensor scales, Tensor opacities, Tensor colors, "
    "Tensor extrinsics, Tensor intrinsics, Tensor background, int width, int height, float kernel_size) "
    "-> (Tensor colors, Tensor depths, Tensor transmittances, Tensor last)",
    reference=reference.rasterize_gaussians,
    kernels={"cpu": "trellis_kernels.gaussians.cpu", "cuda": "trellis_kernels.gaussians.cuda"},
)


@_forward.fake
def _(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    width: int,
    height: int,
    kernel_size: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (extrinsics.shape[0], height, width)
    return (
        means.new_empty(*shape, colors.shape[1]),
        means.new_empty(shape),
        means.new_empty(shape),
        means.new_empty(shape, dtype=torch.int32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[3])


def _backward(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise NotImplementedError("trellis_kernels.rasterize_gaussians has no backward yet: its inputs must not need it")


_forward.autograd(_backward, _setup_context)
