"""`SceneParts`: an object of several materials, from any mesh file, in the unit cube with z up."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trellis.preparation.counting import stated_size
from trellis.representations.gltf import linear_to_srgb
from trellis.representations.mesh import Mesh
from trellis.representations.mesh_reading import MeshPart, colors_of, picture_of, read_parts, unit_colors

if TYPE_CHECKING:
    from trellis.preparation.job import Job

logger = logging.getLogger(__name__)
MAX_FACES = 5_000_000
MAX_BYTES = 1 << 30
MAX_TEXTURE = 2048  # pixels per side: renders have fewer


@dataclass(frozen=True, eq=False)
class Part:
    """The triangles of one material.

    Args:
        vertices: ``[V, 3]`` float32.
        faces: ``[F, 3]`` int32 rows of `vertices`.
        color: red, green, blue (sRGB) and opacity in [0, 1], times what follows.
        colors: ``[V, 3]`` float32 sRGB at the vertices, or None.
        texture: ``[H, W, 4]`` float32 sRGB and opacity, row 0 at the top, or None.
        uv: ``[V, 2]`` float32, (0, 0) the top left corner of the texture; None without one.
    """

    vertices: Tensor
    faces: Tensor
    color: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    colors: Tensor | None = None
    texture: Tensor | None = None
    uv: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SceneParts:
    """An object: its parts, in the unit cube around the origin with z up and the front towards -y.

    Args:
        parts: at least one.
        scale: by how much the file's units were multiplied.
        offset: what was added after that.
    """

    parts: tuple[Part, ...]
    scale: float
    offset: tuple[float, float, float]

    @property
    def vertices(self) -> Tensor:
        """``[V, 3]`` of all parts."""
        return torch.cat([part.vertices for part in self.parts])

    @property
    def faces(self) -> Tensor:
        """``[F, 3]`` int32 rows of `vertices`, part after part."""
        starts = np.cumsum([0, *(len(part.vertices) for part in self.parts)])
        return torch.cat([part.faces + int(start) for part, start in zip(self.parts, starts[:-1], strict=True)])

    @property
    def mesh(self) -> Mesh:
        """All triangles, without colors."""
        return Mesh(self.vertices, self.faces.long())


@dataclass(frozen=True)
class Variant:
    """A change of an object that makes another plausible one.

    Args:
        turns: quarter turns about the vertical.
        mirror: in x.
        stretch: factors of x, y, z before normalisation.
        hue: added to the hue, a whole turn is 1.
        brightness: factor of the colors.
    """

    turns: int = 0
    mirror: bool = False
    stretch: tuple[float, float, float] = (1.0, 1.0, 1.0)
    hue: float = 0.0
    brightness: float = 1.0

    @classmethod
    def random(cls, generator: torch.Generator) -> Variant:
        """Any turn, mirrored half of the time, stretched by up to 25 %, recolored half of the time."""
        draw = torch.rand(7, generator=generator).tolist()
        stretch = tuple(round(float(np.exp((u - 0.5) * 0.45)), 4) for u in draw[:3])
        return cls(
            turns=int(draw[3] * 4),
            mirror=draw[4] < 0.5,
            stretch=(stretch[0], stretch[1], stretch[2]),
            hue=0.0 if draw[5] < 0.5 else round(draw[5] * 2 - 1, 4),
            brightness=round(0.75 + 0.5 * draw[6], 4),
        )


def load_scene(path: Path, rotation: Sequence[Sequence[float]] | None = None) -> SceneParts:
    """Read GLB, glTF, OBJ, PLY or STL with its materials.

    Args:
        path: the file; what it refers to must lie in its folder.
        rotation: 3 x 3, applied in the file's own axes.

    Raises:
        ValueError: the file is damaged, empty, too large, has positions that are not finite or no extent.
        FileNotFoundError: there is none.
    """
    _check_size(path)
    parts = read_parts(path)
    count = sum(len(part.faces) for part in parts)
    if count > MAX_FACES:
        raise ValueError(f"{path} must have at most {MAX_FACES} faces; it has {count}")
    turned = [_part(part, path.suffix.lower(), rotation) for part in parts]
    return normalised([part for part in turned if len(part.faces)])


def _check_size(path: Path) -> None:
    """Refuse what no parser should be given: it would take minutes and all memory before one could count."""
    if not path.is_file():
        return  # read_parts says so
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} must have at most {MAX_BYTES} bytes; it has {path.stat().st_size}")
    size = stated_size(path)
    if size.faces > MAX_FACES or size.vertices > 3 * MAX_FACES:
        raise ValueError(
            f"{path} must have at most {MAX_FACES} faces and {3 * MAX_FACES} vertices; "
            f"it has {size.faces} and {size.vertices}"
        )


def inspect_step(job: Job) -> dict[str, Any]:
    """What one should know of an object before preparing it: counts of faces and materials, whether it has textures."""
    scene = job.scene
    return {
        "faces": sum(len(part.faces) for part in scene.parts),
        "vertices": sum(len(part.vertices) for part in scene.parts),
        "materials": len(scene.parts),
        "textured": any(part.texture is not None for part in scene.parts),
    }


def normalised(parts: Sequence[Part]) -> SceneParts:
    """Move the parts to the origin and scale their largest extent to 1.

    Raises:
        ValueError: they have no triangle or no extent.
    """
    if not parts:
        raise ValueError("the object must have triangles; it has none")
    used = torch.cat([part.vertices[part.faces.long().flatten()] for part in parts]).double()
    low, high = used.amin(0), used.amax(0)
    extent = float((high - low).max())
    if not extent > 1e-12:
        raise ValueError(f"the object must have an extent; all its points lie within {extent:g}")
    scale, center = 1 / extent, (low + high) / 2
    moved = [
        dataclasses.replace(part, vertices=((part.vertices.double() - center) * scale).float().clamp_(-0.5, 0.5))
        for part in parts
    ]
    x, y, z = (-center * scale).tolist()
    return SceneParts(tuple(moved), scale, (x, y, z))


def vary(scene: SceneParts, variant: Variant) -> SceneParts:
    """The scene changed as `variant` says, normalised again."""
    quarter = variant.turns % 4
    turn = torch.linalg.matrix_power(torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), quarter)
    matrix = turn @ torch.diag(torch.tensor(variant.stretch))
    if variant.mirror:
        matrix = torch.diag(torch.tensor([-1.0, 1.0, 1.0])) @ matrix
    return normalised([_varied(part, matrix, variant) for part in scene.parts])


def _varied(part: Part, matrix: Tensor, variant: Variant) -> Part:
    red, green, blue, alpha = part.color
    (red, green, blue), texture, colors = _recolored([red, green, blue], variant), part.texture, part.colors
    if texture is not None:
        texture = torch.cat([_shifted(texture[..., :3], variant), texture[..., 3:]], -1)
    if colors is not None:
        colors = _shifted(colors, variant)
    if texture is not None or colors is not None:
        red, green, blue = part.color[:3]  # changed once is enough
    return dataclasses.replace(
        part,
        vertices=part.vertices @ matrix.T,
        faces=part.faces.flip(1) if variant.mirror else part.faces,
        color=(red, green, blue, alpha),
        texture=texture,
        colors=colors,
    )


def _recolored(color: Sequence[float], variant: Variant) -> list[float]:
    changed: list[float] = _shifted(torch.tensor(color)[None], variant)[0].tolist()
    return changed


def _shifted(colors: Tensor, variant: Variant) -> Tensor:
    """Turn the hue (about the gray axis, a rotation of the color cube) and scale."""
    if variant.hue:
        angle = torch.tensor(2 * np.pi * variant.hue)
        third = torch.full((3, 3), 1 / 3)
        cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / 3**0.5
        matrix = torch.cos(angle) * torch.eye(3) + torch.sin(angle) * cross + (1 - torch.cos(angle)) * third
        colors = colors @ matrix.T
    return (colors * variant.brightness).clamp(0, 1)


def _part(part: MeshPart, suffix: str, rotation: Sequence[Sequence[float]] | None) -> Part:
    vertices = part.vertices
    if rotation is not None:
        vertices = vertices @ np.asarray(rotation, dtype=np.float64).reshape(3, 3).T
    if suffix in (".glb", ".gltf", ".obj"):  # y up
        vertices = np.stack([vertices[:, 0], -vertices[:, 2], vertices[:, 1]], axis=1)
    _drop_damaged_picture(part)
    texture, uv = _texture(part)
    # colors_of() multiplies a glTF's colors with the factor already.
    colors = None if texture is not None else colors_of(part, suffix)
    red, green, blue, alpha = _color(part, suffix)
    if colors is not None:
        red = green = blue = 1.0
    return Part(
        torch.tensor(vertices, dtype=torch.float32),
        torch.tensor(part.faces, dtype=torch.int32),
        (red, green, blue, alpha),
        None if colors is None else torch.tensor(colors, dtype=torch.float32),
        texture,
        uv,
    )


def _drop_damaged_picture(part: MeshPart) -> None:
    """A picture that cannot be decoded (or whose pixels are too many) is as if it were not there: the color stays."""
    from PIL import Image

    picture = picture_of(part)
    if picture is None:
        return
    try:
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        logger.warning("a texture is left out: %s", error)
        for name in ("image", "baseColorTexture"):
            if getattr(part.visual.material, name, None) is not None:
                setattr(part.visual.material, name, None)


def _texture(part: MeshPart) -> tuple[Tensor | None, Tensor | None]:
    from PIL import Image

    picture = picture_of(part)
    if picture is None:
        return None, None
    if max(picture.size) > MAX_TEXTURE:
        picture = picture.copy()
        picture.thumbnail((MAX_TEXTURE, MAX_TEXTURE), Image.Resampling.BOX)
    image = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
    uv = np.stack([part.visual.uv[:, 0], 1 - part.visual.uv[:, 1]], axis=1)  # trimesh's v goes up
    return torch.tensor(image), torch.tensor(uv, dtype=torch.float32).nan_to_num(0, 0, 0)


def _color(part: MeshPart, suffix: str) -> tuple[float, float, float, float]:
    """Color (sRGB) and opacity of a material; white if it has none. The picture of an OBJ replaces its color."""
    material = getattr(part.visual, "material", None)
    if material is None or part.visual.kind != "texture":
        return 1.0, 1.0, 1.0, 1.0
    factor = getattr(material, "baseColorFactor", None)
    if factor is not None:  # glTF: linear
        color = unit_colors(np.asarray(factor))
        red, green, blue = linear_to_srgb(color[:3]).tolist()
        opaque = getattr(material, "alphaMode", None) in (None, "OPAQUE")
        return red, green, blue, 1.0 if opaque or len(color) < 4 else float(color[3])
    alpha = _opacity(getattr(material, "kwargs", None) or {})
    if suffix != ".obj" or picture_of(part) is not None:
        return 1.0, 1.0, 1.0, alpha
    red, green, blue = unit_colors(np.asarray(material.diffuse))[:3].tolist()
    return red, green, blue, alpha


def _opacity(properties: dict[str, Any]) -> float:
    """``d``, or 1 - ``Tr``, of an MTL file."""
    for name, invert in (("d", False), ("tr", True)):
        entry = properties.get(name, properties.get(name.capitalize()))
        try:
            value = float(entry[-1] if isinstance(entry, list) else str(entry))
        except (TypeError, ValueError, IndexError):
            continue
        if 0 <= value <= 1:
            return 1 - value if invert else value
    return 1.0
