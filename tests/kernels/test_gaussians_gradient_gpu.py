"""Gradients of the CUDA rasteriser, emulated and on a GPU, beside autograd through the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.backends import CUDA_BACKENDS, gpu_kernels_on_host
from tests.support.gaussians import Scene, decoded_scene, facing, orbit_cameras, random_scene
from trellis_kernels import OPERATORS, rasterize_gaussians
from trellis_kernels.gaussians import cuda

FORWARD = torch.ops.trellis_kernels.rasterize_gaussians
BACKWARD = torch.ops.trellis_kernels.rasterize_gaussians_backward
TOLERANCE = 1e-3  # of the largest gradient: rounding, and a pixel at a threshold


def pulls(scene: Scene, width: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of colors, depths and transmittances; the same on every device."""
    generator = torch.Generator().manual_seed(7)
    views, channels = scene.background.shape
    shape = (views, height, width)
    drawn = [torch.randn(size, generator=generator, device="cpu") for size in ((*shape, channels), shape, shape)]
    return tuple(x.to(scene.means) for x in drawn)  # type: ignore[return-value]


def gradients(scene: Scene, width: int, height: int, kernel_size: float = 0.1, keep: bool = True) -> tuple[Tensor, ...]:
    """Of all eight inputs, by the kernels."""
    *outputs, _, state = FORWARD(*scene, width, height, kernel_size, keep)
    return BACKWARD(*pulls(scene, width, height), *scene, *outputs, state, kernel_size)  # type: ignore[no-any-return]


def expected_gradients(scene: Scene, width: int, height: int, kernel_size: float = 0.1) -> tuple[Tensor, ...]:
    """By torch's autograd through the reference in float64."""
    inputs = [x.double().requires_grad_() for x in scene]
    outputs = OPERATORS["trellis_kernels::rasterize_gaussians"].reference(*inputs, width, height, kernel_size)
    loss = sum((x * pull).sum() for x, pull in zip(outputs, pulls(scene, width, height), strict=False))
    seen = isinstance(loss, Tensor) and loss.requires_grad  # there are cameras
    found = torch.autograd.grad(loss, inputs, allow_unused=True) if seen else [None] * 8
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True))


def assert_gradients_agree(
    scene: Scene, width: int, height: int, kernel_size: float = 0.1, tolerance: float = TOLERANCE
) -> None:
    actual = gradients(scene, width, height, kernel_size)
    expected = expected_gradients(scene, width, height, kernel_size)
    for name, one, other in zip(Scene._fields, actual, expected, strict=True):
        assert one.dtype == scene.means.dtype
        largest = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(
            one.double(), other, rtol=0, atol=tolerance * largest + 1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def per_view(scene: Scene) -> Scene:
    """With colors of each Gaussian that depend on the camera."""
    views = len(scene.extrinsics)
    scale = torch.linspace(0.5, 1.5, views).view(views, 1, 1)
    return scene._replace(colors=(scene.colors * scale).contiguous())


@CUDA_BACKENDS
@pytest.mark.parametrize(
    ("count", "views", "width", "height"),
    [(0, 1, 17, 3), (0, 0, 17, 3), (3, 0, 17, 3), (1, 1, 20, 24), (5, 3, 1, 1), (90, 2, 37, 20), (70, 1, 16, 32)],
)
def test_gradients_agree_with_autograd(backend: str, count: int, views: int, width: int, height: int) -> None:
    assert_gradients_agree(random_scene(count, views, size=0.05), width, height)


@CUDA_BACKENDS
@pytest.mark.parametrize("channels", [0, 1, 2, 4, 7, 16, 37])
def test_gradients_of_any_number_of_channels(backend: str, channels: int) -> None:
    assert_gradients_agree(random_scene(40, channels=channels, size=0.05), 19, 16)


@CUDA_BACKENDS
@pytest.mark.parametrize("channels", [3, 9])
def test_gradients_of_colors_by_camera(backend: str, channels: int) -> None:
    assert_gradients_agree(per_view(random_scene(40, views=3, channels=channels, size=0.05)), 18, 17)


@CUDA_BACKENDS
@pytest.mark.parametrize("size", [0.003, 0.3, 3.0], ids="{} wide".format)
def test_gradients_at_any_size_of_gaussians(backend: str, size: float) -> None:
    """The widest reach all tiles, more of them in a tile than its block takes at a time."""
    assert_gradients_agree(random_scene(200, size=size), 20, 24)


@CUDA_BACKENDS
def test_gradients_of_needles(backend: str) -> None:
    scene = random_scene(60)._replace(scales=torch.tensor([1e-3, 2e-3, 0.2]).expand(60, 3).contiguous())
    assert_gradients_agree(scene, 40, 33, kernel_size=0.3)


@CUDA_BACKENDS
def test_gradients_inside_a_cloud(backend: str) -> None:
    """Gaussians behind the camera, at its plane and far off the picture, where the projection is linearised aside."""
    extrinsics, intrinsics = orbit_cameras(1, radius=0.1)
    intrinsics[0, 0, 0], intrinsics[0, 1, 2] = 1.7, 0.4
    assert_gradients_agree(random_scene(300)._replace(extrinsics=extrinsics, intrinsics=intrinsics), 33, 24)


@CUDA_BACKENDS
def test_gradients_of_quaternions_of_any_length(backend: str) -> None:
    scene = random_scene(40, size=0.1)
    scene = scene._replace(quats=scene.quats * torch.linspace(0.1, 7, 40)[:, None])
    assert_gradients_agree(scene, 20, 20)
    along = (gradients(scene, 20, 20)[1] * scene.quats).sum(-1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-3)


@CUDA_BACKENDS
def test_gradients_where_alphas_are_held_and_pixels_are_opaque(backend: str) -> None:
    """The third is never drawn, the first and second have no gradient where they are at 0.99."""
    scene = facing([[0, 0, 2.0 + 0.1 * i] for i in range(4)], 0.3, [1.0, 0.995, 1.0, 1.0])
    assert_gradients_agree(scene, 33, 33, 0.0)


@CUDA_BACKENDS
def test_gradients_of_many_gaussians_in_one_corner_of_a_tile(backend: str) -> None:
    """One warp has more than a batch while the others have nothing to do: they must wait before the next batch."""
    scene = facing([[0.75, 0.75, 2.0 + 0.001 * i] for i in range(150)], 0.1, [0.03] * 150)
    scene = scene._replace(colors=random_scene(150).colors, background=torch.zeros(1, 3))
    assert_gradients_agree(scene, 16, 16, 0.0)


@CUDA_BACKENDS
def test_gradients_of_more_tiles_than_one_sums_alone(backend: str) -> None:
    """One Gaussian over all 72 tiles, whose records a warp adds up, beside small ones."""
    scene = random_scene(20, size=0.01)
    scales = scene.scales.clone()
    scales[3] = 2.0
    assert_gradients_agree(scene._replace(scales=scales, opacities=scene.opacities * 0.5), 18 * 16 - 3, 4 * 16 - 5)


@CUDA_BACKENDS
def test_gradients_reach_the_inputs(backend: str) -> None:
    """Through the public function: alphas and depths too, a background for all cameras, no gradient of the medians."""
    scene = random_scene(30, views=2, size=0.05)
    scene = scene._replace(background=scene.background[0])
    inputs = Scene(*(x.clone().requires_grad_() for x in scene))
    colors, alphas, depths, medians = rasterize_gaussians(*inputs.arguments(20, 18))  # type: ignore[arg-type]
    assert not medians.requires_grad
    full = scene._replace(background=scene.background.expand(2, -1).contiguous())
    pull = pulls(full, 20, 18)
    torch.autograd.backward([colors, depths, alphas], [pull[0], pull[1], -pull[2]])
    expected = list(gradients(full, 20, 18))
    expected[7] = expected[7].sum(0)
    for one, other in zip(inputs, expected, strict=True):
        torch.testing.assert_close(one.grad, other)


@CUDA_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision(backend: str, dtype: torch.dtype) -> None:
    scene = Scene(*(x.to(dtype).requires_grad_() for x in random_scene(40, size=0.05)))
    wide = Scene(*(x.detach().float() for x in scene))
    colors, alphas, depths, _ = rasterize_gaussians(*scene.arguments(20, 20))  # type: ignore[arg-type]
    pull = [x.to(dtype) for x in pulls(wide, 20, 20)]
    torch.autograd.backward([colors, depths, alphas], [pull[0], pull[1], -pull[2]])
    for one, other in zip(scene, expected_gradients(wide, 20, 20), strict=True):
        assert one.grad is not None
        assert one.grad.dtype == dtype
        error = (one.grad.double() - other).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * other.abs().max()


@CUDA_BACKENDS
@pytest.mark.parametrize("what", ["means", "quats", "scales", "opacities"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, -1.0])
def test_bad_gaussians_have_no_gradient_and_change_no_other(backend: str, what: str, value: float) -> None:
    if what == "means" and value in (0.0, -1.0):
        pytest.skip("a place like any other")
    if what == "quats" and value == -1.0:
        pytest.skip("a rotation like any other")
    scene = random_scene(30, size=0.05)
    values = getattr(scene, what).clone()
    values[::7] = value
    kept = torch.arange(30) % 7 != 0
    broken = gradients(scene._replace(**{what: values}), 20, 20)
    alone = gradients(Scene(*(x[kept] for x in scene[:5]), *scene[5:]), 20, 20)
    for one, other in zip(broken[:5], alone[:5], strict=True):
        assert one[~kept].count_nonzero() == 0
        torch.testing.assert_close(one[kept], other, equal_nan=False)
    torch.testing.assert_close(broken[5:], alone[5:], rtol=1e-4, atol=1e-4, equal_nan=False)


@CUDA_BACKENDS
def test_a_camera_that_is_not_finite_has_no_gradient(backend: str) -> None:
    scene = random_scene(20, views=2, size=0.05)
    extrinsics = scene.extrinsics.clone()
    extrinsics[1] = torch.nan
    found = gradients(scene._replace(extrinsics=extrinsics), 20, 20)
    assert all(x.isfinite().all() for x in found)
    assert found[5][1].count_nonzero() == found[6][1].count_nonzero() == 0


@CUDA_BACKENDS
@pytest.mark.parametrize("channels", [3, 9])
def test_gradients_are_the_same_each_time_and_however_the_lists_are_made(
    backend: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept lists, lists made again, and lists in parts, where tiles go on from what the part behind left."""
    scene = random_scene(30, views=2, channels=channels, size=0.2)
    torch.use_deterministic_algorithms(True)
    try:
        once = gradients(scene, 20, 18)
        others = [gradients(scene, 20, 18), gradients(scene, 20, 18, keep=False)]
        for entries in (1, 40):
            monkeypatch.setattr(cuda, "LIST_ENTRIES", entries)
            others.append(gradients(scene, 20, 18))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(once, other, strict=True))


@CUDA_BACKENDS
def test_groups_of_cameras_give_the_same_gradients(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = per_view(random_scene(50, views=3, size=0.05))
    together = gradients(scene, 20, 18)
    monkeypatch.setattr(cuda, "SPLATS", 100)
    torch.testing.assert_close(gradients(scene, 20, 18), together)


@CUDA_BACKENDS
@given(seed=st.integers(0, 99))
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_moving_all_gaussians_is_moving_the_camera(backend: str, seed: int) -> None:
    """A truth of its own: a translation t of the scene is R t in the camera's frame. And the order is of no matter."""
    scene = random_scene(60, size=0.05, seed=seed)
    found = Scene(*gradients(scene, 20, 20))
    pose = scene.extrinsics[0, :3, :3].T @ found.extrinsics[0, :3, 3]
    torch.testing.assert_close(found.means.sum(0), pose, rtol=1e-3, atol=1e-3 * found.means.abs().sum().item() / 60)
    order = torch.randperm(60)
    shuffled = gradients(Scene(*(x[order] for x in scene[:5]), *scene[5:]), 20, 20)
    assert all(torch.equal(one[order], other) for one, other in zip(found[:5], shuffled[:5], strict=True))


class _ReadBack(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.item.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_once_for_a_picture_and_its_gradient() -> None:
    scene = random_scene(30, views=3)
    with _ReadBack() as seen, gpu_kernels_on_host():
        gradients(scene, 20, 18)
    assert seen.count == 1


def test_a_last_gaussian_that_is_not_there_is_an_error() -> None:
    scene = random_scene(4, size=0.1)
    with gpu_kernels_on_host():
        colors, depths, transmittances, last, _, state = FORWARD(*scene, 8, 8, 0.1, True)
        outputs = (colors, depths, transmittances, torch.full_like(last, 4))
        with pytest.raises(ValueError, match="last must hold indices of Gaussians"):
            BACKWARD(*pulls(scene, 8, 8), *scene, *outputs, state, 0.1)


def test_gradients_of_a_decoded_scene() -> None:
    """Many small Gaussians in few tiles."""
    with gpu_kernels_on_host():
        assert_gradients_agree(decoded_scene(600), 32, 32)
