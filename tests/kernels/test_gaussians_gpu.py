"""The CUDA kernels of Gaussians: on host tensors by emulation, and on a GPU where there is one."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.backends import CUDA_BACKENDS, gpu_kernels_on_host
from tests.support.gaussians import (
    Scene,
    assert_agree,
    assert_images_agree,
    both,
    facing,
    oracle,
    orbit_cameras,
    random_scene,
)
from trellis_kernels import rasterize_gaussians
from trellis_kernels.gaussians import cuda


def drawn(scene: Scene, width: int, height: int, kernel_size: float = 0.1) -> tuple[Tensor, ...]:
    """Colors, depths, transmittances and last contributors."""
    return torch.ops.trellis_kernels.rasterize_gaussians(*scene, width, height, kernel_size)  # type: ignore[no-any-return]


@CUDA_BACKENDS
@pytest.mark.parametrize(
    ("count", "views", "width", "height"),
    [
        (0, 1, 17, 3),
        (0, 0, 17, 3),
        (1, 1, 20, 24),
        (5, 3, 1, 1),
        (200, 2, 37, 20),
        (300, 1, 48, 40),
        (90, 1, 16, 32),
    ],
)
def test_kernels_agree_with_reference(backend: str, count: int, views: int, width: int, height: int) -> None:
    assert_agree(random_scene(count, views), width, height)


@CUDA_BACKENDS
@pytest.mark.parametrize("size", [1e-4, 0.003, 0.3, 3.0], ids="{} wide".format)
def test_kernels_agree_at_any_size_of_gaussians(backend: str, size: float) -> None:
    """The widest reach all tiles, more of them in a tile than its block takes at a time."""
    assert_agree(random_scene(300, size=size), 20, 24)


@CUDA_BACKENDS
def test_kernels_agree_on_needles(backend: str) -> None:
    """The inverse covariance of a needle is badly conditioned: the bounds must not cut it."""
    scene = random_scene(60)._replace(scales=torch.tensor([1e-3, 2e-3, 0.2]).expand(60, 3))
    assert_agree(scene, 40, 33, kernel_size=0.3)


@CUDA_BACKENDS
def test_kernels_agree_inside_a_cloud(backend: str) -> None:
    """Gaussians behind the camera, at its plane and far off the picture."""
    extrinsics, intrinsics = orbit_cameras(1, radius=0.1)
    assert_agree(random_scene(300)._replace(extrinsics=extrinsics, intrinsics=intrinsics), 33, 24)


@CUDA_BACKENDS
def test_gaussians_behind_the_camera_are_not_seen(backend: str) -> None:
    scene = facing([[0, 0, -2.0], [0, 0, 0.1], [0, 0, 0.0]], 0.1, [1.0, 1.0, 1.0])
    _, depths, transmittances, last, *_ = drawn(scene, 18, 18)
    assert depths.count_nonzero() == 0
    assert (transmittances == 1).all()
    assert (last == -1).all()


@CUDA_BACKENDS
@pytest.mark.parametrize("channels", [0, 1, 4, 16, 37])
def test_any_number_of_channels(backend: str, channels: int) -> None:
    assert_agree(random_scene(40, channels=channels), 19, 16)


@CUDA_BACKENDS
@pytest.mark.parametrize("channels", [3, 20])
def test_colors_by_camera(backend: str, channels: int) -> None:
    scene = random_scene(40, views=3, channels=channels)
    assert_agree(scene._replace(colors=torch.stack([scene.colors * (view + 1) for view in range(3)])), 19, 18)


@CUDA_BACKENDS
def test_quaternions_of_any_length(backend: str) -> None:
    scene = random_scene(60)
    scene = scene._replace(quats=scene.quats * torch.logspace(-3, 3, 60)[:, None])
    assert_agree(scene, 20, 20)


@CUDA_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(backend: str, dtype: torch.dtype) -> None:
    assert_agree(random_scene(60).to(dtype), 20, 20, tolerance=torch.finfo(dtype).eps)


@CUDA_BACKENDS
def test_more_tiles_than_a_mask_has_bits(backend: str) -> None:
    """A wide picture: one Gaussian over all 72 tiles, listed by a warp, beside small ones."""
    scene = random_scene(40, size=0.01)
    scales = scene.scales.clone()
    scales[3] = 2.0
    assert_agree(scene._replace(scales=scales, opacities=scene.opacities * 0.5), 18 * 16 - 3, 4 * 16 - 5)


@CUDA_BACKENDS
def test_oracle(backend: str) -> None:
    item, arguments = oracle()
    result = rasterize_gaussians(*arguments)  # type: ignore[arg-type]
    assert_images_agree(result.colors[0], item["out.color"].permute(1, 2, 0))
    assert_images_agree(result.alphas[0], 1 - item["out.transmittance"])


@CUDA_BACKENDS
def test_one_gaussian_is_its_closed_form(backend: str) -> None:
    width, z, scale, kernel, opacity = 33, 2.0, 0.1, 0.3, 0.8
    transmittances = drawn(facing([[0, 0, z]], scale, [opacity]), width, width, kernel)[2][0]
    sharp = (width * scale / z) ** 2
    grid = torch.arange(width) - (width - 1) / 2
    expected = opacity * sharp / (sharp + kernel) * (-(grid[:, None] ** 2 + grid**2) / (2 * (sharp + kernel))).exp()
    inside = expected > 0.02  # farther out tiles may be left out
    torch.testing.assert_close(1 - transmittances[inside], expected[inside], rtol=1e-4, atol=1e-5)
    assert (transmittances[expected < 1 / 255.1] == 1).all()


@CUDA_BACKENDS
def test_equal_depths_go_by_index_and_nearer_covers_farther(backend: str) -> None:
    """300 equal Gaussians and a nearer one: the sort must be stable over blocks and batches."""
    scene = facing([[0, 0, 2.0]] * 270 + [[0, 0, 1.5]], 1.0, [0.02] * 270 + [0.75])
    for one, other in zip(*both(scene, 15, 15), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    colors = drawn(scene, 15, 15)[0][0, 7, 7]
    assert colors[-1] > 0.74
    assert (colors[:200].diff() < 0).all()  # each equal one lets less through to the next


@CUDA_BACKENDS
def test_many_gaussians_in_one_corner_of_a_tile(backend: str) -> None:
    """One warp blends more than a batch while the others have nothing to do: they must wait before the next batch."""
    scene = facing([[0.75, 0.75, 2.0 + 0.001 * i] for i in range(288)], 0.1, [0.03] * 288)
    for one, other in zip(*both(scene, 16, 16, 0.0), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@CUDA_BACKENDS
def test_blending_stops_before_the_gaussian_that_would_leave_too_little(backend: str) -> None:
    scene = facing([[0, 0, 2.0 + 0.1 * i] for i in range(4)], 3.0, [1.0, 0.98, 1.0, 1.0])
    images, _, transmittances, last, *_ = drawn(scene, 15, 15, 0.0)
    torch.testing.assert_close(transmittances[0, 7, 7], torch.tensor(0.01 * 0.02), rtol=1e-3, atol=0)
    assert images[0, 7, 7, 2:].tolist() == [0.0, 0.0]
    assert last[0, 7, 7] == 1


@CUDA_BACKENDS
@pytest.mark.parametrize("what", ["means", "quats", "scales", "opacities"])
def test_values_that_are_not_finite_are_left_out(backend: str, what: str) -> None:
    scene = random_scene(30)
    values = getattr(scene, what).clone()
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan])
    values[::7] = bad[: values[0].numel()].view(values[0].shape)
    kept = torch.arange(30) % 7 != 0
    expected = Scene(*(x[kept] for x in scene[:5]), *scene[5:])
    broken = drawn(scene._replace(**{what: values}), 20, 20)
    torch.testing.assert_close(broken[:3], drawn(expected, 20, 20)[:3], equal_nan=False)


@CUDA_BACKENDS
@pytest.mark.parametrize("entries", [1, 40, 300])
@pytest.mark.parametrize("channels", [3, 20])
def test_lists_in_parts_give_the_same_picture(
    backend: str, entries: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles stop, and go on, where a part of the lists ends; cameras follow one another in a part."""
    scene = random_scene(30, views=2, channels=channels, size=0.2)
    whole = drawn(scene, 20, 18)
    if backend != "cpu":
        monkeypatch.setattr(cuda, "LIST_ENTRIES", entries)
    for one, other in zip(drawn(scene, 20, 18), whole, strict=True):
        assert torch.equal(one, other)


@CUDA_BACKENDS
def test_groups_of_cameras_give_the_same_pictures(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = random_scene(50, views=3)
    together = drawn(scene, 20, 18)
    monkeypatch.setattr(cuda, "SPLATS", 100)
    for one, other in zip(drawn(scene, 20, 18), together, strict=True):
        assert torch.equal(one, other)


@CUDA_BACKENDS
@given(seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_order_of_the_gaussians_does_not_matter(backend: str, seed: int) -> None:
    scene = random_scene(80, seed=seed)
    order = torch.randperm(80)
    shuffled = Scene(*(x[order] for x in scene[:5]), *scene[5:])
    for one, other in zip(drawn(scene, 20, 20)[:3], drawn(shuffled, 20, 20)[:3], strict=True):
        assert torch.equal(one, other)


class _ReadBack(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.item.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_whatever_the_number_of_cameras() -> None:
    with _ReadBack() as seen, gpu_kernels_on_host():
        drawn(random_scene(30, views=3), 20, 18)
    assert seen.count == 1


def test_float64_is_refused_with_what_there_is() -> None:
    with gpu_kernels_on_host(), pytest.raises(TypeError, match=r"means must be one of torch\.float32, .*float64"):
        rasterize_gaussians(*random_scene(3).to(torch.float64).arguments(8, 8))  # type: ignore[arg-type]
