"""Gradients of the Gaussian rasteriser on a CPU: against numbers, against autograd through the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.gaussians import Scene, facing, random_scene
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


@pytest.mark.parametrize(("count", "views"), [(0, 1), (1, 1), (150, 2)])
def test_gradients_are_those_of_the_definition(count: int, views: int) -> None:
    assert_gradients_agree(random_scene(count, views).to(torch.float64), 37, 21)


def test_colors_of_each_view_have_their_own_gradients() -> None:
    scene = random_scene(60, views=2).to(torch.float64)
    scene = scene._replace(colors=torch.stack([scene.colors, scene.colors.flip(0)]))
    assert_gradients_agree(scene, 20, 17)


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


@pytest.mark.parametrize("place", [-1.0, 0.0, 0.1, math.nan, math.inf, -math.inf])
def test_gaussians_behind_the_camera_have_no_gradient(place: float) -> None:
    scene = random_scene(20, size=0.1).to(torch.float64)
    rotation, translation = scene.extrinsics[0, :3, :3], scene.extrinsics[0, :3, 3]
    means = scene.means.clone()
    means[::7] = rotation.T @ (torch.tensor([0.0, 0.0, place]).double() - translation)
    assert_left_out(scene._replace(means=means))


@pytest.mark.parametrize(
    ("what", "bad"),
    [
        *(("quats", bad) for bad in (math.nan, math.inf, 0.0)),
        *(("scales", bad) for bad in (math.nan, math.inf, 0.0, -0.1)),
        *(("opacities", bad) for bad in (math.nan, math.inf, 0.0, -1.0)),
    ],
)
def test_what_is_left_out_has_no_gradient_and_disturbs_none(what: str, bad: float) -> None:
    scene = random_scene(20, size=0.1).to(torch.float64)
    values = getattr(scene, what).clone()
    values[::7] = bad
    assert_left_out(scene._replace(**{what: values}))


def assert_left_out(scene: Scene) -> None:
    """Every seventh Gaussian of twenty is as if it were not there."""
    kept = torch.arange(20) % 7 != 0
    actual = gradients(scene, 20, 18)
    expected = gradients(Scene(*(x[kept] for x in scene[:5]), *scene[5:]), 20, 18)
    for one, other in zip(actual[5:], expected[5:], strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(actual[:5], expected[:5], strict=True):
        torch.testing.assert_close(one[kept], other)
        assert (one[~kept] == 0).all()


def test_a_quaternion_of_any_length_turns_as_much() -> None:
    scene = random_scene(40)
    longer = scene._replace(quats=scene.quats * torch.linspace(-3, 3, 40)[:, None])
    for one, other in zip(*(rasterize_gaussians(*x.arguments(20, 20)) for x in (scene, longer)), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
