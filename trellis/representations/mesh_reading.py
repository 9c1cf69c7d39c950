"""Mesh files of anyone's, read by trimesh, in our axes and colors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from trellis.representations.gltf import linear_to_srgb, srgb_to_linear
from trellis.representations.mesh import Mesh
from trellis.representations.texture import Texture

SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl")
_Y_UP = (".glb", ".gltf", ".obj")
_LARGEST = 1 << 28  # vertices or faces, and pixels of a texture
_LARGEST_FILE = 1 << 30  # bytes of a file that a mesh refers to


class ReadMesh(NamedTuple):
    """A mesh and, if it has one, its texture."""

    mesh: Mesh
    texture: Texture | None


class MeshPart(NamedTuple):
    """The triangles of one material, in the file's axes.

    Args:
        vertices: ``[V, 3]`` float64, finite, placed as the file's scene says.
        faces: ``[F, 3]`` rows of `vertices`.
        visual: trimesh's colors and material.
    """

    vertices: np.ndarray
    faces: np.ndarray
    visual: Any


def read_mesh(path: str | Path) -> ReadMesh:
    """Read a mesh file; the inverse of `Mesh.save`, for files of other programs too.

    GLB, glTF and OBJ have y up and are turned to our z up; PLY and STL are taken as they are. Colors become sRGB (those
    of glTF vertices are linear). The parts of a scene become one mesh, placed as the scene says; only a mesh that is
    one part keeps its texture, of several parts the textures are looked up at the vertices.

    Returns:
        float32 mesh on the CPU; its normal map is None, because no file has one.

    Raises:
        ValueError: naming the file and what is wrong with it: not of its format, without triangles, indices out of
            range, numbers that are not finite, of a suffix that is not read.
        FileNotFoundError: there is none.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    parts = read_parts(path)
    texture = _texture(path, parts[0]) if len(parts) == 1 else None
    offsets = np.cumsum([0, *(len(part.vertices) for part in parts)])
    faces = np.concatenate([part.faces + offset for part, offset in zip(parts, offsets[:-1], strict=True)])
    vertices = np.concatenate([part.vertices for part in parts]).astype(np.float32)
    if suffix in _Y_UP:
        vertices = np.stack([vertices[:, 0], -vertices[:, 2], vertices[:, 1]], axis=1)
    colors = None if texture is not None else _all_colors(parts, suffix)
    # Corners that a format doubles, along seams of the texture or everywhere, become one vertex again, so that the
    # surface is closed; those of different colors stay apart.
    first, vertex = _distinct(vertices if colors is None else np.concatenate([vertices, colors], axis=1))
    mesh = Mesh(
        torch.tensor(vertices[first]),
        torch.tensor(vertex[faces], dtype=torch.int64),
        None if colors is None else torch.tensor(colors[first]),
    )
    if texture is not None:
        texture = dataclasses.replace(texture, faces=torch.tensor(faces, dtype=torch.int64))
    return ReadMesh(mesh, texture)


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct row first comes, in that order, and which of them each row is."""
    _, first, inverse = np.unique(rows + np.float32(0), axis=0, return_index=True, return_inverse=True)
    order = first.argsort()
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse.reshape(-1)]


def read_parts(path: Path) -> list[MeshPart]:
    """The triangle meshes of a file, one of each material, at least one.

    Files that it refers to are looked for in its folder and below, nowhere else.

    Raises:
        ValueError, FileNotFoundError: as `read_mesh`.
    """
    import trimesh

    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in {', '.join(SUFFIXES)} to be read as a mesh")
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        loaded = trimesh.load(path, file_type=suffix[1:], process=False, resolver=_confined(path))
        scene = loaded if isinstance(loaded, trimesh.Scene) else trimesh.Scene([loaded])
        placed = [(scene.graph[node][0], scene.geometry[scene.graph[node][1]]) for node in scene.graph.nodes_geometry]
    except Exception as error:  # whatever a parser trips over
        raise ValueError(f"{path} must be a valid {suffix[1:]} file: {type(error).__name__} {error}") from error
    # Not scene.dump(): its copies lack the vertex colors that a glTF has beside a material.
    meshes = [(place, part) for place, part in placed if isinstance(part, trimesh.Trimesh) and len(part.faces)]
    if not meshes:
        raise ValueError(f"{path} must have triangles; it has none")
    return [_checked(path, part, place) for place, part in meshes]


def _confined(path: Path) -> Any:
    """A trimesh resolver that opens files in the folder of `path` and below, and no others."""
    from trimesh.resolvers import Resolver

    folder = path.parent.resolve()

    class Confined(Resolver):
        def __init__(self) -> None:
            pass

        def get(self, key: str) -> bytes:
            wanted = (folder / key.strip().replace("\\", "/")).resolve()
            if not wanted.is_relative_to(folder):
                raise ValueError(f"{path.name} must refer to files in its folder; it names {key!r}")
            if not wanted.is_file():
                raise FileNotFoundError(f"{path.name} refers to {key!r}, which is not there")
            if wanted.stat().st_size > _LARGEST_FILE:
                raise ValueError(f"{key!r} must have at most {_LARGEST_FILE} bytes; it has {wanted.stat().st_size}")
            return wanted.read_bytes()

        def keys(self) -> list[str]:
            return []

        def write(self, name: str, data: Any) -> None:
            raise NotImplementedError("this resolver only reads")

        def namespaced(self, namespace: str) -> Resolver:
            return _confined(folder / namespace / path.name)

    return Confined()


def _checked(path: Path, part: Any, place: np.ndarray) -> MeshPart:
    vertices, faces = np.asarray(part.vertices, dtype=np.float64), np.asarray(part.faces)
    if max(len(vertices), len(faces)) > _LARGEST:
        raise ValueError(f"{path} must have at most {_LARGEST} vertices and faces; got {len(vertices)}")
    if not 0 <= faces.min() <= faces.max() < len(vertices):
        raise ValueError(f"{path} must have faces in [0, {len(vertices)}); got {faces.min()} to {faces.max()}")
    vertices = vertices @ place[:3, :3].T + place[:3, 3]
    if not np.isfinite(vertices.astype(np.float32)).all():
        raise ValueError(f"{path} must have finite float32 positions; some are not")
    return MeshPart(vertices, faces[:, ::-1] if np.linalg.det(place[:3, :3]) < 0 else faces, part.visual)


def picture_of(part: MeshPart) -> Any:
    """The base color picture of a part as a PIL image, or None."""
    visual = part.visual
    if visual.kind != "texture" or getattr(visual, "uv", None) is None or len(visual.uv) != len(part.vertices):
        return None
    material = visual.material
    return getattr(material, "baseColorTexture", None) or getattr(material, "image", None)


def _texture(path: Path, part: MeshPart) -> Texture | None:
    picture = picture_of(part)
    if picture is None:
        return None
    if picture.width * picture.height > _LARGEST:
        raise ValueError(f"{path} must have a texture of at most {_LARGEST} pixels; got {picture.size}")
    image = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    factor = getattr(part.visual.material, "baseColorFactor", None)
    if factor is not None:
        image = linear_to_srgb(srgb_to_linear(image) * unit_colors(np.asarray(factor))[:3])
    uv = np.stack([part.visual.uv[:, 0], 1 - part.visual.uv[:, 1]], axis=1)  # trimesh's v goes up
    if not np.isfinite(uv).all():
        raise ValueError(f"{path} must have finite texture coordinates; some are not")
    return Texture(torch.tensor(image, dtype=torch.float32), torch.tensor(uv, dtype=torch.float32))


def _all_colors(parts: list[MeshPart], suffix: str) -> np.ndarray | None:
    """``[V, 3]`` float32 of all parts, white for those that have none; None if none has any."""
    colors = [colors_of(part, suffix) for part in parts]
    if all(color is None for color in colors):
        return None
    rows = [np.ones((len(p.vertices), 3)) if c is None else c for p, c in zip(parts, colors, strict=True)]
    return np.concatenate(rows).astype(np.float32)


def colors_of(part: MeshPart, suffix: str) -> np.ndarray | None:
    """``[V, 3]`` sRGB at the vertices, or None."""
    visual = part.visual
    linear = suffix in (".glb", ".gltf")
    if visual.kind in ("vertex", "face"):
        # trimesh, too, takes the mean over the faces at a vertex, but needs scipy for it.
        colors = unit_colors(visual.vertex_colors)[:, :3] if visual.kind == "vertex" else _mean_over_faces(part)
        return linear_to_srgb(colors) if linear else colors
    if visual.kind != "texture":
        return None
    if picture_of(part) is not None:
        return unit_colors(visual.to_color().vertex_colors)[:, :3]
    stored = visual.vertex_attributes.get("color")
    factor = getattr(visual.material, "baseColorFactor", None)
    if stored is None and factor is None:
        return None
    colors = np.ones((len(part.vertices), 3)) if stored is None else unit_colors(np.asarray(stored))[:, :3]
    if not linear:
        return colors
    return linear_to_srgb(colors if factor is None else colors * unit_colors(np.asarray(factor))[:3])


def _mean_over_faces(part: MeshPart) -> np.ndarray:
    """``[V, 3]`` from the colors of the faces; zero where there is no face."""
    sums, counts = np.zeros((len(part.vertices), 3)), np.zeros((len(part.vertices), 1))
    np.add.at(sums, part.faces, unit_colors(part.visual.face_colors)[:, None, :3])
    np.add.at(counts, part.faces, 1)
    return sums / np.maximum(counts, 1)


def unit_colors(values: np.ndarray) -> np.ndarray:
    """Integers of any width as shares of their largest value; real numbers as they are, in [0, 1]."""
    if np.issubdtype(values.dtype, np.integer):
        return values.astype(np.float64) / np.iinfo(values.dtype).max
    return np.clip(np.nan_to_num(values.astype(np.float64)), 0, 1)
