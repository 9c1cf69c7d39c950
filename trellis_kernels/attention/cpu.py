"""CPU launch. The kernels are csrc/cpu/attention*."""

from __future__ import annotations

from collections.abc import Callable
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
    _launch(_cpu.varlen_attention, query, key, value, query_offsets, key_offsets, out, logsumexp)
    return out.to(query.dtype), logsumexp


def varlen_attention_backward(out_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *saved: Tensor) -> Any:
    dtype = compute_dtype(query.dtype)
    gradients = [tensor.new_empty(tensor.shape, dtype=dtype) for tensor in (query, key, value)]
    _launch(_cpu.varlen_attention_backward, out_gradient, query, key, value, *saved, *gradients)
    return tuple(gradient.to(query.dtype) for gradient in gradients)


def windowed_attention(qkv: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    rows, _, heads, width = qkv.shape
    dtype = compute_dtype(qkv.dtype)
    out, logsumexp = qkv.new_empty(rows, heads, width, dtype=dtype), qkv.new_empty(rows, heads, dtype=dtype)
    _launch(_cpu.windowed_attention, qkv, order, offsets, out, logsumexp)
    return out.to(qkv.dtype), logsumexp


def windowed_attention_backward(out_gradient: Tensor, qkv: Tensor, *saved: Tensor) -> Tensor:
    gradient = qkv.new_empty(qkv.shape, dtype=compute_dtype(qkv.dtype))
    _launch(_cpu.windowed_attention_backward, out_gradient, qkv, *saved, gradient)
    return gradient.to(qkv.dtype)


def window_partition(coords: Tensor, window_size: int, shift: int) -> tuple[Tensor, Tensor]:
    rows = coords.shape[0]
    order, offsets = coords.new_empty(rows), coords.new_empty(rows + 1)
    windows = _cpu.window_partition(coords.contiguous(), window_size, shift, order, offsets)
    return order, offsets[: windows + 1].clone()


def _launch(kernel: Callable[..., None], *tensors: Tensor) -> None:
    # Outputs come last; they are contiguous and of the dtype of the arithmetic already, so they pass unchanged.
    kernel(*widened(*tensors), torch.get_num_threads())
