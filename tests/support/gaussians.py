"""Gaussians and cameras shared by tests and benchmarks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, ParamSpec

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.support.golden import golden
from tests.support.scenes import sphere_voxels
from trellis_kernels import spherical_harmonics, use_reference

Rasterized = tuple[Tensor, ...]
Arguments = ParamSpec("Arguments")


class Scene(NamedTuple):
    """The tensor arguments of `rasterize_gaussians` before the size of the image, and the background."""

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor
    extrinsics: Tensor
    intrinsics: Tensor
    background: Tensor

    def arguments(self, width: int, height: int, kernel_size: float = 0.1) -> tuple[object, ...]:
        return (*self[:7], width, height, self.background, kernel_size)

    def to(self, target: torch.dtype | torch.device) -> Scene:
        return Scene(*(tensor.to(target) for tensor in self))


def _on_host(make: Callable[Arguments, Scene]) -> Callable[Arguments, Scene]:
    """The same random numbers on every device: made on the host, moved to the default device."""

    @functools.wraps(make)
    def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Scene:
        with torch.device("cpu"):
            scene = make(*args, **kwargs)
        return scene.to(torch.get_default_device())

    return made


def orbit_cameras(views: int, radius: float = 2.0, fov: float = math.radians(40)) -> tuple[Tensor, Tensor]:
    """Extrinsics ``[V, 4, 4]`` and normalised intrinsics ``[V, 3, 3]`` of cameras around the origin, z up."""
    yaw = torch.arange(views) * (2 * math.pi / max(views, 1)) + 0.4
    eye = radius * torch.stack([yaw.sin() * 0.9, yaw.cos() * 0.9, torch.full_like(yaw, math.sqrt(1 - 0.81))], -1)
    forward = normalize(-eye, dim=-1)
    right = normalize(torch.linalg.cross(forward, torch.tensor([0.0, 0, 1]).expand_as(forward)), dim=-1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], 1)
    extrinsics = torch.eye(4).repeat(views, 1, 1)
    extrinsics[:, :3, :3] = rotation
    extrinsics[:, :3, 3] = -(rotation @ eye[:, :, None]).squeeze(-1)
    focal = 0.5 / math.tan(fov / 2)
    intrinsics = torch.tensor([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]]).repeat(views, 1, 1)
    return extrinsics, intrinsics


@_on_host
def random_scene(count: int, views: int = 1, channels: int = 3, size: float = 0.03, seed: int = 0) -> Scene:
    """Gaussians of all shapes about `size` wide, in the unit cube around the origin."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.rand(count, 3, generator=generator) - 0.5
    quats = normalize(torch.randn(count, 4, generator=generator), dim=-1)
    scales = size * (0.7 * torch.randn(count, 3, generator=generator)).exp()
    opacities = torch.rand(count, generator=generator)
    colors = torch.rand(count, channels, generator=generator)
    background = torch.rand(views, channels, generator=generator)
    return Scene(means, quats, scales, opacities, colors, *orbit_cameras(views), background)


@_on_host
def decoded_scene(count: int, views: int = 1, seed: int = 0) -> Scene:
    """As the decoder makes them: 32 per voxel of a sphere on a 64^3 grid, scales of 0.004 to 0.01.

    Of a shell thick enough to have so many voxels.
    """
    generator = torch.Generator().manual_seed(seed)
    needed, thickness = -(-count // 32), 1.0
    while len(voxels := sphere_voxels(64, thickness=thickness)[:, 1:]) < needed:
        thickness += 1
    voxels = voxels[torch.randperm(len(voxels), generator=generator)[:needed].sort().values]
    offsets = 1.5 * (torch.rand(len(voxels), 32, 3, generator=generator) - 0.5)
    means = ((voxels[:, None] + 0.5 + offsets) / 64 - 0.5).view(-1, 3)[:count]
    quats = normalize(torch.randn(count, 4, generator=generator), dim=-1)
    scales = 0.004 + 0.006 * torch.rand(count, 3, generator=generator)
    opacities = torch.rand(count, generator=generator)
    colors = (means + 0.5).clamp(0, 1)
    return Scene(means, quats, scales, opacities, colors, *orbit_cameras(views), torch.zeros(views, 3))


def facing(means: list[list[float]], scale: float, opacities: list[float]) -> Scene:
    """Round Gaussians before a camera at the origin that looks along z; colors are unit vectors."""
    count = len(means)
    return Scene(
        torch.tensor(means),
        torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1),
        torch.full((count, 3), scale),
        torch.tensor(opacities),
        torch.eye(count),
        torch.eye(4)[None],
        torch.tensor([[[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1]]]),
        torch.zeros(1, count),
    )


def oracle() -> tuple[dict[str, Tensor], tuple[object, ...]]:
    item = {key: x.to(torch.get_default_device()) for key, x in golden("render_gaussian_oracle").tensors.items()}
    colors = spherical_harmonics(item["in.features_dc"][:, None], torch.zeros(400, 3))
    gaussians = (item["in.xyz"], item["in.quat_wxyz"], item["in.scale"], item["in.opacity"][:, 0], colors)
    return item, (*gaussians, item["in.extrinsics"][None], item["in.intrinsics"][None], 64, 64, item["in.bg"], 0.1)


def assert_images_agree(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal but for the few pixels where rounding moves a Gaussian across a threshold; ``[..., H, W]`` or with C."""
    assert actual.shape == expected.shape
    assert torch.equal(actual.isfinite(), expected.isfinite())
    different = ((actual - expected).abs() > tolerance).sum().item()
    assert different <= max(2, actual.numel() // 1000), f"{different} of {actual.numel()} values differ"


def both(scene: Scene, width: int, height: int, kernel_size: float = 0.1) -> tuple[Rasterized, Rasterized]:
    """Kernel and reference, with what the operator keeps for a backward."""
    arguments = (*scene, width, height, kernel_size)
    actual = torch.ops.trellis_kernels.rasterize_gaussians(*arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its operations are too small to be shared out
    try:
        with use_reference():
            return actual, torch.ops.trellis_kernels.rasterize_gaussians(*arguments)
    finally:
        torch.set_num_threads(threads)


def assert_agree(scene: Scene, width: int, height: int, kernel_size: float = 0.1, tolerance: float = 1e-4) -> None:
    actual, expected = both(scene, width, height, kernel_size)
    for one, other in zip(actual[:3], expected[:3], strict=True):
        assert_images_agree(one, other, tolerance)
    assert_images_agree(actual[4], expected[4], max(tolerance, 1e-5))  # median depths are copies
    assert (actual[3] != expected[3]).sum() <= max(2, expected[3].numel() // 1000)
