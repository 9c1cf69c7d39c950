"""Euler integration of a rectified flow, from noise at t = 1 to data at t = 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from trellis.nn.sparse import SparseTensor

State = TypeVar("State", Tensor, SparseTensor)
Velocity = Callable[[State, float], State]
"""``velocity(x, t)`` with t in [0, 1]: the direction from data to noise at time t."""

SIGMA_MIN = 1e-5


@dataclass(frozen=True)
class FlowStep(Generic[State]):
    """What a sampler yields after each step.

    Args:
        index: number of the step, from 0.
        steps: how many there are.
        t: time before the step, in (0, 1].
        x: state after the step.
        estimate: the data the current velocity points to (``x_0``), for previews.
    """

    index: int
    steps: int
    t: float
    x: State
    estimate: State


def timesteps(steps: int, rescale_t: float = 1.0) -> list[float]:
    """``steps + 1`` times from 1 to 0, denser near 1 when ``rescale_t > 1``: ``t' = r t / (1 + (r - 1) t)``."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    linear = np.linspace(1, 0, steps + 1)  # rounds as the official code does; torch.linspace differs in the last bit
    return (rescale_t * linear / (1 + (rescale_t - 1) * linear)).tolist()


def euler(
    velocity: Callable[[State, float], State],
    noise: State,
    steps: int,
    rescale_t: float = 1.0,
    sigma_min: float = SIGMA_MIN,
) -> Iterator[FlowStep[State]]:
    """Integrate ``dx/dt = velocity(x, t)`` from t = 1 to 0 in `steps` Euler steps; only the last state is kept.

    Being an iterator, it can be left at any step: nothing has to be undone.

    Args:
        velocity: see `Velocity`; conditioning and guidance are already inside.
        noise: the state at t = 1, dense or sparse.
        steps: number of steps.
        rescale_t: see `timesteps`.
        sigma_min: standard deviation of the noise left at t = 0, of the flow's training.

    Yields:
        A `FlowStep` after each step.
    """
    x = noise
    times = timesteps(steps, rescale_t)
    for index, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(x, t)
        estimate = _combine(x, 1 - sigma_min, v, -(sigma_min + (1 - sigma_min) * t))
        x = _combine(x, 1.0, v, -(t - t_next))
        yield FlowStep(index, steps, t, x, estimate)


def to_data(x: Tensor, v: Tensor, t: float, sigma_min: float = SIGMA_MIN) -> Tensor:
    """``x_0 = (1 - s) x - (s + (1 - s) t) v``: the data a velocity points to."""
    return (1 - sigma_min) * x - (sigma_min + (1 - sigma_min) * t) * v


def to_noise(x: Tensor, v: Tensor, t: float) -> Tensor:
    """``eps = (1 - t) v + x``: the noise a velocity comes from."""
    return (1 - t) * v + x


def data_to_noise(x: Tensor, data: Tensor, t: float, sigma_min: float = SIGMA_MIN) -> Tensor:
    """The noise that, mixed with `data`, gives `x` at time t."""
    return (x - (1 - t) * data) / (sigma_min + (1 - sigma_min) * t)


def noise_to_data(x: Tensor, noise: Tensor, t: float, sigma_min: float = SIGMA_MIN) -> Tensor:
    """The data that, mixed with `noise`, gives `x` at time t."""
    return (x - (sigma_min + (1 - sigma_min) * t) * noise) / (1 - t)


def _combine(x: State, a: float, v: State, b: float) -> State:
    """``a x + b v``, dense or sparse."""
    if isinstance(x, SparseTensor) and isinstance(v, SparseTensor):
        return x.with_feats(a * x.feats + b * v.feats)
    return a * x + b * v
