"""What a pipeline has to beat: the nearest training object, and the mean shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trellis.evaluation.metrics import Shape, occupancy_iou
from trellis.evaluation.truth import scene_shape
from trellis.preparation.arrays import is_whole, read_arrays, read_picture, read_voxels, write_arrays
from trellis.preparation.conditions import tokens_path
from trellis.preparation.job import Job
from trellis.preparation.pictures import framed
from trellis.preparation.scene import Part, SceneParts

QUERY = "000.png"  # the conditioning picture of a held-out object that everything is made from
PIXELS = 16
THRESHOLDS = tuple(round(0.04 * step, 2) for step in range(1, 13))
COLOR_SAMPLES = 100  # training objects whose pictures give the mean color
_CORNERS = torch.tensor([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)])
# Of each side of a voxel: where the neighbor is, and its corners, counterclockwise from outside.
_SIDES = (
    ((-1, 0, 0), (0, 1, 3, 2)),
    ((1, 0, 0), (4, 6, 7, 5)),
    ((0, -1, 0), (0, 4, 5, 1)),
    ((0, 1, 0), (2, 3, 7, 6)),
    ((0, 0, -1), (0, 2, 6, 4)),
    ((0, 0, 1), (1, 5, 7, 3)),
)


def nearest_by_tokens(queries: Sequence[Job], training: Sequence[Job]) -> list[Job]:
    """For each query the training object with the most similar picture: cosine of all tokens of the image encoder.

    Raises:
        ValueError: no training object has kept tokens, or a query has none.
    """
    wanted = torch.stack([_undisturbed(job)[0] for job in queries])
    best, found = torch.full((len(queries),), -2.0), [-1] * len(queries)
    for index, job in enumerate(training):
        if tokens_path(job.root, job.settings.image_encoder, job.sha256).is_file():
            similar = (wanted @ _undisturbed(job).T).amax(1)
            _improve(best, found, similar, index)
    if -1 in found:
        raise ValueError(f"no training object has tokens of {queries[0].settings.image_encoder}: run step conditions")
    return [training[index] for index in found]


def nearest_by_pixels(queries: Sequence[Job], training: Sequence[Job], cache: Path) -> list[Job]:
    """For each query the training object with the most similar picture: 16 x 16 pixels, red, green, blue, alpha.

    Args:
        queries: held-out objects.
        training: where to look.
        cache: folder to keep the small pictures in.

    Raises:
        ValueError: no training object has a conditioning picture, or a query has none.
    """
    wanted = torch.stack([_small(job.root / "renders_cond" / job.sha256 / QUERY) for job in queries])
    best, found = torch.full((len(queries),), -torch.inf), [-1] * len(queries)
    for index, job in enumerate(training):
        kept = cache / f"{job.sha256}.npz"
        if not is_whole(kept, "pixels"):
            paths = sorted((job.root / "renders_cond" / job.sha256).glob("[0-9]*.png"))
            if not paths:
                continue
            write_arrays(kept, pixels=torch.stack([_small(path) for path in paths]).numpy())
        rows = torch.from_numpy(read_arrays(kept, "pixels")[0])
        _improve(best, found, -torch.cdist(wanted, rows).amin(1), index)
    if -1 in found:
        raise ValueError("no training object has conditioning pictures: run step render_cond")
    return [training[index] for index in found]


def mean_shape(training: Sequence[Job], cache: Path) -> tuple[Shape, float]:
    """The voxels that enough of the training objects occupy, and what share is enough: the best for those objects.

    Its surface are the sides of voxels whose neighbor is free; its color is the mean of the objects' pictures.

    Raises:
        ValueError: there is no training object.
    """
    if not training:
        raise ValueError("the mean shape needs training objects; there are none")
    resolution = training[0].settings.voxel_resolution
    all_voxels = [read_voxels(job.root / "voxels" / f"{job.sha256}.ply", resolution) for job in training]
    total = torch.zeros((resolution,) * 3)
    for voxels in all_voxels:
        x, y, z = voxels.long().unbind(1)
        total[x, y, z] += 1
    share = total / len(training)
    scores = []
    for threshold in THRESHOLDS:
        chosen = torch.nonzero(share >= threshold)
        part = all_voxels[:: max(1, len(all_voxels) // COLOR_SAMPLES)]
        mean = sum(occupancy_iou(chosen, voxels) for voxels in part) / len(part)
        scores.append((mean if len(chosen) else -1.0, threshold))
    threshold = max(scores)[1]
    voxels = torch.nonzero(share >= threshold)
    scene = voxel_surface(voxels, resolution, _mean_color(training))
    return scene_shape(scene, voxels, cache / f"mean_{resolution}.npz"), threshold


def voxel_surface(voxels: Tensor, resolution: int, color: tuple[float, float, float]) -> SceneParts:
    """The outer sides of voxels ``[N, 3]``, in world units."""
    filled = torch.zeros((resolution + 2,) * 3, dtype=torch.bool)
    x, y, z = (voxels.long() + 1).unbind(1)
    filled[x, y, z] = True
    corners = []
    for (dx, dy, dz), side in _SIDES:
        free = ~filled[x + dx, y + dy, z + dz]
        corners.append(voxels[free][:, None] + _CORNERS[list(side)])
    vertices = torch.cat(corners).flatten(0, 1).float() / resolution - 0.5
    first = torch.arange(0, len(vertices), 4)[:, None]
    faces = torch.cat([first + torch.tensor([0, 1, 2]), first + torch.tensor([0, 2, 3])]).int()
    return SceneParts((Part(vertices, faces, (*color, 1.0)),), 1.0, (0.0, 0.0, 0.0))


def _undisturbed(job: Job) -> Tensor:
    """``[pictures, L C]`` unit rows: the tokens of each picture as it is."""
    path = tokens_path(job.root, job.settings.image_encoder, job.sha256)
    tokens = read_arrays(path, "tokens")[0][:: 1 + job.settings.augmentations]
    return torch.nn.functional.normalize(torch.from_numpy(tokens.astype(np.float32)).flatten(1), dim=1)


def _small(path: Path) -> Tensor:
    picture = read_picture(path)
    picture.thumbnail((128, 128))  # what is left out is not seen at 16 x 16
    return torch.from_numpy(framed(picture, PIXELS).flatten())


def _improve(best: Tensor, found: list[int], values: Tensor, index: int) -> None:
    better = values > best
    best[better] = values[better]
    for row in torch.nonzero(better)[:, 0].tolist():
        found[row] = index


def _mean_color(training: Sequence[Job]) -> tuple[float, float, float]:
    total, weight = np.zeros(3), 0.0
    for job in training[:: max(1, len(training) // COLOR_SAMPLES)]:
        path = job.root / "renders_cond" / job.sha256 / QUERY
        if path.is_file():
            pixels = np.asarray(read_picture(path), np.float64) / 255
            total += (pixels[..., :3] * pixels[..., 3:]).sum((0, 1))
            weight += pixels[..., 3].sum()
    red, green, blue = total / weight if weight else np.full(3, 0.5)
    return float(red), float(green), float(blue)
