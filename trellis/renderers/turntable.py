"""Previews: a contact sheet of views, the frames of a turn around the object, and video files."""

from __future__ import annotations

import itertools
import logging
import math
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trellis.atomic import atomic_path
from trellis.renderers.camera import Cameras
from trellis.renderers.gaussians import Color, render_gaussians
from trellis.representations.gaussians import Gaussians

_LOGGER = logging.getLogger(__name__)
_BATCH = 8  # frames rendered at once

Frames = Iterable[np.ndarray]


def turntable_cameras(count: int = 300) -> Cameras:
    """The official turn: once around at distance 2, swinging between 14 degrees below the horizon and 43 above it."""
    yaw = torch.linspace(0, 2 * 3.1415, count)  # the official number, not pi
    return Cameras.orbit(yaw, 0.25 + 0.5 * yaw.sin(), radius=2.0, fov=math.radians(40))


def snapshot_cameras() -> Cameras:
    """Four sides from far away, as the official snapshots: yaw 90 degrees apart from -16 on, pitch 20, fov 8."""
    yaw = torch.deg2rad(torch.tensor([0.0, 90.0, 180.0, 270.0]) - 16)
    return Cameras.orbit(yaw, math.radians(20), radius=10.0, fov=math.radians(8))


def to_bytes(colors: Tensor) -> np.ndarray:
    """``[..., 3, H, W]`` sRGB, clamped to [0, 1], as ``[..., H, W, 3]`` uint8, rounded."""
    return (colors.detach().clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()


def preview(
    gaussians: Gaussians,
    path: str | Path,
    resolution: int = 512,
    background: Color = (1.0, 1.0, 1.0),
    cameras: Cameras | None = None,
    columns: int = 2,
) -> None:
    """Write a contact sheet of views, row by row, as an image file of the suffix's format.

    Args:
        gaussians: what to show.
        path: usually ``.png``.
        resolution: pixels per side of each view.
        background: sRGB.
        cameras: by default the four sides of `snapshot_cameras`.
        columns: views beside each other.
    """
    cameras = cameras or snapshot_cameras()
    views = [to_bytes(render_gaussians(gaussians, camera, resolution, background).colors)[0] for camera in cameras]
    blank = np.full_like(views[0], round(255 * background[0]))
    views += [blank] * (-len(views) % columns)
    rows = [np.concatenate(views[i : i + columns], 1) for i in range(0, len(views), columns)]
    with atomic_path(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary)


def turntable_frames(
    gaussians: Gaussians,
    count: int = 300,
    resolution: int = 512,
    background: Color = (0.0, 0.0, 0.0),
    cameras: Cameras | None = None,
) -> Iterator[np.ndarray]:
    """Yield frames ``[H, W, 3]`` uint8 of a turn around the object, rendered as they are asked for."""
    cameras = cameras or turntable_cameras(count)
    for begin in range(0, len(cameras), _BATCH):
        yield from to_bytes(render_gaussians(gaussians, cameras[begin : begin + _BATCH], resolution, background).colors)


def save_video(frames: Frames, path: str | Path, fps: int = 30) -> None:
    """Write an ``.mp4``, whole or not at all.

    H.264 by imageio-ffmpeg (extra ``[video]``) or an ffmpeg on the PATH. Without either, MPEG-4 part 2 by OpenCV,
    which browsers do not play; a warning is logged.

    Args:
        frames: ``[H, W, 3]`` uint8, all of one size. H.264 wants even sides: odd ones lose a row or column.
        path: the file.
        fps: frames per second.

    Raises:
        ValueError: no frames, or one that is not like the first.
        RuntimeError: the encoder failed; with its message.
    """
    if Path(path).suffix.lower() != ".mp4":
        raise ValueError(f"path must end in .mp4; got {path}")
    checked = _checked(frames)
    first = next(checked, None)
    if first is None:
        raise ValueError("frames must have at least one frame; got none")
    program = _ffmpeg()
    with atomic_path(path) as temporary:
        if program is not None:
            _encode_h264(program, first, checked, temporary, fps)
        else:
            _LOGGER.warning("no ffmpeg found (pip install 'trellis[video]'): writing MPEG-4 part 2 instead of H.264")
            _encode_mp4v(first, checked, temporary, fps)


def _checked(frames: Frames) -> Iterator[np.ndarray]:
    shape: tuple[int, ...] | None = None
    for number, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape != shape or shape[2] != 3:
            raise ValueError(
                f"frames must be [H, W, 3] uint8 of one size; frame {number} is {list(frame.shape)} {frame.dtype}"
            )
        yield frame[: shape[0] // 2 * 2, : shape[1] // 2 * 2]


def _ffmpeg() -> str | None:
    try:
        import imageio_ffmpeg
    except ImportError:
        return shutil.which("ffmpeg")
    return str(imageio_ffmpeg.get_ffmpeg_exe())


def _encode_h264(program: str, first: np.ndarray, rest: Iterator[np.ndarray], path: Path, fps: int) -> None:
    height, width, _ = first.shape
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -".split()
    target = ["-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "18", "-movflags", "+faststart", "-f", "mp4"]
    command: Sequence[str] = [program, "-y", "-loglevel", "error", *source, *target, str(path.absolute())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            for frame in itertools.chain([first], rest):
                process.stdin.write(np.ascontiguousarray(frame).tobytes())
            process.stdin.close()
        except BrokenPipeError:
            pass  # it says why on stderr
        except BaseException:
            process.kill()
            raise
        message = process.stderr.read().decode(errors="replace").strip()
        status = process.wait()
    if status != 0:
        raise RuntimeError(f"ffmpeg ended with status {status}: {message}")


def _encode_mp4v(first: np.ndarray, rest: Iterator[np.ndarray], path: Path, fps: int) -> None:
    import cv2

    height, width, _ = first.shape
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
    try:
        if not writer.isOpened():
            raise RuntimeError("OpenCV has no MPEG-4 encoder here: install ffmpeg or 'trellis[video]'")
        for frame in itertools.chain([first], rest):
            writer.write(cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2BGR))
    finally:
        writer.release()
