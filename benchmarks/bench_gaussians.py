"""Gaussian rasterisation beside its vectorised definition in torch (per tile, all pixels times all Gaussians at once).

    OMP_NUM_THREADS=1 pytest benchmarks/bench_gaussians.py

Gaussians are those a decoder makes: 32 per voxel of a sphere on a 64^3 grid, scales of 0.004 to 0.01.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.device import device, measure
from tests.support.gaussians import Scene, decoded_scene
from trellis_kernels import rasterize_gaussians, use_reference
from trellis_kernels.gaussians import RasterizedGaussians

Run = Callable[[], RasterizedGaussians]
FULL = pytest.mark.full


def ours(arguments: tuple[object, ...]) -> Run:
    return lambda: rasterize_gaussians(*arguments)


def reference(arguments: tuple[object, ...]) -> Run:
    def run() -> RasterizedGaussians:
        with use_reference():
            return rasterize_gaussians(*arguments)

    return run


@pytest.mark.parametrize(
    ("count", "resolution", "views", "implementation"),
    [
        pytest.param(20_000, 128, 1, ours),
        pytest.param(20_000, 128, 1, reference),
        pytest.param(300_000, 512, 1, ours),
        pytest.param(300_000, 512, 1, reference),
        pytest.param(300_000, 512, 4, ours),
        pytest.param(500_000, 512, 1, ours),
        pytest.param(300_000, 1024, 1, ours, marks=FULL),
        pytest.param(500_000, 1024, 1, ours, marks=FULL),
    ],
)
def test_forward(benchmark, count: int, resolution: int, views: int, implementation) -> None:
    scene = Scene(*(tensor.to(device()) for tensor in decoded_scene(count, views)))
    arguments = scene.arguments(resolution, resolution)
    run = implementation(arguments)
    benchmark.group = f"gaussians forward {len(arguments[0])} Gaussians, {views} x {resolution}^2"
    with torch.inference_mode():
        if implementation is ours and resolution == 128:  # correct, before it is timed
            expected, actual = reference(arguments)(), run()
            different = ((expected.colors - actual.colors).abs() > 1e-4).sum()
            assert different <= actual.colors.numel() // 1000
        measure(benchmark, run, rounds=5 if implementation is ours else 1, warmup=int(implementation is ours))
