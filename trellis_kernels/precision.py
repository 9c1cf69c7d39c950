"""What half precision means on a CPU: half storage, float32 arithmetic, rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def widened(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, contiguous, half-precision ones as float32: what a CPU kernel reads."""
    return tuple(
        tensor if tensor is None else (tensor.float() if tensor.dtype in _HALF else tensor).contiguous()
        for tensor in tensors
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a CPU kernel accumulates and writes in for inputs of `dtype`."""
    return torch.float32 if dtype in _HALF else dtype
