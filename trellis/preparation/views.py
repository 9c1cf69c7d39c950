"""Pictures of an object of several materials, with our own rasterizer: renders, conditioning pictures, voxels."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from trellis.atomic import atomic_path
from trellis.nn.hammersley import sphere_hammersley
from trellis.preparation.job import Job
from trellis.preparation.scene import SceneParts
from trellis.renderers.camera import DEFAULT_FOV, Cameras
from trellis_kernels import interpolate, interpolate_derivatives, rasterize_mesh, sample_texture, voxelize_mesh
from trellis_kernels.mesh_raster import Rasterization

RADIUS = 2.0
FRONT = -math.pi / 2  # yaw of a camera that looks at the front
_LAYERS = 4  # surfaces seen through each other
_PIXELS_AT_ONCE = 1 << 22


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
    if resolution < 1 or ssaa < 1:
        raise ValueError(f"resolution and ssaa must be positive; got {resolution} and {ssaa}")
    lights = [Light.standard()] * len(cameras) if lights is None else lights
    if len(lights) != len(cameras):
        raise ValueError(f"lights must be one for each of {len(cameras)} cameras; got {len(lights)}")
    samples, surface = resolution * ssaa, _Surface(scene)
    chunk = max(1, _PIXELS_AT_ONCE // samples**2)
    pieces = [
        _render(surface, cameras[start : start + chunk], samples, ssaa, lights[start : start + chunk])
        for start in range(0, len(cameras), chunk)
    ]
    if not pieces:
        return Views(torch.zeros(0, 4, resolution, resolution), torch.zeros(0, resolution, resolution))
    return Views(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


class _Surface:
    """A scene as one mesh, its attributes as rows."""

    def __init__(self, scene: SceneParts) -> None:
        self.parts = scene.parts
        self.vertices, self.faces = scene.vertices, scene.faces
        corners = self.vertices[self.faces.long()]
        self.normals = normalize(
            torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), dim=1
        )
        self.part = torch.cat([torch.full((len(part.faces),), i) for i, part in enumerate(scene.parts)])
        colors = []
        for part in scene.parts:
            own = torch.ones(len(part.vertices), 3) if part.colors is None else part.colors
            colors.append(torch.cat([own, torch.ones(len(own), 1)], 1) * torch.tensor(part.color))
        self.colors = torch.cat(colors)
        self.uv = torch.cat([torch.zeros(len(p.vertices), 2) if p.uv is None else p.uv for p in scene.parts])
        self.clear = bool((self.colors[:, 3] < 1).any()) or any(
            p.texture is not None and bool((p.texture[..., 3] < 1).any()) for p in scene.parts
        )

    def shade(self, seen: Rasterization, pixels: Tensor, toward: Tensor, lights: Tensor) -> Tensor:
        """``[P, 4]`` color and opacity of the pixels ``[P, 3]`` (view, row, column) that show a triangle.

        Args:
            seen: what the pixels show.
            pixels: which.
            toward: ``[P, 3]`` from where they are seen, any length.
            lights: ``[V, L, 4]`` directions and strengths; row 0 holds the ambient share.
        """
        view, row, column = pixels.unbind(1)
        face = seen.faces[view, row, column]
        rows = face[None, None], seen.barycentrics[view, row, column][None, None]
        picked = Rasterization(
            rows[0], rows[1], seen.depths[:1, :1, :1], seen.derivatives[view, row, column][None, None]
        )
        albedo = interpolate(self.colors[None], self.faces, picked)[0, 0]
        part = self.part[face.long()]
        if any(p.texture is not None for p in self.parts):
            uv = interpolate(self.uv[None], self.faces, picked)[0, 0]
            steps = interpolate_derivatives(self.uv[None], self.faces, picked)[0, 0]
            for index, material in enumerate(self.parts):
                mine = torch.nonzero(part == index)[:, 0]
                if material.texture is not None and len(mine):
                    texels = sample_texture(material.texture[None], uv[None, None, mine], steps[None, None, mine])
                    albedo[mine] *= texels[0, 0]
        normal = self.normals[face.long()]
        normal = torch.where((normal * toward).sum(1, keepdim=True) < 0, -normal, normal)
        light = lights[:, 0, 3][view]
        for index in range(1, lights.shape[1]):
            lamp = lights[view, index]
            light = light + (normal * lamp[:, :3]).sum(1).clamp(min=0) * lamp[:, 3]
        return torch.cat([(albedo[:, :3] * light[:, None]).clamp(0, 1), albedo[:, 3:]], 1)


def _render(surface: _Surface, cameras: Cameras, samples: int, ssaa: int, lights: Sequence[Light]) -> Views:
    ends = Cameras(cameras.extrinsics, cameras.intrinsics, near=0.1, far=20.0)
    points = surface.vertices @ cameras.extrinsics[:, :3, :3].mT + cameras.extrinsics[:, None, :3, 3]
    clip = torch.cat([points, torch.ones_like(points[..., :1])], -1) @ ends.projection.mT
    most = max(len(light.directions) for light in lights)
    table = torch.zeros(len(lights), most + 1, 4)
    for index, light in enumerate(lights):
        table[index, 0, 3] = light.ambient
        for lamp, (x, y, z, strength) in enumerate(light.directions, 1):
            length = math.sqrt(x * x + y * y + z * z)
            table[index, lamp] = torch.tensor([x / length, y / length, z / length, strength])
    premultiplied = torch.zeros(len(cameras), samples, samples, 4)
    depths, seen = torch.zeros(len(cameras), samples, samples), None
    for layer in range(_LAYERS if surface.clear else 1):
        seen = rasterize_mesh(clip, surface.faces, samples, samples, seen)
        pixels = torch.nonzero((seen.faces >= 0) & (premultiplied[..., 3] < 0.999))
        if not len(pixels):
            break
        view, row, column = pixels.unbind(1)
        away = interpolate(points[..., 2:].contiguous(), surface.faces, seen)[..., 0] if layer == 0 else None
        if away is not None:
            depths = torch.where(seen.faces >= 0, away, depths)
        # All points of a triangle are on the same side of its plane's normal as seen from the camera: a corner will do.
        corner = surface.vertices[surface.faces[seen.faces[view, row, column].long(), 0].long()]
        color = surface.shade(seen, pixels, cameras.centers[view] - corner, table)
        over = (1 - premultiplied[view, row, column, 3:]) * color[:, 3:]
        premultiplied[view, row, column] += torch.cat([color[:, :3] * over, over], 1)
    if ssaa > 1:
        count = samples // ssaa
        premultiplied = premultiplied.view(-1, count, ssaa, count, ssaa, 4).mean((2, 4))
        blocks = depths.view(-1, count, ssaa, count, ssaa)
        nearest = torch.where(blocks > 0, blocks, math.inf).amin((2, 4))
        depths = torch.where(nearest.isfinite(), nearest, 0.0)
    alpha = premultiplied[..., 3:]
    images = torch.cat([premultiplied[..., :3] / alpha.clamp(min=1e-6), alpha], -1)
    return Views(images.permute(0, 3, 1, 2), depths)


def render_step(job: Job) -> dict[str, Any]:
    """Write renders/<sha>: the training views, transforms.json, mesh.ply, and depths.npz if the settings say so."""
    settings, folder = job.settings, job.root / "renders" / job.sha256
    if not (folder / "transforms.json").exists():
        offset = torch.rand(2, generator=torch.Generator().manual_seed(job.seed)).tolist()
        cameras = official_views(settings.views, (offset[0], offset[1]))
        views = render_views(job.scene, cameras, settings.resolution, settings.ssaa)
        if settings.depth:
            with atomic_path(folder / "depths.npz") as path:
                np.savez_compressed(path, depths=views.depths.numpy().astype(np.float16))
        job.scene.mesh.save(folder / "mesh.ply")
        _write(folder, job.scene, cameras, views)
    return {}


def render_cond_step(job: Job) -> dict[str, Any]:
    """Write renders_cond/<sha>: the conditioning pictures, each in another light, and transforms.json."""
    settings, folder = job.settings, job.root / "renders_cond" / job.sha256
    if not (folder / "transforms.json").exists():
        generator = torch.Generator().manual_seed(job.seed + 1)
        cameras = conditioning_views(settings.cond_views, generator, settings.cond_azimuth, settings.cond_elevation)
        lights = [Light.random(generator) for _ in range(settings.cond_views)]
        views = render_views(job.scene, cameras, settings.cond_resolution, settings.ssaa, lights)
        _write(folder, job.scene, cameras, views)
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


def _write(folder: Path, scene: SceneParts, cameras: Cameras, views: Views) -> None:
    """The pictures, then transforms.json: who finds that finds all."""
    import cv2

    folder.mkdir(parents=True, exist_ok=True)
    pixels = (views.images.permute(0, 2, 3, 1) * 255).round().byte().numpy()[..., [2, 1, 0, 3]]
    fov = 2 * torch.atan(0.5 / cameras.intrinsics[:, 0, 0].double())
    frames = []
    for index, (picture, pose, angle) in enumerate(zip(pixels, cameras.blender.tolist(), fov.tolist(), strict=True)):
        name = f"{index:03d}.png"
        done, packed = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 3])
        if not done:
            raise RuntimeError(f"{folder / name} could not be encoded")
        with atomic_path(folder / name) as path:
            path.write_bytes(packed.tobytes())
        frames.append({"file_path": name, "camera_angle_x": angle, "transform_matrix": pose})
    cube = [[-0.5] * 3, [0.5] * 3]
    described = {"aabb": cube, "scale": scene.scale, "offset": list(scene.offset), "frames": frames}
    with atomic_path(folder / "transforms.json") as path:
        path.write_text(json.dumps(described))
