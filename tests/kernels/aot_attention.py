"""The launches of attention that are compiled ahead of time: every dtype and the models' head widths."""

import torch

from trellis_kernels import cuda_device
from trellis_kernels.operator import OPERATORS

EVERYWHERE = [(torch.float16, 64), (torch.bfloat16, 80)]  # the other two pairs take the same registers
ON_AN_H100 = [(torch.float32, 64)]


def launches() -> None:
    hopper = cuda_device.properties(torch.empty(0)).capability == (9, 0)
    for dtype, width in [*EVERYWHERE, *(ON_AN_H100 if hopper else [])]:
        attention(dtype, width)


def attention(dtype: torch.dtype, width: int) -> None:
    rows, heads = 64, 2
    offsets, order = torch.tensor([0, rows], dtype=torch.int32), torch.arange(rows, dtype=torch.int32)
    qkv, out = torch.empty(rows, 3, heads, width, dtype=dtype), torch.empty(rows, heads, width, dtype=dtype)
    logsumexp, inputs = torch.empty(rows, heads), qkv.unbind(1)
    _operator("varlen_attention", *inputs, offsets, offsets)
    _operator("varlen_attention_backward", out, *inputs, out, logsumexp, offsets, offsets)
    _operator("windowed_attention", qkv, order, offsets)
    _operator("windowed_attention_backward", out, qkv, out, logsumexp, order, offsets)


def _operator(name: str, *arguments: torch.Tensor) -> None:
    OPERATORS[f"trellis_kernels::{name}"](*arguments)
