"""The launches of attention that are compiled ahead of time: every dtype and the models' head widths."""

import torch

from trellis_kernels.operator import OPERATORS

SHAPES = [
    (torch.float16, 64),
    (torch.float16, 80),
    (torch.bfloat16, 64),
    (torch.bfloat16, 80),
    (torch.float32, 64),
]


def launches() -> None:
    for dtype, width in SHAPES:
        _attention(dtype, width)


def _attention(dtype: torch.dtype, width: int) -> None:
    rows, heads = 64, 2
    offsets, order = torch.tensor([0, rows], dtype=torch.int32), torch.arange(rows, dtype=torch.int32)
    qkv = torch.empty(rows, 3, heads, width, dtype=dtype)
    query, key, value = qkv.unbind(1)
    OPERATORS["trellis_kernels::varlen_attention"](query, key, value, offsets, offsets)
    OPERATORS["trellis_kernels::windowed_attention"](qkv, order, offsets)
