"""Conditioning a velocity: functions from a model to a `Velocity`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from trellis.nn.sparse import SparseTensor
from trellis.sampling.flow_euler import timesteps

State = TypeVar("State", Tensor, SparseTensor)
FlowModel = Callable[[State, Tensor, Tensor], State]
"""``model(x, t [B] in [0, 1000], cond [B, L, Cc]) -> velocity``."""


def conditioned(model: Callable[[State, Tensor, Tensor], State], cond: Tensor) -> Callable[[State, float], State]:
    """The model's velocity under one condition, repeated over the batch if it has batch 1."""

    def velocity(x: State, t: float) -> State:
        batch = len(x)
        if cond.shape[0] not in (1, batch):
            raise ValueError(f"cond must have batch 1 or {batch}; got {list(cond.shape)}")
        feats = x.feats if isinstance(x, SparseTensor) else x
        timestep = torch.full((batch,), 1000 * t, dtype=torch.float32, device=feats.device)
        return model(x, timestep, cond.expand(batch, -1, -1))

    return velocity


def with_guidance(
    model: Callable[[State, Tensor, Tensor], State],
    cond: Tensor,
    neg_cond: Tensor,
    strength: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable[[State, float], State]:
    """Classifier-free guidance: ``(1 + w) v(cond) - w v(neg_cond)`` while t is in `interval`, ends included.

    Args:
        model: the flow model.
        cond: ``[B or 1, L, Cc]`` condition.
        neg_cond: ``[B or 1, L, Cc]`` what to move away from.
        strength: w; 0 means the conditional velocity alone.
        interval: times in [0, 1] at which guidance applies; elsewhere the conditional velocity is used.

    Source:
        Ho & Salimans 2022, "Classifier-Free Diffusion Guidance"; Kynkäänniemi et al. 2024 for the interval.
    """
    return _guided(conditioned(model, cond), conditioned(model, neg_cond), strength, interval)


def stochastic(
    model: Callable[[State, Tensor, Tensor], State],
    conds: Tensor,
    neg_cond: Tensor,
    strength: float,
    interval: tuple[float, float],
    steps: int,
    rescale_t: float = 1.0,
) -> Callable[[State, float], State]:
    """Several views of one object: step k is guided by view ``k mod V``.

    Args:
        model: the flow model.
        conds: ``[V, L, Cc]``, one condition per view.
        neg_cond: ``[1, L, Cc]``.
        strength: see `with_guidance`.
        interval: see `with_guidance`.
        steps: of the sampler; with `rescale_t` it tells which step a time belongs to.
        rescale_t: of the sampler.
    """
    views = [with_guidance(model, cond[None], neg_cond, strength, interval) for cond in conds]
    step_of = {t: step for step, t in enumerate(timesteps(steps, rescale_t))}

    def velocity(x: State, t: float) -> State:
        return views[step_of[t] % len(views)](x, t)

    return velocity


def multidiffusion(
    model: Callable[[State, Tensor, Tensor], State],
    conds: Tensor,
    neg_cond: Tensor,
    strength: float,
    interval: tuple[float, float],
) -> Callable[[State, float], State]:
    """Several views of one object: the conditional velocities are averaged.

    Args:
        model: the flow model.
        conds: ``[V, L, Cc]``, one condition per view.
        neg_cond: ``[1, L, Cc]``.
        strength: see `with_guidance`.
        interval: see `with_guidance`.

    Source:
        Bar-Tal et al. 2023, "MultiDiffusion".
    """
    views = [conditioned(model, cond[None]) for cond in conds]

    def mean(x: State, t: float) -> State:
        velocities = [view(x, t) for view in views]
        return _map(lambda *parts: torch.stack(parts).mean(dim=0), velocities)

    return _guided(mean, conditioned(model, neg_cond), strength, interval)


def _guided(
    positive: Callable[[State, float], State],
    negative: Callable[[State, float], State],
    strength: float,
    interval: tuple[float, float],
) -> Callable[[State, float], State]:
    low, high = interval

    def velocity(x: State, t: float) -> State:
        v = positive(x, t)
        if strength == 0 or not low <= t <= high:
            return v
        return _map(lambda p, n: (1 + strength) * p - strength * n, [v, negative(x, t)])

    return velocity


def _map(function: Callable[..., Tensor], states: list[State]) -> State:
    first = states[0]
    if isinstance(first, SparseTensor):
        return first.with_feats(function(*(state.feats for state in states)))
    return function(*states)
