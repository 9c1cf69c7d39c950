"""What sparse convolution and resampling mean, in plain PyTorch. Written to be read; every kernel is held to it.

The convolutions run tap by tap, so that no `[N, K, Ci]` gather is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from trellis_kernels.precision import compute_dtype
from trellis_kernels.sparse_conv.orders import locality, plan_orders


def conv_plan(neighbors: Tensor, gradients: bool) -> Tensor:
    rows, taps = neighbors.shape
    present = (neighbors >= 0) & (neighbors < rows)
    orders = plan_orders(rows, taps)
    plan = neighbors.new_zeros(2 * orders + taps * gradients, rows + 1)
    for which in range(orders):
        size = taps // (orders - 1) if which else taps
        first = (which - 1) * size if which else 0
        mask = (present[:, first : first + size].long() << torch.arange(size, device=present.device)).sum(1)
        place = mask.clone()  # of the mask in Gray-code order
        for shift in (1, 2, 4, 8, 16):
            place ^= place >> shift
        if not which:
            place += (torch.arange(rows, device=present.device) >> locality(rows)) << taps
        order = place.argsort(stable=True)
        plan[2 * which, :rows], plan[2 * which + 1, :rows] = order, mask[order] << first
    for tap in range(taps * gradients):
        having = present[:, tap].nonzero()[:, 0]
        plan[2 * orders + tap, : len(having)] = having
        plan[2 * orders + tap, rows] = len(having)
    return plan


def submanifold_conv(
    feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor | None, plan: Tensor | None = None
) -> Tensor:
    dtype, feats, weight = feats.dtype, _wide(feats), _wide(weight)
    out = feats.new_zeros(feats.shape[0], weight.shape[0])
    for tap in range(weight.shape[1]):
        out += _rows(feats, neighbors[:, tap]) @ weight[:, tap].T
    return (out if bias is None else out + bias).to(dtype)


def submanifold_conv_input_gradient(
    out_gradient: Tensor, neighbors: Tensor, weight: Tensor, plan: Tensor | None = None
) -> Tensor:
    """The same convolution with the kernel turned round, because the neighbor relation is symmetric."""
    turned = weight.flip(1).permute(2, 1, 0)
    return submanifold_conv(out_gradient, neighbors, turned, None)


def submanifold_conv_weight_gradient(
    feats: Tensor, neighbors: Tensor, out_gradient: Tensor, plan: Tensor | None = None
) -> Tensor:
    dtype, feats, out_gradient = feats.dtype, _wide(feats), _wide(out_gradient)
    taps = [out_gradient.T @ _rows(feats, neighbors[:, tap]) for tap in range(neighbors.shape[1])]
    return torch.stack(taps, 1).to(dtype)


def subdivided_conv(
    feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor | None, plan: Tensor | None = None
) -> Tensor:
    dtype, feats, weight = feats.dtype, _wide(feats), _wide(weight)
    out = feats.new_zeros(feats.shape[0], 8, weight.shape[0])
    for parent, uses in _fine_taps():
        rows = _rows(feats, neighbors[:, parent])
        for child, tap in uses:
            out[:, child] += rows @ weight[:, tap].T
    return (out if bias is None else out + bias).flatten(0, 1).to(dtype)


def subdivided_conv_input_gradient(
    out_gradient: Tensor, neighbors: Tensor, weight: Tensor, plan: Tensor | None = None
) -> Tensor:
    dtype, weight = out_gradient.dtype, _wide(weight)
    children = _wide(out_gradient).unflatten(0, (-1, 8))
    out = weight.new_zeros(neighbors.shape[0], weight.shape[2])
    for parent, uses in _fine_taps():
        for child, tap in uses:  # this voxel is the neighbor `parent` of its own neighbor `26 - parent`
            out += _rows(children[:, child], neighbors[:, 26 - parent]) @ weight[:, tap]
    return out.to(dtype)


def subdivided_conv_weight_gradient(
    feats: Tensor, neighbors: Tensor, out_gradient: Tensor, plan: Tensor | None = None
) -> Tensor:
    dtype, feats = feats.dtype, _wide(feats)
    children = _wide(out_gradient).unflatten(0, (-1, 8))
    out = feats.new_zeros(out_gradient.shape[1], 27, feats.shape[1])
    for parent, uses in _fine_taps():
        rows = _rows(feats, neighbors[:, parent])
        for child, tap in uses:
            out[:, tap] += children[:, child].T @ rows
    return out.to(dtype)


def sparse_pool(feats: Tensor, inverse: Tensor, count: int, mode: str) -> Tensor:
    wide = _wide(feats)
    out = wide.new_zeros(count, feats.shape[1]).index_add_(0, inverse, wide)
    if mode != "sum":
        rows = wide.new_zeros(count).index_add_(0, inverse, wide.new_ones(len(inverse)))
        out /= (rows + 1 if mode == "biased_mean" else rows.clamp_min(1))[:, None]
    return out.to(feats.dtype)


def upsample(feats: Tensor, inverse: Tensor) -> Tensor:
    return feats.index_select(0, inverse)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype(tensor.dtype))


def _rows(feats: Tensor, index: Tensor) -> Tensor:
    """``feats[index]``; index -1 reads the zero row appended at the end."""
    return pad(feats, (0, 0, 0, 1))[index.long()]


def _fine_taps() -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """For each of the 27 parents around a voxel: the (child, tap) whose fine neighbor lies in that parent."""
    uses: dict[int, list[tuple[int, int]]] = {parent: [] for parent in range(27)}
    for child, tap in product(product((0, 1), repeat=3), product((0, 1, 2), repeat=3)):
        parent = [(d + k - 1) // 2 + 1 for d, k in zip(child, tap, strict=True)]
        uses[_number(parent, 3)].append((_number(child, 2), _number(tap, 3)))
    yield from uses.items()


def _number(digits: tuple[int, ...] | list[int], base: int) -> int:
    return (digits[0] * base + digits[1]) * base + digits[2]
