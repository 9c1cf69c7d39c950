"""Gradients of the Gaussian rasteriser, beside those of its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.gaussians import Scene
from trellis_kernels import rasterize_gaussians, use_reference
from trellis_kernels.gaussians import RasterizedGaussians

NAMES = Scene._fields


def leaves(scene: Scene) -> Scene:
    return Scene(*(tensor.detach().clone().requires_grad_() for tensor in scene))


def loss(images: RasterizedGaussians, seed: int = 0) -> Tensor:
    """A sum of all that has a gradient, with weights of any sign."""
    total = images.colors.new_zeros(())
    for image in images[:3]:
        weights = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        total = total + (image * weights.to(image)).sum()
    return total


def gradients(scene: Scene, width: int, height: int, kernel_size: float = 0.1) -> tuple[Tensor, ...]:
    scene = leaves(scene)
    loss(rasterize_gaussians(*scene.arguments(width, height, kernel_size))).backward()  # type: ignore[arg-type]
    found = [tensor.grad for tensor in scene]
    assert all(gradient is not None for gradient in found)
    return tuple(found)  # type: ignore[arg-type]


def assert_gradients_agree(scene: Scene, width: int, height: int, kernel_size: float = 0.1, rtol: float = 1e-6) -> None:
    """Relative to the largest of each tensor."""
    actual = gradients(scene, width, height, kernel_size)
    with use_reference():
        expected = gradients(scene, width, height, kernel_size)
    for name, one, other in zip(NAMES, actual, expected, strict=True):
        scale = other.abs().amax().item() if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * scale, msg=lambda text, n=name: f"{n}: {text}")
