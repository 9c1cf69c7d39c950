"""What a step leaves for others: arrays in ``.npz`` files, voxels, rendered views."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trellis.atomic import atomic_path
from trellis.renderers.camera import Cameras


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write an ``.npz``, whole or not at all."""
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)


def read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    """The arrays of an ``.npz`` by their names.

    Raises:
        ValueError: it is missing, damaged, or lacks one.
    """
    try:
        with np.load(path) as file:
            return [file[name] for name in names]
    except Exception as error:  # numpy raises many unrelated types on damaged files
        raise ValueError(f"{path} must be an .npz with {', '.join(names)}: {error}") from error


def is_whole(path: Path, *names: str) -> bool:
    """Whether `read_arrays` would succeed."""
    if not path.is_file():
        return False
    try:
        read_arrays(path, *names)
    except ValueError:
        return False
    return True


def read_voxels(path: Path, resolution: int) -> Tensor:
    """``[N, 3]`` int32 indices of the voxels whose centers are the vertices of a PLY file, in the file's order.

    Args:
        path: ``voxels/<sha>.ply``.
        resolution: R, voxels per side of the cube.

    Raises:
        ValueError: it is missing or damaged, has no vertices, or one is outside the cube.
    """
    import trimesh

    try:
        points = np.asarray(trimesh.load(path, file_type="ply", process=False).vertices, np.float64)
    except Exception as error:  # trimesh raises many unrelated types on damaged files
        raise ValueError(f"{path} must be a PLY file of points: {error}") from error
    indices = np.floor((points + 0.5) * resolution).astype(np.int32)
    if not len(indices) or not np.isfinite(points).all() or indices.min() < 0 or indices.max() >= resolution:
        raise ValueError(f"{path} must hold points inside the unit cube around 0")
    return torch.from_numpy(indices)


def read_views(folder: Path) -> tuple[list[Path], Cameras]:
    """The pictures of a folder with a transforms.json, and their cameras.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / "transforms.json"
    try:
        frames: list[Mapping[str, object]] = json.loads(path.read_text())["frames"]
        poses = torch.tensor([frame["transform_matrix"] for frame in frames], dtype=torch.float32).reshape(-1, 4, 4)
        fov = torch.tensor([frame["camera_angle_x"] for frame in frames], dtype=torch.float32)
        names = [str(frame["file_path"]) for frame in frames]
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} must describe rendered views: {error!r}") from error
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{path} must name pictures beside it; got {names[:3]}")
    return [folder / name for name in names], Cameras.from_blender(poses, fov)


def read_picture(path: Path) -> Image.Image:
    """RGBA, not premultiplied.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        with Image.open(path) as file:
            return file.convert("RGBA")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
