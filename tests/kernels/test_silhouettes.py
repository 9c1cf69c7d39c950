"""antialias and face_neighbors: exact coverage, derivatives, small triangles."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.backends import CUDA_BACKENDS
from trellis_kernels import Rasterization, antialias, face_neighbors, rasterize_mesh, use_reference

OPS = torch.ops.trellis_kernels


def square(left: float, top: float, right: float, bottom: float, size: int, split: int = 1) -> tuple[Tensor, Tensor]:
    """Clip positions and faces of a rectangle given in pixels, split into squares of two triangles."""
    x = torch.linspace(left, right, split + 1, dtype=torch.float64)
    y = torch.linspace(top, bottom, split + 1, dtype=torch.float64)
    yy, xx = torch.meshgrid(y, x, indexing="ij")
    xy = torch.stack([xx, yy], -1).view(-1, 2) * (2 / size) - 1
    positions = torch.cat([xy, torch.zeros(len(xy), 1), torch.ones(len(xy), 1)], 1)[None] * 1.5
    first = (torch.arange(split)[:, None] * (split + 1) + torch.arange(split)).view(-1)
    faces = torch.stack([first, first + 1, first + split + 1, first + 1, first + split + 2, first + split + 1], 1)
    return positions, faces.view(-1, 3).int()


def mask(positions: Tensor, faces: Tensor, size: int) -> Tensor:
    drawn = rasterize_mesh(positions, faces, size, size)
    return antialias((drawn.faces >= 0)[..., None].to(positions.dtype), drawn, positions, faces)


def sphere(rows: int) -> tuple[Tensor, Tensor]:
    """``[V, 3]`` points of a sphere of radius 1 without seams, and its faces."""
    theta = torch.linspace(0, torch.pi, rows + 1, dtype=torch.float64)[1:-1, None]
    phi = torch.arange(2 * rows, dtype=torch.float64) * (torch.pi / rows)
    points = torch.stack(torch.broadcast_tensors(theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()), -1)
    poles = torch.tensor([[0, 0, 1.0], [0, 0, -1]], dtype=torch.float64)
    at = torch.arange((rows - 1) * 2 * rows).view(rows - 1, 2 * rows)
    a, b, c, d = at[:-1], at[:-1].roll(-1, 1), at[1:], at[1:].roll(-1, 1)
    last = at.numel()
    faces = [torch.stack(corners, -1).view(-1, 3) for corners in ((a, c, b), (b, c, d))]
    faces += [torch.stack([torch.full_like(at[0], last), at[0], at[0].roll(-1)], -1)]
    faces += [torch.stack([torch.full_like(at[0], last + 1), at[-1].roll(-1), at[-1]], -1)]
    return torch.cat([points.view(-1, 3), poles]), torch.cat(faces).int()


def seen(points: Tensor) -> Tensor:
    """Clip positions of points around the origin, from 3 in front of them."""
    z = points[..., 2:] + 3
    return torch.cat([1.7 * points[..., :2], z - 2.9, z], -1)


def random_scene(views: int, faces: int, size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    w = torch.rand(views, faces + 3, 1) * 2 + 0.2
    positions = torch.cat([torch.randn(views, faces + 3, 2), torch.rand(views, faces + 3, 1) * 1.2 - 0.6, w], -1)
    triangles = torch.stack([torch.arange(faces + 3).roll(-k)[:faces] for k in (0, 1, 2)], 1)  # a strip, in a tangle
    positions, triangles = positions.to(dtype), triangles.int()
    with use_reference():
        drawn = rasterize_mesh(positions, triangles, *size)
    return torch.rand(views, size[1], size[0], 3).to(dtype), drawn.faces, drawn.depths, positions, triangles


def assert_agrees(views: int, faces: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    images, ids, depths, positions, triangles = random_scene(views, faces, size, dtype)
    neighbors = face_neighbors(triangles)
    with use_reference():
        assert torch.equal(neighbors, face_neighbors(triangles))
        expected = OPS.antialias(images, ids, depths, positions, triangles, neighbors)
    actual = OPS.antialias(images, ids, depths, positions, triangles, neighbors)
    same = (actual[2] == expected[2]).all(-1)
    assert (~same).sum() <= 2  # two edges that meet between two pixels are told apart by the last bit
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5}[dtype]
    torch.testing.assert_close(actual[1][same], expected[1][same], rtol=0, atol=tolerance)
    if same.all():
        torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=tolerance)
    backward = torch.randn_like(images), images, positions, triangles, *expected[1:]
    for one, other in zip(OPS.antialias_gradient(*backward), _of_reference(*backward), strict=True):
        scale = float(other.abs().max()) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, scale))


def _of_reference(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    with use_reference():
        return OPS.antialias_gradient(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("views", "faces", "size"), [(1, 1, (1, 1)), (2, 40, (33, 18)), (1, 200, (57, 41)), (3, 0, (4, 5)), (1, 3, (1, 9))]
)
def test_kernels_agree_with_references(dtype: torch.dtype, views: int, faces: int, size: tuple[int, int]) -> None:
    assert_agrees(views, faces, size, dtype)


@CUDA_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("views", "faces", "size"), [(2, 40, (33, 18)), (1, 120, (25, 31)), (3, 0, (4, 5)), (1, 3, (1, 9))]
)
def test_gpu_kernels_agree_with_references(
    backend: str, dtype: torch.dtype, views: int, faces: int, size: tuple[int, int]
) -> None:
    assert_agrees(views, faces, size, dtype)


@pytest.mark.parametrize("split", [1, 7, 24])
def test_straight_edges_have_exact_coverage(split: int) -> None:
    """Also where the triangles are smaller than a pixel."""
    left, top, right, bottom = 2.3, 3.9, 11.6, 9.25
    positions, faces = square(left, top, right, bottom, 16, split)
    shown = mask(positions, faces, 16)[0, ..., 0]
    at = torch.arange(16, dtype=torch.float64)
    across, down = (
        (torch.minimum(at + 1, at.new_tensor(high)) - torch.maximum(at, at.new_tensor(low))).clamp_min(0)
        for low, high in ((left, right), (top, bottom))
    )
    exact = down[:, None] * across
    corner = ((down > 0) & (down < 1))[:, None] & ((across > 0) & (across < 1))
    torch.testing.assert_close(shown[~corner], exact[~corner], rtol=0, atol=1e-12)
    assert (shown - exact)[corner].abs().max() < 0.5


@CUDA_BACKENDS
def test_neighbors_share_an_edge(backend: str) -> None:
    faces = torch.tensor([[0, 1, 2], [1, 3, 2], [3, 1, 4], [5, 3, 1], [6, 7, 8], [8, 7, 6]], dtype=torch.int32)
    # 1-3 has three triangles; 4 and 5 are two sides of one.
    expected = [[1, -1, -1], [-1, 0, -1], [-1, -1, -1], [-1, -1, -1], [5, 5, 5], [5, 5, 5]]
    expected[5] = [4, 4, 4]
    assert face_neighbors(faces).tolist() == expected
    assert face_neighbors(faces[:0]).shape == (0, 3)


def test_gradients_in_positions_and_colors() -> None:
    positions, faces = square(2.3, 3.9, 11.6, 9.2, 16, 2)
    positions = positions + 0.02 * torch.randn_like(positions)
    drawn = rasterize_mesh(positions, faces, 16, 16)
    images = torch.rand(1, 16, 16, 2, dtype=torch.float64)
    leaves = positions.clone().requires_grad_(), images.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, i: antialias(i, drawn, p, faces), leaves, atol=1e-6)


@given(angle=st.floats(0, 6.28), offset=st.floats(-2.0, 2.0))
@settings(max_examples=20, deadline=None)
def test_a_half_plane_has_its_coverage_in_every_row_or_column(angle: float, offset: float) -> None:
    """What a line cuts off of a row of pixels is the length left of it in the middle of the row."""
    size = 16
    normal = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    along = torch.stack([-normal[1], normal[0]])
    ends = [normal * (0.1 * offset + far) + along * wide for far, wide in ((0, -9), (0, 9), (-9, 9), (-9, -9))]
    corners = torch.stack(ends)
    positions = torch.cat([corners, torch.zeros(4, 1), torch.ones(4, 1)], 1)[None]
    shown = mask(positions, torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32), size)[0, ..., 0]
    upright = normal[0].abs() >= normal[1].abs()
    rows, lead, other = (shown, normal[0], normal[1]) if upright else (shown.T, normal[1], normal[0])
    at = (torch.arange(size, dtype=torch.float64) + 0.5) * 2 / size - 1
    crossing = ((0.1 * offset - other * at) / lead + 1) * size / 2  # in pixels
    covered = crossing.clamp(0, size) if lead > 0 else size - crossing.clamp(0, size)
    inside = (crossing > 0.5) & (crossing < size - 0.5)
    torch.testing.assert_close(rows.sum(1)[inside], covered[inside], rtol=0, atol=1e-9)


@pytest.mark.parametrize("rows", [8, 60])
def test_only_silhouettes_of_a_closed_surface_are_blended(rows: int) -> None:
    points, faces = sphere(rows)
    drawn = rasterize_mesh(seen(points)[None], faces, 48, 48)
    images = torch.rand(1, 48, 48, 3, dtype=torch.float64)
    changed = (antialias(images, drawn, seen(points)[None], faces) != images).any(-1)[0]
    hit = torch.nn.functional.pad((drawn.faces[0] >= 0).double(), (1, 1, 1, 1))[None, None]
    near = torch.nn.functional.conv2d(hit, torch.tensor([[[[0.0, 1, 0], [1, 5, 1], [0, 1, 0]]]]).double())[0, 0]
    border = (near > 0) & (near < 9)
    assert (changed <= border).all()
    assert changed.sum() > 60


@pytest.mark.parametrize("rows", [6, 40])
def test_the_gradient_of_a_silhouette_is_that_of_a_supersampled_picture(rows: int) -> None:
    """Triangles of many pixels, and of one; of a smooth function of the picture."""
    points, faces = sphere(rows)
    turn = torch.tensor([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1]], dtype=torch.float64)[:, [2, 0, 1]]
    points = points @ turn
    y, x = torch.meshgrid(*[(torch.arange(512, dtype=torch.float64) + 0.5) / 512] * 2, indexing="ij")
    weights = (3 * x + 1).sin() * (4 * y).cos() + 0.5 * x

    def moved(by: Tensor) -> Tensor:
        return (seen(points * (1 + by[2]) + torch.cat([by[:2], by.new_zeros(1)])))[None]

    def supersampled(by: list[float]) -> float:
        drawn = rasterize_mesh(moved(torch.tensor(by, dtype=torch.float64)), faces, 512, 512)
        return float(((drawn.faces[0] >= 0) * weights).sum()) / 8**2

    by = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    coarse = weights.view(64, 8, 64, 8).mean((1, 3))
    value = (mask(moved(by), faces, 64)[0, ..., 0] * coarse).sum()
    assert float(value.detach()) == pytest.approx(supersampled([0, 0, 0]), abs=0.3)
    (gradient,) = torch.autograd.grad(value, by)
    step = 0.03
    for axis in range(3):
        ahead, back = ([sign * step * (k == axis) for k in range(3)] for sign in (1, -1))
        numeric = (supersampled(ahead) - supersampled(back)) / (2 * step)
        assert float(gradient[axis]) == pytest.approx(numeric, rel=0.03)


def test_bad_triangles_are_left_out() -> None:
    """Beside a square lie a triangle that is not a number, one that has no area, and nothing at all."""
    good, faces = square(2.3, 3.9, 11.6, 9.25, 16)
    extra = torch.tensor([[[float("nan"), 0, 0, 1], [0.9, 0.9, 0, 1]]], dtype=torch.float64)
    positions = torch.cat([good, extra], 1).requires_grad_()
    beside = torch.tensor([[0, 1, 4], [0, 2, 2], [1, 3, 3]], dtype=torch.int32)
    expected = mask(good, faces, 16)
    for context in (use_reference, torch.enable_grad):
        with context():
            shown = mask(positions, torch.cat([faces, beside]), 16)
            (gradient,) = torch.autograd.grad(shown.sum(), positions)
        torch.testing.assert_close(shown, expected)
        assert gradient.isfinite().all()
        assert (gradient[0, 4:] == 0).all()


def test_results_do_not_depend_on_the_thread_count() -> None:
    images, ids, depths, positions, faces = random_scene(2, 300, (70, 50), torch.float32)
    leaves, threads, results = (images.requires_grad_(), positions.requires_grad_()), torch.get_num_threads(), []
    drawn = Rasterization(ids, ids, depths, ids)
    for count in (1, 3):
        torch.set_num_threads(count)
        shown = antialias(images, drawn, positions, faces)
        results.append([face_neighbors(faces), shown, *torch.autograd.grad(shown.square().sum(), leaves)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operator_contracts() -> None:
    images, ids, depths, positions, faces = random_scene(2, 9, (9, 7), torch.float32)
    neighbors = face_neighbors(faces)
    torch.library.opcheck(OPS.face_neighbors.default, (faces,))
    leaves = images.requires_grad_(), ids, depths, positions.requires_grad_(), faces, neighbors
    torch.library.opcheck(OPS.antialias.default, leaves)
    _, shares, edges = OPS.antialias(*(tensor.detach() for tensor in leaves))
    backward = torch.rand_like(images), images.detach(), positions.detach(), faces, shares, edges
    torch.library.opcheck(OPS.antialias_gradient.default, backward)
    drawn = Rasterization(ids, ids, depths, ids)
    compiled = torch.compile(antialias, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, drawn, positions, faces), antialias(images, drawn, positions, faces))
    shown = antialias(images, drawn, positions, faces).square().sum()
    (first,) = torch.autograd.grad(shown, images, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative of antialias"):
        first.sum().backward()


def test_arguments_that_do_not_fit_are_named() -> None:
    positions, faces = square(1, 1, 5, 5, 8)
    drawn = rasterize_mesh(positions, faces, 8, 8)
    image = torch.rand(1, 8, 8, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"images must be torch.float64; got torch.float32"):
        antialias(image.float(), drawn, positions, faces)
    with pytest.raises(ValueError, match=r"ids must be \[B, H, W\] with B=1, H=8, W=7; got \[1, 8, 8\]"):
        antialias(image[:, :, 1:], drawn, positions, faces)
    with pytest.raises(ValueError, match=r"rasterization.faces must be below F=1; got 1"):
        antialias(image, drawn, positions, faces[:1])
    with pytest.raises(ValueError, match=r"faces must be in \[0, 4\); got .* in row 1"):
        antialias(image, drawn, positions, torch.tensor([[0, 1, 2], [1, 4, 2]], dtype=torch.int32))
