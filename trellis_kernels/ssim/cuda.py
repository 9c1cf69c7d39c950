"""CUDA launch. The kernels are csrc/cuda/ssim.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis_kernels import cuda_device


def ssim_map(images: Tensor, targets: Tensor) -> Tensor:
    return _launch("ssim_map", images, targets)


def ssim_map_gradient(out_gradient: Tensor, images: Tensor, targets: Tensor) -> Tensor:
    return _launch("ssim_map_gradient", out_gradient, images, targets)


def _launch(name: str, *tensors: Tensor) -> Tensor:
    dtype = tensors[0].dtype
    if dtype == torch.float64:
        raise TypeError("ssim_map on a GPU must be torch.float32, torch.float16 or torch.bfloat16; got torch.float64")
    inputs = [tensor.float().contiguous() for tensor in tensors]
    out = torch.empty_like(inputs[0])
    native = cuda_device.native(out)
    with cuda_device.guard(out):
        getattr(native, name)(*inputs, out, cuda_device.stream(out))
    return out.to(dtype)
