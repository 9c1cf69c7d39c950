"""The launches of normalization that are compiled ahead of time: the models' widths, and every dtype at one of them."""

import torch
from torch import Tensor

from trellis_kernels.operator import OPERATORS

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
OFFSETS = torch.tensor([0, 30, 64], dtype=torch.int32)


def launches() -> None:
    flow_block(HALF, 1024)
    for dtype in (BRAIN, SINGLE):
        norm(dtype, 1024, 2, OFFSETS)
        heads(dtype, 16, 64)
    heads(HALF, 16, 64)
    heads(HALF, 16, 80)
    for channels in (128, 1280, 2048):  # ends of the latent flow, text XL, its first output block
        norm(HALF, channels, 1, None)


def flow_block(dtype: torch.dtype, channels: int) -> None:
    """What a block with guidance runs: two sequences, modulation as parts of one tensor."""
    x, update = torch.empty(64, channels, dtype=dtype), torch.empty(64, channels, dtype=dtype)
    shift, scale, gate = torch.empty(2, 3 * channels, dtype=dtype).chunk(3, dim=1)
    weight, bias, statistic = torch.empty(1, channels), torch.empty(1, channels), torch.empty(64)
    _operator("layer_norm", x, scale, shift, OFFSETS, 1e-6, 1.0)
    _operator("residual_layer_norm", x, update, gate, weight, bias, OFFSETS, 1e-6, 0.0)
    _operator("residual_layer_norm", x, update, None, scale, shift, OFFSETS, 1e-6, 1.0)
    _operator("gated_residual", x, update, gate, OFFSETS)
    _operator("layer_norm_backward", update, x, scale, OFFSETS, statistic, statistic, 1.0)
    _operator("layer_norm_backward", update, x, weight, OFFSETS, statistic, statistic, 0.0)
    _operator("gated_residual_backward", update, x, gate, OFFSETS)


def norm(dtype: torch.dtype, channels: int, own: int, offsets: Tensor | None) -> None:
    x, values, statistic = torch.empty(64, channels, dtype=dtype), torch.empty(own, channels), torch.empty(64)
    _operator("layer_norm", x, values, values, offsets, 1e-6, 0.0)
    _operator("layer_norm_backward", x, x, values, offsets, statistic, statistic, 0.0)


def heads(dtype: torch.dtype, count: int, width: int) -> None:
    qkv, gamma = torch.empty(64, 3, count, width, dtype=dtype), torch.empty(count, width)
    _operator("head_rms_norm", qkv, gamma, gamma, 2)
    _operator("head_rms_norm_backward", qkv[:, :2].contiguous(), qkv, gamma, gamma)


def _operator(name: str, *arguments: Tensor | float | None) -> None:
    OPERATORS[f"trellis_kernels::{name}"](*arguments)
