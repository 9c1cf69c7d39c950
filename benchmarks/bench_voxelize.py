"""Surface voxels of a mesh at 64^3 beside trimesh, which splits triangles until they are smaller than a voxel.

pytest benchmarks/bench_voxelize.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import trimesh
from torch import Tensor
from trimesh.voxel.creation import voxelize_subdivide

from benchmarks.device import ON_CPU, measure
from trellis_kernels import voxelize_mesh

RESOLUTION = 64
Voxelize = Callable[[Tensor, Tensor], Tensor]


def ours(vertices: Tensor, faces: Tensor) -> Tensor:
    return voxelize_mesh(vertices, faces, RESOLUTION)


def trimesh_subdivide(vertices: Tensor, faces: Tensor) -> Tensor:
    """Only the voxels that corners of the split triangles fall into: not all of those touched."""
    mesh = trimesh.Trimesh(vertices.numpy(), faces.numpy(), process=False)
    points = voxelize_subdivide(mesh, 1 / RESOLUTION).points
    return ((torch.tensor(points) + 0.5) * RESOLUTION).floor().int().clamp(0, RESOLUTION - 1)


@ON_CPU
@pytest.mark.parametrize("implementation", [ours, trimesh_subdivide], ids=lambda f: f.__name__)
@pytest.mark.parametrize("subdivisions", [3, 6])
def test_voxelize(benchmark, subdivisions: int, implementation: Voxelize) -> None:
    sphere = trimesh.creation.icosphere(subdivisions, radius=0.45)
    vertices = torch.from_numpy(sphere.vertices).float()
    faces = torch.from_numpy(sphere.faces).int()
    centers = (ours(vertices, faces) + 0.5) / RESOLUTION - 0.5
    assert (centers.norm(dim=1) - 0.45).abs().max() < 1.5 / RESOLUTION
    if implementation is not ours:  # it puts its voxels half a voxel off, so only their number can be compared
        assert 0.3 < len(implementation(vertices, faces).unique(dim=0)) / len(centers) < 1.2
    benchmark.group = f"voxelize {len(faces)} triangles at {RESOLUTION}^3, {torch.get_num_threads()} threads"
    measure(benchmark, lambda: implementation(vertices, faces), rounds=5)
