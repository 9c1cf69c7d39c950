"""rasterize_mesh and interpolate: reference, closed forms, watertight edges, layers, derivatives."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.backends import CUDA_BACKENDS
from trellis_kernels import Rasterization, interpolate, rasterize_mesh, use_reference
from trellis_kernels.mesh_raster import reference

OPS = torch.ops.trellis_kernels
few_examples = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_mesh(
    views: int, vertices: int, faces: int, dtype: torch.dtype, behind: bool = False
) -> tuple[Tensor, Tensor]:
    """Triangles in and around the picture; with `behind`, some reach behind the camera."""
    w = torch.rand(views, vertices, 1) * 2 + (-0.5 if behind else 0.5)
    positions = torch.cat([torch.randn(views, vertices, 2), torch.rand(views, vertices, 1) * 1.2 - 0.6, w], -1)
    triangles = torch.stack([torch.randperm(vertices)[:3] for _ in range(faces)]) if faces else torch.zeros(0, 3)
    return positions.to(dtype), triangles.int()


def without_twins(faces: Tensor) -> Tensor:
    """Drops faces on the same three vertices: which of two coincident ones is nearer is a matter of rounding."""
    seen = {tuple(sorted(face)): i for i, face in enumerate(faces.tolist())}
    return faces[sorted(seen.values())]


def layers(positions: Tensor, faces: Tensor, width: int, height: int) -> list[Rasterization]:
    first = rasterize_mesh(positions, faces, width, height)
    return [first, rasterize_mesh(positions, faces, width, height, first)]


def assert_agrees(actual: Rasterization, expected: Rasterization) -> None:
    same = actual.faces == expected.faces
    # Two triangles that intersect in a pixel's center may be told apart by the last bit of a float.
    assert (~same).sum() <= 2
    tight = {torch.float64: 1e-9, torch.float32: 2e-5}[actual.depths.dtype]
    torch.testing.assert_close(actual.depths[same], expected.depths[same], rtol=0, atol=tight)
    torch.testing.assert_close(actual.barycentrics[same], expected.barycentrics[same], rtol=0, atol=tight)
    torch.testing.assert_close(actual.derivatives[same], expected.derivatives[same], rtol=1e-4, atol=tight)


@CUDA_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    ("views", "faces", "size"), [(1, 1, (1, 1)), (2, 40, (33, 18)), (1, 300, (57, 61)), (3, 0, (4, 5))]
)
def test_kernel_agrees_with_reference(
    backend: str, dtype: torch.dtype, behind: bool, views: int, faces: int, size: tuple[int, int]
) -> None:
    positions, triangles = random_mesh(views, max(3, faces), faces, dtype, behind)
    first, second = layers(positions, triangles, *size)
    with use_reference():
        expected = layers(positions, triangles, *size)
    assert_agrees(first, expected[0])
    assert_agrees(second, expected[1])
    colors = torch.randn(views, positions.shape[1], 5, dtype=dtype)
    gradient = torch.randn(*first.faces.shape, 5, dtype=dtype)
    by_barycentrics, by_depths = torch.randn_like(first.barycentrics), torch.randn_like(first.depths)
    for attributes in (colors, colors[:1]):
        calls = [
            lambda a=attributes: [OPS.interpolate(a, triangles, first.faces, first.barycentrics)],
            lambda a=attributes: OPS.interpolate_gradient(gradient, a, triangles, first.faces, first.barycentrics),
            lambda: [OPS.rasterize_mesh_gradient(positions, triangles, first.faces, by_barycentrics, by_depths)],
        ]
        for call in calls:
            actual = call()
            with use_reference():
                expected = call()
            for one, other in zip(actual, expected, strict=True):
                scale = float(other.abs().max()) if other.numel() else 1.0
                tolerance = {torch.float64: 1e-10, torch.float32: 2e-5}[dtype]
                torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, scale))


def screen(*corners: tuple[float, float], size: int, depth: float = 0.0, w: float = 1.0) -> Tensor:
    """``[1, V, 4]`` clip positions of points given in pixels."""
    xy = torch.tensor(corners) * (2 / size) - 1
    return torch.cat([xy * w, torch.full((len(corners), 1), depth * w), torch.full((len(corners), 1), w)], 1)[None]


@CUDA_BACKENDS
def test_a_right_triangle_covers_the_pixels_it_must(backend: str) -> None:
    positions = screen((0, 0), (8, 0), (0, 8), size=8)
    drawn = rasterize_mesh(positions, torch.tensor([[0, 1, 2]], dtype=torch.int32), 8, 8)
    x, y = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy")
    inside = x + y < 7  # centers on the slope, x + y = 7, belong to whoever is on its right
    assert torch.equal(drawn.faces[0] == 0, inside)
    weights = torch.stack([1 - (x + y + 1) / 8, (x + 0.5) / 8], -1)
    torch.testing.assert_close(drawn.barycentrics[0][inside], weights[inside], rtol=0, atol=1e-6)
    steps = torch.tensor([-0.125, -0.125, 0.125, 0.0]).expand(8, 8, 4)
    torch.testing.assert_close(drawn.derivatives[0][inside], steps[inside], rtol=0, atol=1e-6)


@CUDA_BACKENDS
@given(seed=st.integers(0, 999), size=st.integers(1, 40))
@few_examples
def test_shared_edges_are_watertight(backend: str, seed: int, size: int) -> None:
    """A fan of triangles around an inner point, in any orientation: each pixel of the square is drawn exactly once."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.randint(0, 2 * size + 1, (2,), generator=generator) / 2  # often exactly a pixel's center
    corners = [(0.0, 0.0), (size / 2, 0.0), (size, 0.0), (size, size), (0.0, size)]
    positions = screen((float(center[0]), float(center[1])), *corners, size=size)
    faces = torch.tensor([[0, i, i % 5 + 1] for i in range(1, 6)], dtype=torch.int32)
    turned = torch.stack(
        [face.roll(int(i)) for face, i in zip(faces, torch.randint(3, (5,), generator=generator), strict=True)]
    )
    turned[::2] = turned[::2].flip(1)
    first = rasterize_mesh(positions, turned, size, size)
    assert (first.faces >= 0).all()
    assert (rasterize_mesh(positions, turned, size, size, first).faces == -1).all()


@CUDA_BACKENDS
@given(seed=st.integers(0, 999), turn=st.integers(0, 2), flip=st.booleans())
@few_examples
def test_the_picture_does_not_depend_on_how_triangles_are_written(
    backend: str, seed: int, turn: int, flip: bool
) -> None:
    torch.manual_seed(seed)
    positions, faces = random_mesh(1, 30, 20, torch.float64, behind=True)
    faces = without_twins(faces)
    written = faces.roll(turn, 1).flip(1) if flip else faces.roll(turn, 1)
    one, other = rasterize_mesh(positions, faces, 25, 19), rasterize_mesh(positions, written, 25, 19)
    assert torch.equal(one.faces, other.faces)
    colors = torch.rand(1, 30, 3, dtype=torch.float64)
    torch.testing.assert_close(interpolate(colors, faces, one), interpolate(colors, written, other), rtol=0, atol=1e-9)


@CUDA_BACKENDS
def test_interpolation_is_perspective_correct(backend: str) -> None:
    """Attributes that are the camera-space point itself come out where the ray of each pixel meets the triangle."""
    points = torch.tensor([[-3.0, -2.0, 2.0], [4.0, -3.0, 9.0], [0.5, 6.0, 5.0]], dtype=torch.float64)
    clip = torch.cat([points, points[:, 2:]], 1)[None]  # x / z, y / z; depth is 1 everywhere
    faces = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    drawn = rasterize_mesh(clip, faces, 16, 12)
    seen = interpolate(points[None], faces, drawn)[0]
    normal = torch.linalg.cross(points[1] - points[0], points[2] - points[0])
    x, y = torch.meshgrid(
        (torch.arange(16) + 0.5).double() / 8 - 1, (torch.arange(12) + 0.5).double() / 6 - 1, indexing="xy"
    )
    rays = torch.stack([x, y, torch.ones_like(x)], -1)
    expected = rays * ((points[0] @ normal) / (rays @ normal))[..., None]
    hit = drawn.faces[0] >= 0
    assert hit.sum() > 20
    torch.testing.assert_close(seen[hit], expected[hit], rtol=0, atol=1e-9)
    assert (seen[~hit] == 0).all()


@CUDA_BACKENDS
def test_the_nearest_triangle_wins_and_layers_follow_in_depth(backend: str) -> None:
    square = ((0, 0), (8, 0), (8, 8), (0, 8))
    positions = torch.cat([screen(*square, size=8, depth=d, w=2.0) for d in (0.5, -0.2, 0.1, -0.2)], 1)
    faces = torch.tensor(
        [[4 * k, 4 * k + 1, 4 * k + 2] for k in range(4)] + [[4 * k, 4 * k + 2, 4 * k + 3] for k in range(4)]
    )
    layer: Rasterization | None = None
    for squares in (1, 3, 2, 0):  # of the two at -0.2 the lower row comes first
        layer = rasterize_mesh(positions, faces.int(), 8, 8, layer)
        assert ((layer.faces == squares) | (layer.faces == squares + 4)).all()
    assert layer is not None
    last = rasterize_mesh(positions, faces.int(), 8, 8, layer)
    assert (last.faces == -1).all()
    assert (last.depths == 1).all()


@CUDA_BACKENDS
def test_what_cannot_be_seen_is_not_drawn(backend: str) -> None:
    size = 6
    full = screen((-9, -9), (30, -9), (-9, 30), size=size)
    cases = {
        "too near": full * torch.tensor([1, 1, 0, 1]) - torch.tensor([0, 0, 1.01, 0]),
        "too far": full * torch.tensor([1, 1, 0, 1]) + torch.tensor([0, 0, 1.01, 0]),
        "behind the camera": -full,
        "degenerate": full[:, [0, 1, 1]],
        "not a number": full * torch.tensor([1, float("nan"), 1, 1]),
        "infinite": full * torch.tensor([float("inf"), 1, 1, 1]),
    }
    face = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    assert (rasterize_mesh(full, face, size, size).faces == 0).all()
    for name, positions in cases.items():
        assert (rasterize_mesh(positions, face, size, size).faces == -1).all(), name
        with use_reference():
            assert (rasterize_mesh(positions, face, size, size).faces == -1).all(), name


@CUDA_BACKENDS
def test_a_triangle_through_the_camera_plane_is_cut_there(backend: str) -> None:
    """The ground seen from 1 above it: below the horizon only, at the distance the ray says."""
    ground = torch.tensor([[-50.0, 1.0, -50.0], [50.0, 1.0, -50.0], [0.0, 1.0, 100.0]], dtype=torch.float64)
    clip = torch.cat([ground[:, :2], 0.01 * ground[:, 2:], ground[:, 2:]], 1)[None]
    faces = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    drawn = rasterize_mesh(clip, faces, 10, 10)
    assert (drawn.faces[0, :5] == -1).all()  # y is down: rows above the middle look up
    assert (drawn.faces[0, 5:] == 0).all()
    distance = interpolate(ground[None, :, 2:], faces, drawn)[0, 5:, :, 0]
    expected = 1 / ((torch.arange(5, 10) + 0.5).double() / 5 - 1)
    torch.testing.assert_close(distance, expected[:, None].expand(5, 10), rtol=1e-9, atol=0)


def test_results_do_not_depend_on_the_thread_count() -> None:
    positions, faces = random_mesh(2, 400, 900, torch.float32)
    colors, threads = torch.randn(1, 400, 3), torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        leaves = positions.clone().requires_grad_(), colors.clone().requires_grad_()
        drawn = rasterize_mesh(leaves[0], faces, 70, 50)
        out = interpolate(leaves[1], faces, drawn)
        results.append([*drawn, out, *torch.autograd.grad(out.square().sum() + drawn.depths.sum(), leaves)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_derivatives_agree_with_finite_differences() -> None:
    positions = screen((0.3, 0.4), (7.2, 1.1), (2.3, 7.6), (7.9, 7.7), size=8, w=1.5).double()
    positions = positions + 0.05 * torch.randn(1, 4, 4, dtype=torch.float64)
    positions = torch.cat([positions, positions.flip(1)]).requires_grad_()
    faces = torch.tensor([[0, 1, 2], [2, 1, 3]], dtype=torch.int32)
    colors = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 8, 8, dtype=torch.float64)

    def picture(positions: Tensor, colors: Tensor) -> tuple[Tensor, Tensor]:
        drawn = rasterize_mesh(positions, faces, 8, 8)
        return interpolate(colors, faces, drawn), (drawn.depths * weights).sum()

    assert torch.autograd.gradcheck(picture, (positions, colors), atol=1e-6)


@CUDA_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_equal_autograd_through_the_definition(backend: str, dtype: torch.dtype) -> None:
    """Barycentrics, depths and colors of the triangles that are seen, written with torch and differentiated by it."""
    positions, faces = random_mesh(2, 30, 12, dtype, behind=True)
    leaves = positions.requires_grad_(), torch.randn(2, 30, 3, dtype=dtype, requires_grad=True)
    drawn = rasterize_mesh(leaves[0], faces, 24, 19)
    seen = drawn.faces >= 0
    assert seen.sum() > 100
    weights = [torch.randn(2, 19, 24, n, dtype=dtype) for n in (2, 1, 3)]

    def gradients(barycentrics: Tensor, depths: Tensor, colors: Tensor) -> tuple[Tensor, ...]:
        outputs = barycentrics, depths[..., None], colors
        total = sum((x * w)[seen].sum() for x, w in zip(outputs, weights, strict=True))
        return torch.autograd.grad(total, leaves)

    actual = gradients(drawn.barycentrics, drawn.depths, interpolate(leaves[1], faces, drawn))
    planes = [reference.edge_planes(view.double(), faces) for view in leaves[0]]
    rows = drawn.faces.clamp_min(0).long()
    normals, determinants, z = (
        torch.stack([a[i] for a, i in zip(x, rows, strict=True)]) for x in zip(*planes, strict=True)
    )
    centers = reference.pixel_centers(24, 19, positions.device).view(1, 19, 24, 1, 3)
    edges = (normals * centers).sum(-1)
    shares = edges / torch.where(seen, edges.sum(-1), 1.0)[..., None]
    corners, _ = reference.corner_rows(leaves[1].double(), faces, drawn.faces)
    expected = gradients(shares[..., :2], (edges * z).sum(-1) / determinants, (corners * shares[..., None]).sum(-2))
    for one, other in zip(actual, expected, strict=True):
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype] * float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_pictures_may_be_huge() -> None:
    """8192^2: more than 2^28 numbers per picture."""
    size = 8192
    positions = screen((0, 0), (size / 2, 0), (size / 2, size), (0, size), size=size, depth=0.25)
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)
    drawn = rasterize_mesh(positions, faces, size, size)
    for row in (0, size // 2, size - 1):
        assert torch.equal(drawn.faces[0, row] >= 0, torch.arange(size) < size / 2)
    assert drawn.faces[0, -1, 0] == 1
    assert drawn.faces[0, 0, size // 2 - 1] == 0
    assert drawn.depths[0, -1, 0] == 0.25
    assert float(drawn.barycentrics[0, -1, 0].sum()) < 2 / size  # all of the third vertex


def test_operator_contracts() -> None:
    positions, faces = random_mesh(2, 12, 9, torch.float32)
    leaf = positions.clone().requires_grad_()
    torch.library.opcheck(OPS.rasterize_mesh.default, (leaf, faces, 9, 7, None, None))
    drawn = rasterize_mesh(positions, faces, 9, 7)
    colors = torch.randn(2, 12, 3, requires_grad=True)
    weights = drawn.barycentrics.clone().requires_grad_()
    torch.library.opcheck(OPS.interpolate.default, (colors, faces, drawn.faces, weights))
    with pytest.raises(NotImplementedError, match="second derivative of mesh rasterization"):
        torch.autograd.grad(OPS.interpolate(colors, faces, drawn.faces, weights).sum(), colors, create_graph=True)[
            0
        ].sum().backward()


def test_arguments_that_do_not_fit_are_named() -> None:
    positions, faces = random_mesh(2, 12, 9, torch.float32)
    drawn = rasterize_mesh(positions, faces, 9, 7)
    with pytest.raises(ValueError, match=r"positions must be \[B, V, 4\] with B=2, V=12; got \[2, 12, 3\]"):
        rasterize_mesh(positions[..., :3], faces, 9, 7)
    with pytest.raises(TypeError, match=r"faces must be torch.int32; got torch.int64"):
        rasterize_mesh(positions, faces.long(), 9, 7)
    with pytest.raises(ValueError, match=r"width must be in \[1, 16384\]; got 0"):
        rasterize_mesh(positions, faces, 0, 7)
    with pytest.raises(ValueError, match=r"faces must be .*; got \[2, 7, 9\]"):
        rasterize_mesh(positions, faces, 8, 7, drawn)
    with pytest.raises(ValueError, match=r"attributes must be \[A, V, C\] with A = 1 or 2; got \[3, 12, 1\]"):
        interpolate(torch.zeros(3, 12, 1), faces, drawn)
    for bad in (-1, 12):
        broken = faces.clone()
        broken[4, 1] = bad
        with pytest.raises(ValueError, match=r"faces must be in \[0, 12\); got .* in row 4"):
            rasterize_mesh(positions, broken, 9, 7)
        with use_reference(), pytest.raises(ValueError, match=r"faces must be in \[0, 12\); got .* in row 4"):
            rasterize_mesh(positions, broken, 9, 7)
    with pytest.raises(ValueError, match=r"rasterization.faces must be below F=3; got"):
        interpolate(torch.zeros(1, 12, 1), faces[:3], drawn._replace(faces=drawn.faces.clamp_min(5)))
