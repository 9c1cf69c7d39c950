"""CPU launch. The kernels are csrc/cpu/ssim*."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trellis_kernels import _cpu
from trellis_kernels.precision import compute_dtype, widened


def ssim_map(images: Tensor, targets: Tensor) -> Tensor:
    out = images.new_empty(images.shape, dtype=compute_dtype(images.dtype))
    _launch(_cpu.ssim_map, images, targets, out)
    return out.to(images.dtype)


def ssim_map_gradient(out_gradient: Tensor, images: Tensor, targets: Tensor) -> Tensor:
    out = images.new_empty(images.shape, dtype=compute_dtype(images.dtype))
    _launch(_cpu.ssim_map_gradient, out_gradient, images, targets, out)
    return out.to(images.dtype)


def _launch(kernel: Callable[..., None], *tensors: Tensor) -> None:
    # The output comes last; it is contiguous and of the dtype of the arithmetic already, so it passes unchanged.
    kernel(*widened(*tensors), torch.get_num_threads())
