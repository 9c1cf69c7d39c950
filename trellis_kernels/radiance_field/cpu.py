"""CPU launch. The kernels are csrc/cpu/radiance_field*.

Beside its outputs the forward holds a packed copy of the factors; the gradient holds one more for the sums, and for a
batch of 65536 rays 40 bytes (float64: 48) per leaf that a ray takes samples from, twice while they are sorted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels import _cpu
from trellis_kernels.precision import compute_dtype, widened


def render_radiance_field(
    positions: Tensor,
    trivec: Tensor,
    density: Tensor,
    features: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    jitter: Tensor | None,
    depth: int,
    aabb: list[float],
    width: int,
    height: int,
) -> tuple[Tensor, ...]:
    dtype, shape = compute_dtype(trivec.dtype), (len(extrinsics), height, width)
    images = [
        trivec.new_empty(*shape, 3, dtype=dtype),
        *(trivec.new_empty(shape, dtype=dtype) for _ in range(3)),
    ]
    crossings = trivec.new_empty(shape, dtype=torch.int32)
    inputs = _inputs(positions, trivec, density, features, extrinsics, intrinsics, background, jitter, aabb)
    arguments = [*inputs, depth, *images, crossings, torch.get_num_threads()]
    _cpu.render_radiance_field(*arguments)
    return *(image.to(trivec.dtype) for image in images), crossings


def render_radiance_field_gradient(
    colors_gradient: Tensor,
    depths_gradient: Tensor,
    transmittances_gradient: Tensor,
    positions: Tensor,
    trivec: Tensor,
    density: Tensor,
    features: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    jitter: Tensor | None,
    crossings: Tensor,
    depth: int,
    aabb: list[float],
    width: int,
    height: int,
) -> tuple[Tensor, ...]:
    differentiated = (trivec, density, features, background)
    results = [x.new_empty(x.shape, dtype=compute_dtype(x.dtype)) for x in differentiated]
    gradients = _wide(colors_gradient, depths_gradient, transmittances_gradient)
    inputs = _inputs(positions, trivec, density, features, extrinsics, intrinsics, background, jitter, aabb)
    arguments = [*gradients, *inputs, depth, *results, torch.get_num_threads()]
    _cpu.render_radiance_field_gradient(*arguments)
    return tuple(result.to(trivec.dtype) for result in results)


def trace_voxels(
    positions: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    depth: int,
    aabb: list[float],
    width: int,
    height: int,
) -> tuple[Tensor, Tensor]:
    ids = positions.new_empty(len(extrinsics), height, width, dtype=torch.int32)
    depths = positions.new_empty(ids.shape, dtype=torch.float64)
    geometry = (_exact(positions), _exact(extrinsics), _exact(intrinsics), _box(aabb))
    _cpu.trace_voxels(*geometry, depth, ids, depths, torch.get_num_threads())
    return ids, depths


def _inputs(
    positions: Tensor,
    trivec: Tensor,
    density: Tensor,
    features: Tensor,
    extrinsics: Tensor,
    intrinsics: Tensor,
    background: Tensor,
    jitter: Tensor | None,
    aabb: list[float],
) -> list[Any]:
    shifts = trivec.new_empty(0, 0, 0) if jitter is None else jitter
    factors = _wide(trivec, density, features)
    return [
        _exact(positions),
        *factors,
        _exact(extrinsics),
        _exact(intrinsics),
        *_wide(background, shifts),
        _box(aabb),
    ]


def _exact(tensor: Tensor) -> Tensor:
    return tensor.double().contiguous()


def _box(aabb: list[float]) -> Tensor:
    return torch.tensor(aabb, dtype=torch.float64, device="cpu")


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor for tensor in widened(*tensors) if tensor is not None]
