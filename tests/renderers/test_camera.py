import math

import pytest
import torch

from tests.support.golden import golden
from trellis.renderers.camera import Cameras


def official() -> tuple[Cameras, object]:
    item = golden("cameras_backproject")
    fov = math.radians(item.info["fov_deg"])
    return Cameras.orbit(item["in.yaws"], item["in.pitchs"], item.info["r"], fov), item


def test_orbit_is_the_official_one() -> None:
    cameras, item = official()
    item.check("out.extrinsics", cameras.extrinsics)  # type: ignore[attr-defined]
    item.check("out.intrinsics", cameras.intrinsics)  # type: ignore[attr-defined]


def test_projected_points_are_the_official_ones() -> None:
    cameras, item = official()
    uv, depth = cameras.project(item["in.points"])  # type: ignore[index]
    item.check("out.uv", uv)  # type: ignore[attr-defined]
    item.check("out.depth", depth)  # type: ignore[attr-defined]


def test_projection_matrix_is_the_official_one() -> None:
    cameras, item = official()
    item.check("out.projection_near0.8_far1.6", cameras.projection[0])  # type: ignore[attr-defined]


def test_blender_poses_are_the_official_ones_and_come_back() -> None:
    cameras, item = official()
    item.check("out.blender_c2w", cameras.blender)  # type: ignore[attr-defined]
    back = Cameras.from_blender(cameras.blender, math.radians(40))
    torch.testing.assert_close(back.extrinsics, cameras.extrinsics, rtol=0, atol=1e-6)


def test_projection_matrix_and_project_agree_off_center() -> None:
    cameras = Cameras.orbit([0.3, 1.0], 0.2)
    intrinsics = cameras.intrinsics.clone()
    intrinsics[:, :2, 2] = torch.tensor([0.4, 0.7])
    cameras = Cameras(cameras.extrinsics, intrinsics)
    points = torch.rand(5, 3) - 0.5
    local = torch.cat([points, torch.ones(5, 1)], 1) @ cameras.extrinsics.transpose(1, 2)
    clip = local @ cameras.projection.transpose(1, 2)
    uv, depth = cameras.project(points)
    torch.testing.assert_close((clip[..., :2] / clip[..., 3:] + 1) / 2, uv)
    torch.testing.assert_close(clip[..., 3], depth)


def test_near_and_far_are_the_ends_of_clip_space() -> None:
    matrix = Cameras.orbit(0.0, 0.0, near=0.5, far=4.0).projection[0]
    clip = torch.tensor([[0, 0, 0.5, 1], [0, 0, 4.0, 1]]) @ matrix.T
    torch.testing.assert_close(clip[:, 2] / clip[:, 3], torch.tensor([0.0, 1.0]))


def test_looks_at_the_target_with_up_shown_upward() -> None:
    camera = Cameras.look_at((1.0, 2.0, 0.5), (0.1, 0.2, 0.3))
    uv, depth = camera.project(torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.4]]))
    torch.testing.assert_close(uv[0, 0], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(depth[0, 0], torch.tensor([0.9, 1.8, 0.2]).norm())
    assert uv[0, 1, 1] < 0.5
    torch.testing.assert_close(camera.centers, torch.tensor([[1.0, 2.0, 0.5]]))


def test_sphere_hammersley_surrounds_the_object() -> None:
    cameras = Cameras.sphere_hammersley(50, radius=3.0)
    assert len(cameras) == 50
    torch.testing.assert_close(cameras.centers.norm(dim=-1), torch.full((50,), 3.0))
    assert cameras.centers.mean(0).abs().max() < 0.2
    assert cameras.extrinsics.isfinite().all()


def test_indexing_gives_batches() -> None:
    cameras = Cameras.orbit([0.0, 1.0, 2.0], 0.1, near=0.3, far=9.0)
    assert len(cameras[1]) == len(cameras[-1]) == 1
    assert torch.equal(cameras[-1].extrinsics, cameras.extrinsics[2:])
    assert cameras[1:].near == 0.3
    assert [len(camera) for camera in cameras] == [1, 1, 1]
    with pytest.raises(IndexError, match=r"index must be in -3\.\.2; got 3"):
        cameras[3]


def test_to_changes_the_dtype() -> None:
    assert Cameras.orbit(0.0, 0.0).to(torch.float64).intrinsics.dtype == torch.float64


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="line of sight"):
        Cameras.look_at((0.0, 0.0, 2.0))
    with pytest.raises(ValueError, match=r"fov must be in \(0, pi\) radians; got 40"):
        Cameras.orbit(0.0, 0.0, fov=40)
    with pytest.raises(ValueError, match="0 < near < far"):
        Cameras.orbit(0.0, 0.0, near=2.0, far=1.0)
    with pytest.raises(ValueError, match=r"extrinsics must be \[V, 4, 4\]; got \[4, 4\]"):
        Cameras(torch.eye(4), torch.eye(3))
