"""What the Gaussian rasteriser makes of input that cannot be drawn, and of pictures of extreme size."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.gaussian_gradients import assert_gradients_agree, gradients, leaves
from tests.support.gaussians import Scene, facing, random_scene
from trellis_kernels import rasterize_gaussians, use_reference


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


@pytest.mark.parametrize("count", [0, 30])
@pytest.mark.parametrize(("views", "width", "height"), [(1, 1, 1), (0, 5, 4), (2, 1, 40)])
def test_small_pictures_have_gradients(count: int, views: int, width: int, height: int) -> None:
    assert_gradients_agree(random_scene(count, views, size=0.1).to(torch.float64), width, height)


def test_a_camera_that_is_not_finite_sees_background() -> None:
    scene = random_scene(10, size=0.1)
    scene = scene._replace(extrinsics=torch.full((1, 4, 4), math.nan))
    result = rasterize_gaussians(*scene.arguments(5, 4))  # type: ignore[arg-type]
    assert torch.equal(result.colors, scene.background[:, None, None].expand(1, 4, 5, 3))
    assert all((tensor == 0).all() for tensor in gradients(scene, 5, 4)[:7])


def test_a_picture_of_8192_pixels_squared() -> None:
    """Without channels it takes 1.3 GB."""
    scene = facing([[0, 0, 2.0], [0.49999 * 2, 0.49999 * 2, 2.0]], 2e-4, [1.0, 1.0])
    scene = scene._replace(colors=torch.zeros(2, 0), background=torch.zeros(1, 0))
    images = rasterize_gaussians(*scene.arguments(8192, 8192))  # type: ignore[arg-type]
    seen = images.alphas[0].nonzero()
    assert len(seen) > 10
    assert seen.amax(0).tolist() == [8191, 8191]
    middle = seen[(seen < 5000).all(-1)]
    assert middle.double().mean(0).tolist() == [4095.5, 4095.5]


def test_gradients_of_a_very_long_picture() -> None:
    scene = leaves(facing([[0, 0, 2.0], [0.9999, 0, 2.0]], 0.1, [1.0, 1.0]))
    rasterize_gaussians(*scene.arguments(16384, 16)).colors.sum().backward()  # type: ignore[arg-type]
    assert scene.colors.grad is not None
    assert (scene.colors.grad.sum(-1) > 0).all()


@pytest.mark.parametrize("large", [1e18, 1e30])
def test_what_overflows_is_left_out(large: float) -> None:
    """Float32: squares of these are not finite."""
    scene = random_scene(20, size=0.1)
    means, scales, quats = scene.means.clone(), scene.scales.clone(), scene.quats.clone()
    means[0] = large
    scales[7] = quats[14] = 1e8 * large
    assert_left_out(scene._replace(means=means, scales=scales, quats=quats))
    with use_reference():
        assert_left_out(scene._replace(means=means, scales=scales, quats=quats))
