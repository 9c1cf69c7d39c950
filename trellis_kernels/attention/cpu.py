"""CPU launch. The kernels are csrc/cpu/attention*."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels import _cpu
from trellis_kernels.precision import compute_dtype, widened


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(query.dtype)
    out = query.new_empty(query.shape, dtype=dtype)
    logsumexp = query.new_empty(query.shape[:2], dtype=dtype)
    _cpu.varlen_attention(
        *_wide(query, key, value, query_offsets, key_offsets), out, logsumexp, torch.get_num_threads()
    )
    return out.to(query.dtype), logsumexp


def varlen_attention_backward(
    out_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(query.dtype)
    gradients = [tensor.new_empty(tensor.shape, dtype=dtype) for tensor in (query, key, value)]
    _cpu.varlen_attention_backward(
        *_wide(out_gradient, query, key, value, out, logsumexp, query_offsets, key_offsets),
        *gradients,
        torch.get_num_threads(),
    )
    query_gradient, key_gradient, value_gradient = (gradient.to(query.dtype) for gradient in gradients)
    return query_gradient, key_gradient, value_gradient


def windowed_attention(qkv: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    rows, _, heads, width = qkv.shape
    dtype = compute_dtype(qkv.dtype)
    out, logsumexp = qkv.new_empty(rows, heads, width, dtype=dtype), qkv.new_empty(rows, heads, dtype=dtype)
    _cpu.windowed_attention(*_wide(qkv, order, offsets), out, logsumexp, torch.get_num_threads())
    return out.to(qkv.dtype), logsumexp


def windowed_attention_backward(
    out_gradient: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, order: Tensor, offsets: Tensor
) -> Tensor:
    gradient = qkv.new_empty(qkv.shape, dtype=compute_dtype(qkv.dtype))
    _cpu.windowed_attention_backward(
        *_wide(out_gradient, qkv, out, logsumexp, order, offsets), gradient, torch.get_num_threads()
    )
    return gradient.to(qkv.dtype)


def window_partition(coords: Tensor, window_size: int, shift: int) -> tuple[Tensor, Tensor]:
    rows = coords.shape[0]
    order, offsets = coords.new_empty(rows), coords.new_empty(rows + 1)
    windows = _cpu.window_partition(coords.contiguous(), window_size, shift, order, offsets)
    return order, offsets[: windows + 1].clone()


def _wide(*tensors: Tensor) -> tuple[Any, ...]:
    return widened(*tensors)
