"""Pictures of triangle meshes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import embedding, normalize

from trellis.renderers.camera import Cameras
from trellis.renderers.canvas import Background, Canvas
from trellis.representations.mesh import Mesh
from trellis.representations.texture import Texture
from trellis_kernels import (
    Rasterization,
    antialias,
    face_neighbors,
    interpolate,
    interpolate_derivatives,
    rasterize_mesh,
    sample_texture,
)

Kind = Literal["mask", "depths", "normals", "normal_maps", "colors"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class MeshImages(NamedTuple):
    """Pictures by V cameras, antialiased; None is what was not asked for or what the mesh has not."""

    mask: Tensor | None
    """``[V, H, W]`` in [0, 1]: share of each pixel that the mesh covers."""
    depths: Tensor | None
    """``[V, H, W]`` camera z in world units, 0 where there is nothing."""
    normals: Tensor | None
    """``[V, 3, H, W]``: ``(n + 1) / 2`` of the world normal n of the triangle; 0.5 where there is nothing."""
    normal_maps: Tensor | None
    """``[V, 3, H, W]``: `Mesh.normals`, 0 where there is nothing."""
    colors: Tensor | None
    """``[V, C, H, W]`` from the texture or `Mesh.colors`, in front of the background."""


def render_mesh(
    mesh: Mesh,
    cameras: Cameras,
    resolution: int = 512,
    background: Background = 0.0,
    ssaa: int = 4,
    texture: Texture | None = None,
    near: float = 1.0,
    far: float = 100.0,
    returns: Sequence[Kind] = KINDS,
    generator: torch.Generator | None = None,
) -> MeshImages:
    """Render a mesh for each camera.

    Differentiable in colors, normal map, texture and its uv, in the vertices (inside of triangles through the
    barycentrics, at silhouettes through `antialias`), in the cameras and the background. Both sides of a triangle are
    drawn; those without area, or with a vertex that is not finite, are not seen. There is no light: colors are shown
    as they are.

    Args:
        mesh: V vertices; they decide device and dtype (half precision is drawn in float32).
        cameras: V cameras. Their near and far are not used, because the closest that a Gaussian should come has
            nothing to do with where a mesh is cut.
        resolution: pixels per side of the result.
        background: of the colors, see `Background`.
        ssaa: samples per side of a pixel.
        texture: drawn instead of the colors of the vertices.
        near: of the projection, as the official default. What is nearer than ``near far / (2 far - near)``, about half
            of it, is not drawn: clip space begins there, as in the official renderer.
        far: what is farther is not drawn.
        returns: which pictures are made.
        generator: for ``background="random"``.

    Returns:
        The pictures asked for; colors or normal maps that the mesh has not are None.

    Raises:
        ValueError: if an argument is out of range, a shape does not fit or a face names a vertex that is not there.
    """
    unknown = [kind for kind in returns if kind not in KINDS]
    if unknown:
        raise ValueError(f"returns must be among {', '.join(KINDS)}; got {unknown[0]!r}")
    mesh.check_indices()
    precise = torch.promote_types(mesh.vertices.dtype, torch.float32)
    mesh = mesh.to(dtype=precise)
    faces = mesh.faces.int()
    neighbors = face_neighbors(faces)
    channels = 3 if texture is None else texture.image.shape[-1]
    cameras = dataclasses.replace(cameras, near=near, far=far)
    canvas = Canvas.create(cameras, mesh.vertices, resolution, ssaa, background, channels, generator)
    present = {
        "colors": texture is not None or mesh.colors is not None,
        "normal_maps": mesh.normals is not None,
    }
    made = [kind for kind in KINDS if kind in returns and present.get(kind, True)]

    def draw(some: Canvas, rows: slice) -> list[Tensor]:
        return _draw(mesh, faces, neighbors, texture, some, made)

    images = dict(zip(made, canvas.draw(draw), strict=True)) if made else {}
    if "normals" in images:
        images["normals"] = (images["normals"] + 1) / 2
    return MeshImages(*(images.get(kind) for kind in KINDS))


def _draw(
    mesh: Mesh, faces: Tensor, neighbors: Tensor, texture: Texture | None, canvas: Canvas, kinds: Sequence[Kind]
) -> list[Tensor]:
    """One picture ``[v, S, S]`` or ``[v, S, S, C]`` per kind; all of them antialiased in one pass."""
    cameras = canvas.cameras
    # What is not finite is never seen; it is taken out first, because zero gradients times NaN are NaN.
    finite = mesh.vertices.isfinite().all(-1, keepdim=True)
    mesh = dataclasses.replace(mesh, vertices=torch.where(finite, mesh.vertices, 0.0))
    local = _transformed(mesh.vertices[None], cameras.extrinsics[:, :3])
    clip = _transformed(local, cameras.projection)
    clip = clip.masked_fill(~finite, math.nan)
    seen = rasterize_mesh(clip, faces, canvas.samples, canvas.samples)
    covered = (seen.faces >= 0)[..., None]
    layers: list[Tensor] = []
    for kind in kinds:
        if kind == "mask":
            layers.append(covered.to(clip))
        elif kind == "depths":
            layers.append(interpolate(local[..., 2:].contiguous(), faces, seen))
        elif kind == "normals":
            layers.append(_face_values(_face_normals(mesh), seen))
        elif kind == "normal_maps":
            assert mesh.normals is not None
            layers.append(interpolate(mesh.normals[None], faces, seen))
        else:
            colors = _colors(mesh, faces, texture, seen)
            layers.append(torch.where(covered, colors, canvas.background[:, None, None]))
    stack = torch.cat(layers, -1) if len(layers) > 1 else layers[0]
    smooth = antialias(stack, seen, clip, faces, neighbors)
    parts = smooth.split([layer.shape[-1] for layer in layers], -1)
    return [part[..., 0] if kind in ("mask", "depths") else part for kind, part in zip(kinds, parts, strict=True)]


def _transformed(points: Tensor, matrices: Tensor) -> Tensor:
    """``[v, V, R]`` of points ``[v or 1, V, 3]`` by matrices ``[v, R, 4]``.

    Term by term: the rounding of a matrix product depends on the number of threads.
    """
    x, y, z = (points[..., axis, None] for axis in range(3))
    a, b, c, d = (matrices[:, None, :, column] for column in range(4))
    return a * x + b * y + c * z + d


def _colors(mesh: Mesh, faces: Tensor, texture: Texture | None, seen: Rasterization) -> Tensor:
    if texture is None:
        assert mesh.colors is not None
        return interpolate(mesh.colors[None], faces, seen)
    image, uv = (values.to(seen.barycentrics) for values in (texture.image, texture.uv))
    corners = faces if texture.faces is None else texture.faces.to(faces)
    if corners.shape != faces.shape:
        raise ValueError(f"texture must have as many faces as the mesh, {len(faces)}; got {len(corners)}")
    steps = interpolate_derivatives(uv[None], corners, seen)
    return sample_texture(image[None], interpolate(uv[None], corners, seen), steps, texture.wrap, texture.filter)


def _face_values(values: Tensor, seen: Rasterization) -> Tensor:
    """``[F, C]`` values of the triangles at the pixels, zero where there is none."""
    corners = torch.arange(3 * len(values), dtype=torch.int32, device=values.device).view(-1, 3)
    return interpolate(values[:, None].expand(-1, 3, -1).flatten(0, 1)[None], corners, seen)


def _face_normals(mesh: Mesh) -> Tensor:
    """``[F, 3]`` unit normals; zero for triangles without area, which are never seen."""
    # Its backward adds up in a fixed order, unlike that of indexing.
    a, b, c = embedding(mesh.faces, mesh.vertices).unbind(1)
    return normalize(torch.linalg.cross(b - a, c - a), dim=-1, eps=1e-30)
