"""`TrainingConfig`: the official JSON of a training run, ``{models, dataset, trainer}``, read strictly."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "configs"
OPTIMIZERS = ("AdamW", "Adam", "SGD")
SCHEDULES = ("constant", "linear_warmup", "cosine")
PRECISIONS = ("fp32", "bf16", "fp16", "amp")


class ConfigError(ValueError):
    """A training configuration is malformed; the message names the key and what is allowed."""


@dataclass(frozen=True)
class Named:
    """An object by its class name and arguments, as official files write it.

    Args:
        name: of the class.
        args: its keyword arguments.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, where: str) -> Named:
        value = _object(value, where, ("name", "args"))
        name, args = value.get("name"), value.get("args", {})
        if not isinstance(name, str) or not isinstance(args, dict):
            raise ConfigError(f"{where} must have a string 'name' and an object 'args'; got {value!r}")
        return cls(name, args)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "args": dict(self.args)}


@dataclass(frozen=True)
class LoopConfig:
    """Trainer arguments that concern the loop and not the objective; the official names, and below them our own.

    Args:
        max_steps: optimiser steps of the whole run.
        batch_size: samples per step of all processes together; one of this and the next.
        batch_size_per_gpu: samples per step and process.
        batch_split: a step's samples are divided into this many passes per process, balanced by voxels.
        optimizer: AdamW, Adam or SGD and its arguments; the `lr` is the peak of the schedule.
        lr_scheduler: `linear_warmup` {warmup} or `cosine` {warmup, steps, final}; None: constant.
        ema_rate: one or several decay rates of the averaged weights.
        fp16_mode: None (float32) or `inflat_all`: half-precision torso, one flat float32 master.
        fp16_scale_growth: added to the log2 of the loss scale after each finite step.
        elastic: the memory controller, see `trellis.training.elastic`.
        grad_clip: a maximal norm, or `AdaptiveGradClipper` and its arguments.
        i_log: steps between TensorBoard scalars.
        i_sample: steps between samples.
        i_save: steps between checkpoints.
        i_ddpcheck: steps between checks that all processes have the same weights; None: never.
        finetune_ckpt: role -> stem of the weights to start from.
        image_cond_model: name of the picture encoder.
        text_cond_model: name of the text encoder.
        seed: of everything random in the run.
        precision: fp32, bf16 or fp16 torso with float32 master weights, or amp (bfloat16 autocast); None: `fp16_mode`.
        frozen: roles whose models stay as they are loaded, as an encoder whose latents are in use.
        lora: `{rank, alpha, targets}`: train low-rank adapters instead of the weights.
        keep_checkpoints: keep this many checkpoints besides the newest; None: all.
    """

    max_steps: int
    batch_size: int | None = None
    batch_size_per_gpu: int | None = None
    batch_split: int = 1
    optimizer: Named = field(default_factory=lambda: Named("AdamW", {"lr": 1e-4, "weight_decay": 0.0}))
    lr_scheduler: Named | None = None
    ema_rate: tuple[float, ...] = (0.9999,)
    fp16_mode: str | None = "inflat_all"
    fp16_scale_growth: float = 1e-3
    elastic: Named | None = None
    grad_clip: Named | float | None = None
    i_log: int = 500
    i_sample: int = 10_000
    i_save: int = 10_000
    i_ddpcheck: int | None = 10_000
    finetune_ckpt: Mapping[str, str] | None = None
    image_cond_model: str | None = None
    text_cond_model: str | None = None
    seed: int = 0
    precision: str | None = None
    frozen: tuple[str, ...] = ()
    lora: Mapping[str, Any] | None = None
    keep_checkpoints: int | None = None

    def __post_init__(self) -> None:
        if (self.batch_size is None) == (self.batch_size_per_gpu is None):
            raise ConfigError("trainer needs one of batch_size and batch_size_per_gpu")
        for name in ("max_steps", "batch_size", "batch_size_per_gpu", "batch_split", "i_log", "i_sample", "i_save"):
            _at_least_one(name, getattr(self, name))
        _one_of("optimizer", self.optimizer.name, OPTIMIZERS)
        if self.lr_scheduler is not None:
            _one_of("lr_scheduler", self.lr_scheduler.name, SCHEDULES)
        _one_of("fp16_mode", self.fp16_mode, (None, "inflat_all", "amp"))
        _one_of("precision", self.precision, (None, *PRECISIONS))
        for rate in self.ema_rate:
            if not isinstance(rate, int | float) or not 0 <= rate < 1:
                raise ConfigError(f"trainer.args.ema_rate must be in [0, 1); got {rate!r}")

    def per_process(self, processes: int) -> int:
        """Samples per step and process."""
        if self.batch_size_per_gpu is not None:
            return self.batch_size_per_gpu
        assert self.batch_size is not None
        if self.batch_size % processes:
            raise ConfigError(f"batch_size={self.batch_size} must be a multiple of the {processes} processes")
        return self.batch_size // processes

    @classmethod
    def of(cls, args: Mapping[str, Any], objective: Collection[str]) -> tuple[LoopConfig, dict[str, Any]]:
        """Split trainer arguments into those of the loop and those of the objective, which understands `objective`.

        Raises:
            ConfigError: an argument is neither's; it is named and all known ones are listed.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(args) - known - set(objective))
        if unknown:
            raise ConfigError(
                f"trainer.args has no {unknown[0]!r}; known are {', '.join(sorted(known | set(objective)))}"
            )
        values = {name: value for name, value in args.items() if name in known}
        for name in ("optimizer", "lr_scheduler", "elastic", "grad_clip"):
            if isinstance(values.get(name), Mapping) or (name == "optimizer" and name in values):
                values[name] = Named.of(values[name], f"trainer.args.{name}")
        rates = values.get("ema_rate", (0.9999,))
        values["ema_rate"] = tuple(rates) if isinstance(rates, list | tuple) else (rates,)
        frozen = values.get("frozen", ())
        if not isinstance(frozen, list | tuple) or not all(isinstance(role, str) for role in frozen):
            raise ConfigError(f"trainer.args.frozen must be a list of roles; got {frozen!r}")
        values["frozen"] = tuple(frozen)
        if values.get("max_steps") is None:
            raise ConfigError("trainer.args.max_steps is missing")
        return cls(**values), {name: value for name, value in args.items() if name in objective}


@dataclass(frozen=True)
class TrainingConfig:
    """The whole of a training run; what is in it is checked by those who build it.

    Args:
        models: role (encoder, decoder, denoiser) -> class and arguments.
        dataset: class and arguments.
        trainer: class and arguments.
    """

    models: Mapping[str, Named]
    dataset: Named
    trainer: Named

    @classmethod
    def from_json(cls, value: Any) -> TrainingConfig:
        """Read a decoded JSON.

        Raises:
            ConfigError: a key is missing or unknown; it is named and the known ones are listed.
        """
        value = _object(value, "configuration", ("models", "dataset", "trainer"))
        missing = [name for name in ("models", "dataset", "trainer") if name not in value]
        if missing:
            raise ConfigError(f"configuration must have {missing[0]!r}; it has {', '.join(value) or 'nothing'}")
        models = value["models"]
        if not isinstance(models, dict) or not models:
            raise ConfigError(f"models must be an object of role -> {{name, args}}; got {models!r}")
        return cls(
            {role: Named.of(model, f"models.{role}") for role, model in models.items()},
            Named.of(value["dataset"], "dataset"),
            Named.of(value["trainer"], "trainer"),
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {
            "models": {role: model.to_json() for role, model in self.models.items()},
            "dataset": self.dataset.to_json(),
            "trainer": self.trainer.to_json(),
        }


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configurations that come with the package."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.json"))}


def load_config(name: str | Path) -> TrainingConfig:
    """Read a configuration by its path, or by the name of a shipped one.

    Raises:
        ConfigError: there is none, or it is malformed.
    """
    path = Path(name)
    if not path.is_file():
        shipped = shipped_configs()
        if path.stem not in shipped:
            raise ConfigError(f"no configuration {str(name)!r}: neither a file nor one of {', '.join(shipped)}")
        path = shipped[path.stem]
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    try:
        return TrainingConfig.from_json(value)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _object(value: Any, where: str, known: Collection[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a JSON object; got {value!r}")
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ConfigError(f"{where} has no key {unknown[0]!r}; known are {', '.join(known)}")
    return value


def _one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
    if value not in allowed:
        raise ConfigError(f"trainer.args.{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def _at_least_one(name: str, value: Any) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise ConfigError(f"trainer.args.{name} must be a positive integer; got {value!r}")
