"""The objects that a pipeline is measured on, rendered and sampled once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trellis.atomic import atomic_path
from trellis.evaluation.metrics import Shape
from trellis.preparation.arrays import is_whole, read_arrays, read_voxels
from trellis.preparation.job import Job, Settings
from trellis.preparation.metadata import done, read_metadata
from trellis.preparation.scene import SceneParts
from trellis.preparation.views import render_views
from trellis.renderers.camera import Cameras
from trellis.representations.mesh import Mesh
from trellis.training.objectives.surfaces import sample_points

VIEWS, RESOLUTION = 24, 256
POINTS = 10_000
SSAA = 2


def fixed_cameras(count: int = VIEWS) -> Cameras:
    """The cameras of all re-renders: radius 2, 40 degrees, evenly around the object."""
    return Cameras.sphere_hammersley(count, radius=2.0, fov=math.radians(40))


def objects(root: Path, split: str, *, variants: bool = False) -> list[Job]:
    """The voxelised objects of a split, by id; with `variants` also their changed copies.

    Raises:
        FileNotFoundError, ValueError: `root` is no prepared folder.
    """
    settings = Settings.load(root)
    return [
        Job(root, sha, row, settings)
        for sha, row in sorted(read_metadata(root).items())
        if row.get("split") == split and done(row.get("voxelized")) and (variants or not int(row.get("variant") or 0))
    ]


def surface_points(mesh: Mesh, count: int = POINTS) -> Tensor:
    """``[count, 3]`` points spread evenly over a surface, always the same; none of a mesh without area."""
    corners = mesh.vertices[mesh.faces]
    areas = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1)
    if not bool(areas.sum() > 0):
        return torch.zeros(0, 3)
    return sample_points(mesh, count, torch.Generator().manual_seed(0)).detach().float()


def scene_images(scene: SceneParts) -> Tensor:
    """``[V, 3, 256, 256]`` of an object with its materials, on white."""
    images = render_views(scene, fixed_cameras(), RESOLUTION, SSAA).images
    return images[:, :3] * images[:, 3:] + 1 - images[:, 3:]


def true_shape(job: Job, cache: Path) -> Shape:
    """The object itself; pictures (8 bits) and points are kept in `cache`."""
    voxels = read_voxels(job.root / "voxels" / f"{job.sha256}.ply", job.settings.voxel_resolution)
    # A job keeps its scene, textures and all, and there are many: this one's is let go at once.
    return Shape(voxels, *_kept(cache / f"{job.sha256}.npz", lambda: dataclasses.replace(job).scene))


def scene_shape(scene: SceneParts, voxels: Tensor, path: Path) -> Shape:
    """Any object, kept at `path` likewise."""
    return Shape(voxels, *_kept(path, lambda: scene))


def _kept(path: Path, scene: Callable[[], SceneParts]) -> tuple[Tensor, Tensor]:
    if not is_whole(path, "points", "images"):
        made = scene()
        images = (scene_images(made) * 255).round().byte().numpy()
        with atomic_path(path) as temporary:
            np.savez_compressed(temporary, points=surface_points(made.mesh).numpy(), images=images)
    points, images = read_arrays(path, "points", "images")
    return torch.from_numpy(points), torch.from_numpy(images.astype(np.float32) / 255)
