"""The launches of attention that are compiled ahead of time: every dtype, the models' head widths and an odd one."""

import torch

from trellis_kernels.operator import OPERATORS

WIDTHS = (64, 80, 20)


def launches() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for width in WIDTHS if dtype == torch.float16 else WIDTHS[:2]:
            _attention(dtype, width)


def _attention(dtype: torch.dtype, width: int) -> None:
    rows, heads = 64, 2
    offsets, order = torch.tensor([0, rows], dtype=torch.int32), torch.arange(rows, dtype=torch.int32)
    qkv = torch.empty(rows, 3, heads, width, dtype=dtype)
    query, key, value = qkv.unbind(1)
    OPERATORS["trellis_kernels::varlen_attention"](query, key, value, offsets, offsets)
    OPERATORS["trellis_kernels::windowed_attention"](qkv, order, offsets)
