"""Softmax attention over packed sequences: dense grids, voxels, windows of voxels and conditioning tokens alike.

B sequences lie end to end in one tensor and `offsets` says where each begins; nothing is padded to the longest. The
operators also return the log-sum-exp of each row of logits, from which the backward rebuilds the probabilities.

On a GPU the host never waits for the device, except `window_partition` for the number of windows. So the values of
`order` and `offsets` are not checked there: an index out of range is not followed, and rows it concerns are undefined.
Kernels are for float16, bfloat16 and float32 with heads of up to 128 columns; they round the probabilities to the dtype
of the inputs before they multiply the values, as flash attention does. Results do not vary from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels.attention import reference
from trellis_kernels.operator import Operator
from trellis_kernels.precision import compute_dtype
from trellis_kernels.shapes import FLOATS, expect

__all__ = ["varlen_attention", "window_partition", "windowed_attention"]

_KERNELS = {"cpu": "trellis_kernels.attention.cpu", "cuda": "trellis_kernels.attention.triton"}


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor) -> Tensor:
    """Attend from each query sequence to the key sequence of the same number.

        out[i] = sum_j softmax_j(query[i] . key[j] / sqrt(D)) value[j]          (j over the keys of i's sequence)

    Args:
        query: ``[N, H, D]`` float. The query sequences end to end.
        key: ``[M, H, D]``, dtype of `query`. The key sequences end to end.
        value: ``[M, H, D]``, dtype of `query`.
        query_offsets: ``[B + 1]`` int32, non-decreasing from 0 to N: sequence b is rows ``offsets[b] : offsets[b+1]``.
        key_offsets: ``[B + 1]`` int32, non-decreasing from 0 to M. For self-attention the same tensor.

    Returns:
        ``[N, H, D]``, dtype of `query`. Queries whose sequence has no keys get zeros: an empty sum.

    Raises:
        ValueError, TypeError: if a shape, dtype or (on a CPU) offset is not one of the above.

    Source:
        Vaswani et al. 2017, "Attention Is All You Need", eq. 1; computed in blocks as in Dao 2023, "FlashAttention-2".
    """
    expect(
        query=(query, "N H D", FLOATS),
        key=(key, "M H D", query.dtype),
        value=(value, "M H D", query.dtype),
        query_offsets=(query_offsets, "B+1", torch.int32),
        key_offsets=(key_offsets, "B+1", torch.int32),
    )
    _expect_not_empty(query.shape[2], query_offsets)
    out, _ = _varlen(query, key, value, query_offsets, key_offsets)
    return out


def windowed_attention(qkv: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Self-attention inside each window: rows of one window attend to each other and to no one else.

    The kernel reads and writes rows through `order`; no permuted copy of `qkv` or of the result is made. A window is
    any set of rows: cubes of voxels (`window_partition`), runs of a serialized order, or one sequence (``arange``).

    Args:
        qkv: ``[N, 3, H, D]`` float. Query, key and value of each row.
        order: ``[N]`` int32. Row numbers grouped by window, each exactly once.
        offsets: ``[W + 1]`` int32, non-decreasing from 0 to N: window w is rows ``order[offsets[w] : offsets[w+1]]``.

    Returns:
        ``[N, H, D]``, dtype of `qkv`, in the row order of `qkv`.

    Raises:
        ValueError, TypeError: if a shape or dtype is not the one above; on a CPU also if `order` is no permutation or
            `offsets` falls.

    Source:
        Liu et al. 2021, "Swin Transformer", sec. 3.2, on voxels: Xiang et al. 2024 (TRELLIS), sec. 3.1.
    """
    expect(
        qkv=(qkv, "N 3 H D", FLOATS),
        order=(order, "N", torch.int32),
        offsets=(offsets, "W+1", torch.int32),
    )
    _expect_not_empty(qkv.shape[3], offsets)
    out, _ = _windowed(qkv, order, offsets)
    return out


def window_partition(coords: Tensor, window_size: int, shift: int) -> tuple[Tensor, Tensor]:
    """Group voxels by the cubic window they lie in.

        window of a voxel = (batch, (x + shift) // window_size, (y + shift) // ..., (z + shift) // ...)

    Windows come in the order of batch, then x, y, z of the window; only those that hold a voxel count.

    Args:
        coords: ``[N, 4]`` int32 (batch, x, y, z), none negative, rows in any order.
        window_size: edge of a window in voxels, >= 1.
        shift: offset of the windows in voxels, >= 0; the models use half a window in every second block.

    Returns:
        ``order [N]`` int32: row numbers grouped by window, ascending inside each; and
        ``offsets [W + 1]`` int32: window w is rows ``order[offsets[w] : offsets[w + 1]]``.

    Raises:
        ValueError, TypeError: if a shape, dtype or value is not one of the above.

    Source:
        Official TRELLIS, windowed sparse attention (partition of `coords`), commit 6b0d647.
    """
    expect(coords=(coords, "N 4", torch.int32))
    if window_size < 1:
        raise ValueError(f"window_size must be at least 1; got {window_size}")
    if shift < 0:
        raise ValueError(f"shift must not be negative; got {shift}")
    order, offsets = _partition(coords, window_size, shift)
    return order, offsets


def _expect_not_empty(head_width: int, offsets: Tensor) -> None:
    if head_width == 0:
        raise ValueError("the head width D must be at least 1; got 0")
    if offsets.shape[0] == 0:
        raise ValueError("offsets must hold at least the leading 0; got []")


_varlen = Operator(
    "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor query_offsets, Tensor key_offsets)"
    " -> (Tensor out, Tensor logsumexp)",
    reference=reference.varlen_attention,
    kernels=_KERNELS,
)
_varlen_backward = Operator(
    "varlen_attention_backward(Tensor out_gradient, Tensor query, Tensor key, Tensor value, Tensor out,"
    " Tensor logsumexp, Tensor query_offsets, Tensor key_offsets) -> (Tensor, Tensor, Tensor)",
    reference=reference.varlen_attention_backward,
    kernels=_KERNELS,
)
_windowed = Operator(
    "windowed_attention(Tensor qkv, Tensor order, Tensor offsets) -> (Tensor out, Tensor logsumexp)",
    reference=reference.windowed_attention,
    kernels=_KERNELS,
)
_windowed_backward = Operator(
    "windowed_attention_backward(Tensor out_gradient, Tensor qkv, Tensor out, Tensor logsumexp, Tensor order,"
    " Tensor offsets) -> Tensor",
    reference=reference.windowed_attention_backward,
    kernels=_KERNELS,
)
_partition = Operator(
    "window_partition(Tensor coords, int window_size, int shift) -> (Tensor order, Tensor offsets)",
    reference=reference.window_partition,
    kernels=_KERNELS,
)


@_varlen.fake
def _(query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor) -> tuple[Tensor, Tensor]:
    logsumexp = query.new_empty(query.shape[:2], dtype=compute_dtype(query.dtype))
    return query.new_empty(query.shape), logsumexp


@_varlen_backward.fake
def _(out_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@_windowed.fake
def _(qkv: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    rows, _, heads, width = qkv.shape
    return qkv.new_empty(rows, heads, width), qkv.new_empty(rows, heads, dtype=compute_dtype(qkv.dtype))


@_windowed_backward.fake
def _(out_gradient: Tensor, qkv: Tensor, *others: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


@_partition.fake
def _(coords: Tensor, window_size: int, shift: int) -> tuple[Tensor, Tensor]:
    boundaries = torch.library.get_ctx().new_dynamic_size()
    return coords.new_empty(coords.shape[0]), coords.new_empty(boundaries)


def _setup_varlen(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _differentiate_varlen(ctx: Any, out_gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if out_gradient is None:
        return (None,) * 5
    query, key, value, query_offsets, key_offsets, out, logsumexp = ctx.saved_tensors
    gradients = _varlen_backward(out_gradient, query, key, value, out, logsumexp, query_offsets, key_offsets)
    return (*gradients, None, None)


def _setup_windowed(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _differentiate_windowed(ctx: Any, out_gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if out_gradient is None:
        return None, None, None
    qkv, order, offsets, out, logsumexp = ctx.saved_tensors
    return _windowed_backward(out_gradient, qkv, out, logsumexp, order, offsets), None, None


def _setup_nothing(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    pass


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("the second derivative of attention is not implemented")


_varlen.autograd(_differentiate_varlen, _setup_varlen)
_windowed.autograd(_differentiate_windowed, _setup_windowed)
_varlen_backward.autograd(_refuse, _setup_nothing)
_windowed_backward.autograd(_refuse, _setup_nothing)
