"""What back-projection means, in plain PyTorch, one view after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trellis_kernels.precision import compute_dtype


def backproject(
    features: Tensor,
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    depths: Tensor | None,
    tolerance: float,
    maximum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    views, height, width, channels = features.shape
    dtype = compute_dtype(features.dtype)
    out = features.new_zeros(len(positions), channels, dtype=dtype)
    counts = torch.zeros(len(positions), dtype=torch.int32, device=features.device)
    winners = torch.full((len(positions), channels) if maximum else (0, 0), -1, dtype=torch.int32, device=out.device)
    for view in range(views):
        seen, taps = _project(view, positions, extrinsics, intrinsics, depths, tolerance, height, width)
        plane = features[view].reshape(height * width, channels).to(dtype)
        sample = torch.zeros_like(out)
        for index, weight in taps:
            sample = sample + plane[index] * weight.to(dtype)[:, None]
        if maximum:
            better = seen[:, None] & ((sample > out) | (winners < 0))
            out, winners = torch.where(better, sample, out), torch.where(better, view, winners)
            counts = counts + seen.int()
        else:
            counted = seen if depths is not None else torch.ones_like(seen)
            out, counts = torch.where(counted[:, None], out + sample, out), counts + counted.int()
    if not maximum:
        out = out / counts.clamp(min=1)[:, None]
    return out.to(features.dtype), counts, winners


def backproject_gradient(
    out_gradient: Tensor,
    counts: Tensor,
    winners: Tensor,
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    depths: Tensor | None,
    tolerance: float,
    maximum: bool,
    height: int,
    width: int,
) -> Tensor:
    channels, dtype = out_gradient.shape[1], compute_dtype(out_gradient.dtype)
    gradient = out_gradient.to(dtype)
    if not maximum:
        gradient = gradient / counts.clamp(min=1)[:, None]
    out = gradient.new_zeros(len(extrinsics), height * width, channels)
    for view in range(len(extrinsics)):
        seen, taps = _project(view, positions, extrinsics, intrinsics, depths, tolerance, height, width)
        if maximum:
            mine = torch.where(winners == view, gradient, 0)
        else:
            mine = gradient if depths is None else torch.where(seen[:, None], gradient, 0)
        for index, weight in taps:
            out[view].index_add_(0, index, mine * weight.to(dtype)[:, None])
    return out.view(len(extrinsics), height, width, channels).to(out_gradient.dtype)


def _project(
    view: int,
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    depths: Tensor | None,
    tolerance: float,
    height: int,
    width: int,
) -> tuple[Tensor, Iterator[tuple[Tensor, Tensor]]]:
    """Which points a view sees, and the four pixels around each with their bilinear weights (0: no such pixel)."""
    camera = intrinsics[view].double() @ extrinsics[view, :3].double()
    u, v, z = (positions.double() @ camera[:, :3].T + camera[:, 3]).unbind(-1)
    front = z > 0
    u, v = torch.where(front, u / z, -1e9), torch.where(front, v / z, -1e9)
    seen = front & (u >= 0) & (u < 1) & (v >= 0) & (v < 1)
    if depths is not None and depths[view].numel():
        rows, columns = depths.shape[1:]
        i, j = ((x * n).clamp(0, n - 1).nan_to_num().long() for x, n in ((v, rows), (u, columns)))
        surface = depths[view, i, j].double()
        seen = seen & ((surface <= 0) | (z <= surface + tolerance))
    return seen, _taps(u * width - 0.5, v * height - 0.5, height, width)


def _taps(x: Tensor, y: Tensor, height: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    if height * width == 0:
        return
    left, top = x.floor(), y.floor()
    for row, vertical in ((top, top + 1 - y), (top + 1, y - top)):
        for column, horizontal in ((left, left + 1 - x), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = torch.where(inside, row * width + column, 0).long()
            yield index, torch.where(inside, vertical * horizontal, 0)
