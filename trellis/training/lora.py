"""Low-rank adapters: fine-tune a large model by training a few small matrices beside its frozen weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from trellis.atomic import atomic_path
from trellis.checkpoints import CheckpointError, read_json, read_state_dict, with_suffix
from trellis.models.config import Model
from trellis.training.config import ConfigError

DOWN, UP = "lora_down", "lora_up"
ATTENTION = ("*attn.to_qkv", "*attn.to_q", "*attn.to_kv", "*attn.to_out")


@dataclass(frozen=True)
class LoraConfig:
    """What `trainer.args.lora` says.

    Args:
        rank: of the adapters.
        alpha: the product of the two matrices is scaled by ``alpha / rank``.
        targets: patterns of the names of the linear layers that get one, such as ``*attn.to_qkv``.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ATTENTION

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> LoraConfig:
        """Read it.

        Raises:
            ConfigError: a key is unknown, or a value impossible.
        """
        unknown = sorted(set(value) - {"rank", "alpha", "targets"})
        if unknown:
            raise ConfigError(f"lora has no {unknown[0]!r}; known are rank, alpha, targets")
        config = cls(value.get("rank", 16), value.get("alpha", 16.0), tuple(value.get("targets", ATTENTION)))
        if type(config.rank) is not int or config.rank < 1:
            raise ConfigError(f"lora rank must be a positive integer; got {config.rank!r}")
        return config

    def to_json(self) -> dict[str, Any]:
        """What `of` reads."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}


class LoraLinear(nn.Linear):
    """``x W^T + b + (alpha / rank) x D^T U^T``, W and b frozen; U is zero at first.

    Source:
        Hu et al. 2022, "LoRA: Low-rank adaptation of large language models".
    """

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = config.alpha / config.rank
        self.lora_down = nn.Parameter(base.weight.new_empty(config.rank, base.in_features))
        self.lora_up = nn.Parameter(base.weight.new_zeros(base.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        added = linear(linear(input, self.lora_down), self.lora_up)
        return linear(input, self.weight, self.bias) + self.scale * added


def add_adapters(model: Model, config: LoraConfig) -> list[str]:
    """Give the model's targets adapters and freeze everything else, in place; the names of the targets.

    Raises:
        ConfigError: no linear layer is a target.
    """
    model.requires_grad_(False)
    targets = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and any(fnmatchcase(name, pattern) for pattern in config.targets)
    ]
    if not targets:
        raise ConfigError(f"lora targets {', '.join(config.targets)} must name linear layers of {type(model).__name__}")
    for name in targets:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, LoraLinear(layer, config))
    return targets


@torch.no_grad()
def merge_adapters(model: Model) -> Model:
    """Add the adapters to the weights and take them out, in place: an ordinary model again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            update = module.scale * module.lora_up.float() @ module.lora_down.float()
            plain.weight = nn.Parameter((module.weight.float() + update).to(module.weight.dtype))
            plain.bias = module.bias
            model.set_submodule(name, plain)
    return model.requires_grad_(True)


def merged_state(state: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """A state dict with adapters as that of the model without, the adapters added to its weights."""
    merged = {key: value for key, value in state.items() if not key.endswith((DOWN, UP))}
    for key in state:
        if key.endswith(DOWN):
            layer = key.removesuffix(DOWN)
            product = state[layer + UP].float() @ state[key].float()
            merged[f"{layer}weight"] = merged[f"{layer}weight"] + config.alpha / config.rank * product
    return merged


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters of a state dict."""
    return {key: value for key, value in state.items() if key.endswith((DOWN, UP))}


def save_adapters(model: Model, config: LoraConfig, stem: str | Path) -> None:
    """Write ``<stem>.json`` and ``<stem>.safetensors`` with the adapters alone."""
    from safetensors.torch import save_file

    state = {key: value.detach().cpu().contiguous() for key, value in adapter_state(model.state_dict()).items()}
    text = json.dumps(config.to_json(), indent=4)
    with (
        atomic_path(with_suffix(Path(stem), ".safetensors")) as weights,
        atomic_path(with_suffix(Path(stem), ".json")) as described,
    ):
        save_file(state, weights)
        described.write_text(text + "\n")


def load_adapters(model: Model, stem: str | Path) -> LoraConfig:
    """Give a model the adapters at `stem`, in place; `merge_adapters` makes them part of its weights.

    Raises:
        CheckpointError: they do not fit the model.
    """
    try:
        config = LoraConfig.of(read_json(with_suffix(Path(stem), ".json")))
        add_adapters(model, config)
    except ConfigError as error:
        raise CheckpointError(f"{stem}: {error}") from None
    expected = adapter_state(model.state_dict())
    stored = read_state_dict(with_suffix(Path(stem), ".safetensors"), expected, model.device)
    model.load_state_dict(stored, strict=False)
    return config
