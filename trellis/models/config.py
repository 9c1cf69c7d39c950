"""What every model configuration shares: official JSON arguments in and out, and the precision policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import nn

from trellis.nn.conv import StoredConv

Config = TypeVar("Config", bound="ModelConfig")

# Arguments of the official classes that only concern training: kept for the round trip, otherwise unused.
TRAINING_ONLY = frozenset({"use_checkpoint"})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base of the configurations. Field names are the official constructor arguments.

    Args:
        use_fp16: the torso of the checkpoint is half precision (embedders, norms and output layer are float32).
        extra: training-only arguments, kept as they were.
        given: names of the arguments that were given; they are what is written back. Empty: all are.
    """

    use_fp16: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    given: frozenset[str] = field(default=frozenset(), compare=False)

    @classmethod
    def from_args(cls: type[Config], args: Mapping[str, Any]) -> Config:
        """Build from the ``args`` of an official JSON.

        Raises:
            ValueError: an argument is unknown (the accepted ones are listed), missing, or has the wrong type.
        """
        known = {f.name: f for f in fields(cls) if f.name not in {"extra", "given"}}
        unknown = sorted(set(args) - set(known) - TRAINING_ONLY)
        if unknown:
            raise ValueError(f"{cls.__name__} has no argument {unknown[0]!r}; it accepts {', '.join(sorted(known))}")
        values = {name: value for name, value in args.items() if name in known}
        extra = {name: value for name, value in args.items() if name not in known}
        for name, value in values.items():
            _check_type(cls.__name__, name, value, str(known[name].type))
        try:
            return cls(**values, extra=extra, given=frozenset(args))
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from None

    def to_args(self) -> dict[str, Any]:
        """The ``args`` of the official JSON: those that were given, or all."""
        names = [f.name for f in fields(self) if f.name not in {"extra", "given"}]
        args = {name: getattr(self, name) for name in names if not self.given or name in self.given}
        return {**args, **self.extra}

    def with_torso(self: Config, dtype: torch.dtype) -> Config:
        """The configuration of the same model with its torso in `dtype`."""
        half = dtype == torch.float16
        given = self.given | {"use_fp16"} if self.given and half != self.use_fp16 else self.given
        return replace(self, use_fp16=half, given=given)


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
}


def _check_type(owner: str, name: str, value: Any, annotation: str) -> None:
    allowed = _JSON_TYPES.get(annotation)
    if allowed is not None and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
        raise ValueError(f"{owner}: {name} must be {annotation}; got {value!r}")


class Model(nn.Module):
    """Base of the models: a configuration, and a torso that may be in half precision.

    The official split: linear and convolution parameters inside the modules named in `torso` take the torso's dtype,
    everything else (embedders, norms, output layer, buffers) is float32.
    """

    torso: tuple[str, ...] = ()
    config: ModelConfig
    official_name: str | None = None  # the class name of the checkpoint it came from

    @property
    def torso_dtype(self) -> torch.dtype:
        """Dtype the torso computes in."""
        return next(self._torso_parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def set_torso_dtype(self, dtype: torch.dtype) -> None:
        """Convert the torso to float16, bfloat16 or float32, in place."""
        for parameter in self._torso_parameters():
            parameter.data = parameter.data.to(dtype)
        self.config = self.config.with_torso(dtype)

    def _torso_parameters(self) -> Iterator[nn.Parameter]:
        for name in self.torso:
            for module in self.get_submodule(name).modules():
                if isinstance(module, nn.Linear | nn.Conv3d | StoredConv):
                    yield from module.parameters(recurse=False)


def initialise_(model: nn.Module) -> None:
    """Official initialisation: Xavier-uniform linear layers, zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
