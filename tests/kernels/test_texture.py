"""sample_texture and interpolate_derivatives: reference, closed forms, mip levels, derivatives."""

import pytest
import torch
from torch import Tensor

from trellis_kernels import interpolate, interpolate_derivatives, rasterize_mesh, sample_texture
from trellis_kernels.mesh_raster.reference_texture import mip_sizes

OPS = torch.ops.trellis_kernels


def centers(height: int, width: int) -> Tensor:
    """``[1, height, width, 2]`` uv of the centers of a grid over the whole texture."""
    v, u = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([u, v], -1)[None]


def steps(uv: Tensor, across: float, down: float) -> Tensor:
    """The same derivatives everywhere: a pixel is so much of the texture wide and high."""
    return uv.new_tensor([across, 0, 0, down]).expand(*uv.shape[:3], 4)


@pytest.mark.parametrize("wrap", ["repeat", "clamp", "zero"])
@pytest.mark.parametrize("filter", ["linear", "nearest"])
def test_texel_centers_show_the_texture(wrap: str, filter: str) -> None:
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


def test_a_level_is_the_mean_of_what_it_covers() -> None:
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
