"""One colored object: voxels with features or a latent, and pictures of it."""

from __future__ import annotations

from typing import Any

import torch

from trellis import SparseTensor
from trellis.renderers.camera import Cameras
from trellis.renderers.mesh import render_mesh
from trellis.representations.mesh import Mesh
from trellis.training.batches import seeded

RESOLUTION = 8
TRUNK: dict[str, Any] = {
    "resolution": RESOLUTION,
    "model_channels": 32,
    "latent_channels": 4,
    "num_blocks": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
    "attn_mode": "swin",
    "window_size": 4,
}
GAUSSIANS: dict[str, Any] = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True,
    "voxel_size": 1.5,
    "num_gaussians": 4,
    "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 9e-4,
    "scaling_bias": 2e-2,
    "opacity_bias": 0.1,
    "scaling_activation": "softplus",
}


def box() -> Mesh:
    """A box whose corners have different colors."""
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    quads = torch.tensor([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    faces = torch.cat([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    return Mesh((corners - 0.5) * torch.tensor([0.7, 0.5, 0.6]), faces, 0.2 + 0.6 * corners)


def cameras(views: int) -> Cameras:
    return Cameras.orbit([0.7 + 1.9 * i for i in range(views)], [0.4] * views)


def shell() -> torch.Tensor:
    """``[N, 4]`` voxels near the surface of the box."""
    axis = (torch.arange(RESOLUTION) + 0.5) / RESOLUTION - 0.5
    grid = torch.cartesian_prod(axis, axis, axis)
    outside = (grid.abs() / torch.tensor([0.35, 0.25, 0.3])).amax(1)
    rows = (((outside < 1.3) & (outside > 0.7)).nonzero()[:, 0]).int()
    coords = torch.stack(torch.unravel_index(rows.long(), (RESOLUTION,) * 3), 1).int()
    return torch.cat([torch.zeros_like(coords[:, :1]), coords], 1)


def voxels(channels: int, copies: int = 1) -> SparseTensor:
    coords = shell()
    coords = torch.cat([coords + torch.tensor([i, 0, 0, 0]) for i in range(copies)]).int()
    feats = torch.randn(len(coords), channels, generator=seeded(5))
    return SparseTensor.from_coords(coords, feats, resolution=RESOLUTION, batch_size=copies)


def pictures(size: int, objects: int = 1, views: int = 2) -> dict[str, Any]:
    seen = render_mesh(box(), cameras(views), size, ssaa=2)
    alpha = seen.mask.clamp(0, 1)
    image = seen.colors / alpha[:, None].clamp_min(1e-3)
    one = {"image": image.clamp(0, 1), "alpha": alpha}
    one |= {"extrinsics": cameras(views).extrinsics, "intrinsics": cameras(views).intrinsics}
    return {name: value[None].expand(objects, *value.shape).contiguous() for name, value in one.items()}
