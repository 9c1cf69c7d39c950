from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.backends import CUDA_BACKENDS
from tests.support.gaussians import (
    Scene,
    assert_agree,
    assert_images_agree,
    decoded_scene,
    facing,
    oracle,
    orbit_cameras,
    random_scene,
)
from trellis_kernels import _cpu, rasterize_gaussians, use_reference
from trellis_kernels.gaussians import cpu, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_passes_the_oracle(instruction_set: str, dtype: torch.dtype) -> None:
    item, arguments = oracle()
    result = rasterize_gaussians(*(x.to(dtype) if isinstance(x, Tensor) else x for x in arguments))  # type: ignore[arg-type]
    assert_images_agree(result.colors[0].float(), item["out.color"].permute(1, 2, 0))
    assert_images_agree(result.alphas[0].float(), 1 - item["out.transmittance"])


def test_reference_passes_the_oracle() -> None:
    item, arguments = oracle()
    with use_reference():
        result = rasterize_gaussians(*arguments)  # type: ignore[arg-type]
    assert_images_agree(result.colors[0], item["out.color"].permute(1, 2, 0))
    assert_images_agree(result.alphas[0], 1 - item["out.transmittance"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "views"), [(0, 1), (1, 1), (333, 2)])
def test_kernel_agrees_with_reference(instruction_set: str, dtype: torch.dtype, count: int, views: int) -> None:
    assert_agree(random_scene(count, views).to(dtype), 37, 50)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    assert_agree(random_scene(100).to(dtype), 20, 20, tolerance=torch.finfo(dtype).eps)


@pytest.mark.parametrize("channels", [0, 1, 3, 4, 19])
def test_any_number_of_channels(instruction_set: str, channels: int) -> None:
    assert_agree(random_scene(100, channels=channels), 33, 16)


@pytest.mark.parametrize("size", [1e-4, 0.003, 0.3, 3.0], ids="{} wide".format)
def test_kernel_agrees_at_any_size_of_gaussians(instruction_set: str, size: float) -> None:
    assert_agree(random_scene(150, size=size), 50, 37)


def test_kernel_agrees_on_needles(instruction_set: str) -> None:
    """The inverse covariance of a needle is badly conditioned: the bounds must not cut it."""
    scene = random_scene(150)._replace(scales=torch.tensor([1e-4, 2e-4, 0.5]).expand(150, 3))
    assert_agree(scene.to(torch.float64), 50, 50, kernel_size=0.01)


@pytest.mark.parametrize("kernel_size", [0.0, 0.3])
def test_kernel_agrees_at_any_kernel_size(kernel_size: float) -> None:
    assert_agree(random_scene(100), 32, 32, kernel_size)


def test_kernel_agrees_inside_a_cloud(instruction_set: str) -> None:
    """Gaussians behind the camera, at its plane and far off the picture."""
    extrinsics, intrinsics = orbit_cameras(1, radius=0.1)
    assert_agree(random_scene(300)._replace(extrinsics=extrinsics, intrinsics=intrinsics), 40, 40)


def test_principal_point_and_unequal_focal_lengths() -> None:
    intrinsics = torch.tensor([[[1.4, 0, 0.3], [0, 0.9, 0.6], [0, 0, 1]]])
    scene = random_scene(150)._replace(intrinsics=intrinsics)
    assert_agree(scene, 45, 30)
    ball = scene._replace(means=torch.zeros(150, 3), scales=torch.full((150, 3), 0.02))
    alphas = rasterize_gaussians(*ball.arguments(100, 100)).alphas[0]  # type: ignore[arg-type]
    y, x = (
        (alphas * grid).sum() / alphas.sum() for grid in torch.meshgrid(*[torch.arange(100.0) + 0.5] * 2, indexing="ij")
    )
    torch.testing.assert_close(torch.stack([x, y]), torch.tensor([30.0, 60.0]), rtol=0, atol=0.1)


@pytest.mark.parametrize("what", ["means", "quats", "scales", "opacities"])
def test_values_that_are_not_finite_are_left_out(instruction_set: str, what: str) -> None:
    scene = random_scene(50)
    values = getattr(scene, what).clone()
    values[::7] = torch.tensor([math.nan, math.inf, -math.inf, math.nan])[: values[0].numel()].view(values[0].shape)
    kept = torch.arange(50) % 7 != 0
    expected = Scene(*(x[kept] for x in scene[:5]), *scene[5:])
    broken = rasterize_gaussians(*scene._replace(**{what: values}).arguments(32, 32))  # type: ignore[arg-type]
    torch.testing.assert_close(broken, rasterize_gaussians(*expected.arguments(32, 32)), equal_nan=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("entries", [1, 100, 3000])
def test_lists_in_batches_give_the_same_picture(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = random_scene(500, size=0.1)._asdict().values()
    whole = torch.ops.trellis_kernels.rasterize_gaussians(*arguments, 50, 70, 0.1)
    monkeypatch.setattr(cpu, "LIST_ENTRIES", entries)
    for one, other in zip(torch.ops.trellis_kernels.rasterize_gaussians(*arguments, 50, 70, 0.1), whole, strict=True):
        assert torch.equal(one, other)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    scene, threads = decoded_scene(40_000), torch.get_num_threads()  # enough for a parallel sort
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(rasterize_gaussians(*scene.arguments(100, 90)))  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_one_gaussian_is_its_closed_form(instruction_set: str) -> None:
    """On the axis its picture is exp(-r^2 / 2 s^2) with s^2 = (f scale / z)^2 + kernel, faded by the filter."""
    width, z, scale, kernel, opacity = 65, 2.0, 0.1, 0.3, 0.8
    alphas = rasterize_gaussians(*facing([[0, 0, z]], scale, [opacity]).arguments(width, width, kernel)).alphas[0]  # type: ignore[arg-type]
    sharp = (width * scale / z) ** 2
    grid = torch.arange(width) - (width - 1) / 2
    expected = opacity * sharp / (sharp + kernel) * (-(grid[:, None] ** 2 + grid**2) / (2 * (sharp + kernel))).exp()
    inside = expected > 0.02  # farther out tiles may be left out
    torch.testing.assert_close(alphas[inside], expected[inside], rtol=1e-4, atol=1e-5)
    assert (alphas[expected < 1 / 255.1] == 0).all()


def test_nearer_covers_farther_and_equal_depths_go_by_index(instruction_set: str) -> None:
    front, tied = facing([[0, 0, 3.0], [0, 0, 2.0]], 1.0, [0.5, 0.75]), facing([[0, 0, 2.0]] * 2, 1.0, [0.5, 0.75])
    for scene, expected, depth in ((front, (0.125, 0.75), 0.125 * 3 + 0.75 * 2), (tied, (0.5, 0.375), 0.875 * 2)):
        result = rasterize_gaussians(*scene.arguments(15, 15))  # type: ignore[arg-type]
        torch.testing.assert_close(result.colors[0, 7, 7], torch.tensor(expected), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(result.depths[0, 7, 7], torch.tensor(depth), rtol=1e-3, atol=1e-3)
        assert result.median_depths[0, 7, 7] == 2


def test_blending_stops_before_the_gaussian_that_would_leave_too_little(instruction_set: str) -> None:
    """Transmittances 0.01, 1e-4 (float32: just below the limit or not), so the third is never drawn."""
    scene = facing([[0, 0, 2.0 + 0.1 * i] for i in range(4)], 3.0, [1.0, 0.98, 1.0, 1.0])
    images, _, transmittances, last, *_ = torch.ops.trellis_kernels.rasterize_gaussians(*scene, 15, 15, 0.0)
    torch.testing.assert_close(transmittances[0, 7, 7], torch.tensor(0.01 * 0.02), rtol=1e-3, atol=0)
    assert images[0, 7, 7, 2:].tolist() == [0.0, 0.0]
    assert last[0, 7, 7] == 1


@given(seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_order_of_the_gaussians_does_not_matter(seed: int) -> None:
    scene = random_scene(200, seed=seed)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
    shuffled = Scene(*(x[order] for x in scene[:5]), *scene[5:])
    arguments = 30, 40
    one, other = (rasterize_gaussians(*x.arguments(*arguments)) for x in (scene, shuffled))  # type: ignore[arg-type]
    assert_images_agree(one.colors, other.colors, 1e-6)
    assert_images_agree(one.depths, other.depths, 1e-6)


@CUDA_BACKENDS
def test_views_are_drawn_as_if_alone(backend: str) -> None:
    scene = random_scene(200, views=3)
    together = rasterize_gaussians(*scene.arguments(30, 40))  # type: ignore[arg-type]
    for view in range(3):
        alone = Scene(*scene[:5], *(x[view : view + 1] for x in scene[5:]))
        result = rasterize_gaussians(*alone.arguments(30, 40))  # type: ignore[arg-type]
        assert all(torch.equal(one[0], many[view]) for one, many in zip(result, together, strict=True))


@CUDA_BACKENDS
def test_one_background_serves_all_views(backend: str) -> None:
    scene = random_scene(0, views=2)._replace(background=torch.tensor([0.1, 0.2, 0.3]))
    result = rasterize_gaussians(*scene.arguments(3, 2))  # type: ignore[arg-type]
    assert torch.equal(result.colors, scene.background.expand(2, 2, 3, 3))
    assert result.alphas.count_nonzero() == result.depths.count_nonzero() == 0


def test_is_an_ordinary_torch_operator() -> None:
    scene = random_scene(20)
    torch.library.opcheck(torch.ops.trellis_kernels.rasterize_gaussians.default, (*scene, 20, 18, 0.1))


def test_compiles_without_graph_breaks() -> None:
    arguments = random_scene(20).arguments(20, 18)
    compiled = torch.compile(rasterize_gaussians, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuple(compiled(*arguments)), tuple(rasterize_gaussians(*arguments)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "size", "error", "message"),
    [
        ({"quats": torch.zeros(4, 4)}, 8, ValueError, r"quats must be \[G, 4\] with G=5; got \[4, 4\]"),
        ({"scales": torch.zeros(5, 3).double()}, 8, TypeError, "scales must be torch.float32; got torch.float64"),
        ({"means": torch.zeros(5, 3).int()}, 8, TypeError, "means must be .*; got torch.int32"),
        ({"intrinsics": torch.zeros(2, 3, 3)}, 8, ValueError, r"intrinsics must be .* with V=1; got \[2, 3, 3\]"),
        ({"background": torch.zeros(4)}, 8, ValueError, r"background must be \[C\] with C=3; got \[4\]"),
        ({}, 0, ValueError, r"width and height must be in 1\.\.16384; got 0 and 0"),
        ({}, 16385, ValueError, r"width and height must be in 1\.\.16384; got 16385 and 16385"),
    ],
)
def test_names_the_argument_that_does_not_fit(
    change: dict[str, Tensor], size: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rasterize_gaussians(*random_scene(5)._replace(**change).arguments(size, size))  # type: ignore[arg-type]


def test_names_a_negative_kernel_size() -> None:
    with pytest.raises(ValueError, match="kernel_size must be at least 0; got -1"):
        rasterize_gaussians(*random_scene(5).arguments(8, 8, -1.0))  # type: ignore[arg-type]


def test_native_function_checks_sizes_itself() -> None:
    scene, out = random_scene(5), torch.zeros(1, 8, 8)
    with pytest.raises(ValueError, match="as many rows as means"):
        _cpu.rasterize_gaussians(
            *scene[:3],
            torch.zeros(4),
            scene.colors[None],
            *scene[5:],
            torch.zeros(1, 8, 8, 3),
            out,
            out,
            out.int(),
            out,
            *(0.1, 100, 1),
        )


def test_radii_are_those_of_the_oracle() -> None:
    item, arguments = oracle()
    means, quats, scales, opacities, _, extrinsics, intrinsics = arguments[:7]  # type: ignore[misc]
    splats = reference.project(means, quats, scales, opacities, extrinsics[0], intrinsics[0], 64, 64, 0.1)
    radii = torch.zeros(400).index_put((splats.indices,), splats.radii)
    assert torch.equal(radii, item["out.radii"])
