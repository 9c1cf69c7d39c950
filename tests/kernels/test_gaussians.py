from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.golden import golden
from trellis_kernels import rasterize_gaussians, spherical_harmonics, use_reference
from trellis_kernels.gaussians import RasterizedGaussians, reference


def oracle() -> tuple[dict[str, Tensor], tuple[object, ...]]:
    item = golden("render_gaussian_oracle").tensors
    colors = spherical_harmonics(item["in.features_dc"][:, None], torch.zeros(400, 3))
    gaussians = (item["in.xyz"], item["in.quat_wxyz"], item["in.scale"], item["in.opacity"][:, 0], colors)
    return item, (*gaussians, item["in.extrinsics"][None], item["in.intrinsics"][None], 64, 64, item["in.bg"], 0.1)


def assert_images_agree(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal but for the few pixels where rounding moves a Gaussian across a threshold; ``[..., H, W]`` or with C."""
    assert actual.shape == expected.shape
    assert torch.equal(actual.isfinite(), expected.isfinite())
    different = ((actual - expected).abs() > tolerance).sum().item()
    assert different <= max(2, actual.numel() // 1000), f"{different} of {actual.numel()} values differ"


def test_reference_passes_the_oracle() -> None:
    item, arguments = oracle()
    with use_reference():
        result = rasterize_gaussians(*arguments)  # type: ignore[arg-type]
    assert_images_agree(result.colors[0], item["out.color"].permute(1, 2, 0))
    assert_images_agree(result.alphas[0], 1 - item["out.transmittance"])


def test_radii_are_those_of_the_oracle() -> None:
    item, arguments = oracle()
    means, quats, scales, opacities, _, extrinsics, intrinsics = arguments[:7]  # type: ignore[misc]
    splats = reference.project(means, quats, scales, opacities, extrinsics[0], intrinsics[0], 64, 64, 0.1)
    radii = torch.zeros(400).index_put((splats.indices,), splats.radii)
    assert torch.equal(radii, item["out.radii"])


def test_result_has_names() -> None:
    _, arguments = oracle()
    with use_reference():
        result = rasterize_gaussians(*arguments)  # type: ignore[arg-type]
    assert isinstance(result, RasterizedGaussians)
    assert result.depths.shape == (1, 64, 64)


def test_spherical_harmonics_of_degree_0_do_not_look_at_the_direction() -> None:
    coefficients = torch.tensor([[[1.0, 0.0, -10.0]]])
    expected = torch.tensor([[0.5 + 0.5 / math.sqrt(math.pi), 0.5, 0.0]])
    torch.testing.assert_close(spherical_harmonics(coefficients, torch.zeros(1, 3)), expected)


def test_spherical_harmonics_are_orthonormal() -> None:
    """An independent truth: the integral of the product of two basis functions over the sphere is 1 or 0."""
    from trellis_kernels.gaussians.harmonics import _basis

    nodes, weights = (torch.from_numpy(array) for array in __import__("numpy").polynomial.legendre.leggauss(8))
    phi = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    z, phi = (grid.flatten() for grid in torch.meshgrid(nodes, phi, indexing="ij"))
    radius = (1 - z * z).sqrt()
    basis = _basis(torch.stack([radius * phi.cos(), radius * phi.sin(), z], -1), 16)
    products = basis.T @ (basis * (weights.repeat_interleave(16) * 2 * math.pi / 16)[:, None])
    torch.testing.assert_close(products, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [1, 4, 9, 16])
def test_gradients_of_spherical_harmonics_are_the_numerical_ones(count: int) -> None:
    coefficients = (0.1 * torch.randn(3, count, 3, dtype=torch.float64)).requires_grad_()
    directions = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(spherical_harmonics, (coefficients, directions))


def test_spherical_harmonics_name_a_wrong_number_of_coefficients() -> None:
    with pytest.raises(ValueError, match=r"coefficients must be \[G, K, 3\] with K = 1, 4, 9 or 16; got \[2, 5, 3\]"):
        spherical_harmonics(torch.zeros(2, 5, 3), torch.zeros(2, 3))
