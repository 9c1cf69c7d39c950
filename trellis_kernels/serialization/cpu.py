"""CPU launch. The kernels are csrc/cpu/serialization.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels import _cpu


def morton_codes(coords: Tensor, transposed: bool, bits: int) -> Tensor:
    return _codes(coords, False, transposed, bits)


def hilbert_codes(coords: Tensor, transposed: bool, bits: int) -> Tensor:
    return _codes(coords, True, transposed, bits)


def morton_order(coords: Tensor, transposed: bool, bits: int) -> Tensor:
    return _order(coords, False, transposed, bits)


def hilbert_order(coords: Tensor, transposed: bool, bits: int) -> Tensor:
    return _order(coords, True, transposed, bits)


def _codes(coords: Tensor, hilbert: bool, transposed: bool, bits: int) -> Tensor:
    codes = coords.new_empty(coords.shape[0], dtype=torch.int64)
    _cpu.curve_codes(coords.contiguous(), hilbert, transposed, bits, codes, torch.get_num_threads())
    return codes


def _order(coords: Tensor, hilbert: bool, transposed: bool, bits: int) -> Tensor:
    order = coords.new_empty(coords.shape[0], dtype=torch.int64)
    _cpu.curve_order(coords.contiguous(), hilbert, transposed, bits, order, torch.get_num_threads())
    return order
