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
_HALF = (torch.float16, torch.bfloat16)


class RasterizedGaussians(NamedTuple):
    """Images of V cameras; dtype that of the means."""

    colors: Tensor
    """``[V, H, W, C]`` in front of the background, not clamped."""
    alphas: Tensor
    """``[V, H, W]`` in [0, 1]: share of each pixel that is not background."""
    depths: Tensor
    """``[V, H, W]``: expected depth ``sum_i w_i z_i`` in world units, 0 where nothing is seen; not divided by alpha."""
    median_depths: Tensor
    """``[V, H, W]``: depth of the Gaussian at which the transmittance falls below 0.5, 0 where none does; no
    gradient."""


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
    one half of a pixel.

    Differentiable once in every tensor, through colors, alphas and expected depths, the fading of opacities by the
    filter included; there is no gradient through the thresholds, through alphas held at 0.99 and through median
    depths. Results and gradients do not depend on the number of threads.

    A Gaussian that cannot be drawn is left out and its gradients are zero, without an error, which on a GPU would have
    to wait for it: a mean, rotation, scale or opacity that is not finite, a scale of 0 or less, a quaternion of zeros,
    one behind the camera or nearer than 0.2 (cameras may be inside of the cloud), one whose projection overflows.
    Colors are not looked at: what is not finite shows where it is drawn, and in the gradients of what is drawn there.
    A camera that is not finite sees nothing but background.

    Args:
        means: ``[G, 3]`` float. Centers in world units. Its dtype is the dtype of every other float argument; half
            precision is computed in float32 and rounded once; float64 is for the CPU only.
        quats: ``[G, 4]`` quaternions (w, x, y, z) of any length but 0: they are normalised here, differentiably.
        scales: ``[G, 3]`` standard deviations in world units, positive.
        opacities: ``[G]`` in [0, 1].
        colors: ``[G, C]``, or ``[V, G, C]`` where they depend on the camera; any number of channels, none included
            (features are more channels), any range.
        extrinsics: ``[V, 4, 4]`` world to camera; x right, y down, z forward.
        intrinsics: ``[V, 3, 3]`` normalised by the image size: focal lengths and principal point of a picture whose
            sides have length 1, origin in its top left corner. Skew is ignored.
        width: pixels, 1 to 16384.
        height: pixels, 1 to 16384.
        background: ``[C]`` or ``[V, C]``.
        kernel_size: variance in pixels^2 of the filter, at least 0.

    Returns:
        Colors ``[V, H, W, C]``, alphas, expected depths and median depths ``[V, H, W]``.

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
        colors=(colors, "V G C" if colors.ndim == 3 else "G C", dtype),
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
    floats = [means, quats, scales, opacities, colors, extrinsics, intrinsics, background]
    if dtype in _HALF:
        floats = [tensor.float() for tensor in floats]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in floats)
    images, depths, transmittances, _, medians, _ = _forward(*floats, width, height, kernel_size, keep)
    result = RasterizedGaussians(images, 1 - transmittances, depths, medians)
    return RasterizedGaussians(*(tensor.to(dtype) for tensor in result)) if dtype in _HALF else result


# Beside the images, what a backward may use: the transmittance left at each pixel, the index of the Gaussian that
# contributed last (-1: none), and, where `keep` is set, a `state` of bytes that only the kernel that wrote it reads:
# whatever it would otherwise have to make again (lists of tiles, transmittances in between). Its size may depend on
# the data on a GPU; a CPU needs none. The gradients of median depths, last and state do not exist.
_KERNELS = {"cpu": "trellis_kernels.gaussians.cpu", "cuda": "trellis_kernels.gaussians.cuda"}
_INPUTS = (
    "Tensor means, Tensor quats, Tensor scales, Tensor opacities, Tensor colors, Tensor extrinsics, "
    "Tensor intrinsics, Tensor background"
)
_forward = Operator(
    f"rasterize_gaussians({_INPUTS}, int width, int height, float kernel_size, bool keep=False) -> (Tensor colors, "
    "Tensor depths, Tensor transmittances, Tensor last, Tensor median_depths, Tensor state)",
    reference=reference.rasterize_gaussians,
    kernels=_KERNELS,
)
# Gradients with respect to the inputs, in their order; colors are [G, C] or [V, G, C], as they were given.
_gradient = Operator(
    "rasterize_gaussians_backward(Tensor colors_gradient, Tensor depths_gradient, Tensor transmittances_gradient, "
    f"{_INPUTS}, Tensor out_colors, Tensor out_depths, Tensor out_transmittances, Tensor last, Tensor state, "
    "float kernel_size) -> (Tensor means, Tensor quats, Tensor scales, Tensor opacities, Tensor colors, "
    "Tensor extrinsics, Tensor intrinsics, Tensor background)",
    reference=reference.rasterize_gaussians_backward,
    kernels=_KERNELS,
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
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (extrinsics.shape[0], height, width)
    kept = torch.library.get_ctx().new_dynamic_size() if keep and means.device.type == "cuda" else 0
    return (
        means.new_empty(*shape, colors.shape[-1]),
        means.new_empty(shape),
        means.new_empty(shape),
        means.new_empty(shape, dtype=torch.int32),
        means.new_empty(shape),
        means.new_empty(kept, dtype=torch.uint8),
    )


@_gradient.fake
def _(
    colors_gradient: Tensor,
    depths_gradient: Tensor,
    transmittances_gradient: Tensor,
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    out_colors: Tensor,
    out_depths: Tensor,
    out_transmittances: Tensor,
    last: Tensor,
    state: Tensor,
    kernel_size: float,
) -> tuple[Tensor, ...]:
    inputs = (means, quats, scales, opacities, colors, extrinsics, intrinsics, background)
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    images, depths, transmittances, last, medians, state = output
    ctx.mark_non_differentiable(last, medians, state)
    ctx.save_for_backward(*inputs[:8], images, depths, transmittances, last, state)
    ctx.kernel_size = inputs[10]


def _differentiate(ctx: Any, colors: Tensor, depths: Tensor, transmittances: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = _gradient(colors, depths, transmittances, *ctx.saved_tensors, ctx.kernel_size)
    return (*gradients, None, None, None, None)


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _refuse(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise NotImplementedError("the second derivative of rasterize_gaussians is not implemented")


_forward.autograd(_differentiate, _setup)
_gradient.autograd(_refuse, _setup_nothing)
