"""CPU launch. The kernels are csrc/cpu/sparse_conv*.cpp (on gemm.inl.h) and sparse_pool.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels import _cpu
from trellis_kernels.precision import compute_dtype, widened
from trellis_kernels.sparse_conv.resampling import POOL_MODES


def conv_plan(neighbors: Tensor, gradients: bool) -> Tensor:
    """The kernels list the pairs of a block of voxels while they work on it."""
    return neighbors.new_empty(0, 0)


def submanifold_conv(
    feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor | None, plan: Tensor | None = None
) -> Tensor:
    bias = feats.new_empty(0) if bias is None else bias
    shape = (feats.shape[0], weight.shape[0])
    return _run(_cpu.submanifold_conv, shape, feats, neighbors, weight, bias)


def submanifold_conv_input_gradient(
    out_gradient: Tensor, neighbors: Tensor, weight: Tensor, plan: Tensor | None = None
) -> Tensor:
    shape = (neighbors.shape[0], weight.shape[2])
    return _run(_cpu.submanifold_conv_input_gradient, shape, out_gradient, neighbors, weight)


def submanifold_conv_weight_gradient(
    feats: Tensor, neighbors: Tensor, out_gradient: Tensor, plan: Tensor | None = None
) -> Tensor:
    shape = (out_gradient.shape[1], neighbors.shape[1], feats.shape[1])
    return _run(_cpu.submanifold_conv_weight_gradient, shape, feats, neighbors, out_gradient)


def subdivided_conv(
    feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor | None, plan: Tensor | None = None
) -> Tensor:
    bias = feats.new_empty(0) if bias is None else bias
    shape = (8 * feats.shape[0], weight.shape[0])
    return _run(_cpu.subdivided_conv, shape, feats, neighbors, weight, bias)


def subdivided_conv_input_gradient(
    out_gradient: Tensor, neighbors: Tensor, weight: Tensor, plan: Tensor | None = None
) -> Tensor:
    shape = (neighbors.shape[0], weight.shape[2])
    return _run(_cpu.subdivided_conv_input_gradient, shape, out_gradient, neighbors, weight)


def subdivided_conv_weight_gradient(
    feats: Tensor, neighbors: Tensor, out_gradient: Tensor, plan: Tensor | None = None
) -> Tensor:
    shape = (out_gradient.shape[1], neighbors.shape[1], feats.shape[1])
    return _run(_cpu.subdivided_conv_weight_gradient, shape, feats, neighbors, out_gradient)


def sparse_pool(feats: Tensor, inverse: Tensor, count: int, mode: str) -> Tensor:
    return _run(_cpu.sparse_pool, (count, feats.shape[1]), feats, inverse, POOL_MODES.index(mode))


def upsample(feats: Tensor, inverse: Tensor) -> Tensor:
    if inverse.numel():
        low, high = (int(bound) for bound in torch.aminmax(inverse))
        if low < 0 or high >= feats.shape[0]:
            wrong = low if low < 0 else high
            raise ValueError(f"inverse must be in [0, M) with M={feats.shape[0]}; got {wrong}")
    return feats.index_select(0, inverse)


def _run(kernel: Any, shape: tuple[int, ...], feats: Tensor, *arguments: Any) -> Tensor:
    tensors = widened(feats, *(argument for argument in arguments if isinstance(argument, Tensor)))
    numbers = (argument for argument in arguments if not isinstance(argument, Tensor))
    out = feats.new_empty(shape, dtype=compute_dtype(feats.dtype))
    kernel(*tensors, *numbers, out, torch.get_num_threads())
    return out.to(feats.dtype)
