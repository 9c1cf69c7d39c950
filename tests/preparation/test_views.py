"""Pictures of objects of several materials, their cameras, and voxels."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.prepared import box
from trellis.nn.hammersley import sphere_hammersley
from trellis.preparation.job import Job, Settings
from trellis.preparation.scene import Part, SceneParts, normalised
from trellis.preparation.views import (
    Light,
    conditioning_views,
    official_views,
    render_cond_step,
    render_step,
    render_views,
    voxelize_step,
)
from trellis.renderers.camera import Cameras
from trellis.renderers.mesh import render_mesh
from trellis.representations.mesh import Mesh
from trellis.representations.texture import Texture

FRONT = Cameras.look_at([[0.0, -2.0, 0.0]])
PLAIN = Light(1.0, ())  # colors as they are


def wall(y: float, color: tuple[float, float, float, float], half: float = 0.5, **more: torch.Tensor) -> Part:
    """A square across the line of sight of `FRONT`."""
    corners = [(-half, y, -half), (half, y, -half), (half, y, half), (-half, y, half)]
    return Part(torch.tensor(corners), torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32), color, **more)


def scene(*parts: Part) -> SceneParts:
    return SceneParts(parts, 1.0, (0.0, 0.0, 0.0))


def test_official_cameras_stand_on_the_remapped_sequence() -> None:
    cameras = official_views(150, (0.3, 0.7))
    torch.testing.assert_close(cameras.centers.norm(dim=1), torch.full((150,), 2.0))
    for index in (0, 17, 149):
        yaw, pitch = sphere_hammersley(index, 150, (0.3, 0.7), remap=True)
        eye = 2 * torch.tensor([math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), math.sin(pitch)])
        torch.testing.assert_close(cameras.centers[index], eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(cameras.intrinsics[:, 0, 0], torch.full((150,), 0.5 / math.tan(math.radians(20))))


def test_conditioning_cameras_see_the_whole_object_at_any_field_of_view() -> None:
    cameras = conditioning_views(400, torch.Generator().manual_seed(0))
    fov = 2 * torch.atan(0.5 / cameras.intrinsics[:, 0, 0])
    radius = cameras.centers.norm(dim=1)
    torch.testing.assert_close(radius, math.sqrt(3) / 2 / torch.sin(fov / 2), rtol=1e-4, atol=0)
    inverse = radius.double() ** -2
    nearest, farthest = (math.sqrt(3) / 2 / math.sin(math.radians(angle / 2)) for angle in (70, 10))
    shares = (inverse - farthest**-2) / (nearest**-2 - farthest**-2)
    assert shares.min() > -1e-3
    assert shares.max() < 1 + 1e-3
    assert abs(float(shares.mean()) - 0.5) < 0.05  # uniform
    assert cameras.centers[:, 2].min() < -0.5 * radius.min()


def test_conditioning_cameras_keep_to_their_sector() -> None:
    cameras = conditioning_views(200, torch.Generator().manual_seed(0), azimuth=45, elevation=(0, 40))
    x, y, z = (cameras.centers / cameras.centers.norm(dim=1, keepdim=True)).unbind(1)
    from_front = torch.rad2deg(torch.atan2(x, -y)).abs()
    assert from_front.max() <= 45 + 1e-3
    assert from_front.max() > 40
    elevation = torch.rad2deg(torch.asin(z))
    assert elevation.min() >= -1e-3
    assert elevation.max() <= 40 + 1e-3


def test_colors_and_opacity_of_a_wall() -> None:
    views = render_views(scene(wall(0.0, (0.2, 0.4, 0.6, 1.0), half=0.25)), FRONT, 32, lights=[PLAIN])
    inside = views.images[0, 3] > 0
    # 0.25 at distance 2 covers 0.125 of the tangent of half the field of view on each side
    assert int(inside.sum()) == (2 * round(16 * 0.125 / math.tan(math.radians(20)))) ** 2
    torch.testing.assert_close(views.images[0, :3, 16, 16], torch.tensor([0.2, 0.4, 0.6]))
    torch.testing.assert_close(views.depths[0][inside], torch.full((int(inside.sum()),), 2.0))
    assert not views.depths[0][~inside].any()


def test_what_is_behind_glass_shows_through() -> None:
    glass, red = (0.0, 0.0, 1.0, 0.25), (1.0, 0.0, 0.0, 1.0)
    views = render_views(scene(wall(0.4, red), wall(-0.4, glass, half=0.2)), FRONT, 33, lights=[PLAIN])
    torch.testing.assert_close(views.images[0, :, 16, 16], torch.tensor([0.75, 0.0, 0.25, 1.0]))
    torch.testing.assert_close(views.depths[0, 16, 16], torch.tensor(1.6))  # of the glass
    alone = render_views(scene(wall(-0.4, glass, half=0.2)), FRONT, 33, lights=[PLAIN])
    torch.testing.assert_close(alone.images[0, :, 16, 16], torch.tensor(glass))  # not premultiplied


def test_light_falls_on_both_sides_and_never_darkens() -> None:
    above = Light(0.5, ((0.0, 0.0, 2.0, 0.25),))
    for cameras in (FRONT, Cameras.look_at([[0.0, 2.0, 0.0]])):
        side = render_views(scene(wall(0.0, (0.4, 0.4, 0.4, 1.0))), cameras, 9, lights=[above])
        torch.testing.assert_close(side.images[0, :3, 4, 4], torch.full((3,), 0.2))
    floor = torch.tensor([(-0.5, -0.5, 0.0), (0.5, -0.5, 0.0), (0.5, 0.5, 0.0), (-0.5, 0.5, 0.0)])
    part = Part(floor, torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32), (0.4, 0.4, 0.4, 1.0))
    for eye, light in (([[0.0, -0.1, 2.0]], 0.75), ([[0.0, -0.1, -2.0]], 0.5)):
        seen = render_views(scene(part), Cameras.look_at(eye), 9, lights=[above])
        torch.testing.assert_close(seen.images[0, :3, 4, 4], torch.full((3,), 0.4 * light))


def test_textures_lie_as_in_the_mesh_renderer() -> None:
    torch.manual_seed(0)
    image, uv = torch.rand(8, 8, 4), torch.tensor([(0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
    image[..., 3] = 1
    part = wall(0.1, (1.0, 1.0, 1.0, 1.0), texture=image, uv=uv)
    cameras = Cameras.look_at([[0.3, -2.0, 0.4]])
    ours = render_views(scene(wall(0.3, (0.0, 1.0, 0.0, 1.0)), part), cameras, 48, lights=[PLAIN])
    mesh = Mesh(part.vertices, part.faces.long())
    theirs = render_mesh(
        mesh, cameras, 48, ssaa=1, texture=Texture(image[..., :3].contiguous(), uv), near=0.1, far=20.0
    )
    assert theirs.colors is not None
    assert theirs.mask is not None
    inside = theirs.mask[0] > 0.999
    assert int(inside.sum()) > 500
    torch.testing.assert_close(ours.images[0, :3][:, inside], theirs.colors[0][:, inside], atol=2e-3, rtol=0)


def test_supersampling_is_the_mean_of_the_samples() -> None:
    things = scene(box(0.4, 0.3, 0.5, (0.8, 0.3, 0.1, 1.0)))
    fine = render_views(things, FRONT, 32).images[0]
    coarse = render_views(things, FRONT, 16, ssaa=2).images[0]
    premultiplied = (fine[:3] * fine[3:]).unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))
    torch.testing.assert_close(coarse[:3] * coarse[3:], premultiplied, atol=1e-6, rtol=0)
    torch.testing.assert_close(coarse[3], fine[3].unfold(0, 2, 2).unfold(1, 2, 2).mean((-1, -2)))


def test_many_views_are_those_of_each() -> None:
    things = scene(box(0.4, 0.3, 0.5, (0.8, 0.3, 0.1, 1.0)))
    cameras = official_views(3, (0.1, 0.2))
    together = render_views(things, cameras, 16)
    for index in range(3):
        assert torch.equal(together.images[index], render_views(things, cameras[index : index + 1], 16).images[0])
    assert render_views(things, cameras[:0], 16).images.shape == (0, 4, 16, 16)


def job(root: Path, **settings: object) -> Job:
    made = Job(root, "ab" * 32, {}, Settings(views=3, resolution=20, ssaa=1, **settings))  # type: ignore[arg-type]
    made.__dict__["scene"] = normalised([box(1, 2, 3, (0.8, 0.3, 0.1, 1.0))])
    return made


def test_the_files_have_the_official_form(tmp_path: Path) -> None:
    made = job(tmp_path, cond_views=2, cond_resolution=24)
    render_step(made)
    render_cond_step(made)
    described = json.loads((tmp_path / "renders" / made.sha256 / "transforms.json").read_text())
    assert described["aabb"] == [[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]]
    assert described["scale"] == pytest.approx(1 / 3)
    poses = torch.tensor([frame["transform_matrix"] for frame in described["frames"]])
    angle = described["frames"][0]["camera_angle_x"]
    assert angle == pytest.approx(math.radians(40), abs=1e-6)
    again = Cameras.from_blender(poses, angle)
    views = render_views(made.scene, again, 20)
    for index, frame in enumerate(described["frames"]):
        picture = np.asarray(Image.open(tmp_path / "renders" / made.sha256 / frame["file_path"]), np.float32) / 255
        difference = np.abs(picture - views.images[index].permute(1, 2, 0).numpy())
        assert np.median(difference) < 0.003
        assert (difference.max(-1) > 0.01).mean() < 0.02  # pixels on edges, moved by the last bit of a matrix
    assert not (tmp_path / "renders" / made.sha256 / "depths.npz").exists()
    cond = json.loads((tmp_path / "renders_cond" / made.sha256 / "transforms.json").read_text())["frames"]
    assert len({frame["camera_angle_x"] for frame in cond}) == 2


def test_voxels_are_centers_of_the_cells_the_surface_touches(tmp_path: Path) -> None:
    import trimesh

    made = job(tmp_path, voxel_resolution=12)
    count = voxelize_step(made)["num_voxels"]
    points = trimesh.load(tmp_path / "voxels" / f"{made.sha256}.ply").vertices
    assert len(points) == count
    cells = (points + 0.5) * 12 - 0.5
    np.testing.assert_allclose(cells, cells.round(), atol=1e-5)
    # The hollow box of 4 x 8 x 12 cells. Its sides lie on cell boundaries, so cells on both sides touch them.
    x, y, z = cells.round().astype(int).T
    assert (x.min(), x.max(), y.min(), y.max(), z.min(), z.max()) == (3, 8, 1, 10, 0, 11)


@pytest.mark.parametrize(("resolution", "ssaa"), [(0, 1), (8, 0)])
def test_pictures_need_pixels(resolution: int, ssaa: int) -> None:
    with pytest.raises(ValueError, match="resolution and ssaa must be positive"):
        render_views(scene(wall(0, (1.0, 1.0, 1.0, 1.0))), FRONT, resolution, ssaa)


def test_each_view_needs_its_light() -> None:
    with pytest.raises(ValueError, match="lights must be one for each of 1 cameras; got 2"):
        render_views(scene(wall(0, (1.0, 1.0, 1.0, 1.0))), FRONT, 8, lights=[PLAIN] * 2)
