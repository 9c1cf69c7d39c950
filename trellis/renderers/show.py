"""Any representation as pictures to look at."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from trellis.renderers.camera import Cameras
from trellis.renderers.canvas import Background, background_colors
from trellis.renderers.gaussians import render_gaussians
from trellis.renderers.mesh import Kind, render_mesh
from trellis.renderers.radiance_field import render_radiance_field
from trellis.representations.gaussians import Gaussians
from trellis.representations.mesh import Mesh
from trellis.representations.mesh_reading import ReadMesh
from trellis.representations.radiance_field import RadianceField

Shown = Gaussians | RadianceField | Mesh | ReadMesh
What = Literal["color", "normal", "depth", "alpha"]
WHATS: tuple[What, ...] = get_args(What)

_REACH = math.sqrt(3) / 2  # from the middle of the object's cube to its corners
# Samples per side of a pixel. The official renderers take 4 for fields and meshes; meshes are antialiased anyway.
_SAMPLES = {Gaussians: 1, RadianceField: 2, ReadMesh: 2}
_KINDS: dict[str, tuple[Kind, ...]] = {
    "color": ("colors",),
    "normal": ("mask", "normals"),
    "depth": ("mask", "depths"),
    "alpha": ("mask",),
}


@torch.no_grad()
def show(
    shown: Shown,
    cameras: Cameras,
    resolution: int = 512,
    background: Background = 0.0,
    ssaa: int | None = None,
    what: What = "color",
    generator: torch.Generator | None = None,
) -> Tensor:
    """``[V, 3, H, W]`` sRGB pictures of any representation, in front of the background, not clamped.

    Args:
        shown: what to show; it decides device and dtype.
        cameras: V cameras.
        resolution: pixels per side of the result.
        background: see `Background`.
        ssaa: samples per side of a pixel; None: 1 for Gaussians, 2 for the others.
        what: ``color`` (of a mesh without colors: gray, brighter where it faces the camera); ``normal`` (meshes only)
            as ``(n + 1) / 2`` of world normals; ``depth``: from white, where the cube of the object begins, to black,
            where it ends; ``alpha``: white on black.
        generator: for ``background="random"``.

    Raises:
        ValueError: if an argument is out of range, or `what` is not something that this representation has.
    """
    if what not in WHATS:
        raise ValueError(f"what must be {', '.join(WHATS)}; got {what!r}")
    if isinstance(shown, Mesh):
        shown = ReadMesh(shown, None)
    samples = _SAMPLES[type(shown)] if ssaa is None else ssaa
    behind = background_colors(background, len(cameras), 3, generator)
    if isinstance(shown, ReadMesh):
        return _show_mesh(shown, cameras, resolution, behind, samples, what)
    if what == "normal":
        raise ValueError(f"what must be color, depth or alpha for {type(shown).__name__}: only meshes have normals")
    if isinstance(shown, Gaussians):
        images = render_gaussians(shown, cameras, resolution, behind, samples)
    else:
        images = render_radiance_field(shown, cameras, resolution, behind, samples)
    return images.colors if what == "color" else _shaded(images.alphas, images.depths, cameras, behind, what)


def _show_mesh(shown: ReadMesh, cameras: Cameras, resolution: int, behind: Tensor, samples: int, what: What) -> Tensor:
    plain = what == "color" and shown.texture is None and shown.mesh.colors is None
    kinds = _KINDS["normal" if plain else what]
    images = render_mesh(shown.mesh, cameras, resolution, behind, samples, shown.texture, returns=kinds)
    if images.colors is not None:
        return images.colors
    mask = images.mask
    assert mask is not None
    if images.normals is None:
        return _shaded(mask, images.depths, cameras, behind, what)
    rest = (1 - mask[:, None]) * behind.to(mask)[..., None, None]
    if not plain:
        return images.normals - 0.5 * (1 - mask[:, None]) + rest
    forward = cameras.extrinsics.to(mask)[:, 2, :3, None, None]
    facing = ((2 * images.normals - 1) * forward).sum(1, keepdim=True).abs()
    return (0.25 * mask[:, None] + 0.65 * facing) + rest


def _shaded(alphas: Tensor, depths: Tensor | None, cameras: Cameras, behind: Tensor, what: What) -> Tensor:
    """Alphas, or depths (times alpha), as gray."""
    if what == "alpha" or depths is None:
        return alphas[:, None].expand(-1, 3, -1, -1)
    middle = cameras.to(depths).extrinsics[:, 2, 3, None, None]  # depth of the world's origin
    near = ((middle + _REACH) * alphas - depths) / (2 * _REACH)
    return near[:, None] + (1 - alphas[:, None]) * behind.to(alphas)[..., None, None]
