"""Hammersley points: evenly spread, without randomness. Used for camera directions and for Gaussian offsets."""

from __future__ import annotations

import math

_PRIMES = (2, 3, 5, 7, 11, 13)


def radical_inverse(base: int, index: int) -> float:
    """The digits of `index` in `base`, mirrored at the point: 6 = 110 in base 2 becomes 0.011 = 0.375."""
    value, digit = 0.0, 1.0 / base
    while index > 0:
        index, remainder = divmod(index, base)
        value += remainder * digit
        digit /= base
    return value


def hammersley(index: int, dims: int, count: int) -> list[float]:
    """Point `index` of `count` Hammersley points in ``[0, 1)^dims``.

    Args:
        index: 0 to ``count - 1``.
        dims: number of coordinates, at most 7: ``index / count``, then radical inverses in base 2, 3, 5, ...
        count: number of points of the set.

    Source:
        Hammersley 1960; offsets of the Gaussian decoder and cameras of microsoft/TRELLIS.
    """
    if not 1 <= dims <= len(_PRIMES) + 1:
        raise ValueError(f"dims must be in 1..{len(_PRIMES) + 1}; got {dims}")
    return [index / count] + [radical_inverse(base, index) for base in _PRIMES[: dims - 1]]


def sphere_hammersley(
    index: int, count: int, offset: tuple[float, float] = (0.0, 0.0), remap: bool = False
) -> tuple[float, float]:
    """Direction `index` of `count`, spread evenly over the sphere.

    Args:
        index: 0 to ``count - 1``.
        count: number of directions.
        offset: shift of the set in ``[0, 1)^2``, e.g. two random numbers.
        remap: put half of the directions in the lowest quarter of the sequence (the training renders do).

    Returns:
        Yaw in radians, from 0 on (not reduced modulo 2 pi), and pitch in radians in ``[-pi / 2, pi / 2]``.
    """
    u, v = hammersley(index, 2, count)
    u, v = u + offset[0] / count, v + offset[1]
    if remap:
        u = 2 * u if u < 0.25 else 2 / 3 * u + 1 / 3
    return 2 * math.pi * v, math.acos(1 - 2 * u) - math.pi / 2
