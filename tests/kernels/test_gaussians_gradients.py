"""Gradients of the Gaussian rasteriser on a CPU: against numbers, against autograd through the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.gaussian_gradients import NAMES, assert_gradients_agree, gradients, leaves
from tests.support.gaussians import Scene, decoded_scene, facing, oracle, orbit_cameras, random_scene
from tests.support.operator_cases import CASES
from trellis_kernels import _cpu, rasterize_gaussians, use_reference
from trellis_kernels.gaussians import cpu

Backward = torch.ops.trellis_kernels.rasterize_gaussians_backward


@pytest.mark.parametrize(("count", "views"), [(0, 1), (1, 1), (150, 2)])
def test_gradients_are_those_of_the_definition(instruction_set: str, count: int, views: int) -> None:
    assert_gradients_agree(random_scene(count, views).to(torch.float64), 37, 21)


@pytest.mark.parametrize("channels", [0, 1, 3, 16, 37])
def test_any_number_of_channels_has_gradients(instruction_set: str, channels: int) -> None:
    assert_gradients_agree(random_scene(60, channels=channels).to(torch.float64), 20, 17)


def test_colors_of_each_view_have_their_own_gradients() -> None:
    scene = random_scene(60, views=2).to(torch.float64)
    scene = scene._replace(colors=torch.stack([scene.colors, scene.colors.flip(0)]))
    assert_gradients_agree(scene, 20, 17)


@pytest.mark.parametrize("size", [1e-4, 0.003, 0.3, 3.0], ids="{} wide".format)
def test_gradients_at_any_size_of_gaussians(size: float) -> None:
    """The widest are opaque soon: gradients stop where blending does, and at alphas of 0.99."""
    scene = random_scene(80, size=size).to(torch.float64)
    assert_gradients_agree(scene._replace(opacities=scene.opacities.sqrt()), 33, 20)


@pytest.mark.parametrize("kernel_size", [0.0, 0.3])
def test_gradients_at_any_kernel_size(kernel_size: float) -> None:
    assert_gradients_agree(random_scene(80, size=0.01).to(torch.float64), 30, 30, kernel_size)


def test_gradients_inside_a_cloud() -> None:
    """Gaussians behind the camera, at its plane and far off the picture, where the linearisation is moved."""
    extrinsics, intrinsics = orbit_cameras(1, radius=0.1)
    intrinsics = intrinsics * torch.tensor([[1.3], [0.8], [1.0]]) + torch.tensor([[0, 0, -0.1], [0, 0, 0.2], [0, 0, 0]])
    scene = random_scene(200, size=0.2)._replace(extrinsics=extrinsics, intrinsics=intrinsics)
    assert_gradients_agree(scene.to(torch.float64), 30, 24, rtol=1e-5)


def test_gradients_of_the_oracle_scene_agree() -> None:
    """Float32, in two tiers: tight for all but a few, which thresholds may move, bounded and unbiased for these."""
    arguments = oracle()[1]
    scene = Scene(*arguments[:7], arguments[9])  # type: ignore[arg-type]
    actual = gradients(scene, 64, 64)
    with use_reference():
        expected = gradients(scene.to(torch.float64), 64, 64)
    for name, one, other in zip(NAMES, actual, expected, strict=True):
        error = (one - other) / other.abs().amax()
        assert (error.abs() > 1e-4).sum() <= max(2, error.numel() // 1000), name
        assert error.abs().amax() < 0.05, name
        assert error.mean().abs() < 1e-4, name


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_numerical_ones(name: str) -> None:
    """Near Gaussians, wide and faint: nothing but the border of 1/255 is within reach of a small step."""
    scene = facing([[0.1, 0.05, 2.0], [-0.1, 0, 2.5], [0.05, 0.1, 3.0]], 0.4, [0.6, 0.5, 0.4]).to(torch.float64)
    turned = torch.tensor([[1.0, 0.2, -0.3, 0.1], [0.5, 0.5, 0.1, 0.0], [0.3, -0.1, 0.2, 0.9]]).double()
    scales = scene.scales * torch.tensor([1.0, 0.7, 1.4]).double()
    scene = scene._replace(quats=turned, scales=scales, background=torch.tensor([[0.3, 0.6, 0.1]]).double())

    def images(value: Tensor) -> tuple[Tensor, ...]:
        return rasterize_gaussians(*scene._replace(**{name: value}).arguments(6, 5))[:3]  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(images, getattr(scene, name).clone().requires_grad_())


@pytest.mark.parametrize("used", ["colors", "alphas", "depths"])
def test_one_picture_alone_has_gradients(used: str) -> None:
    def of(scene: Scene) -> tuple[Tensor, ...]:
        scene = leaves(scene)
        getattr(rasterize_gaussians(*scene.arguments(16, 18)), used).square().sum().backward()  # type: ignore[arg-type]
        return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in scene)

    scene = random_scene(40).to(torch.float64)
    actual = of(scene)
    with use_reference():
        torch.testing.assert_close(actual, of(scene), rtol=1e-9, atol=1e-9)


def test_median_depths_have_no_gradient() -> None:
    assert not rasterize_gaussians(*leaves(random_scene(3)).arguments(4, 4)).median_depths.requires_grad  # type: ignore[arg-type]


def test_alphas_held_at_their_largest_move_only_what_is_behind() -> None:
    scene = facing([[0, 0, 2.0], [0, 0, 3.0]], 500.0, [1.0, 0.5]).to(torch.float64)
    found = gradients(scene, 3, 3, 0.0)
    assert found[3][0] == 0
    assert found[3][1] != 0


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    scene, threads = decoded_scene(20_000, views=2), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gradients(scene, 100, 90))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("entries", [1, 100, 1000])
def test_lists_in_batches_give_the_same_gradients(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = random_scene(400, size=0.1)
    whole = gradients(scene, 50, 40)
    monkeypatch.setattr(cpu, "LIST_ENTRIES", entries)
    assert all(torch.equal(one, other) for one, other in zip(gradients(scene, 50, 40), whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision_are_rounded_once(dtype: torch.dtype) -> None:
    scene = random_scene(50).to(dtype)
    expected = gradients(scene.to(torch.float32), 20, 20)
    for one, other in zip(gradients(scene, 20, 20), expected, strict=True):
        assert one.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(one.float(), other, rtol=eps, atol=20 * eps * other.abs().amax().item())


@given(seed=st.integers(0, 999))
@settings(max_examples=10, deadline=None)
def test_gradients_know_what_cannot_be_seen(seed: int) -> None:
    """The picture does not change if world and camera move together, nor with the length of a quaternion."""
    scene = random_scene(60, views=2, seed=seed).to(torch.float64)
    means, quats, _, _, _, extrinsics, _, _ = gradients(scene, 24, 20)
    moved = torch.einsum("vij,vi->j", scene.extrinsics[:, :3, :3], extrinsics[:, :3, 3])
    torch.testing.assert_close(means.sum(0), moved, rtol=1e-8, atol=1e-8)
    assert (quats * scene.quats).sum(-1).abs().amax() < 1e-9 * quats.abs().amax()
    turned = torch.einsum("vki,vkj->ij", scene.extrinsics[:, :3, :3], extrinsics[:, :3, :3])
    assert turned.isfinite().all()


@given(seed=st.integers(0, 999))
@settings(max_examples=10, deadline=None)
def test_gradients_are_linear_in_what_is_asked(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scene = random_scene(20, size=0.1, seed=seed).to(torch.float64)
    outputs = torch.ops.trellis_kernels.rasterize_gaussians(*scene, 20, 17, 0.1)
    first, second = ([torch.randn(x.shape, generator=generator).double() for x in outputs[:3]] for _ in range(2))
    both = [2 * x - 3 * y for x, y in zip(first, second, strict=True)]
    whole, one, other = (Backward(*x, *scene, *outputs[:4], outputs[5], 0.1) for x in (both, first, second))
    for sum_of_both, x, y in zip(whole, one, other, strict=True):
        torch.testing.assert_close(sum_of_both, 2 * x - 3 * y, rtol=1e-8, atol=1e-8)


def test_is_an_ordinary_torch_operator() -> None:
    scene = leaves(random_scene(12))
    torch.library.opcheck(torch.ops.trellis_kernels.rasterize_gaussians.default, (*scene, 10, 9, 0.1, True))
    torch.library.opcheck(Backward.default, CASES["rasterize_gaussians_backward"](5))


def test_compiles_without_graph_breaks() -> None:
    scene = random_scene(20)

    def of(scene: Scene) -> Tensor:
        images = rasterize_gaussians(*scene.arguments(20, 18))  # type: ignore[arg-type]
        return images.colors.square().sum() + (images.alphas * images.depths).sum()

    one, other = leaves(scene), leaves(scene)
    torch.compile(of, fullgraph=True, backend="aot_eager")(one).backward()
    of(other).backward()
    torch.testing.assert_close([x.grad for x in one], [x.grad for x in other])


def test_says_that_there_is_no_second_derivative() -> None:
    scene = leaves(random_scene(5))
    images = rasterize_gaussians(*scene.arguments(8, 8))  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(images.colors.square().sum(), scene.means, create_graph=True)
    with pytest.raises(NotImplementedError, match="the second derivative of rasterize_gaussians is not implemented"):
        gradient.sum().backward()


def test_native_function_checks_sizes_itself() -> None:
    scene = random_scene(5)
    picture, plane = torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8)
    inputs = (*scene[:4], scene.colors[None], *scene[5:])
    outputs = [torch.zeros_like(x) for x in inputs]
    with pytest.raises(ValueError, match="gradients must have the shapes of the inputs"):
        _cpu.rasterize_gaussians_backward(
            *(picture, plane, plane), *inputs, *(picture, plane, plane), torch.zeros(4, 3), *outputs[1:], 0.1, 100, 1
        )
    with pytest.raises(ValueError, match="images and their gradients must be"):
        _cpu.rasterize_gaussians_backward(
            *(picture, plane, plane[:, 1:]), *inputs, *(picture, plane, plane), *outputs, 0.1, 100, 1
        )
