"""What attention over packed sequences means, in plain PyTorch, one sequence after the other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from trellis_kernels.precision import compute_dtype

_LOGITS_AT_ONCE = 2**24


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(query.dtype)
    out = torch.zeros_like(query, dtype=dtype, memory_format=torch.contiguous_format)
    logsumexp = torch.full(query.shape[:2], -torch.inf, dtype=dtype, device=query.device)
    for rows, keys in _blocks(query, key, query_offsets, key_offsets):
        logits = _logits(query[rows].to(dtype), key[keys].to(dtype))
        logsumexp[rows] = logits.logsumexp(-1).T
        out[rows] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), value[keys].to(dtype))
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
    gradients = [torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (query, key, value)]
    for rows, keys in _blocks(query, key, query_offsets, key_offsets):
        q, k, v = query[rows].to(dtype), key[keys].to(dtype), value[keys].to(dtype)
        upstream = out_gradient[rows].to(dtype)
        probability = (_logits(q, k) - logsumexp[rows].T[..., None]).exp()
        # softmax' : dlogit = p (dp - sum_j p_j dp_j), and that sum is out . dout
        inner = (upstream * out[rows].to(dtype)).sum(-1).T[..., None]
        logits_gradient = probability * (torch.einsum("qhd,khd->hqk", upstream, v) - inner) * q.shape[2] ** -0.5
        gradients[0][rows] = torch.einsum("hqk,khd->qhd", logits_gradient, k)
        gradients[1][keys] += torch.einsum("hqk,qhd->khd", logits_gradient, q)
        gradients[2][keys] += torch.einsum("hqk,qhd->khd", probability, upstream)
    query_gradient, key_gradient, value_gradient = (gradient.to(query.dtype) for gradient in gradients)
    return query_gradient, key_gradient, value_gradient


def windowed_attention(qkv: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    expect_offsets("offsets", offsets, qkv.shape[0])
    expect_permutation(order)
    query, key, value = qkv[order.long()].unbind(1)
    out, logsumexp = varlen_attention(query, key, value, offsets, offsets)
    back = order.long().argsort()
    return out[back], logsumexp[back]


def windowed_attention_backward(
    out_gradient: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, order: Tensor, offsets: Tensor
) -> Tensor:
    rows = order.long()
    query, key, value = qkv[rows].unbind(1)
    gradients = varlen_attention_backward(
        out_gradient[rows], query, key, value, out[rows], logsumexp[rows], offsets, offsets
    )
    return torch.stack(gradients, 1)[rows.argsort()]


def window_partition(coords: Tensor, window_size: int, shift: int) -> tuple[Tensor, Tensor]:
    if coords.numel() and int(coords.min()) < 0:
        raise ValueError(f"coords must not be negative; got {int(coords.min())}")
    batch, *axes = coords.long().unbind(1)
    window = torch.stack([batch, *((axis + shift) // window_size for axis in axes)], 1)
    _, rank, lengths = torch.unique(window, dim=0, return_inverse=True, return_counts=True)
    order = rank.argsort(stable=True)
    return order.int(), torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()


def expect_offsets(name: str, offsets: Tensor, rows: int) -> None:
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != rows or values != sorted(values):
        raise ValueError(f"{name} must be non-decreasing from 0 to {rows}; got {values[0]} to {values[-1]}")


def expect_permutation(order: Tensor) -> None:
    rows = order.shape[0]
    if not torch.equal(order.long().sort().values, torch.arange(rows, device=order.device)):
        raise ValueError(f"order must hold each row number from 0 to {rows - 1} once")


def _logits(query: Tensor, key: Tensor) -> Tensor:
    """``[H, rows, keys]``."""
    return torch.einsum("qhd,khd->hqk", query, key) * query.shape[2] ** -0.5


def _blocks(query: Tensor, key: Tensor, query_offsets: Tensor, key_offsets: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and keys of each sequence; many rows in pieces, so that the logits stay small. Empty ones are left out."""
    expect_offsets("query_offsets", query_offsets, query.shape[0])
    expect_offsets("key_offsets", key_offsets, key.shape[0])
    sequences = zip(pairwise(query_offsets.tolist()), pairwise(key_offsets.tolist()), strict=True)
    for (begin, end), (first, last) in sequences:
        if first < last:
            step = max(1, _LOGITS_AT_ONCE // (max(query.shape[1], 1) * (last - first)))
            for row in range(begin, end, step):
                yield slice(row, min(row + step, end)), slice(first, last)
