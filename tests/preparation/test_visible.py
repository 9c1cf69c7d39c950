"""Features of voxels from what depth pictures show."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trellis.preparation.scene import Part, SceneParts
from trellis.preparation.views import Light, official_views, render_views
from trellis.preparation.visible import CHANNELS, visible_surface
from trellis.renderers.camera import Cameras
from trellis_kernels import voxelize_mesh

RESOLUTION = 8
COLOR = (0.75, 0.5, 0.25)


def tile(height: float, color: tuple[float, float, float] = COLOR) -> Part:
    """A square of the whole width, `height` above the floor."""
    corners = [[-0.49, -0.49, height], [0.49, -0.49, height], [0.49, 0.49, height], [-0.49, 0.49, height]]
    return Part(vertices=torch.tensor(corners), faces=torch.tensor([[0, 1, 2], [0, 2, 3]]).int(), color=(*color, 1.0))


def seen(*parts: Part, size: int = 96, views: int = 12) -> tuple[Tensor, Tensor, Tensor, Cameras]:
    """Voxels of an object, and pictures of it, depths and cameras; lit evenly."""
    scene = SceneParts(tuple(parts), 1.0, (0.0, 0.0, 0.0))
    cameras = official_views(views, (0.3, 0.6))
    images, depths = render_views(scene, cameras, size, lights=[Light(1.0, ())] * views)
    vertices, faces = scene.mesh.vertices, scene.mesh.faces
    return voxelize_mesh(vertices, faces.int(), RESOLUTION), images, depths, cameras


def test_a_tile_shows_its_color_its_height_and_that_it_is_flat() -> None:
    voxels, images, depths, cameras = seen(tile(0.15))
    features = visible_surface(voxels, RESOLUTION, images, depths, cameras)
    assert features.shape == (64, CHANNELS)
    inner = ((voxels[:, :2] > 0) & (voxels[:, :2] < RESOLUTION - 1)).all(1)
    color, place, moments, toward, spread, amount = features[inner].split([3, 3, 6, 3, 1, 1], 1)
    red, green, blue = COLOR
    expected = torch.tensor([4 * sum(COLOR) / 3 - 2, 8 * (red - green), 8 * (blue - (red + green) / 2)])
    torch.testing.assert_close(color, expected.expand_as(color), atol=0.05, rtol=0)
    height = 0.15 * RESOLUTION - math.floor(0.15 * RESOLUTION) - 0.5
    torch.testing.assert_close(place[:, 2], torch.full_like(place[:, 2], 4 * height), atol=0.02, rtol=0)
    assert place[:, :2].abs().max() < 0.5
    torch.testing.assert_close(moments[:, :2], torch.full_like(moments[:, :2], 8 / 12), atol=0.12, rtol=0)
    assert moments[:, [2, 4, 5]].abs().max() < 0.02
    assert spread.max() < 0.05
    assert amount.min() > 0.8
    assert toward[:, 2].abs().max() < 1


def test_what_is_hidden_has_zeros() -> None:
    walls = [tile(-0.45), tile(0.45)]
    for axis in (0, 1):
        for part in walls[:2]:
            vertices = part.vertices.roll(axis + 1, 1)
            walls.append(Part(vertices=vertices.contiguous(), faces=part.faces, color=part.color))
    inside = Part(vertices=torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [0, 0.1, 0]]), faces=torch.tensor([[0, 1, 2]]).int())
    voxels, images, depths, cameras = seen(*walls, inside)
    features = visible_surface(voxels, RESOLUTION, images, depths, cameras)
    hidden = (voxels == 4).all(1)
    assert hidden.sum() == 1
    assert not features[hidden].any()
    assert (features[:, 16] > 0).float().mean() > 0.9


@given(seed=st.integers(0, 1000))
def test_moments_are_those_of_the_points(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    resolution, views, size = 4, 2, 6
    images = torch.rand(views, 4, size, size, generator=generator)
    depths = 1.5 + torch.rand(views, size, size, generator=generator)
    depths[torch.rand(depths.shape, generator=generator) < 0.2] = 0
    voxels = torch.stack(torch.meshgrid(*[torch.arange(resolution)] * 3, indexing="ij"), -1).reshape(-1, 3).int()
    cameras = official_views(views, (0.1, 0.2))
    features = visible_surface(voxels, resolution, images, depths, cameras)

    points: dict[tuple[int, ...], list[np.ndarray]] = {}
    for view, row, column in np.ndindex(views, size, size):
        depth, pixel = float(depths[view, row, column]), images[view, :, row, column].numpy()
        if depth == 0 or pixel[3] < 0.5:
            continue
        to_world = np.linalg.inv(cameras.extrinsics[view].double().numpy())
        focal = float(cameras.intrinsics[view, 0, 0])
        ray = np.array([((column + 0.5) / size - 0.5) / focal, ((row + 0.5) / size - 0.5) / focal, 1.0])
        world = to_world @ np.append(depth * ray, 1.0)
        scaled = (world[:3] + 0.5) * resolution
        cell = np.clip(np.floor(scaled), 0, resolution - 1)
        toward = to_world[:3, 3] - world[:3]
        place = np.clip(scaled - cell - 0.5, -0.5, 0.5)
        point = np.concatenate([pixel[:3], place, toward / np.linalg.norm(toward)])
        points.setdefault(tuple(cell.astype(int)), []).append(point)
    expected = np.zeros(features.shape)
    for cell, rows in points.items():
        table = np.array(rows)
        mean, covariance = table.mean(0), np.cov(table[:, 3:6].T, bias=True).reshape(3, 3)
        moments = [*np.diag(covariance), covariance[0, 1], covariance[0, 2], covariance[1, 2]]
        amount = math.log1p(len(rows)) / math.log1p(100)
        hues = [8 * (mean[0] - mean[1]), 8 * (mean[2] - mean[:2].mean())]
        expected[np.ravel_multi_index(cell, (resolution,) * 3)] = [
            4 * mean[:3].mean() - 2, *hues, *(4 * mean[3:6]), *(8 * np.array(moments)), *mean[6:],
            4 * table[:, :3].mean(1).std(), amount,
        ]  # fmt: skip
    np.testing.assert_allclose(features.numpy(), expected, atol=2e-3)


def test_points_just_outside_of_a_voxel_count_for_it() -> None:
    """A surface on the border of two voxels, of which one is active; depths are rounded to either side."""
    voxels, images, depths, cameras = seen(tile(-0.4999))
    assert (voxels[:, 2] == 0).all()
    nearer = visible_surface(voxels, RESOLUTION, images, depths * 0.999, cameras)
    farther = visible_surface(voxels, RESOLUTION, images, depths * 1.001, cameras)
    for features in (nearer, farther):
        assert (features[:, 16] > 0.8).all()
    moved = voxels + torch.tensor([0, 0, 1], dtype=torch.int32)  # the tile is the floor of these
    features = visible_surface(moved, RESOLUTION, images, depths, cameras)
    assert not features.any()


def test_pictures_must_fit_their_depths() -> None:
    voxels, images, depths, cameras = seen(tile(0.1), views=2, size=8)
    with pytest.raises(ValueError, match=r"images must be 2 of \[4, 8, 8\] like depths; number 0 is \[3, 8, 8\]"):
        visible_surface(voxels, RESOLUTION, images[:, :3], depths, cameras)
    with pytest.raises(ValueError, match="images must be 2 like depths; got 1"):
        visible_surface(voxels, RESOLUTION, images[:1], depths, cameras)
    with pytest.raises(ValueError, match="number 2 is"):
        visible_surface(voxels, RESOLUTION, images[[0, 1, 1]], depths, cameras)


def test_no_voxels() -> None:
    _, images, depths, cameras = seen(tile(0.1), views=2, size=8)
    assert visible_surface(torch.zeros(0, 3).int(), RESOLUTION, images, depths, cameras).shape == (0, CHANNELS)
