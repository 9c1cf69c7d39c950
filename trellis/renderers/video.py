"""Frames to video files and animated pictures."""

from __future__ import annotations

import itertools
import logging
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from trellis.atomic import atomic_path

_LOGGER = logging.getLogger(__name__)

Frames = Iterable[np.ndarray]


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


def save_gif(frames: Frames, path: str | Path, fps: int = 30) -> None:
    """Write an animated ``.gif`` that repeats, whole or not at all; each frame has its own 256 colors.

    Args:
        frames: ``[H, W, 3]`` uint8, all of one size.
        path: the file.
        fps: frames per second, at most 50: the format counts hundredths of a second, and viewers slow down the
            shortest.

    Raises:
        ValueError: no frames, or one that is not like the first.
    """
    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"path must end in .gif; got {path}")
    pictures = (Image.fromarray(frame).quantize(256) for frame in _checked(frames, even=False))
    first = next(pictures, None)
    if first is None:
        raise ValueError("frames must have at least one frame; got none")
    duration = 10 * max(2, round(100 / fps))  # milliseconds
    with atomic_path(path) as temporary:
        first.save(temporary, save_all=True, append_images=pictures, duration=duration, loop=0, disposal=1)


def _checked(frames: Frames, even: bool = True) -> Iterator[np.ndarray]:
    shape: tuple[int, ...] | None = None
    for number, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape != shape or shape[2] != 3:
            raise ValueError(
                f"frames must be [H, W, 3] uint8 of one size; frame {number} is {list(frame.shape)} {frame.dtype}"
            )
        yield frame[: shape[0] // 2 * 2, : shape[1] // 2 * 2] if even else frame


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
