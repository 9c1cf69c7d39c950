"""Texture lookup and antialiasing beside torch's grid_sample, which has neither levels nor wrapping.

pytest benchmarks/bench_texture.py
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from benchmarks.bench_mesh_raster import SIZE, bumpy_sphere, camera, clip_positions
from benchmarks.device import device, measure
from trellis_kernels import antialias, face_neighbors, interpolate_derivatives, rasterize_mesh, sample_texture

TEXTURE = 2048
Problem = tuple[Tensor, Tensor, Tensor, Tensor]
Look = Callable[[Tensor, Tensor, Tensor], Tensor]


def problem() -> Problem:
    """A texture, a floor that runs away from the camera (levels 0 to 3), turned by 0.5, and a gradient."""
    with device():
        texture = torch.rand(1, TEXTURE, TEXTURE, 3)
        y, x = torch.meshgrid(*[(torch.arange(SIZE) + 0.5) / SIZE] * 2, indexing="ij")
        far = 1 / (0.25 + 0.75 * y)  # distance: 4 at the top to 1 at the bottom
        floor = torch.stack([(x - 0.5) * far, far / 2], -1)
        turn = torch.tensor([[math.cos(0.5), -math.sin(0.5)], [math.sin(0.5), math.cos(0.5)]])
        uv = 0.25 * floor @ turn + 0.5
        dx, dy = torch.gradient(uv, dim=(1, 0))
        derivatives = torch.stack([dx[..., 0], dy[..., 0], dx[..., 1], dy[..., 1]], -1)
        return texture, uv[None].contiguous(), derivatives[None], torch.randn(1, SIZE, SIZE, 3)


def ours(texture: Tensor, uv: Tensor, derivatives: Tensor) -> Tensor:
    return sample_texture(texture, uv, derivatives, "zero")


def ours_without_levels(texture: Tensor, uv: Tensor, derivatives: Tensor) -> Tensor:
    return sample_texture(texture, uv, None, "zero")


def torch_without_levels(texture: Tensor, uv: Tensor, derivatives: Tensor) -> Tensor:
    return grid_sample(texture.movedim(3, 1), 2 * uv - 1, align_corners=False).movedim(1, 3)


def torch_levels(texture: Tensor, uv: Tensor, derivatives: Tensor) -> Tensor:
    """All levels in use for all pixels, each weighted by how near it is to the pixel's."""
    jacobian = derivatives.unflatten(-1, (2, 2)) * TEXTURE
    level = torch.linalg.matrix_norm(jacobian, 2).log2().clamp(0, 11)
    image, out = texture.movedim(3, 1), torch.zeros_like(texture[:, :1, :1])
    for index in range(int(level.max().ceil()) + 1):
        if index:
            image = avg_pool2d(image, 2)
        share = (1 - (level - index).abs()).clamp_min(0)[..., None]
        out = out + share * grid_sample(image, 2 * uv - 1, align_corners=False).movedim(1, 3)
    return out


PLAIN, LEVELS = [ours_without_levels, torch_without_levels], [ours, torch_levels]
ROWS = pytest.mark.parametrize("look", PLAIN + LEVELS, ids=lambda f: f.__name__)


def group(what: str, look: Look) -> str:
    kind = "levels" if look in LEVELS else "no levels"
    return f"texture {what}, {kind}, {SIZE}^2 pixels of {TEXTURE}^2, {torch.get_num_threads()} threads"


@ROWS
def test_look_up(benchmark, look: Look) -> None:
    texture, uv, derivatives, _ = problem()
    expected = (ours if look in LEVELS else ours_without_levels)(texture, uv, derivatives)
    torch.testing.assert_close(look(texture, uv, derivatives), expected, rtol=0, atol=2e-3)
    benchmark.group = group("lookup", look)
    measure(benchmark, lambda: look(texture, uv, derivatives), rounds=5)


@pytest.mark.parametrize("wanted", ["texture", "texture and uv"])
@ROWS
def test_backward(benchmark, look: Look, wanted: str) -> None:
    texture, uv, derivatives, gradient = problem()
    leaves = [texture.requires_grad_(), uv.requires_grad_()][: 1 + ("uv" in wanted)]
    uv.requires_grad_("uv" in wanted)
    shown = look(texture, uv, derivatives)
    benchmark.group = group(f"backward ({wanted})", look)
    measure(benchmark, lambda: torch.autograd.grad(shown, leaves, gradient, retain_graph=True), rounds=5)


@pytest.mark.parametrize("step", ["derivatives", "neighbors", "antialias", "antialias backward"])
def test_silhouettes(benchmark, step: str) -> None:
    (vertices, faces), cameras = bumpy_sphere(158, 316), camera()
    positions = clip_positions(vertices, cameras).to(device()).requires_grad_()
    faces = faces.to(device())
    drawn, neighbors = rasterize_mesh(positions.detach(), faces, SIZE, SIZE), face_neighbors(faces)
    with device():
        colors, uv = torch.rand(1, SIZE, SIZE, 3, requires_grad=True), torch.rand(1, len(vertices), 2)
    shown = antialias(colors, drawn, positions, faces, neighbors)
    runs: dict[str, Callable[[], object]] = {
        "derivatives": lambda: interpolate_derivatives(uv, faces, drawn),
        "neighbors": lambda: face_neighbors(faces),
        "antialias": lambda: antialias(colors, drawn, positions, faces, neighbors),
        "antialias backward": lambda: torch.autograd.grad(
            shown, (colors, positions), torch.ones_like(shown), retain_graph=True
        ),
    }
    benchmark.group = f"texture silhouettes, {len(faces)} faces, {SIZE}^2, {torch.get_num_threads()} threads"
    measure(benchmark, runs[step], rounds=5)
