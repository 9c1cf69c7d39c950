"""Gradient clipping by the norm: fixed, or adapted to the norms seen so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from trellis.training.config import ConfigError, Named


class FixedClipper:
    """Gradients are scaled down to at most `max_norm`; None: they are only measured."""

    def __init__(self, max_norm: float | None = None) -> None:
        self.max_norm = max_norm

    def factor(self, norm: float) -> float:
        """What to multiply the gradient of this norm with; a norm that is not finite counts for nothing."""
        if self.max_norm is None or not math.isfinite(norm):
            return 1.0
        return min(1.0, self.max_norm / (norm + 1e-6))

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""


class AdaptiveGradClipper(FixedClipper):
    """Clips at a percentile of the last finite norms, once there are enough of them, and never above `max_norm`.

    Args:
        max_norm: the upper bound, and the limit until the buffer is full; None: no bound.
        clip_percentile: of the norms in the buffer, in [0, 100].
        buffer_size: how many norms are remembered.

    Source:
        microsoft/TRELLIS 6b0d647, trainers/utils.py (checked against its values in tests/golden/train_utils).
    """

    def __init__(self, max_norm: float | None = None, clip_percentile: float = 95.0, buffer_size: int = 1000) -> None:
        super().__init__(max_norm)
        self.bound = max_norm
        self.percentile = clip_percentile
        self.norms = np.zeros(buffer_size, np.float32)
        self.count = 0  # of all norms seen

    def factor(self, norm: float) -> float:
        factor = super().factor(norm)
        if math.isfinite(norm):
            self.norms[self.count % len(self.norms)] = norm
            self.count += 1
            if self.count >= len(self.norms):
                limit = float(np.percentile(self.norms, self.percentile))
                self.max_norm = limit if self.bound is None else min(limit, self.bound)
        return factor

    def state(self) -> dict[str, Any]:
        norms = self.norms[: min(self.count, len(self.norms))]
        return {"max_norm": self.max_norm, "count": self.count, "norms": [float(norm) for norm in norms]}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.max_norm, self.count = state["max_norm"], state["count"]
        self.norms[: len(state["norms"])] = state["norms"]


def build_clipper(described: Named | float | None) -> FixedClipper:
    """What `trainer.args.grad_clip` describes.

    Raises:
        ConfigError: the name or an argument is unknown.
    """
    if described is None or isinstance(described, int | float):
        return FixedClipper(described)
    if described.name != "AdaptiveGradClipper":
        raise ConfigError(f"grad_clip must be a number or AdaptiveGradClipper; got {described.name!r}")
    unknown = sorted(set(described.args) - {"max_norm", "clip_percentile", "buffer_size"})
    if unknown:
        raise ConfigError(
            f"AdaptiveGradClipper has no {unknown[0]!r}; known are max_norm, clip_percentile, buffer_size"
        )
    return AdaptiveGradClipper(**described.args)
