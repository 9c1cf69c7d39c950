"""antialias and face_neighbors: exact coverage, derivatives, small triangles."""

import pytest
import torch
from torch import Tensor

from trellis_kernels import antialias, face_neighbors, rasterize_mesh

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


def test_neighbors_share_an_edge() -> None:
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
