"""ssim_map: reference, closed forms, the sum over windows, golden value, derivatives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.backends import CUDA_BACKENDS
from tests.support.golden import golden
from trellis_kernels import ssim_map, use_reference
from trellis_kernels.ssim.reference import window

OPS = torch.ops.trellis_kernels
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = [(0, 3, 8, 8), (2, 0, 4, 4), (1, 1, 0, 5), (1, 1, 1, 1), (2, 3, 5, 4), (1, 2, 33, 47), (3, 1, 70, 16)]


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    images = torch.rand(*shape)
    return images.to(dtype), (images + 0.2 * torch.randn(*shape)).to(dtype)


def assert_agrees(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    images, targets = pair(*shape, dtype=dtype)
    gradient = torch.randn(shape).to(dtype)
    calls = [lambda: ssim_map(images, targets), lambda: OPS.ssim_map_gradient(gradient, images, targets)]
    for call in calls:
        actual = call()
        with use_reference():
            expected = call()
        assert actual.dtype == dtype
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype] * max(1.0, scale))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_agree_with_references(shape: tuple[int, ...], dtype: torch.dtype, instruction_set: str) -> None:
    assert_agrees(shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    assert_agrees((2, 3, 40, 21), dtype)


@CUDA_BACKENDS
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 1, 0, 5), (1, 1, 1, 1), (2, 1, 5, 4), (1, 2, 17, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_kernels_agree_with_references(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_agrees(shape, dtype)


@CUDA_BACKENDS
def test_equal_images_are_alike_and_constants_have_a_closed_form(backend: str) -> None:
    images, _ = pair(1, 2, 20, 23)
    torch.testing.assert_close(ssim_map(images, images), torch.ones(1, 2, 20, 23))
    a, b = torch.full((1, 1, 25, 25), 0.3), torch.full((1, 1, 25, 25), 0.7)
    expected = (2 * 0.3 * 0.7 + 1e-4) / (0.3**2 + 0.7**2 + 1e-4)  # inside: nothing varies, only the means differ
    middle = ssim_map(a, b)[0, 0, 5:-5, 5:-5]
    torch.testing.assert_close(middle, torch.full((15, 15), expected), rtol=2e-3, atol=0)


def test_each_pixel_is_the_formula_over_its_window() -> None:
    """One pixel near a corner, by a double loop over the 11 x 11 window."""
    images, targets = pair(1, 1, 9, 12, dtype=torch.float64)
    weights = window(torch.float64, "cpu")
    moments = dict.fromkeys(("x", "y", "xx", "yy", "xy"), 0.0)
    for dy in range(-5, 6):
        for dx in range(-5, 6):
            if 0 <= 2 + dy < 9 and 0 <= 7 + dx < 12:
                w = float(weights[dy + 5] * weights[dx + 5])
                x, y = float(images[0, 0, 2 + dy, 7 + dx]), float(targets[0, 0, 2 + dy, 7 + dx])
                for name, value in (("x", x), ("y", y), ("xx", x * x), ("yy", y * y), ("xy", x * y)):
                    moments[name] += w * value
    mx, my = moments["x"], moments["y"]
    sxx, syy, sxy = moments["xx"] - mx * mx, moments["yy"] - my * my, moments["xy"] - mx * my
    expected = (2 * mx * my + 1e-4) * (2 * sxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (sxx + syy + 9e-4))
    assert float(ssim_map(images, targets)[0, 0, 2, 7]) == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 99), height=st.integers(1, 40), width=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_symmetric_bounded_and_equivariant_under_flips(seed: int, height: int, width: int) -> None:
    torch.manual_seed(seed)
    images, targets = pair(1, 1, height, width, dtype=torch.float64)
    similarity = ssim_map(images, targets)
    torch.testing.assert_close(similarity, ssim_map(targets, images))
    assert similarity.abs().max() <= 1 + 1e-12
    torch.testing.assert_close(similarity.flip(2, 3), ssim_map(images.flip(2, 3), targets.flip(2, 3)))
    torch.testing.assert_close(similarity.mT, ssim_map(images.mT, targets.mT))


def test_results_do_not_depend_on_the_thread_count() -> None:
    images, targets = pair(2, 3, 100, 90)
    gradient, threads = torch.randn(2, 3, 100, 90), torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append((ssim_map(images, targets), OPS.ssim_map_gradient(gradient, images, targets)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_derivatives_agree_with_finite_differences_and_autograd_through_the_reference() -> None:
    images, targets = (t.requires_grad_() for t in pair(2, 1, 6, 13, dtype=torch.float64))
    assert torch.autograd.gradcheck(ssim_map, (images, targets))
    gradient = torch.randn(2, 1, 6, 13, dtype=torch.float64)
    ours = torch.autograd.grad(ssim_map(images, targets), (images, targets), gradient)
    from trellis_kernels.ssim import reference

    theirs = torch.autograd.grad(reference.ssim_map(images, targets), (images, targets), gradient)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_operator_contract() -> None:
    images, targets = pair(1, 2, 7, 8)
    torch.library.opcheck(OPS.ssim_map.default, (images.requires_grad_(), targets))
    torch.library.opcheck(OPS.ssim_map_gradient.default, (torch.randn(1, 2, 7, 8), images.detach(), targets))
    compiled = torch.compile(ssim_map, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, targets), ssim_map(images, targets))
    (first,) = torch.autograd.grad(ssim_map(images, targets).sum(), images, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()


def test_arguments_that_do_not_fit_are_named() -> None:
    images, targets = pair(1, 2, 7, 8)
    with pytest.raises(ValueError, match=r"targets must be \[B, C, H, W\] with B=1, C=2, H=7, W=8; got \[1, 2, 7, 7\]"):
        ssim_map(images, targets[..., 1:])
    with pytest.raises(TypeError, match=r"targets must be torch.float32; got torch.float64"):
        ssim_map(images, targets.double())


def test_mean_agrees_with_the_official_loss() -> None:
    item = golden("train_utils")
    item.check("out.ssim", ssim_map(item["in.img1"], item["in.img2"]).mean())
