"""Features from fine voxels to coarse ones and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels.operator import Operator
from trellis_kernels.shapes import FLOATS, expect
from trellis_kernels.sparse_conv import reference

POOL_MODES = ("sum", "mean", "biased_mean")
_KERNELS = {"cpu": "trellis_kernels.sparse_conv.cpu", "cuda": "trellis_kernels.sparse_conv.triton"}


def sparse_pool(feats: Tensor, inverse: Tensor, count: int, mode: str) -> Tensor:
    """Combine the rows that belong to the same coarse voxel.

        sum:  out[m] = sum of feats[n] over n with inverse[n] == m
        mean: the sum divided by the number of rows, 0 for a coarse voxel without rows
        biased_mean: the sum divided by the number of rows plus one

    Sums run in the order of the rows, in float32 at least. The result does not depend on the number of threads.

    Args:
        feats: ``[N, C]`` float.
        inverse: ``[N]`` int32 in ``[0, count)``: the coarse voxel of each row, from `coarsen`.
        count: number of coarse voxels.
        mode: ``"sum"``, ``"mean"``, or ``"biased_mean"``: what the official models do, since they average into a
            tensor of zeros with the zero counted as one more row.

    Returns:
        ``[count, C]``, dtype of `feats`.

    Raises:
        ValueError: if a shape or mode does not fit, `count` is negative, or an index is not in ``[0, count)``; the
            last is not checked on a GPU, as that would wait for it: such rows belong to no voxel there.
        TypeError: if a dtype does not fit.

    Source:
        Golden value ``sparse_ops`` ``out.down_feats``, computed by the official code at commit 6b0d647.
    """
    expect(feats=(feats, "N C", FLOATS), inverse=(inverse, "N", torch.int32))
    if mode not in POOL_MODES:
        raise ValueError(f"mode must be {' or '.join(map(repr, POOL_MODES))}; got {mode!r}")
    if count < 0:
        raise ValueError(f"count must be at least 0; got {count}")
    return _pool(feats, inverse, count, mode)


def upsample(feats: Tensor, inverse: Tensor) -> Tensor:
    """Give every fine voxel the features of its coarse voxel.

        out[n] = feats[inverse[n]]

    Args:
        feats: ``[M, C]`` float, of the coarse voxels.
        inverse: ``[N]`` int32 in ``[0, M)``: the coarse voxel of each fine one, from `coarsen`.

    Returns:
        ``[N, C]``, dtype of `feats`.

    Raises:
        ValueError: if a shape does not fit or an index is not in ``[0, M)``; the latter is not checked on a GPU, as
            that would wait for it: such voxels get zeros there.
        TypeError: if a dtype does not fit.
    """
    expect(feats=(feats, "M C", FLOATS), inverse=(inverse, "N", torch.int32))
    return _upsample(feats, inverse)


def subdivide(feats: Tensor) -> Tensor:
    """Give each of the 8 children of every voxel the features of its parent.

        out[8 n + 4 dx + 2 dy + dz] = feats[n]

    A composition of torch operations. A convolution that follows directly is far cheaper as `subdivided_conv`.

    Args:
        feats: ``[N, C]`` float.

    Returns:
        ``[8 N, C]``, dtype of `feats`.

    Raises:
        ValueError: if `feats` does not have two dimensions.
        TypeError: if `feats` is not floating point.
    """
    expect(feats=(feats, "N C", FLOATS))
    return feats[:, None].expand(-1, 8, -1).reshape(8 * feats.shape[0], feats.shape[1])


_pool = Operator(
    "sparse_pool(Tensor feats, Tensor inverse, int count, str mode) -> Tensor",
    reference=reference.sparse_pool,
    kernels=_KERNELS,
)
_upsample = Operator(
    "upsample(Tensor feats, Tensor inverse) -> Tensor",
    reference=reference.upsample,
    kernels=_KERNELS,
)


@_pool.fake
def _(feats: Tensor, inverse: Tensor, count: int, mode: str) -> Tensor:
    return feats.new_empty(count, feats.shape[1])


@_upsample.fake
def _(feats: Tensor, inverse: Tensor) -> Tensor:
    return feats.new_empty(inverse.shape[0], feats.shape[1])


def _save_for_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, inverse, ctx.count, ctx.mode = inputs
    ctx.save_for_backward(inverse)


def _pool_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (inverse,) = ctx.saved_tensors
    if ctx.mode != "sum":
        ones = torch.ones(inverse.shape[0], 1, dtype=torch.float32, device=inverse.device)
        rows = _pool(ones, inverse, ctx.count, "sum")
        rows = rows + 1 if ctx.mode == "biased_mean" else rows.clamp_min(1)
        gradient = (gradient / rows.to(torch.promote_types(gradient.dtype, torch.float32))).to(gradient.dtype)
    return _upsample(gradient, inverse), None, None, None


def _save_for_upsample(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    feats, inverse = inputs
    ctx.count = feats.shape[0]
    ctx.save_for_backward(inverse)


def _upsample_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _pool(gradient, *ctx.saved_tensors, ctx.count, "sum"), None


_pool.autograd(_pool_backward, _save_for_pool)
_upsample.autograd(_upsample_backward, _save_for_upsample)
