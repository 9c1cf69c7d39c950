"""spherical_harmonics: reference, scipy's harmonics, orthonormality, derivatives, directions that are none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.backends import CUDA_BACKENDS
from trellis_kernels import spherical_harmonics, use_reference
from trellis_kernels.gaussians.harmonics_reference import basis

OPS = torch.ops.trellis_kernels
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def seen(count: int, terms: int, views: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Coefficients, a few of which are clamped, and directions of lengths between 0.1 and 10."""
    lengths = 10 ** (2 * torch.rand(views, count, 1) - 1)
    directions = torch.nn.functional.normalize(torch.randn(views, count, 3), dim=-1) * lengths
    return (0.4 * torch.randn(count, terms, 3)).to(dtype), directions.to(dtype)


def assert_agrees(count: int, terms: int, views: int, dtype: torch.dtype) -> None:
    coefficients, directions = seen(count, terms, views, dtype)
    gradient = torch.randn(views, count, 3).to(dtype)
    actual = (
        spherical_harmonics(coefficients, directions),
        *OPS.spherical_harmonics_gradient(gradient, coefficients, directions),
    )
    with use_reference():
        expected = (
            spherical_harmonics(coefficients, directions),
            *OPS.spherical_harmonics_gradient(gradient, coefficients, directions),
        )
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype == dtype
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("terms", [4, 9, 16])
@pytest.mark.parametrize(("count", "views"), [(0, 1), (1, 0), (1, 1), (16, 1), (333, 3)])
def test_kernels_agree_with_references(count: int, views: int, terms: int, dtype: torch.dtype) -> None:
    assert_agrees(count, terms, views, dtype)


@CUDA_BACKENDS
@pytest.mark.parametrize("terms", [4, 9, 16])
@pytest.mark.parametrize(("count", "views"), [(0, 1), (1, 0), (1, 1), (131, 2)])
def test_gpu_kernels_agree_with_references(backend: str, count: int, views: int, terms: int) -> None:
    assert_agrees(count, terms, views, torch.float32)
    assert_agrees(count, terms, views, torch.bfloat16)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_colors_are_those_of_scipys_harmonics(degree: int) -> None:
    """The real forms of the complex harmonics with the Condon-Shortley phase, -m from the imaginary part."""
    special = pytest.importorskip("scipy.special")
    coefficients, directions = seen(50, (degree + 1) ** 2, 1, torch.float64)
    x, y, z = (directions[0] / directions[0].norm(dim=-1, keepdim=True)).numpy().T
    polar, azimuth = np.arccos(z), np.arctan2(y, x)
    terms = []
    for order in range(degree + 1):
        for m in range(-order, order + 1):
            value = special.sph_harm_y(order, abs(m), polar, azimuth)
            terms.append(value.real if m == 0 else math.sqrt(2) * (value.imag if m < 0 else value.real))
    expected = np.einsum("kg,gkc->gc", np.stack(terms), coefficients.numpy()) + 0.5
    actual = spherical_harmonics(coefficients, directions[0])
    torch.testing.assert_close(actual, torch.from_numpy(expected).clamp_min(0), rtol=0, atol=1e-12)


def test_the_basis_is_orthonormal() -> None:
    """The integral of the product of two basis functions over the sphere is 1 or 0."""
    nodes, weights = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(8))
    phi = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    z, phi = (grid.flatten() for grid in torch.meshgrid(nodes, phi, indexing="ij"))
    radius = (1 - z * z).sqrt()
    values = basis(torch.stack([radius * phi.cos(), radius * phi.sin(), z], -1), 16)
    products = values.T @ (values * (weights.repeat_interleave(16) * 2 * math.pi / 16)[:, None])
    torch.testing.assert_close(products, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)


def test_degree_0_does_not_look_at_the_direction() -> None:
    coefficients = torch.tensor([[[1.0, 0.0, -10.0]]])
    expected = torch.tensor([[0.5 + 0.5 / math.sqrt(math.pi), 0.5, 0.0]])
    torch.testing.assert_close(spherical_harmonics(coefficients, torch.zeros(1, 3)), expected)
    several = spherical_harmonics(coefficients, torch.full((2, 1, 3), math.nan))
    torch.testing.assert_close(several, expected.expand(2, 1, 3))


@pytest.mark.parametrize("terms", [1, 4, 9, 16])
@pytest.mark.parametrize("views", [None, 2])
def test_gradients_are_the_numerical_ones(terms: int, views: int | None) -> None:
    coefficients = (0.1 * torch.randn(3, terms, 3, dtype=torch.float64)).requires_grad_()
    directions = torch.randn(*([views] if views else []), 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(spherical_harmonics, (coefficients, directions))


@given(seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
@settings(max_examples=15, deadline=None)
def test_length_of_a_direction_does_not_matter(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    coefficients, directions = seen(40, 16)
    one, other = (spherical_harmonics(coefficients, factor * directions) for factor in (1.0, scale))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    directions.requires_grad_()
    (gradient,) = torch.autograd.grad(spherical_harmonics(coefficients, directions).sum(), directions)
    assert ((gradient * directions).sum(-1).abs() < 1e-4).all()


@CUDA_BACKENDS
def test_a_direction_that_is_none_sees_degree_0_only(backend: str) -> None:
    bad = torch.tensor([[0.0, 0, 0], [math.nan, 1, 0], [0, math.inf, 0], [1e-30, 0, 0], [0, 0, 1e30]])
    coefficients, _ = seen(5, 16)
    coefficients = coefficients.to(bad.device).requires_grad_()
    bad.requires_grad_()
    actual = spherical_harmonics(coefficients, bad)
    torch.testing.assert_close(actual, spherical_harmonics(coefficients[:, :1], bad))
    by_coefficients, by_bad = torch.autograd.grad(actual.sum(), [coefficients, bad])
    assert not by_bad.any()
    assert not by_coefficients[:, 1:].any()


@CUDA_BACKENDS
def test_coefficients_that_are_not_finite_stay_in_their_row(backend: str) -> None:
    coefficients, directions = seen(20, 9)
    coefficients[7, 3, 1] = math.nan
    actual = spherical_harmonics(coefficients, directions[0])
    expected = torch.zeros(20, 3, dtype=torch.bool)
    expected[7, 1] = True
    assert torch.equal(actual.isnan(), expected)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    (coefficients, directions), threads = seen(9001, 16, 2), torch.get_num_threads()
    gradient = torch.randn(2, 9001, 3)
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(OPS.spherical_harmonics_gradient(gradient, coefficients, directions))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_is_an_ordinary_torch_operator() -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in seen(20, 9, 2))
    torch.library.opcheck(OPS.spherical_harmonics.default, inputs)
    compiled = torch.compile(spherical_harmonics, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), spherical_harmonics(*inputs))


def test_second_derivative_says_that_it_is_missing() -> None:
    inputs = [tensor.requires_grad_() for tensor in seen(3, 4)]
    (gradient,) = torch.autograd.grad(spherical_harmonics(*inputs).sum(), inputs[1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative of spherical_harmonics"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("coefficients", "directions", "error", "message"),
    [
        (torch.zeros(2, 5, 3), torch.zeros(2, 3), ValueError, r"K = 1, 4, 9 or 16; got \[2, 5, 3\]"),
        (torch.zeros(2, 4, 3), torch.zeros(3, 3), ValueError, r"directions must be \[G, 3\] with G=2; got \[3, 3\]"),
        (torch.zeros(2, 4, 3), torch.zeros(1, 1, 3), ValueError, r"directions must be .* G=2; got \[1, 1, 3\]"),
        (torch.zeros(2, 4, 2), torch.zeros(2, 3), ValueError, r"coefficients must be \[G, K, 3\]"),
        (torch.zeros(2, 4, 3), torch.zeros(2, 3).double(), TypeError, "directions must be torch.float32"),
        (torch.zeros(2, 4, 3).int(), torch.zeros(2, 3), TypeError, "coefficients must be .*; got torch.int32"),
    ],
)
def test_names_the_argument_that_does_not_fit(
    coefficients: Tensor, directions: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        spherical_harmonics(coefficients, directions)
