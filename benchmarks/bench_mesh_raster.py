"""Mesh rasterization beside ray casting of the same pixels.

pytest benchmarks/bench_mesh_raster.py
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.device import ON_CPU, ON_GPU, device, measure
from trellis.renderers.camera import Cameras
from trellis_kernels import Rasterization, interpolate, rasterize_mesh

SIZE = 1024
Draw = Callable[[], Tensor]


def bumpy_sphere(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """``[V, 3]`` vertices and ``[F, 3]`` faces, 2 rows columns of them."""
    theta = torch.linspace(1e-3, math.pi - 1e-3, rows + 1)[:, None]
    phi = torch.arange(columns) * (2 * math.pi / columns)
    radius = 0.4 + 0.04 * (7 * theta).sin() * (9 * phi).sin()
    vertices = torch.stack(
        [radius * theta.sin() * phi.cos(), radius * theta.sin() * phi.sin(), radius * theta.cos()], -1
    )
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    a, b = row * columns + column, row * columns + (column + 1) % columns
    faces = torch.stack([torch.stack([a, b, a + columns], -1), torch.stack([b, b + columns, a + columns], -1)], 2)
    return vertices.view(-1, 3), faces.view(-1, 3).int()


def camera() -> Cameras:
    return Cameras.orbit(0.5, 0.4, radius=1.6, near=0.5, far=4.0)


def clip_positions(vertices: Tensor, cameras: Cameras) -> Tensor:
    homogeneous = torch.nn.functional.pad(vertices, (0, 1), value=1.0)
    return homogeneous @ (cameras.projection @ cameras.extrinsics).transpose(1, 2)


def ours(vertices: Tensor, faces: Tensor, cameras: Cameras, size: int) -> Draw:
    return lambda: rasterize_mesh(clip_positions(vertices, cameras), faces, size, size).faces[0]


def embree(vertices: Tensor, faces: Tensor, cameras: Cameras, size: int) -> Draw:
    """One ray per pixel through trimesh and Embree; building its tree is not counted."""
    pytest.importorskip("embreex")
    import trimesh

    mesh = trimesh.Trimesh(vertices.numpy(), faces.numpy(), process=False)
    caster = trimesh.ray.ray_pyembree.RayMeshIntersector(mesh)
    centers = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(centers, centers, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], -1) @ torch.linalg.inv(cameras.intrinsics[0]).T
    directions = (rays.view(-1, 3) @ cameras.extrinsics[0, :3, :3]).numpy()
    origins = cameras.centers.expand(size * size, 3).numpy()
    return lambda: torch.from_numpy(caster.intersects_first(origins, directions)).view(size, size)


@ON_CPU
@pytest.mark.parametrize("implementation", [ours, embree], ids=lambda f: f.__name__)
@pytest.mark.parametrize("rows", [50, 158, pytest.param(500, marks=pytest.mark.full)])
def test_rasterize(benchmark, implementation: Callable[..., Draw], rows: int) -> None:
    (vertices, faces), cameras = bumpy_sphere(rows, 2 * rows), camera()
    expected = ours(vertices, faces, cameras, SIZE)()
    run = implementation(vertices, faces, cameras, SIZE)
    assert (run() != expected).float().mean() < 1e-3  # rays through edges may hit either side
    benchmark.group = f"mesh_raster {len(faces)} faces, {SIZE}^2, {torch.get_num_threads()} threads"
    measure(benchmark, run, rounds=5)


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        *[(rows, SIZE) for rows in (56, 79, 112, 158, 224, 316)],
        *[(158, size) for size in (256, 512, 2048)],
        *[pytest.param(*at, marks=ON_GPU) for at in ((707, 512), (707, 1024), (707, 2048), (1581, 1024))],
    ],
)
def test_time_grows_linearly(benchmark, rows: int, size: int) -> None:
    """The sphere with more and more triangles, and in larger and larger pictures."""
    vertices, faces = (x.to(device()) for x in bumpy_sphere(rows, 2 * rows))
    positions = clip_positions(vertices, camera().to(device()))
    benchmark.group = f"mesh_raster growth, {torch.get_num_threads()} threads"
    benchmark.extra_info["faces"], benchmark.extra_info["pixels"] = len(faces), size * size
    gigabytes = (faces.numel() * 4 + positions.numel() * 4 + size * size * 32) / 1e9
    measure(benchmark, lambda: rasterize_mesh(positions, faces, size, size), rounds=5, warmup=1, gigabytes=gigabytes)


@pytest.mark.parametrize("rows", [158, pytest.param(707, marks=ON_GPU)])
@pytest.mark.parametrize("step", ["layer behind", "interpolate", "forward and backward"])
def test_shading(benchmark, rows: int, step: str) -> None:
    vertices, faces = (x.to(device()) for x in bumpy_sphere(rows, 2 * rows))
    cameras = camera().to(device())
    vertices.requires_grad_(step == "forward and backward")
    drawn: Rasterization = rasterize_mesh(clip_positions(vertices, cameras), faces, SIZE, SIZE)

    def run() -> Tensor:
        if step == "interpolate":
            return interpolate(vertices[None], faces, drawn)
        if step == "layer behind":
            return rasterize_mesh(clip_positions(vertices, cameras), faces, SIZE, SIZE, drawn).faces
        again = rasterize_mesh(clip_positions(vertices, cameras), faces, SIZE, SIZE)
        return torch.autograd.grad(interpolate(vertices[None], faces, again).square().sum(), vertices)[0]

    benchmark.group = f"mesh_raster shading, {step}, {len(faces)} faces, {SIZE}^2, {torch.get_num_threads()} threads"
    measure(benchmark, run, rounds=5)
