"""What a step leaves for others: arrays in ``.npz`` files, voxels, rendered views."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trellis.atomic import atomic_path
from trellis.renderers.camera import Cameras


class Place(Protocol):
    """A file or folder to read: a path, or one inside of tar shards."""

    @property
    def name(self) -> str:
        """The last part of it."""

    def read_bytes(self) -> bytes:
        """All of a file."""

    def __truediv__(self: AnyPlace, name: str, /) -> AnyPlace:
        """What is called `name` in a folder."""


AnyPlace = TypeVar("AnyPlace", bound=Place)


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write an ``.npz``, whole or not at all."""
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)


def read_arrays(path: Place, *names: str) -> list[np.ndarray]:
    """The arrays of an ``.npz`` by their names.

    Raises:
        ValueError: it is missing, damaged, or lacks one.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
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


def read_voxels(path: Place, resolution: int) -> Tensor:
    """``[N, 3]`` int32 indices of the voxels whose centers are the vertices of a PLY file, in the file's order.

    Args:
        path: ``voxels/<sha>.ply``.
        resolution: R, voxels per side of the cube.

    Raises:
        ValueError: it is missing or damaged, has no vertices, or one is outside the cube.
    """
    points = np.asarray(_ply(path, "points").vertices, np.float64)
    indices = np.floor((points + 0.5) * resolution).astype(np.int32)
    if not len(indices) or not np.isfinite(points).all() or indices.min() < 0 or indices.max() >= resolution:
        raise ValueError(f"{path} must hold points inside the unit cube around 0")
    return torch.from_numpy(indices)


def read_triangles(path: Place) -> tuple[Tensor, Tensor]:
    """``[V, 3]`` float32 vertices and ``[F, 3]`` int32 triangles of a PLY file, F > 0.

    Raises:
        ValueError: it is missing or damaged, has no triangles, a number that is not finite or an index out of range.
    """
    loaded = _ply(path, "triangles")
    vertices = np.asarray(loaded.vertices, np.float32)
    faces = np.asarray(getattr(loaded, "faces", ()), np.int64).reshape(-1, 3)
    if not len(faces) or faces.min() < 0 or faces.max() >= len(vertices) or not np.isfinite(vertices).all():
        raise ValueError(f"{path} must have finite vertices, and triangles of these")
    return torch.from_numpy(vertices), torch.from_numpy(faces.astype(np.int32))


def _ply(path: Place, what: str) -> Any:
    import trimesh

    try:  # from memory: so nothing that the file refers to is opened
        return trimesh.load(io.BytesIO(path.read_bytes()), file_type="ply", process=False)
    except Exception as error:  # trimesh raises many unrelated types on damaged files
        raise ValueError(f"{path} must be a PLY file of {what}: {error}") from error


def read_views(folder: AnyPlace) -> tuple[list[AnyPlace], Cameras]:
    """The pictures of a folder with a transforms.json, and their cameras.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / "transforms.json"
    try:
        frames: list[Mapping[str, object]] = json.loads(path.read_bytes())["frames"]
        poses = torch.tensor([frame["transform_matrix"] for frame in frames], dtype=torch.float32).reshape(-1, 4, 4)
        fov = torch.tensor([frame["camera_angle_x"] for frame in frames], dtype=torch.float32)
        names = [str(frame["file_path"]) for frame in frames]
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} must describe rendered views: {error!r}") from error
    if not (torch.isfinite(poses).all() and torch.isfinite(fov).all() and ((fov > 0) & (fov < torch.pi)).all()):
        raise ValueError(f"{path} must have finite poses, and camera_angle_x between 0 and pi")
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{path} must name pictures beside it; got {names[:3]}")
    return [folder / name for name in names], Cameras.from_blender(poses, fov)


def read_picture(path: Place) -> Image.Image:
    """RGBA, not premultiplied.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as file:
            return file.convert("RGBA")
    except Exception as error:  # of a damaged picture also SyntaxError, struct.error, DecompressionBombError
        raise ValueError(f"{path} cannot be read: {error}") from error
