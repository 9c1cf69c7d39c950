"""Cameras: OpenCV axes (x right, y down, z forward) in a world whose z points up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trellis.nn.hammersley import sphere_hammersley
from trellis_kernels.shapes import FLOATS, expect

DEFAULT_FOV = math.radians(40)


@dataclass(frozen=True)
class Cameras:
    """V cameras. One camera is a batch of one; indexing and slicing give batches.

    Args:
        extrinsics: ``[V, 4, 4]`` float. World to camera.
        intrinsics: ``[V, 3, 3]`` float. Focal lengths and principal point of a picture with sides of length 1 and its
            origin in the top left corner.
        near: distance of the near plane in world units; only `projection` knows it.
        far: distance of the far plane.

    Raises:
        ValueError, TypeError: if a shape, dtype or distance is not the one above.
    """

    extrinsics: Tensor
    intrinsics: Tensor
    near: float = 0.8
    far: float = 1.6

    def __post_init__(self) -> None:
        expect(extrinsics=(self.extrinsics, "V 4 4", FLOATS), intrinsics=(self.intrinsics, "V 3 3", FLOATS))
        if not 0 < self.near < self.far:
            raise ValueError(f"near and far must be 0 < near < far; got {self.near} and {self.far}")

    @classmethod
    def look_at(
        cls,
        eye: Tensor | Sequence[float],
        target: Tensor | Sequence[float] = (0.0, 0.0, 0.0),
        up: Tensor | Sequence[float] = (0.0, 0.0, 1.0),
        fov: float | Tensor = DEFAULT_FOV,
        near: float = 0.8,
        far: float = 1.6,
    ) -> Cameras:
        """Cameras at `eye` that see `target` in the middle.

        Args:
            eye: ``[3]`` or ``[V, 3]``, world units.
            target: ``[3]`` or ``[V, 3]``.
            up: ``[3]`` or ``[V, 3]``, shown upward; not along the line of sight.
            fov: angle of view in radians, across both sides of the picture; one or ``[V]``.
            near: see `Cameras`.
            far: see `Cameras`.

        Raises:
            ValueError: if a camera has no direction of view or `up` lies along it.
        """
        position = torch.as_tensor(eye, dtype=torch.float32).reshape(-1, 3)
        aim, above = (torch.as_tensor(x, dtype=torch.float32).to(position).expand_as(position) for x in (target, up))
        z = normalize(aim - position, dim=-1)
        x = torch.linalg.cross(-above, z)
        if not (x.norm(dim=-1) > 1e-6).all():
            raise ValueError("up must not lie along the line of sight, and eye must not be target")
        x = normalize(x, dim=-1)
        rotation = torch.stack([x, normalize(torch.linalg.cross(z, x), dim=-1), z], 1)
        extrinsics = torch.eye(4).to(position).repeat(len(position), 1, 1)
        extrinsics[:, :3, :3] = rotation
        extrinsics[:, :3, 3] = -(rotation @ position[:, :, None]).squeeze(-1)
        return cls(extrinsics, intrinsics_from_fov(fov, len(position)).to(position), near, far)

    @classmethod
    def orbit(
        cls,
        yaw: float | Sequence[float] | Tensor,
        pitch: float | Sequence[float] | Tensor,
        radius: float = 2.0,
        fov: float | Tensor = DEFAULT_FOV,
        near: float = 0.8,
        far: float = 1.6,
    ) -> Cameras:
        """Cameras around the origin, at ``radius (sin yaw cos pitch, cos yaw cos pitch, sin pitch)``.

        Args:
            yaw: radians, one or ``[V]``.
            pitch: radians above the horizon, one or ``[V]``; not straight up or down.
            radius: distance in world units.
            fov: see `look_at`.
            near: see `Cameras`.
            far: see `Cameras`.
        """
        yaws, pitches = torch.broadcast_tensors(
            *(torch.as_tensor(angle, dtype=torch.float32).reshape(-1) for angle in (yaw, pitch))
        )
        eye = torch.stack([yaws.sin() * pitches.cos(), yaws.cos() * pitches.cos(), pitches.sin()], -1)
        return cls.look_at(radius * eye, fov=fov, near=near, far=far)

    @classmethod
    def sphere_hammersley(
        cls,
        count: int,
        radius: float = 2.0,
        fov: float | Tensor = DEFAULT_FOV,
        offset: tuple[float, float] = (0.0, 0.0),
        remap: bool = False,
        near: float = 0.8,
        far: float = 1.6,
    ) -> Cameras:
        """`count` cameras spread evenly around the origin; `offset` and `remap` as in `nn.hammersley`."""
        angles = torch.tensor([sphere_hammersley(i, count, offset, remap) for i in range(count)], dtype=torch.float64)
        # The first point of the sequence is straight down, where `up` would leave the roll open.
        yaw, pitch = angles.view(-1, 2).unbind(-1)
        return cls.orbit(yaw, pitch.clamp(-math.pi / 2 + 1e-4, math.pi / 2 - 1e-4), radius, fov, near, far)

    @classmethod
    def from_blender(cls, poses: Tensor, fov: float | Tensor, near: float = 0.8, far: float = 1.6) -> Cameras:
        """Cameras from ``transform_matrix`` of a transforms.json: ``[V, 4, 4]`` camera to world, y up, z backward."""
        expect(poses=(poses, "V 4 4", FLOATS))
        return cls(_world_to_camera(poses), intrinsics_from_fov(fov, len(poses)).to(poses), near, far)

    @classmethod
    def from_gltf(cls, path: str | Path) -> Cameras:
        """The perspective cameras in the scene of a ``.glb`` or ``.gltf`` file, turned from its y up into our z up.

        Intrinsics keep its aspect ratio, where a picture is 1 wide and 1 high; near and far are the nearest and the
        farthest of its cameras, 1000 where one has no far plane.

        Raises:
            ValueError: naming what is wrong with the file, or it has no perspective camera.
        """
        from trellis.renderers.gltf_cameras import read_gltf_cameras

        poses, intrinsics, near, far = read_gltf_cameras(path)
        return cls(_world_to_camera(poses), intrinsics, near, far)

    def __len__(self) -> int:
        return len(self.extrinsics)

    def __getitem__(self, index: int | slice | Tensor) -> Cameras:
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"index must be in {-len(self)}..{len(self) - 1}; got {index}")
            index = slice(index, index + 1 or None)
        return dataclasses.replace(self, extrinsics=self.extrinsics[index], intrinsics=self.intrinsics[index])

    def __iter__(self) -> Iterator[Cameras]:
        return (self[index] for index in range(len(self)))

    def to(self, *args: Any, **kwargs: Any) -> Cameras:
        """The same cameras on another device or in another dtype; arguments of `torch.Tensor.to`."""
        moved = {name: getattr(self, name).to(*args, **kwargs) for name in ("extrinsics", "intrinsics")}
        return dataclasses.replace(self, **moved)

    @property
    def centers(self) -> Tensor:
        """``[V, 3]`` where the cameras are, in world units."""
        rotation, translation = self.extrinsics[:, :3, :3], self.extrinsics[:, :3, 3:]
        return -(rotation.transpose(1, 2) @ translation).squeeze(-1)

    @property
    def blender(self) -> Tensor:
        """``[V, 4, 4]`` camera to world with y up and z backward, as in a transforms.json."""
        return torch.linalg.inv(self.extrinsics) * self.extrinsics.new_tensor([1, -1, -1, 1])

    @property
    def projection(self) -> Tensor:
        """``[V, 4, 4]`` camera to clip space; y stays down and depth goes from 0 (near) to 1 (far).

        The principal point is where `intrinsics` puts it; the official matrix mirrors it in y, which shows only for
        pictures cut off center.
        """
        fx, fy = self.intrinsics[:, 0, 0], self.intrinsics[:, 1, 1]
        cx, cy = self.intrinsics[:, 0, 2], self.intrinsics[:, 1, 2]
        matrix = self.intrinsics.new_zeros(len(self), 4, 4)
        matrix[:, 0, 0], matrix[:, 0, 2] = 2 * fx, 2 * cx - 1
        matrix[:, 1, 1], matrix[:, 1, 2] = 2 * fy, 2 * cy - 1
        matrix[:, 2, 2], matrix[:, 2, 3] = (
            self.far / (self.far - self.near),
            self.near * self.far / (self.near - self.far),
        )
        matrix[:, 3, 2] = 1
        return matrix

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Where points are seen.

        Args:
            points: ``[N, 3]``, world units.

        Returns:
            ``[V, N, 2]`` positions in the picture, (0, 0) its top left corner and (1, 1) its bottom right, and
            ``[V, N]`` depths, negative behind the camera.
        """
        expect(points=(points, "N 3", self.extrinsics.dtype))
        local = points @ self.extrinsics[:, :3, :3].transpose(1, 2) + self.extrinsics[:, None, :3, 3]
        image = local @ self.intrinsics.transpose(1, 2)
        return image[..., :2] / image[..., 2:], local[..., 2]


def _world_to_camera(poses: Tensor) -> Tensor:
    """Extrinsics of poses with y up and z backward."""
    return torch.linalg.inv(poses * poses.new_tensor([1, -1, -1, 1]))


def intrinsics_from_fov(fov: float | Tensor, count: int) -> Tensor:
    """``[count, 3, 3]`` normalised intrinsics with the principal point in the middle; `fov` in radians, one or each.

    Raises:
        ValueError: if an angle is not in (0, pi).
    """
    angle = torch.as_tensor(fov, dtype=torch.float32).expand(count)
    if not ((angle > 0) & (angle < math.pi)).all():
        raise ValueError(f"fov must be in (0, pi) radians; got {fov}")
    matrix = torch.eye(3, device=angle.device).repeat(count, 1, 1)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 0.5 / torch.tan(angle / 2)
    matrix[:, :2, 2] = 0.5
    return matrix
