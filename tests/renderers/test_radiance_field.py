import math

import pytest
import torch

from tests.support.golden import golden
from tests.support.objects import lumpy_field
from trellis.renderers.camera import Cameras
from trellis.renderers.radiance_field import render_radiance_field, render_voxels
from trellis.representations.radiance_field import RadianceField

FRONT = Cameras.orbit(0.0, 0.0)  # at (0, 2, 0), x to the left


def voxel(at: tuple[int, int, int] = (1, 1, 1), resolution: int = 4, density: float = 1e3) -> RadianceField:
    """One voxel of even density, orange."""
    position = (torch.tensor([at]) + 0.5) / resolution
    color = torch.tensor([0.9, 0.5, 0.1]).logit() / 0.28209479177387814
    depth = resolution.bit_length() - 1
    one = torch.ones(1, 1, 3, 4)
    return RadianceField(position, depth, one, torch.full((1, 1), density), color.view(1, 1, 1, 3), resolution)


def test_passes_the_oracle() -> None:
    item = golden("render_trivec_oracle")
    depth = int(item["in.depth_level"][0])
    tensors = {"trivec": item["in.trivec"], "density": item["in.density"], "features_dc": item["in.features_dc"]}
    field = RadianceField(item["in.position"], depth, **tensors, resolution=2**depth)
    cameras = Cameras(item["in.extrinsics"][None], item["in.intrinsics"][None])
    images = render_radiance_field(field, cameras, 28, item["in.bg"], 1, jitter=item["in.jitter"][None])
    names = {"color": "colors", "alpha": "alphas", "depth": "depths", "percent_depth": "median_depths"}
    for name, ours in names.items():
        expected = item[f"out.{name}"]
        different = ((getattr(images, ours)[0] - expected).abs() > 1e-4).sum()
        assert different <= max(2, expected.numel() // 1000), name


def test_a_voxel_is_where_its_coordinates_say() -> None:
    """Voxel (3, 1, 2) of 4: x to the left in the picture, z up."""
    images = render_radiance_field(voxel((3, 1, 2)), FRONT, 64, ssaa=2)
    v, u = (images.alphas[0] > 0.5).nonzero().float().mean(0).div(64).tolist()
    expected = FRONT.project(torch.tensor([[0.375, -0.125, 0.125]]))[0][0, 0]
    assert abs(u - float(expected[0])) < 0.02
    assert abs(v - float(expected[1])) < 0.02
    torch.testing.assert_close(
        images.colors[0, :, int(v * 64), int(u * 64)], torch.tensor([0.9, 0.5, 0.1]), rtol=0, atol=0.02
    )


def test_depth_is_that_of_the_side_in_front() -> None:
    images = render_radiance_field(voxel((1, 3, 1), density=1e5), FRONT, 33, ssaa=1)
    inside = images.alphas[0] > 0.99
    torch.testing.assert_close(images.depths[0][inside], torch.full((int(inside.sum()),), 1.5), rtol=0, atol=0.04)
    assert (images.median_depths[0][inside] > 1.49).all()


def test_background_jitter_and_rank() -> None:
    field = lumpy_field(16)
    cameras = Cameras.orbit([0.0, 2.0], 0.3)
    plain = render_radiance_field(field, cameras, 16, torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), 1)
    assert plain.colors[:, :2, 0, 0].tolist() == [[1, 0], [0, 1]]
    moved = [
        render_radiance_field(field, cameras, 16, ssaa=1, jitter=torch.Generator().manual_seed(seed)).colors
        for seed in (0, 0, 1)
    ]
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])
    assert not torch.equal(render_radiance_field(field, cameras, 16, ssaa=1, used_rank=1).colors, plain.colors)


def test_gradients_reach_the_factors() -> None:
    field = voxel()
    leaves = {name: getattr(field, name).clone().requires_grad_() for name in ("trivec", "density", "features_dc")}
    drawn = RadianceField(field.positions, field.depth, **leaves, resolution=4)
    images = render_radiance_field(drawn, FRONT, 16, ssaa=2)
    for gradient in torch.autograd.grad((images.colors.sum() + images.depths.sum()), list(leaves.values())):
        assert gradient.isfinite().all()
    assert drawn.features_dc.grad is None


def test_voxels_are_cubes() -> None:
    occupied = torch.zeros(8, 8, 8, dtype=torch.bool)
    occupied[2, 7, 5] = True
    images = render_voxels(occupied, FRONT, 64, 1.0, ssaa=2)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3) / 8 + torch.tensor([2, 7, 5]) / 8 - 0.5
    uv = FRONT.project(corners)[0][0] * 64
    v, u = (images.alphas[0] > 0.5).nonzero().unbind(1)
    for seen, points in ((u, uv[:, 0]), (v, uv[:, 1])):
        assert abs(float(seen.min()) - float(points.min())) <= 1
        assert abs(float(seen.max()) + 1 - float(points.max())) <= 1
    middle = images.colors[0, :, int(v.float().mean()), int(u.float().mean())]
    torch.testing.assert_close(middle, torch.tensor([2.5, 7.5, 5.5]) / 8, rtol=0, atol=0.01)
    again = render_voxels(torch.tensor([[2, 7, 5]], dtype=torch.int32), FRONT, 64, 1.0, 2, grid=8)
    assert torch.equal(again.colors, images.colors)
    painted = render_voxels(occupied, FRONT, 64, 1.0, 2, colors=torch.tensor([[0.0, 1, 0]])).colors
    assert painted[0, 0].min() < 0.01


def test_nothing_is_background() -> None:
    images = render_voxels(torch.zeros(4, 4, 4, dtype=torch.bool), FRONT, 8, (0.2, 0.4, 0.6))
    torch.testing.assert_close(images.colors[0, :, 3, 3], torch.tensor([0.2, 0.4, 0.6]))
    assert not images.alphas.any()


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="grid must be a power of two in"):
        render_voxels(torch.zeros(3, 3, 3, dtype=torch.bool), FRONT, 8)
    with pytest.raises(ValueError, match=r"occupied must be in \[0, 4\); got 4 to 4"):
        render_voxels(torch.full((1, 3), 4, dtype=torch.int32), FRONT, 8, grid=4)
    with pytest.raises(TypeError, match=r"occupied must be torch\.bool"):
        render_voxels(torch.zeros(4, 4, 4), FRONT, 8)
    with pytest.raises(ValueError, match="resolution and ssaa must be at least 1"):
        render_radiance_field(voxel(), FRONT, 0)
    with pytest.raises(ValueError, match=r"jitter must be \[1, 16, 16\]; got \[1, 8, 8\]"):
        render_radiance_field(voxel(), FRONT, 8, ssaa=2, jitter=torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match=r"used_rank must be in 1\.\.1; got 2"):
        render_radiance_field(voxel(), FRONT, 8, used_rank=2)
    assert math.isfinite(float(render_radiance_field(voxel(), FRONT[:0], 8).colors.sum()))
