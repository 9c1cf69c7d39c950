"""`FlatWeights`: all trained parameters as one float32 vector, their gradient as another, their averages as more.

Clipping, the optimiser and the averages are then a handful of passes over memory however many parameters there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

ALIGNMENT = 16  # elements: every parameter starts on a cache line


class Entry(NamedTuple):
    """One trained parameter.

    Args:
        role: of its model.
        name: its state-dict key there.
        parameter: itself.
        rows: where its elements lie in the vector.
    """

    role: str
    name: str
    parameter: nn.Parameter
    rows: slice


class FlatWeights:
    """The master weights of `models`, in the order of their parameters.

    Parameters in float32 become views of the master vector and their gradients views of its gradient: nothing is ever
    copied. Those in half precision are rounded from the master after each step (officially "inflat_all").

    Args:
        models: role -> model; parameters that require no gradient stay as they are.
        ema_rates: decay rates of the averages to keep.
    """

    def __init__(self, models: Mapping[str, nn.Module], ema_rates: Sequence[float] = ()) -> None:
        self.models = dict(models)
        self.entries: list[Entry] = []
        start = 0
        for role, model in self.models.items():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    self.entries.append(Entry(role, name, parameter, slice(start, start + parameter.numel())))
                    start += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        if not self.entries:
            raise ValueError("models must have a parameter to train; got none")
        device = self.entries[0].parameter.device
        self.master = torch.zeros(start, device=device)
        self.gradient = torch.zeros_like(self.master)
        self._half: list[Tensor] = []
        self._half_master: list[Tensor] = []
        self._half_gradient: list[Tensor] = []
        for entry in self.entries:
            parameter = entry.parameter
            weight = self._view(self.master, entry)
            gradient = self._view(self.gradient, entry)
            weight.copy_(parameter.detach())
            if parameter.dtype == torch.float32:
                parameter.data = weight
                parameter.grad = gradient
            else:
                self._half.append(parameter.data)
                self._half_master.append(weight)
                self._half_gradient.append(gradient)
                parameter.grad = torch.zeros_like(parameter)
        self.averages = {rate: self.master.clone() for rate in ema_rates}

    @staticmethod
    def _view(vector: Tensor, entry: Entry) -> Tensor:
        return vector[entry.rows].view(entry.parameter.shape)

    @property
    def count(self) -> int:
        """Trained parameters."""
        return sum(entry.parameter.numel() for entry in self.entries)

    def _half_parameters(self) -> Iterator[nn.Parameter]:
        return (entry.parameter for entry in self.entries if entry.parameter.dtype != torch.float32)

    def zero_gradient(self) -> None:
        self.gradient.zero_()
        if self._half:
            torch._foreach_zero_([p.grad for p in self._half_parameters() if p.grad is not None])

    def collect_gradient(self) -> Tensor:
        """The gradient vector, with the gradients of half-precision parameters copied in."""
        if self._half:
            gradients = [p.grad for p in self._half_parameters() if p.grad is not None]
            torch._foreach_copy_(self._half_gradient, gradients)
        return self.gradient

    @torch.no_grad()
    def publish(self) -> None:
        """Round the master into the half-precision parameters."""
        if self._half:
            torch._foreach_copy_(self._half, self._half_master)

    @torch.no_grad()
    def average(self) -> None:
        """Move every average towards the master: ``average = rate average + (1 - rate) master``."""
        for rate, average in self.averages.items():
            average.lerp_(self.master, 1 - rate)

    def state(self, role: str, ema_rate: float | None = None) -> dict[str, Tensor]:
        """The state dict of one model with float32 parameters: the master's, or an average's."""
        vector = self.master if ema_rate is None else self.averages[ema_rate]
        state = {name: tensor.detach() for name, tensor in self.models[role].state_dict().items()}
        state |= {entry.name: self._view(vector, entry) for entry in self.entries if entry.role == role}
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}

    @torch.no_grad()
    def restore(self, role: str, state: Mapping[str, Tensor], ema_rate: float | None = None) -> None:
        """Take the parameters of one model from `state`; call `publish` when all are in."""
        vector = self.master if ema_rate is None else self.averages[ema_rate]
        for entry in self.entries:
            if entry.role == role:
                self._view(vector, entry).copy_(state[entry.name])

    @torch.no_grad()
    def reset_averages(self) -> None:
        """Start the averages again from the master, as after loading weights to fine-tune."""
        for average in self.averages.values():
            average.copy_(self.master)
