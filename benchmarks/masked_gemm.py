"""FlexGEMM's published algorithm, our own version: masked implicit GEMM in one Gray-code order, split-K, autotuned.

Written from its description, not from its source. It runs on our kernels, restricted to what was published: one order
for all taps, one tile with a power of two of columns, and tiles and splits chosen by timing them, where ours follow
from the shape. So it has our pipelining; the ratio that is left is due to orders per plane, tails and that choice.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trellis_kernels import cuda_device, submanifold_conv_weight_gradient
from trellis_kernels.sparse_conv.orders import plan_orders

# Rows, columns, depth, warps, stages, splits.
_TILES = ((128, 256, 64, 8, 4), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4),
          (64, 64, 64, 4, 4), (128, 64, 32, 4, 4))  # fmt: skip
_CONFIGURATIONS = [(*tile, splits) for tile, splits in itertools.product(_TILES, (1, 2, 4))]
_TUNED: dict[tuple[Any, ...], tuple[int, ...]] = {}


def one_order(neighbors: Tensor) -> Tensor:
    """A plan with one order of rows and the pairs of each tap; what ours has besides is left out."""
    from trellis_kernels.sparse_conv import triton as launches

    rows, taps = neighbors.shape
    plan = neighbors.new_empty(2 * plan_orders(rows, taps) + taps, rows + 1)
    with cuda_device.guard(neighbors):
        launches._write_orders(neighbors, plan, 1)
        launches._list_pairs(neighbors, plan[-taps:])
    return plan


def masked_gemm(feats: Tensor, neighbors: Tensor, weight: Tensor, plan: Tensor) -> Tensor:
    """``submanifold_conv(feats, neighbors, weight)``, differentiable once."""
    return _MaskedGemm.apply(feats, neighbors, weight, plan)


class _MaskedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feats: Tensor, neighbors: Tensor, weight: Tensor, plan: Tensor) -> Tensor:
        ctx.save_for_backward(feats, neighbors, weight, plan)
        return _tuned(feats, neighbors, weight, plan, (1, 2, 0))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        feats, neighbors, weight, plan = ctx.saved_tensors
        gradient = gradient.contiguous()
        input_gradient = _tuned(gradient, neighbors, weight, plan, (1, 0, 2))
        return input_gradient, None, submanifold_conv_weight_gradient(feats, neighbors, gradient, plan), None


def _tuned(feats: Tensor, neighbors: Tensor, weight: Tensor, plan: Tensor, dimensions: tuple[int, int, int]) -> Tensor:
    key = (len(feats).bit_length(), weight.shape, feats.dtype, dimensions)
    if key not in _TUNED:
        run = partial(_launch, feats, neighbors, weight, plan, dimensions)
        _TUNED[key] = min(_CONFIGURATIONS, key=lambda configuration: _milliseconds(partial(run, configuration)))
    return _launch(feats, neighbors, weight, plan, dimensions, _TUNED[key])


def _milliseconds(run: Any) -> float:
    from triton.runtime.errors import OutOfResources

    try:
        run()
    except OutOfResources:
        return float("inf")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(3):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _launch(
    feats: Tensor,
    neighbors: Tensor,
    weight: Tensor,
    plan: Tensor,
    dimensions: tuple[int, int, int],
    configuration: tuple[int, ...],
) -> Tensor:
    import triton

    from trellis_kernels.sparse_conv.triton_gather import PLAIN, add_splits, gather_gemm

    m, n, k, warps, stages, splits = configuration
    rows, taps = neighbors.shape
    ci, co = (weight.shape[i] for i in dimensions[1:])
    out = feats.new_empty(rows, co)
    target = out if splits == 1 else feats.new_empty((splits, rows, co), dtype=torch.float32)
    with cuda_device.guard(feats):
        gather_gemm[(triton.cdiv(rows, m) * triton.cdiv(co, n), 1, splits)](
            feats, neighbors, plan, weight, None, target,
            rows, taps, ci, co, plan.stride(0), *(weight.stride(i) for i in dimensions),
            KIND=PLAIN.value, MIRRORED=dimensions[1] == 0, MASKED=True, FIRST_ORDER=0, PARTS=1, SPLITS=splits,
            HAS_BIAS=False, PRECISION="tf32", BLOCK_M=m, BLOCK_N=n, BLOCK_T=0, BLOCK_K=k,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if splits > 1:
            add_splits[(triton.cdiv(out.numel(), 1024),)](
                target, None, out, out.numel(), co, SPLITS=splits, HAS_BIAS=False, BLOCK=1024
            )
    return out
