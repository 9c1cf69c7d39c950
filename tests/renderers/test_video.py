import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from trellis.renderers import video
from trellis.renderers.video import save_gif, save_video


def moving_square(count: int) -> list[np.ndarray]:
    frames = np.zeros((count, 48, 64, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[10:30, 4 * i : 4 * i + 20, 0] = 255
    return list(frames)


def read_video(path: Path) -> np.ndarray:
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    return np.stack(frames)


def test_video_without_ffmpeg_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(video, "_ffmpeg", lambda: None)
    with caplog.at_level(logging.WARNING):
        save_video(moving_square(8), tmp_path / "x.mp4", fps=10)
    assert "instead of H.264" in caplog.text
    frames = read_video(tmp_path / "x.mp4")
    assert frames.shape == (8, 48, 64, 3)
    assert frames[0, 20, 10, 0] > 180
    assert frames[0, 20, 10, 2] < 80
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_video_by_ffmpeg(tmp_path: Path) -> None:
    if video._ffmpeg() is None:
        pytest.skip("no ffmpeg here")
    save_video(moving_square(8), tmp_path / "x.mp4", fps=10)
    assert read_video(tmp_path / "x.mp4").shape == (8, 48, 64, 3)


def fake_ffmpeg(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_ffmpeg_gets_all_pixels_of_even_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fake_ffmpeg(tmp_path / "ffmpeg", 'for last; do :; done; cat > "$last"')
    monkeypatch.setattr(video, "_ffmpeg", lambda: program)
    frames = [np.random.default_rng(i).integers(0, 256, (5, 7, 3), np.uint8) for i in range(3)]
    save_video(frames, tmp_path / "x.mp4")
    assert (tmp_path / "x.mp4").read_bytes() == b"".join(frame[:4, :6].tobytes() for frame in frames)


def test_failing_ffmpeg_leaves_nothing_and_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fake_ffmpeg(tmp_path / "ffmpeg", "echo 'no such codec' >&2; exit 3")
    monkeypatch.setattr(video, "_ffmpeg", lambda: program)
    with pytest.raises(RuntimeError, match="status 3: no such codec"):
        save_video(moving_square(300), tmp_path / "x.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["ffmpeg"]


def test_says_what_is_wrong_with_frames(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        save_video([], tmp_path / "x.mp4")
    with pytest.raises(ValueError, match=r"frame 1 is \[4, 4, 3\] uint8"):
        save_video([np.zeros((8, 8, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)], tmp_path / "x.mp4")
    with pytest.raises(ValueError, match=r"must end in \.mp4"):
        save_video(moving_square(1), tmp_path / "x.gif")
    assert not list(tmp_path.iterdir())


def test_gif_repeats_every_frame(tmp_path: Path) -> None:
    save_gif(moving_square(5), tmp_path / "x.gif", fps=10)
    with Image.open(tmp_path / "x.gif") as picture:
        assert picture.n_frames == 5
        assert picture.info["duration"] == 100
        assert picture.info["loop"] == 0
        picture.seek(4)
        last = np.asarray(picture.convert("RGB"))
    assert np.array_equal(last, moving_square(5)[4])


def test_says_what_is_wrong_with_a_gif(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        save_gif([], tmp_path / "x.gif")
    with pytest.raises(ValueError, match=r"must end in \.gif"):
        save_gif(moving_square(1), tmp_path / "x.mp4")
    assert not list(tmp_path.iterdir())
