"""The optimiser: schedule, loss scale, clipping, update and averages of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trellis.training.clip import FixedClipper
from trellis.training.config import ConfigError, Named
from trellis.training.weights import FlatWeights

_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
}
_SCHEDULE_ARGUMENTS = {"constant": set[str](), "linear_warmup": {"warmup"}, "cosine": {"warmup", "steps", "final"}}


@dataclass
class LossScale:
    """The loss is multiplied by ``2^log2`` so that half-precision gradients neither vanish nor overflow.

    Args:
        log2: of the scale; grows by `growth` after a finite step, falls by 1 after one that is not.
        growth: per finite step. 0 with a scale of 1: no scaling at all.
    """

    log2: float = 20.0
    growth: float = 1e-3
    enabled: bool = True

    @property
    def factor(self) -> float:
        return 2.0**self.log2 if self.enabled else 1.0

    def update(self, finite: bool) -> None:
        if self.enabled:
            self.log2 += self.growth if finite else -1.0


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Args:
        grad_norm: before clipping, of the unscaled gradient.
        clipped: what the gradient was multiplied with to clip it.
        finite: whether the weights were updated.
        lr: learning rate used.
    """

    grad_norm: float
    clipped: float
    finite: bool
    lr: float


def learning_rate_factor(schedule: Named | None, step: int, max_steps: int) -> float:
    """What the learning rate is multiplied with at `step` (from 0).

    ``linear_warmup {warmup}`` rises over `warmup` steps and stays; ``cosine {warmup, steps, final}`` then falls to
    `final` (of the peak) at `steps`, by default the end of the run.

    Raises:
        ConfigError: an argument is unknown.
    """
    if schedule is None or schedule.name == "constant":
        return 1.0
    unknown = sorted(set(schedule.args) - _SCHEDULE_ARGUMENTS[schedule.name])
    if unknown:
        known = ", ".join(sorted(_SCHEDULE_ARGUMENTS[schedule.name]))
        raise ConfigError(f"lr_scheduler {schedule.name} has no {unknown[0]!r}; known are {known}")
    warmup = schedule.args.get("warmup", 0)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.name == "linear_warmup":
        return 1.0
    final, end = schedule.args.get("final", 0.0), schedule.args.get("steps", max_steps)
    progress = min(1.0, (step - warmup) / max(1, end - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(described: Named, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a configuration, fused unless it says otherwise.

    Raises:
        ConfigError: an argument is unknown or impossible.
    """
    arguments = {"fused": True, **described.args}
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    try:
        return _CLASSES[described.name](parameters, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer {described.name}: {error}") from None


class FlatOptimizer:
    """Updates `FlatWeights`.

    Args:
        described: class and arguments; `lr` is the peak of the schedule.
        weights: what is trained.
        clipper: limits the gradient.
        scale: of the loss.
    """

    def __init__(self, described: Named, weights: FlatWeights, clipper: FixedClipper, scale: LossScale) -> None:
        self.weights, self.clipper, self.scale = weights, clipper, scale
        vector = torch.nn.Parameter(weights.master, requires_grad=True)
        vector.grad = weights.gradient
        self.optimizer = build_optimizer(described, [vector])
        self.vector = vector
        self.lr = float(self.optimizer.param_groups[0]["lr"])

    def step(self, factor: float) -> StepReport:
        """Apply the gradient that lies in the weights; `factor` scales the learning rate."""
        gradient = self.weights.collect_gradient()
        norm = float(torch.linalg.vector_norm(gradient)) / self.scale.factor
        finite = math.isfinite(norm)
        lr = self.lr * factor
        clipped = self.clipper.factor(norm)
        if finite:
            multiplier = clipped / self.scale.factor
            if multiplier != 1.0:
                gradient.mul_(multiplier)
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
            self.weights.publish()
        self.scale.update(finite)
        self.weights.average()  # after skipped steps too, as officially
        return StepReport(norm, clipped, finite, lr)

    def tensors(self) -> dict[str, Tensor]:
        """What the optimiser remembers, by name."""
        return {key: value for key, value in self.optimizer.state[self.vector].items() if isinstance(value, Tensor)}

    def state(self) -> dict[str, Any]:
        """Everything else that a run needs to go on: decoded JSON."""
        return {"log2_scale": self.scale.log2, "clipper": self.clipper.state()}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from `tensors` and `state`."""
        device = self.vector.device
        counter = device if self.optimizer.param_groups[0]["fused"] else "cpu"
        self.optimizer.state[self.vector] = {
            key: value.to(device if value.ndim else counter, copy=True) for key, value in tensors.items()
        }
        self.scale.log2 = state["log2_scale"]
        self.clipper.restore(state["clipper"])
