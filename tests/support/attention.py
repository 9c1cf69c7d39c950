"""Packed sequences for tests of attention, and an independent truth."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as dense_attention

from trellis_kernels import use_reference


def either(reference: bool) -> AbstractContextManager[object]:
    return use_reference() if reference else nullcontext()


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed(rows: int, width: int, dtype: torch.dtype, heads: int = 2) -> Tensor:
    return torch.randn(rows, heads, width).to(dtype).requires_grad_()


def by_sequence(query: Tensor, key: Tensor, value: Tensor, queries: list[int], keys: list[int]) -> Tensor:
    """The independent truth: torch's attention, in float64, one sequence after the other."""
    sequences = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
    out = [dense_attention(*(x.double().transpose(0, 1) for x in sequence)).transpose(0, 1) for sequence in sequences]
    return torch.cat(out)


def by_window(qkv: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    out = torch.empty_like(qkv[:, 0], dtype=torch.float64)
    for rows in order.long().split(offsets.diff().tolist()):
        out[rows] = by_sequence(*qkv[rows].unbind(1), [len(rows)], [len(rows)])
    return out
