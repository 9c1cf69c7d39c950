"""Back-projection: features of pictures, gathered at points of space."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from trellis_kernels.backprojection import reference
from trellis_kernels.operator import Operator
from trellis_kernels.shapes import FLOATS, expect

__all__ = ["backproject"]

_KERNELS = {"cpu": "trellis_kernels.backprojection.cpu", "cuda": "trellis_kernels.backprojection.triton"}


def backproject(
    features: Tensor,
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    depths: Tensor | None = None,
    tolerance: float = 0.0,
    aggregate: Literal["mean", "max"] = "mean",
) -> Tensor:
    """Gather at each point what the pictures show there: project, sample bilinearly, combine the views.

    A view sees a point that is in front of its camera and inside its picture and, with `depths`, not behind what the
    picture shows. The mean goes over all views, those that do not see the point counting as zero, as the official
    features do; with `depths` it goes over the views that see the point. The maximum goes over the views that see it,
    channel by channel. A point that no view sees gets zeros. The samples, ``[V, N, C]``, never exist.

    Pixel centers are at whole numbers plus one half of a pixel; beyond the border a picture is zero. Half precision is
    computed in float32 and rounded once. Differentiable in `features`; where several views share a maximum, the first
    gets the gradient. The results do not depend on the number of threads.

    On a GPU the sums are products of matrices on tensor cores: the bilinear weights are rounded to the dtype of
    `features` if that is a half precision, float64 features are refused, and what is not finite spreads to the points
    and pixels around it.

    Args:
        features: ``[V, H, W, C]`` float. V pictures, channels last.
        positions: ``[N, 3]`` float32 or float64. World units.
        extrinsics: ``[V, 4, 4]``, dtype of `positions`. World to camera; x right, y down, z forward.
        intrinsics: ``[V, 3, 3]``, dtype of `positions`. Normalised by the size of the picture, origin in its top left
            corner.
        depths: ``[V, h, w]``, dtype of `positions`. What each picture shows, as a distance along the camera's z in
            world units, at any resolution (the nearest pixel counts); 0 where it shows nothing.
        tolerance: how far behind `depths` a point is still seen, world units, at least 0.
        aggregate: how views are combined.

    Returns:
        ``[N, C]``, dtype of `features`.

    Raises:
        ValueError: if a shape, `tolerance` or `aggregate` is not one of those above; on a GPU also for pictures with
            2^31 values or sides above 32,000.
        TypeError: if a dtype does not fit.

    Source:
        Xiang et al. 2024, "Structured 3D Latents", sec. 3.1; golden value ``cameras_backproject``.
    """
    geometry = positions.dtype
    expect(
        features=(features, "V H W C", FLOATS),
        positions=(positions, "N 3", (torch.float32, torch.float64)),
        extrinsics=(extrinsics, "V 4 4", geometry),
        intrinsics=(intrinsics, "V 3 3", geometry),
    )
    if depths is not None:
        expect(depths=(depths, "V h w", geometry), features=(features, "V H W C"))
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance must be finite and at least 0; got {tolerance}")
    if aggregate not in ("mean", "max"):
        raise ValueError(f"aggregate must be 'mean' or 'max'; got {aggregate!r}")
    out, _, _ = _backproject(features, positions, extrinsics, intrinsics, depths, float(tolerance), aggregate == "max")
    return out


# `counts` is how many views took part, `winners` (for the maximum; otherwise empty) the view each value came from.
_backproject = Operator(
    "backproject(Tensor features, Tensor positions, Tensor extrinsics, Tensor intrinsics, Tensor? depths,"
    " float tolerance, bool maximum) -> (Tensor out, Tensor counts, Tensor winners)",
    reference.backproject,
    _KERNELS,
)
_backproject_gradient = Operator(
    "backproject_gradient(Tensor out_gradient, Tensor counts, Tensor winners, Tensor positions, Tensor extrinsics,"
    " Tensor intrinsics, Tensor? depths, float tolerance, bool maximum, SymInt height, SymInt width) -> Tensor",
    reference.backproject_gradient,
    _KERNELS,
)


@_backproject.fake
def _(
    features: Tensor,
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    depths: Tensor | None,
    tolerance: float,
    maximum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (positions.shape[0], features.shape[3])
    return (
        features.new_empty(shape),
        features.new_empty(shape[0], dtype=torch.int32),
        features.new_empty(shape if maximum else (0, 0), dtype=torch.int32),
    )


@_backproject_gradient.fake
def _(
    out_gradient: Tensor,
    counts: Tensor,
    winners: Tensor,
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    depths: Tensor | None,
    tolerance: float,
    maximum: bool,
    height: int,
    width: int,
) -> Tensor:
    return out_gradient.new_empty(extrinsics.shape[0], height, width, out_gradient.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, positions, extrinsics, intrinsics, depths, ctx.tolerance, ctx.maximum = inputs
    _, counts, winners = output
    ctx.mark_non_differentiable(counts, winners)
    ctx.size = features.shape[1:3]
    ctx.save_for_backward(counts, winners, positions, extrinsics, intrinsics, depths)


def _differentiate(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[1:5]):
        raise NotImplementedError("backproject is differentiable in features only; detach the positions and cameras")
    features = _backproject_gradient(gradient, *ctx.saved_tensors, ctx.tolerance, ctx.maximum, *ctx.size)
    return features, None, None, None, None, None, None


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _refuse(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("the second derivative of backproject is not implemented")


_backproject.autograd(_differentiate, _setup)
_backproject_gradient.autograd(_refuse, _setup_nothing)
