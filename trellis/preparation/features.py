"""The step that gathers, at each voxel, what an image model makes of the renders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from trellis.preparation.arrays import is_whole, read_arrays, read_picture, read_views, read_voxels, write_arrays
from trellis.preparation.conditions import encoder
from trellis.preparation.visible import visible_surface
from trellis_kernels import backproject

if TYPE_CHECKING:
    from trellis.preparation.job import Job

BATCH = 8  # views in memory at full size
FEATURE_SCALE = 8.0  # root mean square of EfficientNet's features, which are divided by it
COLOR_SCALE = 4.0  # colors vary by a quarter: so they weigh as much as a feature
TOLERANCE = 1.5  # voxels that a center may lie behind the surface and still be seen
_SEEN_SIZE = 224  # of the pictures EfficientNet sees: grids of 56 x 56 and 28 x 28


def feature_step(job: Job) -> dict[str, Any]:
    """Write ``features/<model>/<sha>.npz``: ``indices [N, 3]`` uint8 and ``patchtokens [N, C]`` float16.

    ``efficientnet_lite0``: 67 channels on a grid of 56 x 56: the colors on black, from -2 to 2, and the features of
    strides 4 and 8 over 8. Where there is a depths.npz, a voxel takes the mean of the views that see it, or of all if
    none does.

    ``visible_surface``: 17 moments of the surface that the depths show (`trellis.preparation.visible`); no network.

    Other names are those of DINOv2 models: patch tokens before the last norm, and the mean over all views, as
    officially.

    Raises:
        ValueError: renders or voxels are missing or damaged.
        CheckpointError: the model's weights are not there.
    """
    settings = job.settings
    path = features_path(job.root, settings.feature_model, job.sha256)
    if not is_whole(path, "indices", "patchtokens"):
        indices = read_voxels(job.root / "voxels" / f"{job.sha256}.ply", settings.voxel_resolution)
        folder = job.root / "renders" / job.sha256
        with torch.inference_mode():
            features = voxel_features(settings.feature_model, indices, settings.voxel_resolution, folder)
        write_arrays(path, indices=indices.numpy().astype(np.uint8), patchtokens=features.half().numpy())
    return {}


def features_path(root: Path, model: str, sha256: str) -> Path:
    """Where the features of an object are."""
    return root / "features" / model / f"{sha256}.npz"


def voxel_features(model: str, indices: Tensor, resolution: int, folder: Path) -> Tensor:
    """Features of voxels, from a folder of renders.

    Args:
        model: see `feature_step`.
        indices: ``[N, 3]`` int32 of voxels.
        resolution: voxels per side.
        folder: with transforms.json and pictures, maybe depths.npz.

    Returns:
        ``[N, C]`` float16.
    """
    paths, cameras = read_views(folder)
    if model == "visible_surface":
        pictures = (torch.from_numpy(np.array(read_picture(path))).permute(2, 0, 1) / 255 for path in paths)
        return visible_surface(indices, resolution, pictures, _depths(folder, len(paths)), cameras).half()
    positions = (indices.float() + 0.5) / resolution - 0.5
    if model != "efficientnet_lite0":
        network = encoder(model, "image")
        maps = _maps(paths, network.image_size, network.patch_features)
        return backproject(maps, positions, cameras.extrinsics, cameras.intrinsics)
    maps = _maps(paths, _SEEN_SIZE, efficientnet_features)
    if not (folder / "depths.npz").is_file():
        return backproject(maps, positions, cameras.extrinsics, cameras.intrinsics)
    depths = _depths(folder, len(paths))
    seen = backproject(
        maps, positions, cameras.extrinsics, cameras.intrinsics, depths=depths, tolerance=TOLERANCE / resolution
    )
    hidden = torch.nonzero(~seen.any(1))[:, 0]
    if len(hidden):
        seen[hidden] = backproject(maps, positions[hidden], cameras.extrinsics, cameras.intrinsics)
    return seen


def _depths(folder: Path, count: int) -> Tensor:
    """``[V, H, W]`` float32 of `folder`/depths.npz."""
    path = folder / "depths.npz"
    (depths,) = read_arrays(path, "depths")
    if depths.ndim != 3 or len(depths) != count:
        raise ValueError(f"{path} must hold depths [{count}, H, W] of its views; got {list(depths.shape)}")
    return torch.from_numpy(depths.astype(np.float32))


def efficientnet_features(images: Tensor) -> Tensor:
    """``[B, 3, H, W]`` pictures on black, sides multiples of 8, to ``[B, H / 4, W / 4, 67]``."""
    _, fine, coarse = encoder("efficientnet_lite0", "image").stages(images, 3)
    size = list(fine.shape[2:])
    coarse = F.interpolate(coarse, size, mode="bilinear", align_corners=False)
    parts = [(F.avg_pool2d(images, 4) - 0.5) * COLOR_SCALE, fine / FEATURE_SCALE, coarse / FEATURE_SCALE]
    return torch.cat(parts, 1).permute(0, 2, 3, 1)


def _maps(paths: Sequence[Path], size: int, features: Callable[[Tensor], Tensor]) -> Tensor:
    """``[V, h, w, C]`` float16 of the pictures, resized to `size` pixels a side (Lanczos), on black."""
    maps = []
    for start in range(0, len(paths), BATCH):
        batch = []
        for path in paths[start : start + BATCH]:
            resized = read_picture(path).resize((size, size), Image.Resampling.LANCZOS)
            pixels = np.asarray(resized, np.float32) / 255
            batch.append(pixels[..., :3] * pixels[..., 3:])
        maps.append(features(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)).half().contiguous())
    return torch.cat(maps)
