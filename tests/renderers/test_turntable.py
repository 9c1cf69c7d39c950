from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.renderers.test_gaussians import ball
from tests.support.solids import box
from trellis.renderers.turntable import preview, snapshot_cameras, turntable_cameras, turntable_frames, view_rows


def test_preview_is_a_sheet_of_four_views(tmp_path: Path) -> None:
    preview(ball((0, 0, 0.3), (1, 0, 0)), tmp_path / "x.png", resolution=32)
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    assert sheet.shape == (64, 64, 3)
    assert (sheet[0, 0] == 255).all()
    assert sheet[:16].mean() < sheet[16:32].mean()  # the ball is in the upper half of each view


def test_preview_fills_the_last_row(tmp_path: Path) -> None:
    cameras = snapshot_cameras()[:3]
    preview(ball((0, 0, 0), (1, 0, 0)), tmp_path / "x.png", 16, cameras=cameras, columns=2)
    assert (np.asarray(Image.open(tmp_path / "x.png"))[16:, 16:] == 255).all()


def test_turn_is_the_official_one() -> None:
    centers = turntable_cameras(300).centers
    yaw = torch.linspace(0, 2 * 3.1415, 300)
    torch.testing.assert_close(centers[:, 2], 2 * (0.25 + 0.5 * yaw.sin()).sin())
    torch.testing.assert_close(centers.norm(dim=-1), torch.full((300,), 2.0))


def test_frames_are_bytes() -> None:
    frames = list(turntable_frames(ball((0, 0, 0), (1, 0, 0), 0.2), count=9, resolution=16))
    assert len(frames) == 9
    assert frames[0].shape == (16, 16, 3)
    assert frames[0].dtype == np.uint8
    assert frames[0][8, 8, 0] > 200


def test_objects_stand_side_by_side() -> None:
    rows = list(view_rows([ball((0, 0, 0), (1, 0, 0), 0.2), box((0.5, 0.5, 0.5))], snapshot_cameras(3), 16, 1.0))
    assert len(rows) == 3
    assert rows[0].shape == (16, 32, 3)
    assert rows[0][8, 8, 0] > 200 > 100 > rows[0][8, 8, 1]
    assert (rows[0][8, 20:28] < 255).any()


def test_sheet_of_several_objects_has_a_row_per_view(tmp_path: Path) -> None:
    preview([ball((0, 0, 0), (1, 0, 0))] * 3, tmp_path / "x.png", 16, cameras=snapshot_cameras(2))
    assert np.asarray(Image.open(tmp_path / "x.png")).shape == (32, 48, 3)
