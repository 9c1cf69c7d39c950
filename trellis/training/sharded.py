"""`ShardedWeights` and their optimiser: what `weights` and `optim` are for one process, divided with FSDP2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trellis.training.clip import FixedClipper
from trellis.training.config import Named
from trellis.training.optim import LossScale, StepReport, build_optimizer


class ShardedWeights:
    """The float32 parameters of sharded models, and averages of their shards.

    Args:
        models: role -> model, sharded.
        ema_rates: decay rates of the averages to keep.
    """

    def __init__(self, models: Mapping[str, nn.Module], ema_rates: Sequence[float] = ()) -> None:
        self.models = dict(models)
        self.parameters = {
            (role, name): parameter
            for role, model in self.models.items()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.averages = {
            rate: {key: parameter.detach().clone() for key, parameter in self.parameters.items()} for rate in ema_rates
        }

    @property
    def count(self) -> int:
        """Trained parameters, of all processes together."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def zero_gradient(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def publish(self) -> None:
        """Nothing: the parameters are the master."""

    @torch.no_grad()
    def average(self) -> None:
        """Move every average towards the master."""
        for rate, average in self.averages.items():
            for key, parameter in self.parameters.items():
                average[key].lerp_(parameter.detach(), 1 - rate)

    def reset_averages(self) -> None:
        """Start the averages again from the master."""
        for average in self.averages.values():
            for key, parameter in self.parameters.items():
                average[key].copy_(parameter.detach())

    def state(self, role: str, ema_rate: float | None = None) -> dict[str, Tensor]:
        """The whole state dict of one model; all processes must ask for it together."""
        state = {name: _whole(tensor) for name, tensor in self.models[role].state_dict().items()}
        if ema_rate is not None:
            average = self.averages[ema_rate]
            state |= {name: _whole(tensor) for (of, name), tensor in average.items() if of == role}
        return state

    def shards(self) -> dict[str, Any]:
        """What this process holds, by name, for `torch.distributed.checkpoint`."""
        shards: dict[str, Any] = {f"{role}.{name}": p.detach() for (role, name), p in self.parameters.items()}
        for rate, average in self.averages.items():
            shards |= {f"ema{rate}.{role}.{name}": tensor for (role, name), tensor in average.items()}
        return shards


class ShardedOptimizer:
    """Updates `ShardedWeights`; see `FlatOptimizer`."""

    def __init__(self, described: Named, weights: ShardedWeights, clipper: FixedClipper, scale: LossScale) -> None:
        self.weights, self.clipper, self.scale = weights, clipper, scale
        self.optimizer = build_optimizer(described, list(weights.parameters.values()))
        self.lr = float(self.optimizer.param_groups[0]["lr"])

    def step(self, factor: float) -> StepReport:
        """Apply the gradient that lies in the parameters."""
        gradients = [p.grad for p in self.weights.parameters.values() if p.grad is not None]
        norm = float(_whole(nn.utils.get_total_norm(gradients)))
        finite, lr, clipped = math.isfinite(norm), self.lr * factor, self.clipper.factor(norm)
        if finite:
            if clipped != 1.0:
                for gradient in gradients:
                    gradient.mul_(clipped)
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
        self.weights.average()
        return StepReport(norm, clipped, finite, lr)

    def shards(self) -> dict[str, Any]:
        """What the optimiser remembers of this process's shards; made if there was no step yet."""
        shards: dict[str, Any] = {}
        for (role, name), parameter in self.weights.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                shards[f"optimizer.{key}.{role}.{name}"] = value
        return shards

    def prepare(self) -> None:
        """Make the (zero) state that `shards` lists, so that a checkpoint can be read into it."""
        learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        before = {key: parameter.detach().clone() for key, parameter in self.weights.parameters.items()}
        for parameter in self.weights.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        with torch.no_grad():
            for key, parameter in self.weights.parameters.items():
                parameter.copy_(before[key])
                parameter.grad = None
        for group, lr in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = lr

    def tensors(self) -> dict[str, Tensor]:
        """None: they are in the shards."""
        return {}

    def state(self) -> dict[str, Any]:
        return {"log2_scale": self.scale.log2, "clipper": self.clipper.state()}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from `state`; `read_shards` restores the rest."""
        self.clipper.restore(state["clipper"])


def write_shards(folder: Path, weights: ShardedWeights, optimizer: ShardedOptimizer) -> None:
    """Every process writes what it holds (`torch.distributed.checkpoint`)."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save({**weights.shards(), **optimizer.shards()}, checkpoint_id=str(folder))


def read_shards(folder: Path, weights: ShardedWeights, optimizer: ShardedOptimizer) -> None:
    """Read what `write_shards` wrote, also with another number of processes."""
    from torch.distributed.checkpoint.state_dict_loader import load

    optimizer.prepare()
    load({**weights.shards(), **optimizer.shards()}, checkpoint_id=str(folder))


def _whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return tensor.detach() if full is None else full().detach()
