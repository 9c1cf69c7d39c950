"""CUDA launch. The kernel is csrc/cuda/serialization.cu; sorting is torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels import cuda_device


def morton_codes(coords: Tensor, transposed: bool, bits: int) -> Tensor:
    return _codes(coords, False, transposed, bits)


def hilbert_codes(coords: Tensor, transposed: bool, bits: int) -> Tensor:
    return _codes(coords, True, transposed, bits)


def morton_order(coords: Tensor, transposed: bool, bits: int) -> Tensor:
    return torch.sort(_codes(coords, False, transposed, bits), stable=True)[1]


def hilbert_order(coords: Tensor, transposed: bool, bits: int) -> Tensor:
    return torch.sort(_codes(coords, True, transposed, bits), stable=True)[1]


def _codes(coords: Tensor, hilbert: bool, transposed: bool, bits: int) -> Tensor:
    codes = coords.new_empty(coords.shape[0], dtype=torch.int64)
    native = cuda_device.native(coords)
    with cuda_device.guard(coords):
        native.curve_codes(cuda_device.aligned(coords), hilbert, transposed, bits, codes, cuda_device.stream(coords))
    return codes
