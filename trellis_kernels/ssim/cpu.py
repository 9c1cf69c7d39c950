"""CPU launch. The kernels are csrc/cpu/ssim*."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels import _cpu
from trellis_kernels.precision import compute_dtype, widened


def ssim_map(images: Tensor, targets: Tensor) -> Tensor:
    out = images.new_empty(images.shape, dtype=compute_dtype(images.dtype))
    _cpu.ssim_map(*widened(images, targets), out, torch.get_num_threads())
    return out.to(images.dtype)


def ssim_map_gradient(out_gradient: Tensor, images: Tensor, targets: Tensor) -> Tensor:
    out = images.new_empty(images.shape, dtype=compute_dtype(images.dtype))
    _cpu.ssim_map_gradient(*widened(out_gradient, images, targets), out, torch.get_num_threads())
    return out.to(images.dtype)
