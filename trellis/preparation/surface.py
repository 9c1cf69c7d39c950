"""`Surface`: pictures of an object of several materials, quickly: only the samples that its box covers are touched."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trellis.preparation.scene import SceneParts
from trellis.renderers.camera import Cameras
from trellis_kernels import interpolate, interpolate_derivatives, rasterize_mesh, sample_texture
from trellis_kernels.mesh_raster import Rasterization

_NEAR = 0.01  # what is closer to the camera is not seen
_LAYERS = 8  # surfaces seen through each other
_OPAQUE = 0.999
_SAMPLES_AT_ONCE = 1 << 21


class Picture(NamedTuple):
    """The part of a picture that an object's box covers.

    Args:
        top: the row of the whole picture that row 0 is.
        left: the same of columns.
        colors: ``[h, w, 4]`` float32 sRGB, not premultiplied, and opacity.
        depths: ``[h, w]`` float32 distance along the camera's axis to the nearest surface, 0 where there is none.
    """

    top: int
    left: int
    colors: Tensor
    depths: Tensor


@dataclass
class _Frame:
    """A view that is being drawn: its box in pixels, and which of the samples at hand are its own."""

    top: int
    left: int
    height: int
    width: int
    start: int
    clip: Tensor  # [1, V, 4], of the box
    materials: Tensor  # [F, 4], premultiplied, lit as the side of each triangle is that is seen
    seen: Rasterization | None = None


@dataclass
class _Samples:
    """What samples show, those of one view after those of another."""

    rows: list[Tensor] = field(default_factory=list)
    colors: list[Tensor] = field(default_factory=list)
    depths: list[Tensor] = field(default_factory=list)
    texture: list[Tensor] = field(default_factory=list)
    uv: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)


class Surface:
    """A scene as one mesh.

    Light is the same over a triangle: the normals are those of the triangles, because files seldom have good ones.
    Textures are filtered premultiplied, so that what is not opaque does not bleed.

    Args:
        scene: what to draw.
    """

    def __init__(self, scene: SceneParts) -> None:
        parts = scene.parts
        vertices, self._faces = scene.vertices, scene.faces
        self._axes = vertices.T.contiguous()
        corners = vertices[self._faces.long()]
        cross = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        self._normals = normalize(cross, dim=1, eps=1e-30).T.contiguous()
        self._offsets = (self._normals.T * corners[:, 0]).sum(1)
        part = torch.cat([torch.full((len(p.faces),), i) for i, p in enumerate(parts)])
        materials = torch.tensor([p.color for p in parts])
        materials[:, :3] *= materials[:, 3:]
        self._materials = materials.index_select(0, part)
        self._colors = None
        if any(p.colors is not None for p in parts):
            self._colors = torch.cat([torch.ones(len(p.vertices), 3) if p.colors is None else p.colors for p in parts])
        textures = [(i, p.texture) for i, p in enumerate(parts) if p.texture is not None]
        self._textures = [torch.cat([t[..., :3] * t[..., 3:], t[..., 3:]], -1)[None] for _, t in textures]
        least = min([float(materials[:, 3].min()), *(float(texture[..., 3].min()) for _, texture in textures)])
        self._clear, self._holes = least < _OPAQUE, least <= 0
        self._flat = self._colors is None and not textures
        if textures:
            self._uv = torch.cat([torch.zeros(len(p.vertices), 2) if p.uv is None else p.uv for p in parts])
            number = torch.full((len(parts),), -1)
            number[[i for i, _ in textures]] = torch.arange(len(textures))
            self._texture = number[part]

    def draw(self, cameras: Cameras, resolution: int, ssaa: int, lamps: Sequence[Tensor]) -> Iterator[Picture]:
        """Draw the surface for each camera.

        Args:
            cameras: V cameras.
            resolution: H = W of the whole pictures.
            ssaa: samples per side of a pixel; a pixel is their mean, its depth the least of theirs.
            lamps: of each view ``[1 + L, 4]``: (0, 0, 0, ambient), then unit directions and strengths.
        """
        frames: list[_Frame] = []
        for index in range(len(cameras)):
            frame = self._frame(cameras[index], resolution, ssaa, lamps[index])
            samples = sum(f.height * f.width for f in [*frames, frame]) * ssaa**2
            if frames and samples > _SAMPLES_AT_ONCE:
                yield from self._drawn(frames, ssaa)
                frames, frame.start = [], 0
            elif frames:
                frame.start = frames[-1].start + frames[-1].height * frames[-1].width * ssaa**2
            frames.append(frame)
        yield from self._drawn(frames, ssaa)

    def _frame(self, camera: Cameras, resolution: int, ssaa: int, lamps: Tensor) -> _Frame:
        # Term by term: the rounding of a matrix product depends on the number of threads.
        (a, b, c), t = camera.extrinsics[0, :3, :3].T, camera.extrinsics[0, :3, 3]
        x, y, z = self._axes
        x, y, z = (a[i] * x + b[i] * y + c[i] * z + t[i] for i in range(3))
        k = camera.intrinsics[0] * resolution
        horizontal, vertical = k[0, 0] * x + k[0, 2] * z, k[1, 1] * y + k[1, 2] * z
        (left, right), (top, bottom) = (self._extent(along, z, resolution) for along in (horizontal, vertical))
        width, height = right - left, bottom - top
        clip = torch.stack(
            [
                (horizontal - left * z) * (2 / width) - z,
                (vertical - top * z) * (2 / height) - z,
                # Depth is -near / z: its error is a share of the distance, and nothing is too far.
                torch.full_like(z, -_NEAR),
                z,
            ],
            1,
        )
        return _Frame(top, left, height, width, 0, clip[None], self._lit(camera.centers[0], lamps))

    @staticmethod
    def _extent(along: Tensor, z: Tensor, resolution: int) -> tuple[int, int]:
        """First and last + 1 of the pixels that points fall on; at least one pixel."""
        if not bool((z > _NEAR).all()):
            return 0, resolution
        low, high = torch.aminmax(along / z)
        first = min(max(math.floor(float(low)), 0), resolution - 1)
        return first, min(max(math.ceil(float(high)), first + 1), resolution)

    def _lit(self, center: Tensor, lamps: Tensor) -> Tensor:
        x, y, z = self._normals
        toward = (x * center[0] + y * center[1] + z * center[2] >= self._offsets).float() * 2 - 1
        light = lamps[0, 3].expand_as(toward)
        for lamp in lamps[1:]:
            facing = toward * (x * lamp[0] + y * lamp[1] + z * lamp[2])
            light = light + facing.clamp_(min=0) * lamp[3]
        lit = self._materials * torch.stack([light, light, light, torch.ones_like(light)], 1)
        return _limited(lit) if self._flat else lit

    def _drawn(self, frames: Sequence[_Frame], ssaa: int) -> Iterator[Picture]:
        total = sum(frame.height * frame.width for frame in frames) * ssaa**2
        colors, depths = torch.zeros(total, 4), torch.ones(total)
        left = list(frames)
        for layer in range(_LAYERS if self._clear else 1):
            found = _Samples()
            left = [frame for frame in left if self._layer(frame, ssaa, colors, found)]
            if not left:
                break
            rows, shown = torch.cat(found.rows), self._textured(found)
            if self._holes:
                before = depths.index_select(0, rows)
                depths.index_copy_(0, rows, torch.minimum(before, torch.cat(found.depths).where(shown[:, 3] > 0, 1.0)))
            if layer > 0:
                before = colors.index_select(0, rows)
                shown = shown.mul_(1 - before[:, 3:]).add_(before)
            colors.index_copy_(0, rows, shown)
            if layer == 0 and not self._holes:
                for frame in left:
                    assert frame.seen is not None
                    depths[frame.start : frame.start + frame.seen.depths.numel()] = frame.seen.depths.flatten()
        for frame in frames:
            mine = slice(frame.start, frame.start + frame.height * frame.width * ssaa**2)
            yield _picture(frame, colors[mine], depths[mine], ssaa)

    def _layer(self, frame: _Frame, ssaa: int, colors: Tensor, found: _Samples) -> bool:
        """Add what the next layer of a view shows to `found`; whether it shows anything."""
        again = frame.seen is not None
        width, height = frame.width * ssaa, frame.height * ssaa
        seen = frame.seen = rasterize_mesh(frame.clip, self._faces, width, height, frame.seen)
        ids = seen.faces.flatten()
        visible = ids >= 0
        if again:
            visible &= colors[frame.start : frame.start + len(ids), 3] < _OPAQUE
        rows = torch.nonzero(visible)[:, 0]
        if not len(rows):
            return False
        face = ids.index_select(0, rows)
        found.rows.append(rows + frame.start)
        found.colors.append(frame.materials.index_select(0, face))
        if self._holes:
            found.depths.append(seen.depths.flatten().index_select(0, rows))
        if self._flat:
            return True
        picked = Rasterization(
            face[None, None],
            seen.barycentrics.view(-1, 2).index_select(0, rows)[None, None],
            seen.depths[:, :1, :1],
            seen.derivatives.view(-1, 4).index_select(0, rows)[None, None],
        )
        if self._colors is not None:
            found.colors[-1][:, :3] *= interpolate(self._colors[None], self._faces, picked)[0, 0]
        if self._textures:
            found.texture.append(self._texture.index_select(0, face))
            found.uv.append(interpolate(self._uv[None], self._faces, picked)[0, 0])
            found.steps.append(interpolate_derivatives(self._uv[None], self._faces, picked)[0, 0])
        return True

    def _textured(self, found: _Samples) -> Tensor:
        """``[P, 4]`` premultiplied."""
        colors = torch.cat(found.colors)
        if self._flat:
            return colors
        if self._textures:
            number, uv, steps = torch.cat(found.texture), torch.cat(found.uv), torch.cat(found.steps)
            for index, texture in enumerate(self._textures):
                mine = torch.nonzero(number == index)[:, 0]
                if len(mine):
                    where = uv.index_select(0, mine)[None, None], steps.index_select(0, mine)[None, None]
                    texels = sample_texture(texture, *where)[0, 0]
                    colors.index_copy_(0, mine, colors.index_select(0, mine).mul_(texels))
        return _limited(colors)


def _limited(colors: Tensor) -> Tensor:
    """Premultiplied colors in a light of more than 1 stay colors."""
    return torch.minimum(colors, colors[:, 3:])


def _picture(frame: _Frame, colors: Tensor, depths: Tensor, ssaa: int) -> Picture:
    height, width = frame.height, frame.width
    colors, depths = colors.view(height, ssaa, width, ssaa, 4), depths.view(height, ssaa, width, ssaa)
    pixels = _folded(_folded(colors, 1, torch.add), 2, torch.add) / ssaa**2
    nearest = _folded(_folded(depths, 1, torch.minimum), 2, torch.minimum)
    straight = pixels / pixels[..., 3:].clamp(min=1e-6)
    straight[..., 3] = pixels[..., 3]
    return Picture(frame.top, frame.left, straight, torch.where(nearest < 0, -_NEAR / nearest, 0.0))


def _folded(samples: Tensor, dim: int, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What torch's own reductions over a few samples take many times as long for."""
    return functools.reduce(join, samples.unbind(dim))
