"""From samples to pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d


def downsample(samples: Tensor, factor: int) -> Tensor:
    """Average square pictures with a triangle two pixels wide, cut off at the border: the official supersampling.

    The numbers of ``interpolate(mode="bilinear", antialias=True)``, whose derivative on a GPU adds in no fixed order
    and is refused under `torch.use_deterministic_algorithms`. That of a convolution is not.

    Args:
        samples: ``[V, factor R, factor R, C]`` float.
        factor: samples per side of a pixel, at least 1.

    Returns:
        ``[V, C, R, R]``.
    """
    pictures = samples.permute(0, 3, 1, 2)
    if factor == 1:
        return pictures
    channels, pixels = samples.shape[3], samples.shape[1] // factor
    if samples.numel() == 0:
        return samples.new_empty(len(samples), channels, pixels, pixels)
    reach = factor // 2  # into the pixels before and after
    places = torch.arange(-reach, factor + reach, dtype=torch.float64) + 0.5
    triangle = (1 - (places - factor / 2).abs() / factor).to(samples)
    total = samples.new_full((pixels,), factor)
    total[0] -= triangle[:reach].sum()
    total[-1] -= triangle[-reach:].sum()
    for shape, stride, padding in (((-1, 1), (factor, 1), (reach, 0)), ((1, -1), (1, factor), (0, reach))):
        weight = triangle.view(1, 1, *shape).expand(channels, 1, -1, -1)
        pictures = conv2d(pictures, weight, stride=stride, padding=padding, groups=channels) / total.view(shape)
    return pictures
