"""Drawing only what an object's box covers, beside pictures drawn whole; layers, holes, depth, resuming."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.golden import golden
from tests.support.prepared import box
from trellis.preparation import surface
from trellis.preparation.arrays import read_views
from trellis.preparation.job import Job, Settings
from trellis.preparation.scene import Part, SceneParts, normalised
from trellis.preparation.views import Light, official_views, render_cond_step, render_step, render_views
from trellis.renderers.camera import Cameras
from trellis_kernels import interpolate, rasterize_mesh

FRONT = Cameras.look_at([[0.0, -2.0, 0.0]])
PLAIN = Light(1.0, ())  # colors as they are
TWO = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)


def wall(y: float, color: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0), **more: Tensor) -> Part:
    """A square across the line of sight of `FRONT`."""
    return Part(torch.tensor([(-0.4, y, -0.4), (0.4, y, -0.4), (0.4, y, 0.4), (-0.4, y, 0.4)]), TWO, color, **more)


def scene(*parts: Part) -> SceneParts:
    return SceneParts(parts, 1.0, (0.0, 0.0, 0.0))


def crowd(count: int) -> Part:
    """Small triangles here and there, of all colors."""
    generator = torch.Generator().manual_seed(3)
    centers = torch.rand(count, 1, 3, generator=generator) - 0.5
    corners = (centers + 0.2 * (torch.rand(count, 3, 3, generator=generator) - 0.5)).clamp(-0.5, 0.5)
    faces = torch.arange(3 * count, dtype=torch.int32).view(-1, 3)
    return Part(corners.view(-1, 3), faces, colors=torch.rand(3 * count, 3, generator=generator))


# From outside; from so near that much is cut off on one side or on all; past it.
@pytest.mark.parametrize("eye", [(0.5, -2.0, 0.7), (0.3, -0.9, 0.2), (0.1, -0.7, 0.0)])
@pytest.mark.parametrize("aim", [(0.0, 0.0, 0.0), (0.6, 0.0, 0.4), (-3.0, 0.0, 0.0)])
def test_the_box_shows_what_the_whole_picture_shows(eye: tuple, aim: tuple) -> None:
    part, cameras = crowd(60), Cameras.look_at([eye], aim)
    ours = render_views(scene(part), cameras, 40, lights=[PLAIN])
    cameras = Cameras(cameras.extrinsics, cameras.intrinsics, near=0.02, far=50.0)
    local = part.vertices @ cameras.extrinsics[:, :3, :3].mT + cameras.extrinsics[:, None, :3, 3]
    clip = torch.cat([local, torch.ones_like(local[..., :1])], -1) @ cameras.projection.mT
    seen = rasterize_mesh(clip, part.faces, 40, 40)
    assert part.colors is not None
    colors = interpolate(part.colors[None], part.faces, seen)[0]
    same = (ours.images[0, 3] > 0) == (seen.faces[0] >= 0)
    assert int((~same).sum()) <= 1  # a center on an edge, to the last bit
    near = (ours.images[0, :3].permute(1, 2, 0) - colors).abs().amax(-1) < 1e-4
    assert int((~near).sum()) <= 2
    depths = interpolate(local[..., 2:].contiguous(), part.faces, seen)[0, ..., 0]
    assert int(((ours.depths[0] - depths).abs() > 1e-3).sum()) <= 2


def test_a_floor_that_passes_under_the_camera_fills_the_lower_half() -> None:
    floor = Part(torch.tensor([(-0.5, -0.5, 0.0), (0.5, -0.5, 0.0), (0.5, 0.5, 0.0), (-0.5, 0.5, 0.0)]), TWO)
    seen = render_views(scene(floor), Cameras.look_at([[0.0, -0.1, 0.02]], [0.0, 0.9, 0.02]), 20).images[0, 3]
    # The far edge is 0.6 away and 0.02 below: 0.9 pixels under the middle.
    assert torch.equal(seen, (torch.arange(20) >= 11).float()[:, None].expand(20, 20))


def test_a_ceiling_seen_from_below_is_not_lit_from_above() -> None:
    ceiling = torch.tensor([(-0.5, -0.5, 0.4), (0.5, -0.5, 0.4), (0.5, 0.5, 0.4), (-0.5, 0.5, 0.4)])
    above = Light(0.5, ((0.0, 0.0, 1.0, 0.25),))
    for faces in (TWO, TWO.flip(1)):
        for height, brightness in ((0.2, 0.5), (0.6, 0.75)):
            cameras = Cameras.look_at([[0.0, -1.0, height]], [0.0, 0.0, 0.4])
            seen = render_views(scene(Part(ceiling, faces)), cameras, 31, lights=[above]).images[0]
            there = seen[3] > 0
            assert int(there.sum()) > 50
            torch.testing.assert_close(seen[0][there], torch.full((int(there.sum()),), brightness))


def test_depth_of_a_slope_is_where_the_rays_meet_it() -> None:
    slope = Part(torch.tensor([(-0.5, -0.5, -0.5), (0.5, -0.5, -0.5), (0.5, 0.5, 0.5), (-0.5, 0.5, 0.5)]), TWO)
    depths = render_views(scene(slope), FRONT, 31).depths[0]
    up = -((torch.arange(31, dtype=torch.float64) + 0.5) / 31 * 2 - 1) * math.tan(math.radians(20))
    # The ray (0, -2, 0) + t (., 1, up) meets the plane y = z at t = 2 / (1 - up); t is the depth.
    expected = (2 / (1 - up))[:, None].expand(31, 31).float()
    hit = depths > 0
    assert 300 < int(hit.sum()) < 31 * 31
    torch.testing.assert_close(depths[hit], expected[hit], rtol=1e-6, atol=0)


def test_depth_of_a_supersampled_pixel_is_its_nearest() -> None:
    things = scene(box(0.4, 0.3, 0.5, (0.8, 0.3, 0.1, 1.0)))
    fine = render_views(things, FRONT, 32).depths[0]
    blocks = torch.where(fine > 0, fine, math.inf).unfold(0, 2, 2).unfold(1, 2, 2).amin((-1, -2))
    expected = torch.where(blocks.isfinite(), blocks, 0.0)
    torch.testing.assert_close(render_views(things, FRONT, 16, ssaa=2).depths[0], expected)


def test_eight_panes_are_seen_through() -> None:
    panes = [wall(0.1 * index - 0.4, (1.0, 1.0, 1.0, 0.25)) for index in range(8)]
    views = render_views(scene(*panes), FRONT, 9, lights=[PLAIN])
    torch.testing.assert_close(views.images[0, :, 4, 4], torch.tensor([1.0, 1.0, 1.0, 1 - 0.75**8]))
    torch.testing.assert_close(views.depths[0, 4, 4], torch.tensor(1.6))


def test_holes_of_a_texture_are_neither_seen_nor_measured_and_do_not_bleed() -> None:
    texture = torch.zeros(8, 8, 4)
    texture[..., 1] = 1.0  # holes are green
    texture[:, :4] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    uv = torch.tensor([(0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
    leaf, back = wall(-0.2, texture=texture, uv=uv), wall(0.3, (0.0, 0.0, 1.0, 1.0))
    alone = render_views(scene(leaf), FRONT, 41, ssaa=2, lights=[PLAIN])
    colors, alpha = alone.images[0, :3], alone.images[0, 3]
    assert ((alpha > 0.05) & (alpha < 0.95)).any()
    assert float((colors[1] * alpha).max()) < 1e-6
    assert float(colors[0][alpha > 1e-3].min()) > 0.999
    row = 20
    assert float(alpha[row, 27]) == 0.0
    assert float(alone.depths[0, row, 27]) == 0.0
    both = render_views(scene(leaf, back), FRONT, 41, lights=[PLAIN])
    torch.testing.assert_close(both.images[0, :, row, 27], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(both.depths[0, row, 27], torch.tensor(2.3))
    torch.testing.assert_close(both.images[0, :, row, 10], torch.tensor([1.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(both.depths[0, row, 10], torch.tensor(1.8))


def test_parts_of_every_kind_look_as_if_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    uv = torch.tensor([(0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
    textures = [torch.cat([torch.rand(4, 4, 3, generator=generator), torch.ones(4, 4, 1)], -1) for _ in range(2)]
    kinds = [
        wall(0.0, (0.3, 0.6, 0.9, 1.0)),
        wall(0.0, (0.5, 0.5, 0.5, 1.0), colors=torch.rand(4, 3, generator=generator)),
        wall(0.0, (1.0, 0.5, 1.0, 1.0), texture=textures[0], uv=uv),
        wall(0.0, texture=textures[1], uv=uv),
    ]
    places = [torch.tensor([x, 0.0, z]) for x in (-0.25, 0.25) for z in (-0.25, 0.25)]
    parts = [
        Part(part.vertices * 0.5 + place, part.faces, part.color, part.colors, part.texture, part.uv)
        for part, place in zip(kinds, places, strict=True)
    ]
    together = render_views(scene(*parts), FRONT, 48).images[0]
    for part in parts:
        alone = render_views(scene(part), FRONT, 48).images[0]
        mine = alone[3] > 0
        assert int(mine.sum()) > 100
        torch.testing.assert_close(together[:, mine], alone[:, mine], atol=1e-5, rtol=0)
    assert int((together[3] > 0).sum()) == sum(
        int((render_views(scene(p), FRONT, 48).images[0, 3] > 0).sum()) for p in parts
    )


def test_pictures_do_not_depend_on_how_many_are_drawn_at_once_or_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    things = scene(crowd(40), wall(0.1, (0.5, 0.5, 1.0, 0.5)))
    cameras = official_views(5, (0.2, 0.4))
    whole = render_views(things, cameras, 24, ssaa=2)
    monkeypatch.setattr(surface, "_SAMPLES_AT_ONCE", 1500)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pieces = render_views(things, cameras, 24, ssaa=2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole.images, pieces.images)
    assert torch.equal(whole.depths, pieces.depths)


def test_what_is_never_bright_enough_is_cut_at_white_not_at_the_opacity() -> None:
    bright = Light(3.0, ())
    for alpha in (1.0, 0.5):
        seen = render_views(scene(wall(0.0, (0.2, 0.5, 0.9, alpha))), FRONT, 9, lights=[bright]).images[0, :, 4, 4]
        torch.testing.assert_close(seen, torch.tensor([0.6, 1.0, 1.0, alpha]))


def job(root: Path, **settings: object) -> Job:
    made = Job(root, "cd" * 32, {}, Settings(views=3, resolution=16, ssaa=1, cond_resolution=16, **settings))  # type: ignore[arg-type]
    made.__dict__["scene"] = normalised([box(1, 2, 3, (0.8, 0.3, 0.1, 1.0))])
    return made


@pytest.mark.parametrize("lost", ["001.png", "mesh.ply", "depths.npz", "transforms.json"])
def test_what_is_lost_is_rendered_again(tmp_path: Path, lost: str) -> None:
    made, folder = job(tmp_path, depth=True), tmp_path / "renders" / ("cd" * 32)
    render_step(made)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".npz"}
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    render_step(made)
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / lost).unlink()
    render_step(made)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".npz"}
    depths = np.load(folder / "depths.npz")["depths"]
    assert depths.dtype == np.float16
    assert depths.shape == (3, 16, 16)


def test_damaged_transforms_are_written_again(tmp_path: Path) -> None:
    made = job(tmp_path, cond_views=2)
    path = tmp_path / "renders_cond" / made.sha256 / "transforms.json"
    render_cond_step(made)
    written = path.read_text()
    for damage in ("", "{", "[]", json.dumps({"frames": []})):
        path.write_text(damage)
        render_cond_step(made)
        assert path.read_text() == written


def test_cameras_of_the_official_code_survive_the_file(tmp_path: Path) -> None:
    item = golden("cameras_backproject")
    angle = math.radians(item.info["fov_deg"])
    frames = [
        {"file_path": f"{index:03d}.png", "camera_angle_x": angle, "transform_matrix": pose.tolist()}
        for index, pose in enumerate(item["out.blender_c2w"])
    ]
    (tmp_path / "transforms.json").write_text(json.dumps({"frames": frames}))
    _, cameras = read_views(tmp_path)
    item.check("out.extrinsics", cameras.extrinsics)
    item.check("out.intrinsics", cameras.intrinsics)
    uv, depth = cameras.project(item["in.points"])
    item.check("out.uv", uv)
    item.check("out.depth", depth)


def test_the_file_gives_back_the_cameras_that_rendered(tmp_path: Path) -> None:
    made = job(tmp_path)
    render_step(made)
    _, cameras = read_views(tmp_path / "renders" / made.sha256)
    offset = torch.rand(2, generator=torch.Generator().manual_seed(made.seed)).tolist()
    expected = official_views(3, (offset[0], offset[1]))
    torch.testing.assert_close(cameras.extrinsics, expected.extrinsics, atol=1e-6, rtol=0)
    torch.testing.assert_close(cameras.intrinsics, expected.intrinsics, atol=1e-6, rtol=0)
