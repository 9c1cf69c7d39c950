"""Valid arguments for every operator, at any number of rows: what tests that go over all of `OPERATORS` feed them.

A new operator needs an entry here; `tests/kernels/test_bad_input.py` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.fields import random_field
from tests.support.gaussians import random_scene
from tests.support.sparse_maps import neighbors_of
from trellis_kernels import OPERATORS

CHANNELS, HEADS, WIDTH = 16, 2, 16
Case = Callable[[int], tuple[Any, ...]]


def reference_of(name: str, *args: Any) -> Any:
    return OPERATORS[f"trellis_kernels::{name}"].reference(*args)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def voxels(rows: int) -> Tensor:
    """``[rows, 4]`` distinct voxels, neighbors of each other, in two samples."""
    coords = torch.cartesian_prod(*[torch.arange(5, dtype=torch.int32)] * 3)[:rows]
    batch = (torch.arange(rows, dtype=torch.int32) >= (rows + 1) // 2).int()
    return torch.cat([batch[:, None], coords], dim=1).contiguous()


def offsets(rows: int) -> Tensor:
    """Two sequences, the first longer."""
    return torch.tensor([0, (rows + 1) // 2, rows], dtype=torch.int32)


def _maps(rows: int) -> Tensor:
    return neighbors_of(voxels(rows))


def _coarse(rows: int) -> tuple[Tensor, int]:
    coarse, inverse = reference_of("coarsen", voxels(rows), 2)
    return inverse, len(coarse)


def _weight(taps: int = 27) -> Tensor:
    return noise(CHANNELS, taps, CHANNELS)


def _qkv(rows: int) -> Tensor:
    return noise(rows, 3, HEADS, WIDTH)


def _attention(rows: int) -> tuple[Tensor, ...]:
    return (*(part.contiguous() for part in _qkv(rows).unbind(1)), offsets(rows), offsets(rows))


def _attention_backward(rows: int) -> tuple[Tensor, ...]:
    query, key, value, *bounds = _attention(rows)
    out, logsumexp = reference_of("varlen_attention", query, key, value, *bounds)
    return noise(rows, HEADS, WIDTH), query, key, value, out, logsumexp, *bounds


def _windows(rows: int) -> tuple[Tensor, ...]:
    return _qkv(rows), *reference_of("window_partition", voxels(rows), 2, 1)


def _windows_backward(rows: int) -> tuple[Tensor, ...]:
    qkv, order, bounds = _windows(rows)
    out, logsumexp = reference_of("windowed_attention", qkv, order, bounds)
    return noise(rows, HEADS, WIDTH), qkv, out, logsumexp, order, bounds


def _modulated(rows: int) -> tuple[Any, ...]:
    return noise(rows, CHANNELS), noise(2, CHANNELS), noise(2, CHANNELS), offsets(rows), 1e-6, 1.0


def _modulated_backward(rows: int) -> tuple[Any, ...]:
    x, gain, shift, bounds, eps, unit = _modulated(rows)
    _, mean, rstd = reference_of("layer_norm", x, gain, shift, bounds, eps, unit)
    return noise(rows, CHANNELS), x, gain, bounds, mean, rstd, unit


def _cubes(rows: int) -> tuple[Tensor, Tensor, int]:
    coords = voxels(rows)[:, 1:].contiguous()
    distance = (coords[:, :1] - 1).float() + torch.arange(8) % 2 - 0.5  # the surface crosses every cube at x = 1
    return coords, torch.cat([distance, 0.1 * noise(rows, 53 - 8)], dim=1), 8


def _surface(rows: int) -> tuple[Any, ...]:
    coords, feats, resolution = _cubes(rows)
    *topology, _ = reference_of("surface_topology", coords, feats, resolution)
    return feats, *topology, resolution, False


def _surface_gradient(rows: int) -> tuple[Any, ...]:
    arguments = _surface(rows)
    return *arguments, *(torch.ones_like(value) for value in reference_of("surface_values", *arguments))


def _quads(rows: int) -> tuple[Tensor, Tensor]:
    *_, quads = reference_of("surface_topology", *_cubes(rows))
    return quads, noise(int(quads.max()) + 1 if len(quads) else 0).sigmoid()


def _images(rows: int) -> tuple[Tensor, Tensor]:
    return noise(1, 2, rows, 13).sigmoid(), noise(1, 2, rows, 13).abs().sigmoid()


def _rasterized(rows: int) -> tuple[Any, ...]:
    return *random_scene(rows, size=0.1), 33, 17, 0.1


def _rasterized_backward(rows: int) -> tuple[Any, ...]:
    inputs = _rasterized(rows)[:8]
    images, depths, transmittances, last, _, state = reference_of("rasterize_gaussians", *_rasterized(rows))
    gradients = noise(1, 17, 33, 3), noise(1, 17, 33), noise(1, 17, 33)
    return *gradients, *inputs, images, depths, transmittances, last, state, 0.1


def _mesh(rows: int) -> tuple[Tensor, Tensor]:
    """Triangles that overlap, each of three neighboring rows."""
    positions = torch.cat([noise(2, rows + 2, 3).tanh() * 0.9, torch.ones(2, rows + 2, 1)], -1)
    first = torch.arange(rows, dtype=torch.int32)
    return positions, torch.stack([first, first + 1, first + 2], 1)


def _drawn(rows: int) -> tuple[Tensor, ...]:
    """Corners to carry to the pixels, triangles, and which of them each pixel shows where."""
    positions, faces = _mesh(rows)
    barycentrics, _, _, ids = reference_of("rasterize_mesh", positions, faces, 11, 7, None, None)
    return noise(2, rows + 2, 3), faces, ids, barycentrics


def _drawn_gradient(rows: int) -> tuple[Tensor, ...]:
    positions, faces = _mesh(rows)
    return positions, faces, _drawn(rows)[2], noise(2, 7, 11, 2), noise(2, 7, 11)


def _derivatives(rows: int) -> tuple[Tensor, ...]:
    corners, faces, ids, _ = _drawn(rows)
    return corners, faces, ids, noise(2, 7, 11, 4)


def _textured(rows: int) -> tuple[Any, ...]:
    """A texture, so many pixels that look it up, and how fast their coordinates change."""
    return noise(2, 6, 9, 3), 0.7 * noise(2, rows, 5, 2), 0.3 * noise(2, rows, 5, 4), "repeat", "linear"


def _textured_gradient(rows: int) -> tuple[Any, ...]:
    return noise(2, rows, 5, 3), *_textured(rows)


def _textured_uv_gradient(rows: int) -> tuple[Any, ...]:
    texture, *where = _textured(rows)
    _, mips = reference_of("sample_texture", texture, *where)
    return noise(2, rows, 5, 3), texture, mips, *where


def _silhouettes(rows: int) -> tuple[Tensor, ...]:
    positions, faces = _mesh(rows)
    _, depths, _, ids = reference_of("rasterize_mesh", positions, faces, 11, 7, None, None)
    return noise(2, 7, 11, 3), ids, depths, positions, faces, reference_of("face_neighbors", faces)


def _silhouettes_gradient(rows: int) -> tuple[Tensor, ...]:
    images, ids, depths, positions, faces, neighbors = _silhouettes(rows)
    _, *crossings = reference_of("antialias", images, ids, depths, positions, faces, neighbors)
    return noise(2, 7, 11, 4)[..., :3], images, positions, faces, *crossings


def _field(rows: int) -> tuple[Any, ...]:
    return random_field(rows, 2, 13, 9, views=2).operands()


def _field_gradient(rows: int) -> tuple[Any, ...]:
    *tensors, depth, box, width, height = _field(rows)
    *_, crossings = reference_of("render_radiance_field", *_field(rows))
    gradients = noise(2, 9, 13, 3), noise(2, 9, 13), noise(2, 9, 13) / 2
    return *gradients, *tensors, crossings, depth, box, width, height


def _voxels_seen(rows: int) -> tuple[Any, ...]:
    positions, _, _, _, extrinsics, intrinsics, _, _, *numbers = _field(rows)
    return positions, extrinsics, intrinsics, *numbers


def _photographed(rows: int) -> tuple[Any, ...]:
    """Three pictures of points around the origin, with depths."""
    extrinsics = torch.eye(4).repeat(3, 1, 1)
    extrinsics[:, 2, 3] = 2 + torch.arange(3) / 4
    intrinsics = torch.tensor([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]).repeat(3, 1, 1)
    depths = 2 + 0.3 * noise(3, 4, 5)
    return noise(3, 6, 7, CHANNELS), noise(rows, 3).tanh(), extrinsics, intrinsics, depths, 0.1, True


def _photographed_gradient(rows: int) -> tuple[Any, ...]:
    features, *others = _photographed(rows)
    _, counts, winners = reference_of("backproject", features, *others)
    return noise(rows, CHANNELS), counts, winners, *others, *features.shape[1:3]


CASES: dict[str, Case] = {
    "antialias": _silhouettes,
    "antialias_gradient": _silhouettes_gradient,
    "backproject": _photographed,
    "backproject_gradient": _photographed_gradient,
    "coarsen": lambda n: (voxels(n), 2),
    "conv_plan": lambda n: (_maps(n), True),
    "face_neighbors": lambda n: (_mesh(n)[1],),
    "gated_residual": lambda n: (noise(n, CHANNELS), noise(n, CHANNELS), noise(2, CHANNELS), offsets(n)),
    "gated_residual_backward": lambda n: (noise(n, CHANNELS), noise(n, CHANNELS), noise(2, CHANNELS), offsets(n)),
    "head_rms_norm": lambda n: (_qkv(n), noise(HEADS, WIDTH), noise(HEADS, WIDTH), 3),
    "head_rms_norm_backward": lambda n: (noise(n, 3, HEADS, WIDTH), _qkv(n), *(noise(HEADS, WIDTH),) * 2),
    "hilbert_codes": lambda n: (voxels(n), True, 5),
    "hilbert_order": lambda n: (voxels(n), False, 16),
    "interpolate": _drawn,
    "interpolate_derivatives": _derivatives,
    "interpolate_gradient": lambda n: (noise(2, 7, 11, 3), *_drawn(n)),
    "layer_norm": _modulated,
    "layer_norm_backward": _modulated_backward,
    "morton_codes": lambda n: (voxels(n), True, 5),
    "morton_order": lambda n: (voxels(n), False, 16),
    "neighbor_map": lambda n: (voxels(n), 3),
    "rasterize_gaussians": _rasterized,
    "rasterize_gaussians_backward": _rasterized_backward,
    "rasterize_mesh": lambda n: (*_mesh(n), 11, 7, None, None),
    "rasterize_mesh_gradient": _drawn_gradient,
    "render_radiance_field": _field,
    "render_radiance_field_gradient": _field_gradient,
    "residual_layer_norm": lambda n: (
        noise(n, CHANNELS),
        2 * noise(n, CHANNELS),
        noise(2, CHANNELS),
        *_modulated(n)[1:],
    ),
    "sample_texture": _textured,
    "sample_texture_gradient": _textured_gradient,
    "sample_texture_uv_gradient": _textured_uv_gradient,
    "sparse_pool": lambda n: (noise(n, CHANNELS), *_coarse(n), "biased_mean"),
    "spherical_harmonics": lambda n: (0.3 * noise(n, 16, 3), noise(2, n, 3)),
    "spherical_harmonics_gradient": lambda n: (noise(2, n, 3), 0.3 * noise(n, 16, 3), 3 * noise(2, n, 3)),
    "split_quads": _quads,
    "ssim_map": _images,
    "ssim_map_gradient": lambda n: (noise(1, 2, n, 13), *_images(n)),
    "subdivide_coords": lambda n: (voxels(n),),
    "subdivided_conv": lambda n: (noise(n, CHANNELS), _maps(n), _weight(), noise(CHANNELS)),
    "subdivided_conv_input_gradient": lambda n: (noise(8 * n, CHANNELS), _maps(n), _weight()),
    "subdivided_conv_weight_gradient": lambda n: (noise(n, CHANNELS), _maps(n), noise(8 * n, CHANNELS)),
    "subdivided_neighbor_map": lambda n: (_maps(n),),
    "submanifold_conv": lambda n: (noise(n, CHANNELS), _maps(n), _weight(), noise(CHANNELS)),
    "submanifold_conv_input_gradient": lambda n: (noise(n, CHANNELS), _maps(n), _weight()),
    "submanifold_conv_weight_gradient": lambda n: (noise(n, CHANNELS), _maps(n), 2 * noise(n, CHANNELS)),
    "surface_topology": _cubes,
    "surface_values": _surface,
    "surface_values_gradient": _surface_gradient,
    "trace_voxels": _voxels_seen,
    "upsample": lambda n: (noise(_coarse(n)[1], CHANNELS), _coarse(n)[0]),
    "varlen_attention": _attention,
    "varlen_attention_backward": _attention_backward,
    "voxelize_mesh": lambda n: (0.4 * noise(n + 2, 3).tanh(), _mesh(n)[1], 8),
    "window_partition": lambda n: (voxels(n), 2, 1),
    "windowed_attention": _windows,
    "windowed_attention_backward": _windows_backward,
}
