"""Structural similarity beside plain torch: a loss step of the Gaussian decoder, 4 pictures of 512^2.

pytest benchmarks/bench_ssim.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.device import device, measure
from trellis_kernels import ssim_map, use_reference
from trellis_kernels.ssim.reference import C1, C2, window

Loss = Callable[[Tensor, Tensor], Tensor]


def ours(images: Tensor, targets: Tensor) -> Tensor:
    return ssim_map(images, targets)


def reference(images: Tensor, targets: Tensor) -> Tensor:
    with use_reference():
        return ssim_map(images, targets)


def grouped_conv(images: Tensor, targets: Tensor) -> Tensor:
    """What training code has: five depthwise convolutions with the 11 x 11 window, derivatives by autograd."""
    channels = images.shape[1]
    weights = window(images.dtype, images.device)
    kernel = (weights[:, None] * weights).expand(channels, 1, 11, 11)

    def blurred(image: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(image, kernel, padding=5, groups=channels)

    x, y = blurred(images), blurred(targets)
    xx, yy, xy = (blurred(a * b) for a, b in ((images, images), (targets, targets), (images, targets)))
    return (2 * x * y + C1) * (2 * (xy - x * y) + C2) / ((x * x + y * y + C1) * (xx - x * x + yy - y * y + C2))


@pytest.mark.parametrize("implementation", [ours, reference, grouped_conv], ids=lambda f: f.__name__)
@pytest.mark.parametrize("step", ["forward", "forward and backward"])
def test_ssim(benchmark, implementation: Loss, step: str) -> None:
    with device():
        images, targets = torch.rand(4, 3, 512, 512), torch.rand(4, 3, 512, 512)
    backward = step != "forward"
    images.requires_grad_(backward)

    def run() -> Tensor:
        if not backward:
            return implementation(images, targets)
        return torch.autograd.grad(implementation(images, targets).mean(), images)[0]

    expected = ours(images, targets)
    torch.testing.assert_close(implementation(images, targets), expected, rtol=0, atol=1e-4)
    benchmark.group = f"ssim {step}, 4 x 3 x 512^2, {torch.get_num_threads()} threads"
    pixels = images.numel()  # two filters of 11 products over 5 moments; and 3 partial derivatives
    measure(benchmark, run, rounds=5, gflop=pixels * 22e-9 * (13 if backward else 5))
