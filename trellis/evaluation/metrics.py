"""Scores of a predicted object: occupancy, surface, pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trellis_kernels import ssim_map

THRESHOLDS = (0.01, 0.02, 0.05)  # of the F-score, sides of the unit cube
NAMES = ("iou", "chamfer", *(f"fscore_{threshold}" for threshold in THRESHOLDS), "psnr", "ssim")
FARTHEST = 1.0  # Chamfer distance to a surface that is not there
BEST_PSNR = 100.0  # of equal pictures
_AT_ONCE = 1 << 22  # distances held at a time
Scores = dict[str, float | None]


@dataclass(frozen=True)
class Shape:
    """An object as it is measured; what is None is not measured.

    Args:
        voxels: ``[N, 3]`` integer, those its surface occupies.
        points: ``[P, 3]`` on its surface, world units.
        images: ``[V, 3, H, W]`` sRGB by the fixed cameras, on white.
    """

    voxels: Tensor | None = None
    points: Tensor | None = None
    images: Tensor | None = None


def score(shape: Shape, truth: Shape) -> Scores:
    """All scores of `shape`; None where either has not what it takes."""
    scores: Scores = dict.fromkeys(NAMES)
    if shape.voxels is not None and truth.voxels is not None:
        scores["iou"] = occupancy_iou(shape.voxels, truth.voxels)
    if shape.points is not None and truth.points is not None:
        scores |= surface_scores(shape.points, truth.points)
    if shape.images is not None and truth.images is not None:
        scores |= picture_scores(shape.images, truth.images)
    return scores


def occupancy_iou(voxels: Tensor, others: Tensor) -> float:
    """Intersection over union of two sets of voxels ``[N, 3]`` and ``[M, 3]``; of two empty ones 1."""
    weights = torch.tensor([1 << 32, 1 << 16, 1])
    first, second = ((rows.long() * weights).sum(1).unique() for rows in (voxels, others))
    common = int(torch.isin(first, second).sum())
    union = len(first) + len(second) - common
    return common / union if union else 1.0


def nearest_distances(points: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """For each of `points` ``[N, 3]`` the distance to the nearest of `targets` ``[M, 3]``, and the other way round."""
    there, back = [], torch.full((len(targets),), math.inf)
    for part in points.split(max(1, _AT_ONCE // max(1, len(targets)))):
        distances = torch.cdist(part, targets, compute_mode="donot_use_mm_for_euclid_dist")
        there.append(distances.amin(1))
        back = torch.minimum(back, distances.amin(0))
    return torch.cat(there), back


def surface_scores(points: Tensor, targets: Tensor) -> Scores:
    """F-scores and Chamfer distance of two surfaces, given points spread evenly over each.

    The F-score at t is the harmonic mean of the shares of points of either that have one of the other within t; the
    Chamfer distance is the mean of the two mean distances. Of a surface without points they are 0, and `FARTHEST`.
    """
    if not len(points) or not len(targets):
        return {"chamfer": FARTHEST, **{f"fscore_{threshold}": 0.0 for threshold in THRESHOLDS}}
    there, back = nearest_distances(points, targets)
    scores: Scores = {"chamfer": (float(there.mean()) + float(back.mean())) / 2}
    for threshold in THRESHOLDS:
        precision, recall = (float((each <= threshold).double().mean()) for each in (there, back))
        both = precision + recall
        scores[f"fscore_{threshold}"] = 2 * precision * recall / both if both else 0.0
    return scores


def picture_scores(images: Tensor, targets: Tensor) -> Scores:
    """PSNR in dB and SSIM of ``[V, 3, H, W]`` in [0, 1]: each the mean over the views."""
    images = images.clamp(0, 1)
    errors = (images - targets).double().square().mean((1, 2, 3))
    psnr = (-10 * errors.log10()).clamp(max=BEST_PSNR)
    return {"psnr": float(psnr.mean()), "ssim": float(ssim_map(images, targets).mean())}


def mean_scores(rows: Sequence[Mapping[str, object]]) -> Scores:
    """The mean of each score over the objects that have it."""
    means: Scores = {}
    for name in NAMES:
        values = [float(value) for row in rows if isinstance(value := row.get(name), int | float)]
        means[name] = sum(values) / len(values) if values else None
    return means
