"""Gaussian rasterisation beside its vectorised definition in torch and a scalar splatter, and its gradients.

    pytest benchmarks/bench_gaussians.py

Gaussians are those a decoder makes: 32 per voxel of a sphere on a 64^3 grid, scales of 0.004 to 0.01. The reference
does, per tile, all pixels times all Gaussians at once; the splatter (peers_cpp/splatter.cpp) is one thread over
bounding boxes, the usual ones and the smallest ones. How times grow: python -m benchmarks.gaussians_curve.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.device import ON_CPU, device, measure, on_gpu
from tests.support.gaussians import Scene, decoded_scene
from trellis_kernels import rasterize_gaussians, spherical_harmonics, use_reference
from trellis_kernels.gaussians.harmonics_reference import basis

Arguments = tuple[Any, ...]
Run = Callable[[], Any]
FULL = pytest.mark.full


def ours(arguments: Arguments) -> Run:
    return lambda: rasterize_gaussians(*arguments).colors[0]


def reference(arguments: Arguments) -> Run:
    def run() -> Tensor:
        with use_reference():
            return rasterize_gaussians(*arguments).colors[0]

    return run


def splatter(arguments: Arguments) -> Run:
    draw = peers.scalar_splatter(tight=False)
    return lambda: draw(*arguments)


def tight_splatter(arguments: Arguments) -> Run:
    draw = peers.scalar_splatter(tight=True)
    return lambda: draw(*arguments)


def scene_of(count: int, views: int) -> Scene:
    return Scene(*(tensor.to(device()) for tensor in decoded_scene(count, views)))


@pytest.mark.parametrize(
    ("count", "resolution", "views", "implementation"),
    [
        pytest.param(20_000, 128, 1, ours),
        pytest.param(20_000, 128, 1, reference),
        pytest.param(20_000, 128, 1, splatter, marks=ON_CPU),
        pytest.param(20_000, 128, 1, tight_splatter, marks=ON_CPU),
        pytest.param(300_000, 512, 1, ours),
        pytest.param(300_000, 512, 1, reference),
        pytest.param(300_000, 512, 1, splatter, marks=ON_CPU),
        pytest.param(300_000, 512, 1, tight_splatter, marks=ON_CPU),
        pytest.param(300_000, 512, 4, ours),
        pytest.param(500_000, 512, 1, ours),
        pytest.param(300_000, 1024, 1, ours, marks=FULL),
        pytest.param(500_000, 1024, 1, ours, marks=FULL),
    ],
)
def test_forward(benchmark, count: int, resolution: int, views: int, implementation: Callable[..., Run]) -> None:
    arguments = scene_of(count, views).arguments(resolution, resolution)
    run = implementation(arguments)
    threads = "" if on_gpu() else f", {torch.get_num_threads()} threads"
    benchmark.group = f"gaussians forward {count} Gaussians, {views} x {resolution}^2{threads}"
    with torch.inference_mode():
        if implementation is not ours and (implementation is not reference or resolution == 128):
            difference = (ours(arguments)() - run()).abs()  # correct, before it is timed
            if implementation is splatter:  # alphas below e^-4.5 outside its boxes
                assert difference.max() < 0.03
                assert difference.mean() < 1e-3
            else:
                assert (difference > 1e-4).sum() <= difference.numel() // 1000
        slow = implementation is reference and resolution > 128
        rounds = 9 if implementation is ours else 1 if slow else 3
        measure(benchmark, run, rounds=rounds, warmup=int(not slow))


@pytest.mark.parametrize("step", ["forward that keeps", "backward", "forward and backward"])
@pytest.mark.parametrize(
    ("count", "resolution", "referring"),
    [(20_000, 128, False), (20_000, 128, True), (300_000, 512, False)],
    ids=lambda value: {True: "reference", False: "ours"}.get(value, str(value)) if value in (0, 1) else str(value),
)
def test_gradients(benchmark, count: int, resolution: int, referring: bool, step: str) -> None:
    scene = scene_of(count, 1)
    leaves = scene._replace(**{name: getattr(scene, name).requires_grad_() for name in Scene._fields[:6]})
    arguments = leaves.arguments(resolution, resolution)
    wanted = [*leaves[:6]]
    seed = torch.rand(resolution, resolution, 3, device=device())
    draw = (reference if referring else ours)(arguments)

    def differentiate(image: Tensor, keep: bool) -> tuple[Tensor, ...]:
        with use_reference() if referring else nullcontext():
            return torch.autograd.grad(image, wanted, seed, retain_graph=keep)

    def backward() -> Any:
        return differentiate(image, True)

    def run() -> Any:
        return draw() if step == "forward that keeps" else differentiate(draw(), False)

    threads = "" if on_gpu() else f", {torch.get_num_threads()} threads"
    benchmark.group = f"gaussians {step} {count} Gaussians, {resolution}^2{threads}"
    image = draw()
    if referring:
        expected = torch.autograd.grad(ours(arguments)(), wanted, seed)
        for one, other in zip(differentiate(image, True), expected, strict=True):
            assert (one - other).norm() <= 1e-2 * other.norm()
    measure(benchmark, backward if step == "backward" else run, rounds=1 if referring else 7, warmup=1)


@pytest.mark.parametrize("step", ["forward", "forward and backward"])
@pytest.mark.parametrize("implementation", ["ours", "plain torch"])
def test_spherical_harmonics(benchmark, implementation: str, step: str) -> None:
    """300k Gaussians, degree 3: at least 65 MB are read and written, 130 MB for the gradients."""
    coefficients, directions = (torch.randn(300_000, *shape, device=device()) for shape in ((16, 3), (3,)))
    coefficients *= 0.2
    backward = step != "forward"
    leaves = [coefficients.requires_grad_(backward), directions.requires_grad_(backward)]
    seed = torch.rand(300_000, 3, device=device())

    def plain() -> Tensor:
        terms = basis(torch.nn.functional.normalize(directions, dim=-1), 16)
        return ((terms[..., None] * coefficients).sum(-2) + 0.5).clamp_min(0)

    def draw() -> Tensor:
        return spherical_harmonics(coefficients, directions) if implementation == "ours" else plain()

    def run() -> Any:
        return torch.autograd.grad(draw(), leaves, seed) if backward else draw()

    torch.testing.assert_close(draw(), plain(), rtol=0, atol=1e-5)
    threads = "" if on_gpu() else f", {torch.get_num_threads()} threads"
    benchmark.group = f"spherical harmonics {step}, 300000 Gaussians, degree 3{threads}"
    measure(benchmark, run, rounds=7, warmup=1, gigabytes=300_000 * 4e-9 * (54 + 108 * backward))
