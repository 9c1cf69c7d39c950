"""Pictures of an object of several materials, with our own rasterizer: renders, conditioning pictures, voxels."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trellis.atomic import atomic_path
from trellis.nn.hammersley import sphere_hammersley
from trellis.preparation.job import Job
from trellis.preparation.scene import SceneParts
from trellis.preparation.surface import Picture, Surface
from trellis.renderers.camera import DEFAULT_FOV, Cameras
from trellis_kernels import voxelize_mesh

RADIUS = 2.0
FRONT = -math.pi / 2  # yaw of a camera that looks at the front


@dataclass(frozen=True)
class Light:
    """How surfaces are lit: a share of their color whatever their direction, and more from each of some directions.

    Args:
        ambient: share of the color that every surface shows.
        directions: ``(x, y, z, strength)`` towards the lights; a surface that faces one shows `strength` more. Both
            sides of a surface are lit as the side that is seen.
    """

    ambient: float
    directions: tuple[tuple[float, float, float, float], ...]

    @property
    def lamps(self) -> Tensor:
        """``[1 + L, 4]``: (0, 0, 0, `ambient`), then unit directions and strengths."""
        rows = [(0.0, 0.0, 0.0, self.ambient)]
        for x, y, z, strength in self.directions:
            length = math.sqrt(x * x + y * y + z * z)
            rows.append((x / length, y / length, z / length, strength))
        return torch.tensor(rows)

    @classmethod
    def standard(cls) -> Light:
        """A key light where the official scenes have theirs, the sky, and a little from below."""
        return cls(0.5, ((4.0, 1.0, 6.0, 0.3), (0.0, 0.0, 1.0, 0.2), (0.0, 0.0, -1.0, 0.1), (0.0, -1.0, 0.3, 0.1)))

    @classmethod
    def random(cls, generator: torch.Generator) -> Light:
        """A key light from anywhere above, of any strength."""
        x, y, z, strength, ambient = torch.rand(5, generator=generator).tolist()
        key = (2 * x - 1, 2 * y - 1, 0.1 + z, 0.6 * strength)
        return cls(0.4 + 0.4 * ambient, (key, (0.0, 0.0, 1.0, 0.15), (0.0, 0.0, -1.0, 0.05)))


class Views(NamedTuple):
    """Pictures of a scene.

    Args:
        images: ``[V, 4, H, W]`` float32 sRGB, not premultiplied, and opacity.
        depths: ``[V, H, W]`` float32 distance along the camera's axis to the nearest surface, 0 where there is none.
    """

    images: Tensor
    depths: Tensor


def official_views(count: int, offset: tuple[float, float]) -> Cameras:
    """The cameras of training renders: remapped sphere-Hammersley directions, radius 2, 40 degrees.

    Args:
        count: V.
        offset: two numbers in [0, 1) that turn the set.

    Source:
        Facts, section 14 (official render script).
    """
    angles = [sphere_hammersley(index, count, offset, remap=True) for index in range(count)]
    return _around([yaw for yaw, _ in angles], [pitch for _, pitch in angles], [RADIUS] * count, [DEFAULT_FOV] * count)


def conditioning_views(
    count: int,
    generator: torch.Generator,
    azimuth: float = 180.0,
    elevation: tuple[float, float] = (-90.0, 90.0),
) -> Cameras:
    """Cameras of conditioning pictures: the object fills the picture at fields of view of 10 to 70 degrees.

    The distance follows the official distribution: 1 / radius^2 uniform between those of the extreme fields of view.

    Args:
        count: V.
        generator: of directions and distances.
        azimuth: at most so many degrees from the front, which is -y; 180 together with all elevations: the official
            sphere-Hammersley directions.
        elevation: lowest and highest, degrees; between them evenly on the sphere.

    Source:
        Facts, section 14 (official conditioning script).
    """
    numbers = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    nearest, farthest = (math.sqrt(3) / 2 / math.sin(math.radians(fov) / 2) for fov in (70.0, 10.0))
    inverse = 1 / farthest**2 + numbers[:, 0] * (1 / nearest**2 - 1 / farthest**2)
    radius = inverse.rsqrt()
    fov = (2 * torch.asin(math.sqrt(3) / 2 / radius)).tolist()
    if azimuth >= 180 and elevation == (-90.0, 90.0):
        offset = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        angles = [sphere_hammersley(index, count, (offset[0], offset[1])) for index in range(count)]
        return _around([yaw for yaw, _ in angles], [pitch for _, pitch in angles], radius.tolist(), fov)
    low, high = (math.sin(math.radians(angle)) for angle in elevation)
    pitch = torch.asin(low + (high - low) * numbers[:, 2]).tolist()
    yaw = (FRONT + math.radians(azimuth) * (2 * numbers[:, 1] - 1)).tolist()
    return _around(yaw, pitch, radius.tolist(), fov)


def _around(yaw: Sequence[float], pitch: Sequence[float], radius: Sequence[float], fov: Sequence[float]) -> Cameras:
    rows = zip(yaw, pitch, radius, strict=True)
    # Straight up and down there is no "up"; a hair beside it there is.
    tilted = [(y, max(-1.5707, min(1.5707, p)), r) for y, p, r in rows]
    eyes = [(r * math.cos(y) * math.cos(p), r * math.sin(y) * math.cos(p), r * math.sin(p)) for y, p, r in tilted]
    return Cameras.look_at(torch.tensor(eyes, dtype=torch.float32).view(-1, 3), fov=torch.tensor(fov))


def render_views(
    scene: SceneParts, cameras: Cameras, resolution: int, ssaa: int = 1, lights: Sequence[Light] | None = None
) -> Views:
    """Render an object with its materials, transparent ones included.

    Args:
        scene: what to render.
        cameras: V cameras.
        resolution: H = W.
        ssaa: samples per side of a pixel; a pixel is their mean.
        lights: of each view; None: the standard one.

    Raises:
        ValueError: `resolution` or `ssaa` is not positive, or there are not V lights.
    """
    images = torch.zeros(len(cameras), 4, resolution, resolution) if resolution > 0 else torch.empty(0)
    depths = torch.zeros(images[:, 0].shape) if resolution > 0 else images
    for index, picture in enumerate(_pictures(scene, cameras, resolution, ssaa, lights)):
        height, width = picture.depths.shape
        rows, columns = slice(picture.top, picture.top + height), slice(picture.left, picture.left + width)
        images[index, :, rows, columns] = picture.colors.permute(2, 0, 1)
        depths[index, rows, columns] = picture.depths
    return Views(images, depths)


def _pictures(
    scene: SceneParts, cameras: Cameras, resolution: int, ssaa: int, lights: Sequence[Light] | None = None
) -> Iterator[Picture]:
    if resolution < 1 or ssaa < 1:
        raise ValueError(f"resolution and ssaa must be positive; got {resolution} and {ssaa}")
    lights = [Light.standard()] * len(cameras) if lights is None else lights
    if len(lights) != len(cameras):
        raise ValueError(f"lights must be one for each of {len(cameras)} cameras; got {len(lights)}")
    return Surface(scene).draw(cameras, resolution, ssaa, [light.lamps for light in lights])


def render_step(job: Job) -> dict[str, Any]:
    """Write renders/<sha>: the training views, transforms.json, mesh.ply, and depths.npz if the settings say so."""
    settings, folder = job.settings, job.root / "renders" / job.sha256
    others = ["mesh.ply", "depths.npz"] if settings.depth else ["mesh.ply"]
    if not _is_there(folder, settings.views, others):
        offset = torch.rand(2, generator=torch.Generator().manual_seed(job.seed)).tolist()
        cameras = official_views(settings.views, (offset[0], offset[1]))
        pictures = _pictures(job.scene, cameras, settings.resolution, settings.ssaa)
        job.scene.mesh.save(folder / "mesh.ply")
        _write(folder, job.scene, cameras, settings.resolution, pictures, settings.depth)
    return {}


def render_cond_step(job: Job) -> dict[str, Any]:
    """Write renders_cond/<sha>: the conditioning pictures, each in another light, and transforms.json."""
    settings, folder = job.settings, job.root / "renders_cond" / job.sha256
    if not _is_there(folder, settings.cond_views):
        generator = torch.Generator().manual_seed(job.seed + 1)
        cameras = conditioning_views(settings.cond_views, generator, settings.cond_azimuth, settings.cond_elevation)
        lights = [Light.random(generator) for _ in range(settings.cond_views)]
        pictures = _pictures(job.scene, cameras, settings.cond_resolution, settings.ssaa, lights)
        _write(folder, job.scene, cameras, settings.cond_resolution, pictures)
    return {}


def voxelize_step(job: Job) -> dict[str, Any]:
    """Write voxels/<sha>.ply: the centers of the voxels that the surface touches."""
    resolution = job.settings.voxel_resolution
    # As officially: a point on the cube's far side belongs to the last voxel.
    vertices = job.scene.vertices.clamp(-0.5 + 1e-6, 0.5 - 1e-6)
    coords = voxelize_mesh(vertices, job.scene.faces, resolution)
    if not len(coords):
        raise ValueError("the object must touch a voxel; it touches none")
    points = ((coords.double() + 0.5) / resolution - 0.5).numpy().astype("<f4")
    with atomic_path(job.root / "voxels" / f"{job.sha256}.ply") as path, path.open("wb") as file:
        properties = "".join(f"property float {axis}\n" for axis in "xyz")
        header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{properties}end_header\n"
        file.write(header.encode() + points.tobytes())
    return {"num_voxels": len(coords)}


def _is_there(folder: Path, count: int, others: Sequence[str] = ()) -> bool:
    """Whether a folder of pictures was written to its end and nothing of it is missing since."""
    try:
        frames = json.loads((folder / "transforms.json").read_text())["frames"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    names = [f"{index:03d}.png" for index in range(count)] + list(others)
    return len(frames) == count and all((folder / name).is_file() for name in names)


def _write(
    folder: Path, scene: SceneParts, cameras: Cameras, side: int, pictures: Iterable[Picture], depth: bool = False
) -> None:
    """The pictures as they come, then transforms.json: who finds that finds all."""
    import cv2

    fov = 2 * torch.atan(0.5 / cameras.intrinsics[:, 0, 0].double())
    frames, depths = [], np.zeros((len(cameras) if depth else 0, side, side), np.float16)
    for index, (picture, pose, angle) in enumerate(zip(pictures, cameras.blender.tolist(), fov.tolist(), strict=True)):
        name, (height, width) = f"{index:03d}.png", picture.depths.shape
        where = slice(picture.top, picture.top + height), slice(picture.left, picture.left + width)
        pixels = np.zeros((side, side, 4), np.uint8)
        pixels[where] = (picture.colors * 255).round_().byte().numpy()[..., [2, 1, 0, 3]]
        if depth:
            depths[(index, *where)] = picture.depths.numpy()
        done, packed = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        if not done:
            raise RuntimeError(f"{folder / name} could not be encoded")
        with atomic_path(folder / name) as path:
            path.write_bytes(packed.tobytes())
        frames.append({"file_path": name, "camera_angle_x": angle, "transform_matrix": pose})
    if depth:
        with atomic_path(folder / "depths.npz") as path:
            np.savez_compressed(path, depths=depths)
    cube = [[-0.5] * 3, [0.5] * 3]
    described = {"aabb": cube, "scale": scene.scale, "offset": list(scene.offset), "frames": frames}
    with atomic_path(folder / "transforms.json") as path:
        path.write_text(json.dumps(described))
