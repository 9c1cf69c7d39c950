"""The CUDA kernels of mesh_raster beside those of the CPU: emulated on host tensors, and on a GPU if there is one."""

import pytest
import torch
from torch import Tensor

from tests.kernels.test_mesh_raster import random_mesh, screen
from tests.support.backends import CUDA_BACKENDS, gpu_kernels_on_host
from trellis_kernels import Rasterization, interpolate, rasterize_mesh
from trellis_kernels.mesh_raster import cuda
from trellis_kernels.operator import use_kernels_of

OPS = torch.ops.trellis_kernels


def on_cpu(call: str, *args: object) -> tuple[Tensor, ...]:
    """The CPU kernel's results."""
    with use_kernels_of("cpu"), torch.device("cpu"):
        results = getattr(OPS, call)(*(x.cpu() if isinstance(x, Tensor) else x for x in args))
    return (results,) if isinstance(results, Tensor) else results


def crowd(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two views of triangles of all sizes: smaller than a pixel, larger than the picture, behind the camera, broken."""
    torch.manual_seed(2)
    positions, faces = random_mesh(2, 150, 120, torch.float32, behind=True)
    small = positions.repeat(1, 2, 1)[:, torch.arange(300)]
    small[:, 0::3] = torch.cat([torch.rand(2, 100, 2) * 2 - 1, -torch.rand(2, 100, 1), torch.ones(2, 100, 1)], -1)
    reach = torch.tensor([0.02, 0.3]).repeat(50)[:, None] * torch.tensor([1, 1, 0.1, 0])
    for i in (1, 2):
        small[:, i::3] = small[:, 0::3] + reach * torch.randn(2, 100, 4)
    small[:, 7], small[0, 8, 3], small[1, 11, 0] = small[:, 6], float("nan"), float("inf")
    tiny = torch.arange(300, dtype=torch.int32).view(100, 3) + 150
    return torch.cat([positions, small], 1).to(dtype), torch.cat([faces, tiny, tiny.flip(1)])


@CUDA_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("width", "height"), [(83, 45), (16, 16), (1, 7)])
def test_every_pixel_is_that_of_the_cpu(backend: str, dtype: torch.dtype, width: int, height: int) -> None:
    """Layer by layer, triangles and depths are the same to the last bit: both compute with the same roundings."""
    positions, faces = crowd(dtype)
    behind: tuple[Tensor | None, Tensor | None] = (None, None)
    for layer in range(3):
        args = (positions, faces, width, height, *behind)
        barycentrics, depths, derivatives, ids = (x.cpu() for x in OPS.rasterize_mesh(*args))
        expected = on_cpu("rasterize_mesh", *args)
        assert torch.equal(ids, expected[3])
        assert torch.equal(depths, expected[1])
        torch.testing.assert_close(barycentrics, expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(derivatives, expected[2], rtol=1e-4, atol=1e-5)
        assert width * height < 100 or (ids >= 0).float().mean() > (0.9 if layer == 0 else 0.3)
        behind = OPS.rasterize_mesh(*args)[3], OPS.rasterize_mesh(*args)[1]


def gradients(
    positions: Tensor, faces: Tensor, attributes: Tensor, size: int, views: slice = slice(None)
) -> list[tuple[str, tuple[Tensor, ...]]]:
    """Calls of the operators of gradients."""
    drawn = rasterize_mesh(positions, faces, size, size)
    torch.manual_seed(0)
    weights = torch.randn(*drawn.faces.shape, attributes.shape[2], dtype=positions.dtype)
    seen = (faces, drawn.faces)
    return [
        ("rasterize_mesh_gradient", (positions, *seen, torch.randn_like(drawn.barycentrics), drawn.depths)),
        ("interpolate_gradient", (weights, attributes, *seen, drawn.barycentrics)),
    ]


def assert_gradients_agree(calls: list[tuple[str, tuple[Tensor, ...]]]) -> None:
    for name, args in calls:
        actual = getattr(OPS, name)(*args)
        for one, other in zip((actual,) if isinstance(actual, Tensor) else actual, on_cpu(name, *args), strict=True):
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[other.dtype]
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=tolerance * max(1.0, float(other.abs().max())))


@CUDA_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 4, 6])
def test_sums_of_long_runs_of_pixels_and_of_many_corners_agree(backend: str, dtype: torch.dtype, channels: int) -> None:
    """A square of two triangles over all pixels, in front of a fan of 200 triangles around one vertex."""
    square = screen((0, 0), (40, 0), (40, 40), (0, 40), size=40)
    angle = torch.arange(200) * (2 * torch.pi / 200)
    rim = torch.stack([angle.cos(), angle.sin()], 1) * 15 + 20
    fan = screen((20, 20), *[tuple(p) for p in rim.tolist()], size=40, depth=0.5)
    around = torch.arange(200)
    triangles = torch.stack([torch.full_like(around, 4), 5 + around, 5 + (around + 1) % 200], 1)
    positions = torch.cat([square, fan], 1).to(dtype).expand(3, -1, -1).clone()
    positions[1, :4, 0] += 2.0  # leaves half of the fan to be seen
    positions[2, :4, 2] = 0.9
    faces = torch.cat([torch.tensor([[0, 1, 2], [0, 2, 3]]), triangles]).int()
    for sets in (1, 3):
        attributes = torch.randn(sets, positions.shape[1], channels, dtype=dtype)
        assert_gradients_agree(gradients(positions, faces, attributes, 40))


@CUDA_BACKENDS
def test_views_are_taken_in_groups(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    positions, faces = random_mesh(5, 30, 20, torch.float64, behind=True)
    monkeypatch.setattr(cuda, "ROWS", 2 * len(faces))
    for attributes in (torch.randn(1, 30, 2, dtype=torch.float64), torch.randn(5, 30, 2, dtype=torch.float64)):
        assert_gradients_agree(gradients(positions, faces, attributes, 9))


@CUDA_BACKENDS
def test_results_are_the_same_bits_again(backend: str) -> None:
    """The emulation's threads come in another order each time, and so do those of a GPU."""
    positions, faces = crowd(torch.float32)
    attributes = torch.randn(1, positions.shape[1], 3)
    results = []
    for _ in range(2):
        drawn = rasterize_mesh(positions, faces, 41, 37)
        calls = gradients(positions, faces, attributes, 20)
        results.append([*drawn, *(x for name, args in calls for x in [*getattr(OPS, name)(*args)])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@CUDA_BACKENDS
@pytest.mark.parametrize(("views", "faces"), [(0, 3), (2, 0)])
def test_nothing_to_draw(backend: str, views: int, faces: int) -> None:
    positions, triangles = random_mesh(views, 6, faces, torch.float32)
    leaves = [positions.requires_grad_(), torch.randn(1, 6, 2).requires_grad_()]
    drawn = rasterize_mesh(leaves[0], triangles, 30, 20)
    out = interpolate(leaves[1], triangles, drawn)
    assert (drawn.faces == -1).all()
    assert (drawn.depths == 1).all()
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum() + drawn.depths.sum(), leaves))


def test_indices_out_of_range_are_found() -> None:
    """On a GPU a device-side assert, like those of torch's own indexing; under emulation an error."""
    positions, faces = random_mesh(1, 12, 9, torch.float32)
    with gpu_kernels_on_host():
        drawn = rasterize_mesh(positions, faces, 9, 7)
        for bad in (-1, 12):
            broken = faces.clone()
            broken[4, 1] = bad
            with pytest.raises(ValueError, match=r"faces must be in \[0, V\)"):
                rasterize_mesh(positions, broken, 9, 7)
            with pytest.raises(ValueError, match=r"faces must be in \[0, V\)|an index is out of range"):
                OPS.interpolate_gradient(
                    torch.ones(1, 7, 9, 1), torch.ones(1, 12, 1), broken, drawn.faces, drawn.barycentrics
                )
        far = drawn.faces.clamp_min(9)
        weights, one = drawn.barycentrics, torch.ones(1, 12, 1)
        for call in (
            lambda: interpolate(one, faces, Rasterization(far, weights, drawn.depths, drawn.derivatives)),
            lambda: OPS.interpolate_gradient(torch.ones(1, 7, 9, 1), one, faces, far, weights),
            lambda: OPS.rasterize_mesh_gradient(positions, faces, far, weights, drawn.depths),
        ):
            with pytest.raises(ValueError, match=r"rasterization.faces must be below F|an index is out of range"):
                call()
