"""Strivec fields shaped like decoded objects (a shell of 64^3 leaves, rank 16, 8 entries) beside the definition.

pytest benchmarks/bench_radiance_field.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.device import device, measure
from tests.support.fields import Field, surface_field
from trellis_kernels import render_radiance_field, render_voxels, use_reference

FLOP = 16 * (6 * 2 + 2 + 4 * 2)  # per sample: three interpolations, their product, and four dot products
BACKWARD = 2.8  # times that: the samples again, twice, and eight sums of each factor
TYPICAL_RADIUS = 0.341  # 12k leaves


def images_of(field: Field, implementation: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        return torch.cat([x.flatten() for x in render_radiance_field(*field.arguments())[:3]])

    def defined() -> Tensor:
        with use_reference():
            return run()

    return run if implementation == "ours" else defined


def with_gradients(field: Field, implementation: str) -> Callable[[], Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in field[1:4]]
    render = images_of(field._replace(trivec=leaves[0], density=leaves[1], features=leaves[2]), implementation)
    return lambda: torch.cat([x.flatten() for x in torch.autograd.grad(render().square().sum(), leaves)])


def samples_of(field: Field) -> float:
    """About how many samples the rays take: eleven in each leaf they cross."""
    operands = field.operands()
    return 11.0 * float(torch.ops.trellis_kernels.render_radiance_field(*operands)[4].sum())


def scene(size: int, depth: int = 6, radius: float = TYPICAL_RADIUS) -> Field:
    with device():
        return surface_field(depth, size, size, radius)


@pytest.mark.parametrize("implementation", ["ours", "reference"])
@pytest.mark.parametrize("step", ["forward", "forward and backward"])
def test_small_picture(benchmark, implementation: str, step: str) -> None:
    """The definition visits every leaf for every ray: 1.3k leaves of 16^3 and 64^2 rays are what it can do."""
    field = scene(64, depth=4, radius=0.45)
    build = images_of if step == "forward" else with_gradients
    run = build(field, implementation)
    expected = build(field, "ours")()
    different = (run() - expected).abs() > 1e-3 * expected.abs().max()
    assert int(different.sum()) <= max(2, len(expected) // 1000)
    benchmark.group = f"radiance field {step}, {len(field.positions)} leaves of 16^3, 64^2, {threads()}"
    measure(benchmark, run, rounds=3)


@pytest.mark.parametrize("size", [128, 256, 512, pytest.param(1024, marks=pytest.mark.full)])
@pytest.mark.parametrize("step", ["forward", "forward and backward"])
def test_time_by_pixels(benchmark, step: str, size: int) -> None:
    field = scene(size)
    benchmark.group = f"radiance field {step} by pixels, {len(field.positions)} leaves of 64^3, {threads()}"
    run = (images_of if step == "forward" else with_gradients)(field, "ours")
    gflop = samples_of(field) * FLOP * 1e-9 * (1 if step == "forward" else 1 + BACKWARD)
    measure(benchmark, run, rounds=5, gflop=gflop)


@pytest.mark.parametrize("radius", [0.171, 0.241, TYPICAL_RADIUS, 0.482])
@pytest.mark.parametrize("step", ["forward", "forward and backward"])
def test_time_by_leaves(benchmark, step: str, radius: float) -> None:
    """Spheres of 3k, 6k, 12k and 24k leaves, at 512^2: pixels that show something grow with them."""
    field = scene(512, radius=radius)
    benchmark.group = f"radiance field {step} by leaves, 512^2, {threads()}"
    benchmark.extra_info["leaves"] = len(field.positions)
    run = (images_of if step == "forward" else with_gradients)(field, "ours")
    gflop = samples_of(field) * FLOP * 1e-9 * (1 if step == "forward" else 1 + BACKWARD)
    measure(benchmark, run, rounds=3, gflop=gflop)


def test_voxels(benchmark) -> None:
    field = scene(512)
    colors = torch.rand_like(field.positions)
    camera = (field.depth, field.box, *field[4:6], field.width, field.height, field.background)
    benchmark.group = f"voxels, {len(field.positions)} of 64^3, 512^2, {threads()}"
    measure(benchmark, lambda: render_voxels(field.positions, colors, *camera).colors, rounds=5)


def threads() -> str:
    return f"{torch.get_num_threads()} threads"
