"""What structural similarity means, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def window(dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """``[11]``: the Gaussian along one axis; it sums to 1."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = (-(offsets**2) / (2 * SIGMA**2)).exp()
    return (weights / weights.sum()).to(device=device, dtype=dtype)


def blurred(image: Tensor) -> Tensor:
    """Each channel under the window, zeros beyond the border. It is its own adjoint."""
    weights = window(image.dtype, image.device)
    planes = image.reshape(-1, 1, *image.shape[2:])
    planes = conv2d(planes, weights.view(1, 1, 1, -1), padding=(0, WINDOW // 2))
    return conv2d(planes, weights.view(1, 1, -1, 1), padding=(WINDOW // 2, 0)).view(image.shape)


def ssim_map(images: Tensor, targets: Tensor) -> Tensor:
    if images.numel() == 0:
        return torch.empty_like(images)
    x, y = _computed(images, targets)
    luminance, contrast, *_ = _terms(x, y)
    return (luminance * contrast).to(images.dtype)


def ssim_map_gradient(out_gradient: Tensor, images: Tensor, targets: Tensor) -> Tensor:
    if images.numel() == 0:
        return torch.empty_like(images)
    gradient, x, y = _computed(out_gradient, images, targets)
    luminance, contrast, mean_x, mean_y, means, spread = _terms(x, y)
    similarity = luminance * contrast
    by_xx = -similarity / spread  # derivatives by blurred(x x), blurred(x y) and the mean
    by_xy = 2 * luminance / spread
    by_mean = 2 * (mean_y * contrast - mean_x * similarity) / means - 2 * mean_x * by_xx - mean_y * by_xy
    result = blurred(gradient * by_mean) + 2 * x * blurred(gradient * by_xx) + y * blurred(gradient * by_xy)
    return result.to(images.dtype)


def _computed(*images: Tensor) -> list[Tensor]:
    half = images[0].dtype in (torch.float16, torch.bfloat16)
    return [image.float() if half else image for image in images]


def _terms(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    mean_x, mean_y = blurred(x), blurred(y)
    means = mean_x**2 + mean_y**2 + C1
    spread = blurred(x * x) - mean_x**2 + blurred(y * y) - mean_y**2 + C2
    luminance = (2 * mean_x * mean_y + C1) / means
    contrast = (2 * (blurred(x * y) - mean_x * mean_y) + C2) / spread
    return luminance, contrast, mean_x, mean_y, means, spread
