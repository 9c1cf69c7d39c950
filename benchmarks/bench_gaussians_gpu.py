"""Gaussian rasterisation on a GPU, with its gradient, beside gsplat (antialiased) and Faster-GS, where installed.

    pytest benchmarks/bench_gaussians_gpu.py            # `--full` adds 800^2, four cameras and wide features

Gaussians are those a decoder makes: 32 per voxel of a sphere on a 64^3 grid, 0.3 to 1 million of them. Forward and
backward together are one row, as a training step needs them: gradients of means, quaternions, scales, opacities and
colors. A peer's picture must be ours but for a mean squared error of 1e-3, or its row is not timed: the mip filters
differ a little (Faster-GS's size is its own), and so do borders of tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.device import ON_GPU, device, measure
from tests.support.gaussians import Scene, decoded_scene
from trellis_kernels import rasterize_gaussians

pytestmark = [ON_GPU, pytest.mark.priority(1)]
FULL = pytest.mark.full
Draw = Callable[[], Tensor]
Make = Callable[[Scene, int], tuple[Draw, list[Tensor]]]  # draws a scene at a resolution; what it can learn
KERNEL = 0.1
SIZES = [  # Gaussians, pixels per side, cameras
    pytest.param(300_000, 512, 1, id="300k 512"),
    pytest.param(300_000, 1024, 1, id="300k 1024"),
    pytest.param(613_000, 512, 1, id="613k 512"),
    pytest.param(1_000_000, 1024, 1, id="1M 1024"),
    pytest.param(613_000, 800, 1, id="613k 800", marks=FULL),
    pytest.param(300_000, 512, 4, id="300k 4 x 512", marks=FULL),
]


def trellis(scene: Scene, resolution: int) -> tuple[Draw, list[Tensor]]:
    return lambda: rasterize_gaussians(*scene.arguments(resolution, resolution, KERNEL)).colors, list(scene[:5])  # type: ignore[arg-type]


def gsplat(scene: Scene, resolution: int) -> tuple[Draw, list[Tensor]]:
    library = pytest.importorskip("gsplat")
    pixels = torch.tensor([[resolution], [resolution], [1.0]], device=scene.means.device)
    intrinsics = scene.intrinsics * pixels

    def draw() -> Tensor:
        images, _, _ = library.rasterization(
            *scene[:5],
            scene.extrinsics,
            intrinsics,
            resolution,
            resolution,
            near_plane=0.2,
            eps2d=KERNEL,
            backgrounds=scene.background,
            packed=False,
            rasterize_mode="antialiased",
        )
        return images

    return draw, list(scene[:5])


def faster_gs(scene: Scene, resolution: int) -> tuple[Draw, list[Tensor]]:
    """It takes logarithms of scales, logits of opacities and spherical harmonics, made before it is timed."""
    library: Any = pytest.importorskip("FasterGSCudaBackend")
    if scene.colors.shape[1] != 3:
        pytest.skip("three channels only")
    harmonics = ((scene.colors.detach() - 0.5) / 0.28209479177387814)[:, None].requires_grad_()
    scales = scene.scales.detach().log().requires_grad_()
    opacities = scene.opacities.detach().clamp(1e-4, 1 - 1e-4).logit()[:, None].requires_grad_()
    rest, nothing = scene.means.new_zeros(len(scene.means), 0, 3), scene.means.new_empty(0)
    cameras = []
    for pose, focal, background in zip(scene.extrinsics, scene.intrinsics * resolution, scene.background, strict=True):
        eye = -pose[:3, :3].T @ pose[:3, 3]
        fx, fy, cx, cy = focal[0, 0].item(), focal[1, 1].item(), focal[0, 2].item(), focal[1, 2].item()
        size = (1, resolution, resolution)
        cameras.append(library.RasterizerSettings(pose, eye, background, *size, fx, fy, cx, cy, 0.2, 100.0, True))

    def draw() -> Tensor:
        gaussians = (scene.means, scales, scene.quats, opacities, harmonics, rest, nothing)
        images = [library.diff_rasterize(*gaussians, camera) for camera in cameras]
        return torch.stack(images).permute(0, 2, 3, 1)

    return draw, [scene.means, scene.quats, scales, opacities, harmonics]


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [trellis, gsplat, faster_gs], ids=lambda f: f.__name__)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("count", "resolution", "views"), SIZES)
def test_forward(benchmark, implementation: Make, count: int, resolution: int, views: int) -> None:
    scene = scene_of(count, views)
    benchmark.group = f"gaussians forward, {count} Gaussians, {views} x {resolution}^2"
    with torch.no_grad():
        draw, _ = implementation(scene, resolution)
        check(draw(), trellis(scene, resolution)[0]())
        measure(benchmark, draw, rounds=3)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("count", "resolution", "views"), SIZES)
def test_forward_and_backward(benchmark, implementation: Make, count: int, resolution: int, views: int) -> None:
    benchmark.group = f"gaussians forward and backward, {count} Gaussians, {views} x {resolution}^2"
    time_step(benchmark, implementation, scene_of(count, views), resolution)


@FULL
@IMPLEMENTATIONS
@pytest.mark.parametrize("channels", [16, 32])
def test_features_forward_and_backward(benchmark, implementation: Make, channels: int) -> None:
    """Wide feature channels in place of colors."""
    scene = scene_of(300_000, 1)
    features = torch.rand(300_000, channels, generator=torch.Generator().manual_seed(1)).to(device())
    scene = scene._replace(colors=features, background=features.new_zeros(1, channels))
    benchmark.group = f"gaussians forward and backward, 300000 Gaussians, 512^2, {channels} channels"
    time_step(benchmark, implementation, scene, 512)


def time_step(benchmark, implementation: Make, scene: Scene, resolution: int) -> None:
    learned = scene._replace(**{name: getattr(scene, name).requires_grad_() for name in Scene._fields[:5]})
    draw, leaves = implementation(learned, resolution)
    images = draw()
    check(images.detach(), trellis(scene, resolution)[0]().detach())
    upstream = torch.randn_like(images)
    measure(benchmark, lambda: torch.autograd.grad(draw(), leaves, upstream), rounds=2)


def scene_of(count: int, views: int) -> Scene:
    return decoded_scene(count, views).to(device())


def check(actual: Tensor, expected: Tensor) -> None:
    error = (actual - expected).square().mean().item()
    if not error < 1e-3:  # another convention, or another version of the library: not the same work
        pytest.skip(f"the picture is another: mean squared error {error:.2g}")
