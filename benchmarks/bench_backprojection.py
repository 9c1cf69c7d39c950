"""Back-projection of DINOv2 tokens onto voxels beside plain torch: 150 views of 37^2 tokens, 1024 wide (--full).

pytest benchmarks/bench_backprojection.py
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.device import device, measure
from benchmarks.scenes import object_voxels
from trellis.renderers.camera import Cameras
from trellis_kernels import backproject

Gather = Callable[[Tensor, Tensor, Cameras], Tensor]


def ours(features: Tensor, positions: Tensor, cameras: Cameras) -> Tensor:
    return backproject(features, positions, cameras.extrinsics, cameras.intrinsics)


def grid_sample(features: Tensor, positions: Tensor, cameras: Cameras) -> Tensor:
    """View after view with a running sum: what one would write in torch to save memory. Channels first, as it needs."""
    uv, _ = cameras.project(positions)
    out = features.new_zeros(len(positions), features.shape[3])
    for picture, place in zip(features.permute(0, 3, 1, 2), uv * 2 - 1, strict=True):
        out += torch.nn.functional.grid_sample(picture[None], place[None, :, None], align_corners=False)[0, :, :, 0].T
    return out / len(features)


@pytest.mark.parametrize("implementation", [ours, grid_sample], ids=lambda f: f.__name__)
@pytest.mark.parametrize("step", ["forward", "forward and backward"])
@pytest.mark.parametrize(
    ("views", "channels"), [(24, 256), pytest.param(150, 1024, marks=pytest.mark.full)], ids=lambda n: str(n)
)
def test_backproject(benchmark, views: int, channels: int, step: str, implementation: Gather) -> None:
    voxels = object_voxels()
    with device():
        features = torch.randn(views, 37, 37, channels)
        positions = ((voxels[:, 1:] + 0.5) / 64 - 0.5).to(features)
        cameras = Cameras.sphere_hammersley(views, fov=math.radians(40)).to(features)
    backward = step != "forward"
    features.requires_grad_(backward)

    def run() -> Tensor:
        out = implementation(features, positions, cameras)
        return torch.autograd.grad(out, features, out.detach())[0] if backward else out

    if views < 100:
        torch.testing.assert_close(run(), _expected(features, positions, cameras, backward), rtol=1e-3, atol=1e-4)
    benchmark.group = (
        f"backprojection {step}, {views} views of 37^2 x {channels}, {len(voxels)} voxels, "
        f"{torch.get_num_threads()} threads"
    )
    products = 4 * views * len(voxels) * channels
    read = features.numel() + len(voxels) * channels
    measure(benchmark, run, rounds=3, gflop=products * 2e-9 * (1 + backward), gigabytes=read * 4e-9 * (1 + backward))


def _expected(features: Tensor, positions: Tensor, cameras: Cameras, backward: bool) -> Tensor:
    out = ours(features, positions, cameras)
    return torch.autograd.grad(out, features, out.detach())[0] if backward else out
