"""Voxel maps beside plain-torch ways to build them.

    pytest benchmarks/bench_voxel_hash.py

Voxels are those a mesh decoder meets: a thin shell, subdivided once or twice. "shuffled" is the same in random order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks.device import device
from benchmarks.device import measure as measure_row
from tests.support.scenes import shuffled_within_samples, sphere_voxels
from trellis_kernels import (
    coarsen,
    neighbor_map,
    subdivide_coords,
    subdivided_neighbor_map,
    unique_coords,
    use_reference,
)

SCENES = {
    "64^3": lambda: sphere_voxels(64).contiguous(),
    "128^3": lambda: subdivide_coords(sphere_voxels(64)),
    "256^3": lambda: subdivide_coords(subdivide_coords(sphere_voxels(64))),
    "256^3 shuffled": lambda: shuffled_within_samples(subdivide_coords(subdivide_coords(sphere_voxels(64)))),
    "1024^3": lambda: subdivide_coords(subdivide_coords(sphere_voxels(256))),
}
FULL = pytest.param("1024^3", marks=pytest.mark.full)  # 16.7M voxels
MAPS = pytest.mark.parametrize("scene", ["64^3", "128^3", "256^3", "256^3 shuffled", FULL])
SETS = pytest.mark.parametrize("scene", ["128^3", "256^3", "256^3 shuffled", FULL])
Run = Callable[[], object]
pytestmark = pytest.mark.priority(3)


@cache
def voxels_of(scene: str) -> Tensor:
    return SCENES[scene]().to(device())


def ours(function: Callable[..., object], *arguments: object) -> Run:
    return lambda: function(*arguments)


def reference(function: Callable[..., object], *arguments: object) -> Run:
    def run() -> object:
        with use_reference():
            return function(*arguments)

    return run


def dense_table(_: object, coords: Tensor) -> Run:
    """A dense grid of rows with an empty border, gathered at each tap."""

    def run() -> Tensor:
        _, x, y, z = coords.long().unbind(1)
        edge = int(coords[:, 1:].max()) + 3
        table = torch.full((edge**3,), -1, dtype=torch.int32, device=coords.device)
        center = ((x + 1) * edge + y + 1) * edge + z + 1
        table[center] = torch.arange(len(coords), dtype=torch.int32, device=coords.device)
        step = torch.arange(-1, 2, device=coords.device)
        steps = ((step[:, None, None] * edge + step[:, None]) * edge + step).flatten()
        return table[center[:, None] + steps]

    return run


def gathered_table(_: object, neighbors: Tensor) -> Run:
    """The plain-torch form of a subdivided map: a gather of parents, scaled."""
    with use_reference():
        origin = subdivided_neighbor_map(torch.arange(27, dtype=torch.int32).expand(27, 27))[:8].long()
    taps, child = (origin // 8).to(device()), (origin % 8).int().to(device())

    def run() -> Tensor:
        parents = neighbors[:, taps]
        return torch.where(parents < 0, -1, 8 * parents + child).view(-1, 27)

    return run


def torch_unique(_: object, coords: Tensor, factor: int = 1) -> Run:
    """torch.unique of packed keys: quicker than unique(dim=0)."""

    def run() -> tuple[Tensor, Tensor]:
        b, x, y, z = coords.long().unbind(1)
        keys = (b << 48) | (x // factor << 32) | (y // factor << 16) | z // factor
        keys, inverse = keys.unique(return_inverse=True)
        return torch.stack([keys >> shift & 0xFFFF for shift in (48, 32, 16, 0)], 1).int(), inverse.int()

    return run


def measure(benchmark, problem: str, scene: str, run: Run, expected: object, moved: Callable[[object], int]) -> None:
    """One row: asserts the result, then times it. `moved`: bytes that must be read or written, from the result."""
    start = time.perf_counter()
    result = run()
    rounds = max(1, min(7, int(3 / (time.perf_counter() - start))))  # slow ones need no repetition to be told apart
    for actual, wanted in zip(as_tuple(result), as_tuple(expected), strict=True):
        assert torch.equal(actual, wanted)
    voxels, traffic = len(voxels_of(scene)), moved(result)
    del result, expected, actual, wanted
    benchmark.group = f"voxel_hash {problem}, {scene}, {voxels} voxels, {torch.get_num_threads()} threads"
    with torch.inference_mode():
        measure_row(benchmark, run, rounds=rounds, gigabytes=1e-9 * traffic)


def as_tuple(result: object) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def named(*implementations: Callable[..., Run]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("implementation", implementations, ids=lambda f: f.__name__)


@MAPS
@named(ours, reference, dense_table)
def test_neighbor_map(benchmark, implementation: Callable[..., Run], scene: str) -> None:
    coords = voxels_of(scene)
    if scene == "1024^3" and implementation is not ours:
        pytest.skip("needs tens of gigabytes")
    if scene == "256^3 shuffled" and implementation is reference:
        pytest.skip("takes a quarter of a minute, like 256^3")
    run = implementation(neighbor_map, coords)
    measure(benchmark, "neighbor map", scene, run, neighbor_map(coords), lambda out: 4 * (out.numel() + coords.numel()))


@pytest.mark.parametrize("scene", ["128^3", "256^3", FULL])
@named(ours, reference, gathered_table)
def test_subdivided_neighbor_map(benchmark, implementation: Callable[..., Run], scene: str) -> None:
    fine = voxels_of(scene)
    if scene == "1024^3" and implementation is not ours:
        pytest.skip("needs tens of gigabytes")
    neighbors = neighbor_map(fine.view(-1, 8, 4)[:, 0] // fine.new_tensor([1, 2, 2, 2]))
    run = implementation(subdivided_neighbor_map, neighbors)
    measure(benchmark, "subdivided map", scene, run, neighbor_map(fine), lambda out: 4 * (out.numel() * 9 // 8))


@SETS
@named(ours, reference, torch_unique)
def test_unique_coords(benchmark, implementation: Callable[..., Run], scene: str) -> None:
    coords = voxels_of(scene)
    run = implementation(unique_coords, coords)
    expected = unique_coords(coords)
    measure(benchmark, "unique", scene, run, expected, lambda out: 4 * (2 * coords.numel() + len(coords)))


@SETS
@named(ours, reference, torch_unique)
def test_coarsen(benchmark, implementation: Callable[..., Run], scene: str) -> None:
    coords = voxels_of(scene)
    run = implementation(coarsen, coords, 2)
    expected = coarsen(coords, 2)
    measure(benchmark, "coarsen", scene, run, expected, lambda out: 4 * (coords.numel() * 9 // 8 + len(coords)))


@pytest.mark.parametrize("scene", ["256^3", FULL])
@named(ours, reference)
def test_subdivide_coords(benchmark, implementation: Callable[..., Run], scene: str) -> None:
    fine = voxels_of(scene)
    coords = fine.view(-1, 8, 4)[:, 0] // fine.new_tensor([1, 2, 2, 2])
    run = implementation(subdivide_coords, coords)
    measure(benchmark, "subdivide", scene, run, fine, lambda out: 4 * (out.numel() * 9 // 8))
