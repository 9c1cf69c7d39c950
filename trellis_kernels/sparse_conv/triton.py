"""GPU launches. The kernels are triton_gather.py, triton_pairs.py, triton_plan.py and triton_rows.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from trellis_kernels import cuda_device
from trellis_kernels.sparse_conv import tiles
from trellis_kernels.sparse_conv.orders import PARTS, locality, plan_orders, plan_parts
from trellis_kernels.sparse_conv.triton_gather import (
    FROM_CHILDREN,
    PLAIN,
    TO_CHILDREN,
    add_splits,
    collapse_weight,
    gather_gemm,
)
from trellis_kernels.sparse_conv.triton_pairs import add_pair_splits, pair_gemm
from trellis_kernels.sparse_conv.triton_plan import count_pairs, list_pairs, row_keys, write_orders
from trellis_kernels.sparse_conv.triton_rows import gather_rows, pool_rows

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TAPS = {PLAIN.value: 1, TO_CHILDREN.value: 8, FROM_CHILDREN.value: 8}


def submanifold_conv(
    feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor | None, plan: Tensor | None = None
) -> Tensor:
    return _gather(PLAIN.value, feats, neighbors, weight, (1, 2, 0), False, bias, plan)


def submanifold_conv_input_gradient(
    out_gradient: Tensor, neighbors: Tensor, weight: Tensor, plan: Tensor | None = None
) -> Tensor:
    """The forward kernel with the taps turned round and the weight transposed."""
    return _gather(PLAIN.value, out_gradient, neighbors, weight, (1, 0, 2), True, None, plan)


def submanifold_conv_weight_gradient(
    feats: Tensor, neighbors: Tensor, out_gradient: Tensor, plan: Tensor | None = None
) -> Tensor:
    return _pairs(False, feats, neighbors, out_gradient, plan)


def subdivided_conv(
    feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor | None, plan: Tensor | None = None
) -> Tensor:
    """A child has 8 parents around it, with the sum of the taps that lead there as the weight of each."""
    return _gather(TO_CHILDREN.value, feats, neighbors, _collapsed(weight), (0, 2, 1), False, bias, plan)


def subdivided_conv_input_gradient(
    out_gradient: Tensor, neighbors: Tensor, weight: Tensor, plan: Tensor | None = None
) -> Tensor:
    return _gather(FROM_CHILDREN.value, out_gradient, neighbors, _collapsed(weight), (0, 1, 2), False, None, plan)


def subdivided_conv_weight_gradient(
    feats: Tensor, neighbors: Tensor, out_gradient: Tensor, plan: Tensor | None = None
) -> Tensor:
    return _pairs(True, feats, neighbors, out_gradient, plan)


def conv_plan(neighbors: Tensor, gradients: bool) -> Tensor:
    rows, taps = neighbors.shape
    orders = plan_orders(rows, taps)
    plan = neighbors.new_zeros(2 * orders + taps * gradients, rows + 1)
    if not rows:
        return plan
    neighbors = neighbors.contiguous()
    with cuda_device.guard(neighbors):
        if orders:
            _write_orders(neighbors, plan, orders)
        if gradients:
            _list_pairs(neighbors, plan[2 * orders :])
    return plan


def sparse_pool(feats: Tensor, inverse: Tensor, count: int, mode: str) -> Tensor:
    feats = feats.contiguous()
    channels = feats.shape[1]
    out = feats.new_empty(count, channels)
    if out.numel() == 0:
        return out
    block = min(256, triton.next_power_of_2(channels))
    accumulator = triton.language.float64 if feats.dtype == torch.float64 else triton.language.float32
    with cuda_device.guard(feats):
        coarse, order = inverse.sort(stable=True)
        starts = torch.searchsorted(coarse, torch.arange(count + 1, dtype=torch.int32, device=coarse.device))
        pool_rows[(count, triton.cdiv(channels, block))](
            feats, order, starts, out, channels, MEAN=mode != "sum", MORE=int(mode == "biased_mean"),
            ACCUMULATOR=accumulator, BLOCK=block, num_warps=1,
        )  # fmt: skip
    return out


def upsample(feats: Tensor, inverse: Tensor) -> Tensor:
    feats, inverse = feats.contiguous(), inverse.contiguous()
    rows, (sources, channels) = inverse.shape[0], feats.shape
    out = feats.new_empty(rows, channels)
    if out.numel():
        width = min(128, triton.next_power_of_2(channels))
        grid = (triton.cdiv(rows, 2048 // width), triton.cdiv(channels, width))
        with cuda_device.guard(feats):
            gather_rows[grid](
                feats, inverse, out, rows, sources, channels, BLOCK_R=2048 // width, BLOCK_C=width, num_warps=4
            )
    return out


def _write_orders(neighbors: Tensor, plan: Tensor, orders: int) -> None:
    rows, taps = neighbors.shape
    parts = max(1, orders - 1)
    keys = neighbors.new_empty(orders, rows)
    width = max(2, triton.next_power_of_2(taps))
    row_keys[(triton.cdiv(rows, 128),)](
        neighbors, keys, rows, taps, locality(rows), PARTS=parts, BLOCK=128, BLOCK_TAPS=width
    )
    keys, order = keys.sort(dim=1, stable=True)
    write_orders[(triton.cdiv(rows, 1024), orders)](
        keys, order, plan, rows, taps, plan.stride(0), PARTS=parts, BLOCK=1024
    )


def _list_pairs(neighbors: Tensor, lists: Tensor) -> None:
    rows, taps = neighbors.shape
    width = min(32, triton.next_power_of_2(taps))
    grid = (triton.cdiv(rows, 128), triton.cdiv(taps, width))
    counts = neighbors.new_empty(taps, grid[0])
    count_pairs[grid](neighbors, counts, rows, taps, BLOCK=128, BLOCK_TAPS=width)
    ends = counts.cumsum(1, dtype=torch.int32)
    list_pairs[grid](neighbors, ends, lists, rows, taps, BLOCK=128, BLOCK_TAPS=width)


def _planned(neighbors: Tensor, plan: Tensor | None, gradients: bool) -> Tensor:
    """The plan given, or one made here; with the lists of pairs if `gradients`."""
    rows, taps = neighbors.shape
    orders = 2 * plan_orders(rows, taps)
    if plan is None or plan.numel() == 0 or (gradients and plan.shape[0] < orders + taps):
        return conv_plan(neighbors, gradients)
    if plan.shape[0] not in (orders, orders + taps) or plan.shape[1] != rows + 1:
        raise ValueError(
            f"plan must be the conv_plan of these neighbors, [{orders} or {orders + taps}, {rows + 1}]; "
            f"got {list(plan.shape)}"
        )
    return plan.contiguous()


def _gather(
    kind: int,
    feats: Tensor,
    neighbors: Tensor,
    weight: Tensor,
    dimensions: tuple[int, int, int],
    mirrored: bool,
    bias: Tensor | None,
    plan: Tensor | None,
) -> Tensor:
    """Launch gather_gemm; `dimensions` says which of the weight's are the taps, the input and the output channels."""
    exact = _exact(feats)
    feats, neighbors = feats.contiguous(), neighbors.contiguous()
    rows, taps = neighbors.shape
    ci, co = (weight.shape[i] for i in dimensions[1:])
    children = 8 if kind == TO_CHILDREN.value else 1
    out = feats.new_empty(children * rows, co)
    if out.numel() == 0 or ci == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    bias = None if bias is None else bias.contiguous()
    plan = _planned(neighbors, plan, gradients=False)
    device = cuda_device.properties(feats)
    tile = tiles.gather_tiles(feats.dtype, exact, co, ci, device)
    programs = triton.cdiv(rows, tile.m) * triton.cdiv(co, tile.n + tile.tail)
    parts = plan_parts(rows, taps) if kind == PLAIN.value and tiles.parts_pay(rows, ci) else 1
    steps = triton.cdiv(ci, tile.k) * {PLAIN.value: taps, TO_CHILDREN.value: 8, FROM_CHILDREN.value: 64}[kind]
    splits = tiles.gather_splits(programs * parts * children, steps // (2 * parts), tile.slots)
    pieces = parts * splits
    target = out if pieces == 1 else feats.new_empty((pieces, *out.shape), dtype=torch.float32)
    with cuda_device.guard(feats):
        gather_gemm[(programs, children, pieces)](
            feats, neighbors, plan, weight, bias if pieces == 1 else None, target,
            rows, taps, ci, co, plan.stride(0), *(weight.stride(i) for i in dimensions),
            KIND=kind, MIRRORED=mirrored, MASKED=plan_orders(rows, taps) > 0, FIRST_ORDER=parts // PARTS, PARTS=parts,
            SPLITS=splits, HAS_BIAS=bias is not None and pieces == 1, PRECISION=_precision(exact),
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_T=tile.tail, BLOCK_K=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if pieces > 1:
            add_splits[(triton.cdiv(out.numel(), 1024),)](
                target, bias, out, out.numel(), co, SPLITS=pieces, HAS_BIAS=bias is not None, BLOCK=1024
            )
    return out


def _pairs(children: bool, feats: Tensor, neighbors: Tensor, out_gradient: Tensor, plan: Tensor | None) -> Tensor:
    exact = _exact(feats)
    feats, neighbors, out_gradient = feats.contiguous(), neighbors.contiguous(), out_gradient.contiguous()
    rows, taps = neighbors.shape
    ci, co = feats.shape[1], out_gradient.shape[1]
    out = feats.new_empty(co, taps, ci)
    if out.numel() == 0 or rows == 0:
        return out.zero_()
    lists = _planned(neighbors, plan, gradients=True)[2 * plan_orders(rows, taps) :]
    device = cuda_device.properties(feats)
    tile = tiles.pair_tiles(feats.dtype, exact, co, ci, device)
    matrices = 64 if children else taps
    programs = triton.cdiv(co, tile.m) * triton.cdiv(ci, tile.n + tile.tail)
    splits = tiles.pair_splits(programs * matrices, rows, tile.slots)
    direct = splits == 1 and not children
    target = out if direct else feats.new_empty((splits, matrices, co, ci), dtype=torch.float32)
    strides = (0, ci, taps * ci) if direct else (matrices * co * ci, co * ci, ci)
    with cuda_device.guard(feats):
        pair_gemm[(programs, matrices, splits)](
            feats, neighbors, lists, out_gradient, target,
            rows, taps, ci, co, lists.stride(0), *strides,
            CHILDREN=children, SPLITS=splits, PRECISION=_precision(exact),
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_T=tile.tail, BLOCK_K=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if not direct:
            add_pair_splits[(triton.cdiv(co * ci, 1024), taps)](
                target, out, taps, ci, co, CHILDREN=children, SPLITS=splits, BLOCK=1024
            )
    return out


def _collapsed(weight: Tensor) -> Tensor:
    """``[64, Co, Ci]``: for each child and each of its parents the sum of the taps that lead there."""
    co, _, ci = weight.shape
    out = weight.new_empty(64, co, ci)
    if out.numel():
        with cuda_device.guard(weight):
            strides = weight.stride()
            collapse_weight[(64, triton.cdiv(co * ci, 1024))](weight, out, *strides, co, ci, BLOCK=1024)
    return out


def _exact(feats: Tensor) -> bool:
    """Whether float32 products are to be exact rather than tf32."""
    if feats.dtype not in _DTYPES:
        raise TypeError(f"feats must be {' or '.join(map(str, _DTYPES))} on a GPU; got {feats.dtype}")
    return not torch.backends.cuda.matmul.allow_tf32


def _precision(exact: bool) -> str:
    return "ieee" if exact else "tf32"
