"""sample_texture and interpolate_derivatives: reference, closed forms, mip levels, derivatives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.backends import CUDA_BACKENDS
from trellis_kernels import interpolate, interpolate_derivatives, rasterize_mesh, sample_texture, use_reference
from trellis_kernels.mesh_raster import reference_texture
from trellis_kernels.mesh_raster.reference_texture import mip_sizes

OPS = torch.ops.trellis_kernels


def centers(height: int, width: int) -> Tensor:
    """``[1, height, width, 2]`` uv of the centers of a grid over the whole texture."""
    v, u = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([u, v], -1)[None]


def steps(uv: Tensor, across: float, down: float) -> Tensor:
    """The same derivatives everywhere: a pixel is so much of the texture wide and high."""
    return uv.new_tensor([across, 0, 0, down]).expand(*uv.shape[:3], 4)


WRAPS = pytest.mark.parametrize("wrap", ["repeat", "clamp", "zero"])
FILTERS = pytest.mark.parametrize("filter", ["linear", "nearest"])
# Images of the texture and of pixels, size of the texture, of a picture, channels.
SHAPES = [
    (1, 1, (1, 1), (3, 5), 3),
    (1, 2, (5, 12), (13, 7), 1),
    (2, 2, (17, 8), (9, 16), 4),
    (2, 2, (2, 33), (6, 6), 5),
    (1, 3, (4, 4), (0, 5), 3),
    (1, 1, (6, 7), (5, 5), 0),
]


def assert_agrees(
    shape: tuple[int, int, tuple[int, int], tuple[int, int], int],
    dtype: torch.dtype,
    wrap: str,
    filter: str,
    mips: bool,
) -> None:
    images, views, size, picture, channels = shape
    texture = torch.randn(images, *size, channels, dtype=torch.float64).to(dtype)
    uv = (torch.randn(views, *picture, 2, dtype=torch.float64) * 0.8 + 0.5).to(dtype)
    derivatives = (torch.randn(views, *picture, 4, dtype=torch.float64).exp() * 0.1).to(dtype) if mips else None
    gradient = torch.randn(views, *picture, channels, dtype=torch.float64).to(dtype)
    if gradient.numel():
        gradient[:, 0] = 0
    where = uv, derivatives, wrap, filter
    _, levels = OPS.sample_texture(texture, *where)
    calls = [
        lambda: OPS.sample_texture(texture, *where),
        lambda: [OPS.sample_texture_gradient(gradient, texture, *where)],
        lambda: [OPS.sample_texture_uv_gradient(gradient, texture, levels, *where)],
    ]
    for call in calls:
        actual = call()
        with use_reference():
            expected = call()
        for one, other in zip(actual, expected, strict=True):
            scale = float(other.abs().max()) if other.numel() else 1.0
            tolerance = {torch.float64: 1e-11, torch.float32: 3e-5}[dtype]
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, scale))


@WRAPS
@FILTERS
@pytest.mark.parametrize("mips", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_agree_with_references(wrap: str, filter: str, mips: bool, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        assert_agrees(shape, dtype, wrap, filter, mips)


@CUDA_BACKENDS
@WRAPS
@pytest.mark.parametrize("mips", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gpu_kernels_agree_with_references(backend: str, wrap: str, mips: bool, dtype: torch.dtype) -> None:
    for shape, filter in zip(SHAPES, ["linear", "nearest", "linear", "linear", "nearest", "linear"], strict=True):
        assert_agrees(shape, dtype, wrap, filter, mips)


@CUDA_BACKENDS
@pytest.mark.parametrize("mips", [False, True])
def test_many_pixels_may_share_a_texel(backend: str, mips: bool) -> None:
    """More of them than are summed in one go, twice in the same place and some around."""
    texture, uv = torch.rand(1, 5, 4, 3), torch.full((1, 30, 24, 2), 0.37)
    uv[0, 13:15] = torch.rand(2, 24, 2)
    gradient, derivatives = torch.randn(1, 30, 24, 3), torch.full((1, 30, 24, 4), 0.3) if mips else None
    actual = OPS.sample_texture_gradient(gradient, texture, uv, derivatives, "repeat", "linear")
    with use_reference():
        expected = OPS.sample_texture_gradient(gradient, texture, uv, derivatives, "repeat", "linear")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@CUDA_BACKENDS
@WRAPS
@FILTERS
def test_texel_centers_show_the_texture(backend: str, wrap: str, filter: str) -> None:
    texture = torch.rand(1, 5, 8, 3)
    torch.testing.assert_close(sample_texture(texture, centers(5, 8), None, wrap, filter), texture)
    still = steps(centers(5, 8), 1e-3, 1e-3)
    torch.testing.assert_close(sample_texture(texture, centers(5, 8), still, wrap, filter), texture)


def test_a_constant_stays_one_at_every_level() -> None:
    texture = torch.full((1, 7, 12, 2), 0.3)
    uv = torch.randn(2, 20, 11, 2)
    shown = sample_texture(texture, uv, torch.randn(2, 20, 11, 4).exp() * 0.2)
    torch.testing.assert_close(shown, torch.full_like(shown, 0.3))
    assert mip_sizes(7, 12) == [(7, 12), (3, 6), (1, 3), (1, 1)]


@CUDA_BACKENDS
def test_a_level_is_the_mean_of_what_it_covers(backend: str) -> None:
    texture = torch.rand(1, 16, 32, 3)
    means = texture.view(1, 4, 4, 8, 4, 3).mean((2, 4))
    uv = centers(4, 8)
    torch.testing.assert_close(sample_texture(texture, uv, steps(uv, 4 / 32, 1 / 64)), means)  # the longer axis counts
    uv = centers(1, 1)
    odd = torch.rand(1, 13, 7, 3)
    torch.testing.assert_close(sample_texture(odd, uv, steps(uv, 1, 1)), odd.mean((1, 2), keepdim=True))


def test_a_ramp_is_reproduced_and_the_levels_between_are_blended() -> None:
    ramp = centers(8, 16)
    uv = 0.5 / 8 + torch.rand(1, 9, 9, 2) * 7 / 8
    torch.testing.assert_close(sample_texture(ramp, uv, None, "clamp"), uv)
    inside = 0.25 + torch.rand(1, 9, 9, 2) / 2
    torch.testing.assert_close(sample_texture(ramp, inside, steps(inside, 3 / 16, 0.0), "clamp"), inside)
    texture = torch.rand(1, 8, 8, 1)
    one, two, between = (sample_texture(texture, uv, steps(uv, 2**level / 8, 0.0)) for level in (1, 2, 1.25))
    torch.testing.assert_close(between, 0.75 * one + 0.25 * two)


def quad(width: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """A slanted square in perspective, its uv."""
    xyz = torch.tensor([[-1.0, -1, 2], [1, -1, 2], [1, 1, 6], [-1, 1, 6]], dtype=torch.float64)
    positions = torch.cat([1.9 * xyz[:, :2], 0.5 * xyz[:, 2:], xyz[:, 2:]], 1)[None]
    uv = torch.tensor([[[0.0, 0], [1, 0], [1, 1], [0, 1]]], dtype=torch.float64)
    return positions, torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32), uv


def test_derivatives_are_those_of_the_interpolated_values() -> None:
    positions, faces, uv = quad(24, 20)
    drawn = rasterize_mesh(positions, faces, 24, 20)
    derivatives = interpolate_derivatives(uv, faces, drawn)
    fine = 64  # steps of a pixel
    exact = interpolate(uv, faces, rasterize_mesh(positions, faces, 24 * fine, 20 * fine))
    at = exact[:, fine // 2 :: fine, fine // 2 :: fine]
    dx, dy = ((exact.roll(-1, dim)[:, fine // 2 :: fine, fine // 2 :: fine] - at) * fine for dim in (2, 1))
    numeric = torch.stack([dx[..., 0], dy[..., 0], dx[..., 1], dy[..., 1]], -1)
    hit = drawn.faces >= 0
    assert hit.sum() > 100
    torch.testing.assert_close(derivatives[hit], numeric[hit], rtol=0.02, atol=1e-4)
    assert (derivatives[~hit] == 0).all()


@WRAPS
def test_gradients_agree_with_finite_differences_and_with_autograd_through_the_reference(wrap: str) -> None:
    texture = torch.randn(1, 7, 6, 2, dtype=torch.float64, requires_grad=True)
    uv = (torch.randn(2, 3, 4, 2, dtype=torch.float64) * 0.6 + 0.5).requires_grad_()
    derivatives = torch.randn(2, 3, 4, 4, dtype=torch.float64).exp() * 0.1
    for footprint in (None, derivatives):
        assert torch.autograd.gradcheck(lambda t, x, d=footprint: sample_texture(t, x, d, wrap), (texture, uv))
        gradient = torch.randn(2, 3, 4, 2, dtype=torch.float64)
        ours = torch.autograd.grad(sample_texture(texture, uv, footprint, wrap), (texture, uv), gradient)
        shown, _ = reference_texture.sample_texture(texture, uv, footprint, wrap, "linear")
        theirs = torch.autograd.grad(shown, (texture, uv), gradient)
        for actual, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@given(
    seed=st.integers(0, 99),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    wrap=st.sampled_from(["repeat", "clamp"]),
)
@settings(max_examples=20, deadline=None)
def test_symmetries(seed: int, height: int, width: int, wrap: str) -> None:
    """Flips and turns of the texture and uv cancel; periods do not show; weights sum to one."""
    torch.manual_seed(seed)
    texture = torch.rand(1, height, width, 2, dtype=torch.float64, requires_grad=True)
    uv, derivatives = torch.randn(1, 6, 5, 2, dtype=torch.float64), torch.randn(1, 6, 5, 4, dtype=torch.float64) * 0.3
    shown = sample_texture(texture, uv, derivatives, wrap)
    flipped = sample_texture(texture.flip(2), uv * uv.new_tensor([-1, 1]) + uv.new_tensor([1, 0]), derivatives, wrap)
    torch.testing.assert_close(flipped, shown, rtol=0, atol=1e-9)
    turned = sample_texture(texture.transpose(1, 2), uv.flip(-1), derivatives[..., [2, 3, 0, 1]], wrap)
    torch.testing.assert_close(turned, shown, rtol=0, atol=1e-9)
    if wrap == "repeat":
        moved = sample_texture(texture, uv + torch.randint(-3, 4, uv.shape), derivatives, wrap)
        torch.testing.assert_close(moved, shown, rtol=0, atol=1e-9)
    gradient = torch.randn_like(shown)
    (by_texture,) = torch.autograd.grad(shown, texture, gradient)
    torch.testing.assert_close(by_texture.sum((0, 1, 2)), gradient.sum((0, 1, 2)))


def test_uv_that_is_not_finite_shows_nothing_and_a_boundless_footprint_the_mean() -> None:
    texture = torch.rand(1, 8, 8, 3, requires_grad=True)
    uv, derivatives = torch.rand(1, 1, 6, 2), torch.zeros(1, 1, 6, 4)
    uv[0, 0, 0, 0], uv[0, 0, 1, 1], uv[0, 0, 2] = float("nan"), float("inf"), -1e30
    derivatives[0, 0, 3, 2], derivatives[0, 0, 4, 0] = float("nan"), float("inf")
    uv.requires_grad_()
    for context in (use_reference, torch.enable_grad):
        with context():
            shown = sample_texture(texture, uv, derivatives)
            by_texture, by_uv = torch.autograd.grad(shown.sum(), (texture, uv))
        assert (shown[0, 0, :2] == 0).all()
        assert shown.isfinite().all()
        torch.testing.assert_close(shown[0, 0, 3:5], texture.mean((1, 2)).expand(2, 3))
        assert (by_uv[0, 0, :2] == 0).all()
        torch.testing.assert_close(by_texture.sum(), torch.tensor(12.0))


def test_results_do_not_depend_on_the_thread_count() -> None:
    texture, gradient = torch.randn(1, 70, 50, 3), torch.randn(2, 150, 140, 3)
    uv, derivatives = torch.randn(2, 150, 140, 2), torch.randn(2, 150, 140, 4) * 0.05
    texture.requires_grad_(), uv.requires_grad_()
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        shown = sample_texture(texture, uv, derivatives)
        results.append([shown, *torch.autograd.grad(shown, (texture, uv), gradient)])
    torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_operator_contracts() -> None:
    texture, uv = torch.rand(1, 6, 5, 3, requires_grad=True), torch.rand(2, 4, 3, 2, requires_grad=True)
    derivatives = torch.rand(2, 4, 3, 4) * 0.3
    for footprint in (None, derivatives):
        torch.library.opcheck(OPS.sample_texture.default, (texture, uv, footprint, "repeat", "linear"))
    _, levels = OPS.sample_texture(texture.detach(), uv.detach(), derivatives, "repeat", "linear")
    where = uv.detach(), derivatives, "repeat", "linear"
    torch.library.opcheck(OPS.sample_texture_gradient.default, (torch.rand(2, 4, 3, 3), texture.detach(), *where))
    by_uv = torch.rand(2, 4, 3, 3), texture.detach(), levels, *where
    torch.library.opcheck(OPS.sample_texture_uv_gradient.default, by_uv)
    compiled = torch.compile(sample_texture, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(texture, uv, derivatives), sample_texture(texture, uv, derivatives))
    (first,) = torch.autograd.grad(sample_texture(texture, uv, derivatives).sum(), texture, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative of sample_texture"):
        first.sum().backward()


def test_arguments_that_do_not_fit_are_named() -> None:
    texture, uv = torch.rand(1, 4, 4, 3), torch.rand(2, 5, 6, 2)
    with pytest.raises(ValueError, match=r"uv must be \[B, h, w, 2\].*; got \[2, 5, 6, 3\]"):
        sample_texture(texture, torch.rand(2, 5, 6, 3))
    with pytest.raises(ValueError, match=r"derivatives must be \[B, h, w, 4\] with .*; got \[2, 5, 5, 4\]"):
        sample_texture(texture, uv, torch.rand(2, 5, 5, 4))
    with pytest.raises(ValueError, match=r"texture must be \[T, H, W, C\] with T = 1 or 2; got \[3, 4, 4, 3\]"):
        sample_texture(texture.expand(3, 4, 4, 3), uv)
    with pytest.raises(ValueError, match=r"texture must be 1 to 16384 texels high and wide; got \[1, 0, 4, 3\]"):
        sample_texture(texture[:, :0], uv)
    with pytest.raises(ValueError, match=r"wrap must be 'repeat' or 'clamp' or 'zero'; got 'mirror'"):
        sample_texture(texture, uv, wrap="mirror")
    with pytest.raises(ValueError, match=r"filter must be 'linear' or 'nearest'; got 'cubic'"):
        sample_texture(texture, uv, filter="cubic")
    with pytest.raises(TypeError, match=r"uv must be torch.float32; got torch.float64"):
        sample_texture(texture, uv.double())
