"""Structural similarity of images, fused with its gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trellis_kernels.operator import Operator
from trellis_kernels.shapes import FLOATS, expect
from trellis_kernels.ssim import reference

__all__ = ["ssim_map"]

_KERNELS = {"cpu": "trellis_kernels.ssim.cpu", "cuda": "trellis_kernels.ssim.cuda"}


def ssim_map(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity of each pixel's surroundings in two images; its mean is the SSIM index.

        ssim = (2 m_x m_y + c1) (2 s_xy + c2) / ((m_x^2 + m_y^2 + c1) (s_xx + s_yy + c2))

    with means m and covariances s under a Gaussian window of 11 x 11 pixels and standard deviation 1.5, per channel;
    beyond its border an image is zero. c1 = 0.01^2 and c2 = 0.03^2, for values in [0, 1]. Symmetric in its arguments
    and differentiable once in both. Half precision is computed in float32 and rounded once. The result and the
    gradients do not depend on the number of threads.

    Args:
        images: ``[B, C, H, W]`` float, any range; the constants are meant for [0, 1].
        targets: ``[B, C, H, W]``, dtype of `images`.

    Returns:
        ``[B, C, H, W]`` in [-1, 1], dtype of `images`; 1 where the surroundings are equal.

    Raises:
        ValueError: if the shapes differ.
        TypeError: if a dtype does not fit.

    Source:
        Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", eq. 13; window
        and zero padding as the official training loss (golden value ``train_utils``).
    """
    expect(images=(images, "B C H W", FLOATS), targets=(targets, "B C H W", images.dtype))
    return _ssim(images, targets)


_ssim = Operator("ssim_map(Tensor images, Tensor targets) -> Tensor", reference.ssim_map, _KERNELS)
_ssim_gradient = Operator(
    "ssim_map_gradient(Tensor out_gradient, Tensor images, Tensor targets) -> Tensor",
    reference.ssim_map_gradient,
    _KERNELS,
)


@_ssim.fake
def _(images: Tensor, targets: Tensor) -> Tensor:
    return images.new_empty(images.shape)


@_ssim_gradient.fake
def _(out_gradient: Tensor, images: Tensor, targets: Tensor) -> Tensor:
    return images.new_empty(images.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    images, targets = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        _ssim_gradient(gradient, images, targets) if need[0] else None,
        _ssim_gradient(gradient, targets, images) if need[1] else None,
    )


def _setup_nothing(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    pass


def _refuse(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("the second derivative of ssim_map is not implemented")


_ssim.autograd(_differentiate, _setup)
_ssim_gradient.autograd(_refuse, _setup_nothing)
