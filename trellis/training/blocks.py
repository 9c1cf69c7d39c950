"""The blocks of a model, and two things done to them from outside: recomputation and autocast."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trellis.models.config import Model


def torso_blocks(model: Model) -> list[nn.Module]:
    """The members of the model's torso, in order: what half precision and recomputation act on."""
    return [block for name in model.torso for block in model.get_submodule(name).children()]


def autocast_blocks(models: Iterable[Model], dtype: torch.dtype = torch.bfloat16) -> None:
    """Let the matrix products of all blocks run in `dtype`; embedders, norms, residuals and outputs stay float32."""
    for model in models:
        for block in torso_blocks(model):
            block.forward = _autocast(block.forward, dtype)


def _autocast(forward: Any, dtype: torch.dtype) -> Any:
    def cast(*args: Any, **kwargs: Any) -> Any:
        device = next(forward.__self__.parameters()).device.type
        with torch.autocast(device, dtype):
            return forward(*args, **kwargs)

    return cast


class Recomputation:
    """Activation checkpointing of the first blocks of each model: less memory for a second forward pass.

    Results are the same to the last bit.

    Args:
        models: whose blocks.

    Source:
        Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """

    def __init__(self, models: Iterable[Model]) -> None:
        self.lengths: list[int] = []
        self.counts: list[int] = []
        for which, model in enumerate(models):
            blocks = torso_blocks(model)
            self.lengths.append(len(blocks))
            self.counts.append(0)
            for place, block in enumerate(blocks):
                block.forward = self._recomputed(block.forward, which, place)

    def set_ratio(self, ratio: float) -> float:
        """Keep about this share of the activations; the share that will be kept exactly, on average over models.

        Of L blocks the first ``min(ceil((1 - ratio) L) + 1, L)`` are recomputed, as officially; none for 1.
        """
        exact = []
        for which, length in enumerate(self.lengths):
            count = 0 if ratio >= 1 else min(-int(-(1 - ratio) * length // 1) + 1, length)
            self.counts[which] = count
            exact.append(1.0 if count == 0 else 1 - (count - 1) / length)
        return sum(exact) / len(exact)

    def _recomputed(self, forward: Any, which: int, place: int) -> Any:
        def maybe(*args: Any, **kwargs: Any) -> Any:
            if place < self.counts[which] and torch.is_grad_enabled():
                return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            return forward(*args, **kwargs)

        return maybe
