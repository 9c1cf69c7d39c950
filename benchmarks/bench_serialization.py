"""Space-filling curves beside plain-torch forms.

pytest benchmarks/bench_serialization.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.device import device
from benchmarks.device import measure as measure_row
from tests.support.scenes import shuffled_within_samples, sphere_voxels
from trellis_kernels import (
    hilbert_codes,
    hilbert_order,
    morton_codes,
    morton_order,
    subdivide_coords,
    use_reference,
)

SCENES = {
    "64^3": lambda: shuffled_within_samples(sphere_voxels(64)),
    "256^3": lambda: shuffled_within_samples(subdivide_coords(subdivide_coords(sphere_voxels(64)))),
    "1024^3": lambda: shuffled_within_samples(subdivide_coords(subdivide_coords(sphere_voxels(256)))),
}
CODES_OF = {morton_order: morton_codes, hilbert_order: hilbert_codes}
scenes = pytest.mark.parametrize("scene", ["64^3", "256^3", pytest.param("1024^3", marks=pytest.mark.full)])
Run = Callable[[], Tensor]


def ours(function: Callable[..., Tensor], coords: Tensor) -> Run:
    return lambda: function(coords)


def reference(function: Callable[..., Tensor], coords: Tensor) -> Run:
    def run() -> Tensor:
        with use_reference():
            return function(coords)

    return run


def our_codes_argsort(function: Callable[..., Tensor], coords: Tensor) -> Run:
    return lambda: CODES_OF[function](coords).argsort(stable=True)


def spread_bits(function: Callable[..., Tensor], coords: Tensor) -> Run:
    """Morton codes by the masks-and-shifts of bit-trick collections, in torch."""
    if function is not morton_codes:
        pytest.skip("Morton only")

    def run() -> Tensor:
        batch, *axes = coords.long().unbind(1)
        code = batch << 48
        for place, bits in zip((2, 1, 0), axes, strict=True):
            for shift, mask in ((16, 0xFF0000FF), (8, 0xF00F00F00F), (4, 0xC30C30C30C3), (2, 0x249249249249)):
                bits = (bits | (bits << shift)) & mask
            code |= bits << place
        return code

    return run


def measure(benchmark, function: Callable[..., Tensor], scene: str, run: Run, expected: Tensor) -> None:
    start = time.perf_counter()
    assert torch.equal(run(), expected)
    rounds = max(1, min(7, int(3 / (time.perf_counter() - start))))
    voxels = len(expected)
    benchmark.group = f"serialization {function.__name__}, {scene}, {voxels} voxels, {torch.get_num_threads()} threads"
    with torch.inference_mode():
        measure_row(benchmark, run, rounds=rounds, gigabytes=24e-9 * voxels)  # a row of 16 bytes read, 8 written


@scenes
@pytest.mark.parametrize("function", [morton_codes, hilbert_codes], ids=lambda f: f.__name__)
@pytest.mark.parametrize("implementation", [ours, reference, spread_bits], ids=lambda f: f.__name__)
def test_codes(benchmark, implementation: Callable[..., Run], function: Callable[..., Tensor], scene: str) -> None:
    coords = SCENES[scene]().to(device())
    measure(benchmark, function, scene, implementation(function, coords), function(coords))


@scenes
@pytest.mark.parametrize("function", [morton_order, hilbert_order], ids=lambda f: f.__name__)
@pytest.mark.parametrize("implementation", [ours, reference, our_codes_argsort], ids=lambda f: f.__name__)
def test_order(benchmark, implementation: Callable[..., Run], function: Callable[..., Tensor], scene: str) -> None:
    coords = SCENES[scene]().to(device())
    measure(benchmark, function, scene, implementation(function, coords), function(coords))
