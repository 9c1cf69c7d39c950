"""Conditioning a velocity: functions from a model to a `Velocity`.

The branches of guidance and the views of an object are evaluated as one batch, `_TOGETHER` at a time, and what a model
makes of its conditions alone (`FlowModel.context`) is computed once, not at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from trellis.nn.context import rows_of
from trellis.nn.sparse import SparseTensor, repeated
from trellis.sampling.flow_euler import timesteps

State = TypeVar("State", Tensor, SparseTensor)
FlowModel = Callable[[State, Tensor, Tensor], State]
"""``model(x, t [B] in [0, 1000], cond [B, L, Cc]) -> velocity``."""

_TOGETHER = 2  # copies of the state in one batch: conditional and unconditional, or two views
_KEPT = 4  # conditions whose `context` is kept: in the large models 135 MB each in half precision


def conditioned(model: Callable[[State, Tensor, Tensor], State], cond: Tensor) -> Callable[[State, float], State]:
    """The model's velocity under one condition, repeated over the batch if it has batch 1."""
    evaluate = _evaluator(model, [cond])
    return lambda x, t: evaluate(x, t, [0])[0]


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
    evaluate = _evaluator(model, [cond, neg_cond] if strength else [cond])

    def velocity(x: State, t: float) -> State:
        return _guided(evaluate(x, t, [0, 1] if _applies(strength, interval, t) else [0]), strength)

    return velocity


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
    evaluate = _evaluator(model, [*conds.split(1), neg_cond] if strength else list(conds.split(1)))
    step_of = {t: step for step, t in enumerate(timesteps(steps, rescale_t))}

    def velocity(x: State, t: float) -> State:
        view = step_of[t] % len(conds)
        return _guided(evaluate(x, t, [view, len(conds)] if _applies(strength, interval, t) else [view]), strength)

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
    count = len(conds)
    evaluate = _evaluator(model, [*conds.split(1), neg_cond] if strength else list(conds.split(1)))

    def velocity(x: State, t: float) -> State:
        wanted = range(count + 1 if _applies(strength, interval, t) else count)
        return _guided(_averaged(evaluate(x, t, wanted), count), strength)

    return velocity


def _averaged(velocities: list[State], count: int) -> list[State]:
    """The mean of the first `count`, and the others."""
    velocities[:count] = [_map(lambda *parts: torch.stack(parts).mean(dim=0), velocities[:count])]
    return velocities


def _applies(strength: float, interval: tuple[float, float], t: float) -> bool:
    return strength != 0 and interval[0] <= t <= interval[1]


def _guided(branches: list[State], strength: float) -> State:
    """Of the conditional velocity and, where guidance applies, the unconditional one."""
    if len(branches) == 1:
        return branches[0]
    return _map(lambda p, n: (1 + strength) * p - strength * n, branches)


def _evaluator(
    model: Callable[[State, Tensor, Tensor], State], conds: list[Tensor]
) -> Callable[[State, float, Sequence[int]], list[State]]:
    """``evaluate(x, t, wanted)``: the velocities of one state under each of the wanted conditions.

    Args:
        model: the flow model.
        conds: each ``[B or 1, L, Cc]``; those with as many tokens as the first can share a batch with it.
    """
    alike = all(cond.shape[1:] == conds[0].shape[1:] for cond in conds)
    prepared: list[Any] = []

    def evaluate(x: State, t: float, wanted: Sequence[int]) -> list[State]:
        batch = len(x)
        for cond in (conds[index] for index in wanted):
            if cond.shape[0] not in (1, batch):
                raise ValueError(f"cond must have batch 1 or {batch}; got {list(cond.shape)}")
        if not alike:
            return [v for index in wanted for v in _evaluator(model, [conds[index]])(x, t, [0])]
        if prepared and not torch.is_grad_enabled():
            context = prepared[0]
        else:
            tokens = torch.cat(conds)
            context = model.context(tokens) if hasattr(model, "context") and len(tokens) <= _KEPT else tokens
            prepared[:] = [] if torch.is_grad_enabled() else [context]  # what has a gradient serves one backward
        device = x.feats.device if isinstance(x, SparseTensor) else x.device
        starts = [sum(len(cond) for cond in conds[:index]) for index in wanted]
        found: list[State] = []
        for first in range(0, len(starts), _TOGETHER):
            group = list(zip(starts, wanted, strict=True))[first : first + _TOGETHER]
            rows = [start + sample % len(conds[index]) for start, index in group for sample in range(batch)]
            own = context[rows_of(rows, device)] if isinstance(context, Tensor) else context.select(rows)
            timestep = torch.full((len(rows),), 1000 * t, dtype=torch.float32, device=device)
            found += _split(model(_repeated(x, len(group)), timestep, own), x, len(group))
        return found

    return evaluate


def _repeated(x: State, copies: int) -> State:
    """A batch that holds `copies` times the samples of `x`, one copy after the other."""
    if copies == 1:
        return x
    if isinstance(x, SparseTensor):
        return SparseTensor(x.grid.derive(repeated, copies), x.feats.repeat(copies, 1))
    return x.repeat(copies, *(1,) * (x.ndim - 1))


def _split(v: State, x: State, copies: int) -> list[State]:
    """The inverse of `_repeated`, on the grid of `x`."""
    if copies == 1:
        return [v]
    if isinstance(v, SparseTensor) and isinstance(x, SparseTensor):
        return [x.with_feats(feats) for feats in v.feats.tensor_split(copies)]
    return list(v.tensor_split(copies))


def _map(function: Callable[..., Tensor], states: list[State]) -> State:
    first = states[0]
    if isinstance(first, SparseTensor):
        return first.with_feats(function(*(state.feats for state in states)))
    return function(*states)
