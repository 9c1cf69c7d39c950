"""FlexiCubes on sparse cubes beside the dense form in plain torch that the official code uses.

    pytest benchmarks/bench_mesh_extraction.py [--full]

The scene is a sphere with noise: a shell of voxels, each divided into 4^3 cubes, as the mesh decoder does. The official
size is 64 voxels, 256 cells per axis (`--full` runs the dense form there too, which takes gigabytes).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.dense_flexicubes import dense_extract
from benchmarks.device import device
from benchmarks.device import measure as measure_row
from tests.support.scenes import sphere_voxels
from trellis_kernels import ExtractedMesh, extract_mesh, use_reference
from trellis_kernels.mesh_extraction.tables import corner_offsets


def scene(voxels: int) -> tuple[Tensor, Tensor, int]:
    """Cubes, network output ``[N, 101]`` and resolution."""
    generator = torch.Generator().manual_seed(0)
    coords = sphere_voxels(voxels, thickness=1.17)[:, 1:]
    for _ in range(2):
        coords = (coords[:, None] * 2 + corner_offsets().flip(1)).flatten(0, 1).int()
    resolution = 4 * voxels
    feats = torch.randn(len(coords), 101, generator=generator)
    points = (coords[:, None] + corner_offsets()) / resolution - 0.5
    noise = torch.randn(len(coords), 8, generator=generator) * 0.1
    feats[:, :8] = points.norm(dim=2) - 0.4 + (1 + noise) / resolution
    return coords.contiguous().to(device()), feats.to(device()), resolution


def ours(coords: Tensor, feats: Tensor, resolution: int, training: bool) -> ExtractedMesh:
    return extract_mesh(coords, feats, resolution, training)


def reference(coords: Tensor, feats: Tensor, resolution: int, training: bool) -> ExtractedMesh:
    with use_reference():
        return extract_mesh(coords, feats, resolution, training)


def dense(coords: Tensor, feats: Tensor, resolution: int, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    if training:
        pytest.skip("the dense form here is the evaluation form")
    return dense_extract(coords, feats, resolution)


SMALL, OFFICIAL = 16, 64
EXTRACTIONS = [
    (ours, SMALL, ()),
    (reference, SMALL, ()),
    (dense, SMALL, ()),
    (ours, OFFICIAL, ()),
    (reference, OFFICIAL, pytest.mark.full),
    (dense, OFFICIAL, pytest.mark.full),
]


def measure(benchmark, group: str, run: Callable[[], object], gigabytes: float, rounds: int = 5) -> None:
    benchmark.group = group
    measure_row(benchmark, run, rounds=rounds, warmup=1, gigabytes=gigabytes)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    ("implementation", "voxels"),
    [pytest.param(f, voxels, marks=marks, id=f"{4 * voxels}^3-{f.__name__}") for f, voxels, marks in EXTRACTIONS],
)
def test_extract(benchmark, implementation, voxels: int, training: bool) -> None:
    coords, feats, resolution = scene(voxels)
    group = f"mesh_extraction {'training' if training else 'evaluation'} {resolution}^3, {len(coords)} cubes"
    with torch.inference_mode():
        if voxels == SMALL:
            assert_same(implementation(coords, feats, resolution, training), ours(coords, feats, resolution, training))
        run = partial(implementation, coords, feats, resolution, training)
        gigabytes = 4e-9 * (feats.numel() + coords.numel())
        measure(benchmark, group, run, gigabytes, 5 if implementation is ours or voxels == SMALL else 2)


@pytest.mark.parametrize(
    ("implementation", "voxels"),
    [
        pytest.param(f, voxels, id=f"{4 * voxels}^3-{f.__name__}")
        for f, voxels, marks in EXTRACTIONS[:2] + EXTRACTIONS[3:4]
    ],
)
def test_backward(benchmark, implementation, voxels: int) -> None:
    coords, feats, resolution = scene(voxels)
    feats.requires_grad_()
    mesh = implementation(coords, feats, resolution, True)
    loss = mesh.vertices.sum() + mesh.attributes.sum() + torch.stack(mesh.terms[:3]).sum()

    def run() -> None:
        if implementation is reference:
            with use_reference():
                torch.autograd.grad(loss, feats, retain_graph=True)
        else:
            torch.autograd.grad(loss, feats, retain_graph=True)

    measure(benchmark, f"mesh_extraction backward {resolution}^3, {len(coords)} cubes", run, 8e-9 * feats.numel())


def assert_same(actual, expected: ExtractedMesh) -> None:
    """The same vertices in some order, and as many faces."""
    assert len(actual[1]) == len(expected.faces)
    assert len(actual[0]) == len(expected.vertices)
    nearest = torch.cdist(actual[0][::50].double(), expected.vertices.double()).min(1)
    assert nearest.values.max() < 1e-5
    torch.testing.assert_close(actual[2][::50], expected.attributes[nearest.indices], rtol=1e-4, atol=1e-4)
