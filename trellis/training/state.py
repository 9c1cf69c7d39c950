"""`Run`: the models of a run and all that changes as they train; built, saved and restored here."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trellis.checkpoints import CheckpointError, build_model, load_model
from trellis.models.config import Model
from trellis.training import checkpoint
from trellis.training.blocks import autocast_blocks
from trellis.training.clip import build_clipper
from trellis.training.config import PRECISIONS, ConfigError, LoopConfig, TrainingConfig
from trellis.training.distributed import Processes, Replica, Sharded
from trellis.training.elastic import Elastic, build_controller
from trellis.training.lora import LoraConfig, adapter_state, add_adapters, merged_state
from trellis.training.optim import FlatOptimizer, LossScale
from trellis.training.sharded import ShardedOptimizer, ShardedWeights, read_shards, write_shards
from trellis.training.start import start_from
from trellis.training.weights import FlatWeights


@dataclass
class Run:
    """A run; what `train` returns is the run as it was when it ended.

    Args:
        config: of the whole run.
        loop: the part of it that concerns the loop.
        precision: fp32, bf16, fp16 or amp.
        team: the processes.
        models: role -> model, with the weights of the last step.
        weights: the float32 weights and their averages.
        optimizer: of the weights.
        passes: runs the objective.
        elastic: fits passes into the memory.
        lora: how the adapters are, if adapters are trained.
        base: role -> stem of the weights it started from.
        step: steps done.
        stopped: why it ended before its last step; None: it did not.
        skipped: steps in a row that were not finite.
        started: when, on the monotonic clock.
    """

    config: TrainingConfig
    loop: LoopConfig
    precision: str
    team: Processes
    models: dict[str, Model]
    weights: FlatWeights | ShardedWeights
    optimizer: FlatOptimizer | ShardedOptimizer
    passes: Replica
    elastic: Elastic
    lora: LoraConfig | None
    base: Mapping[str, str]
    step: int = 0
    stopped: str | None = None
    skipped: int = 0
    started: float = field(default_factory=time.monotonic)


def chosen_precision(loop: LoopConfig, asked: str, device: torch.device) -> str:
    """fp32, bf16, fp16 or amp.

    Raises:
        ConfigError: it is none of these.
    """
    chosen = loop.precision or "auto" if asked == "auto" else asked
    if chosen == "auto":
        half = {"inflat_all": "fp16", "amp": "amp"}.get(str(loop.fp16_mode), "fp32")
        chosen = "fp32" if device.type == "cpu" else half
    if chosen not in PRECISIONS:
        raise ConfigError(f"precision must be auto, {', '.join(PRECISIONS)}; got {chosen!r}")
    return chosen


def build_run(
    config: TrainingConfig,
    loop: LoopConfig,
    objective: Any,
    team: Processes,
    *,
    precision: str,
    parallel: str = "ddp",
    stems: Mapping[str, str],
) -> Run:
    """Models with fresh weights, or those at `stems` (role -> stem), and their optimiser."""
    models: dict[str, Model] = {}
    lora = None if loop.lora is None else LoraConfig.of(loop.lora)
    if lora is not None and (set(stems) != set(config.models) or parallel == "fsdp2"):
        raise ConfigError("lora needs weights to start from for every model (--load or finetune_ckpt), and not fsdp2")
    if unknown := sorted(set(loop.frozen) - set(config.models)):
        raise ConfigError(f"frozen has no role {unknown[0]!r}; there are {', '.join(config.models)}")
    if missing := sorted(set(loop.frozen) - set(stems)):
        raise ConfigError(f"frozen needs weights to start from for {missing[0]!r} (--load or finetune_ckpt)")
    torso = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(loop.seed)
        for role, described in config.models.items():
            model = build_model(described.name, described.args)
            model.set_torso_dtype(torch.float32)
            if role in stems:
                start_from(model, stems[role])
            if lora is not None:
                add_adapters(model, lora)
            if role in loop.frozen:
                model.requires_grad_(False)
            models[role] = model.to(team.device).train()
            if torso is not None:
                model.set_torso_dtype(torso)
    if precision == "amp":
        autocast_blocks(models.values())
    elastic = Elastic(build_controller(loop.elastic, team.device), models.values(), team.device)
    scale = LossScale(growth=loop.fp16_scale_growth) if precision == "fp16" else LossScale(0.0, 0.0, enabled=False)
    clipper = build_clipper(loop.grad_clip)
    if parallel == "fsdp2":
        sharded = Sharded(objective, models, team)
        shards = ShardedWeights(models, loop.ema_rate)
        divided = ShardedOptimizer(loop.optimizer, shards, clipper, scale)
        return Run(config, loop, precision, team, models, shards, divided, sharded, elastic, lora, stems)
    weights = FlatWeights(models, loop.ema_rate)
    optimizer = FlatOptimizer(loop.optimizer, weights, clipper, scale)
    passes = Replica(objective, models, team)
    return Run(config, loop, precision, team, models, weights, optimizer, passes, elastic, lora, stems)


def save_run(run: Run, names: checkpoint.Names) -> OSError | None:
    """Write a checkpoint; all processes call it, the first one writes what is not divided.

    Returns:
        What went wrong with the disk, if something did: then the step does not count as saved, and former ones stay.
    """
    error: OSError | None = None
    if isinstance(run.weights, ShardedWeights) and isinstance(run.optimizer, ShardedOptimizer):
        write_shards(names.shards, run.weights, run.optimizer)
    for role, described in run.config.models.items():
        for rate in (None, *run.loop.ema_rate):
            state = run.weights.state(role, rate)
            if run.team.first and error is None:
                try:
                    _write_model(run, names, role, rate, described.to_json(), state)
                except OSError as problem:
                    error = problem
    if run.team.first and error is None:
        try:
            _write_rest(run, names)
        except OSError as problem:
            error = problem
    if run.team.first and error is not None:
        names.delete()
    return (
        OSError("the first process could not write") if run.team.agree(int(error is not None)) and not error else error
    )


def _write_model(
    run: Run,
    names: checkpoint.Names,
    role: str,
    rate: float | None,
    described: dict[str, Any],
    state: dict[str, Tensor],
) -> None:
    if run.lora is not None:
        checkpoint.write_model(names.adapters(role, rate), run.lora.to_json(), adapter_state(state))
        # Into the weights as they were read: those here may have been rounded to half precision.
        base = load_model(run.base[role], dtype=torch.float32).state_dict()
        state = merged_state({**base, **adapter_state(state)}, run.lora)
    checkpoint.write_model(names.model(role, rate), described, state)


def _write_rest(run: Run, names: checkpoint.Names) -> None:
    remembered = {"step": run.step, "precision": run.precision, "elastic": run.elastic.state(), "base": dict(run.base)}
    checkpoint.write_misc(names, run.optimizer.tensors(), {**remembered, **run.optimizer.state()})
    if run.loop.keep_checkpoints is not None:
        for step in checkpoint.saved_steps(names.run)[: -1 - run.loop.keep_checkpoints]:
            old = checkpoint.Names(names.run, step)
            old.delete()
            shutil.rmtree(old.shards, ignore_errors=True)


def restore_run(run: Run, names: checkpoint.Names) -> None:
    """Continue from a checkpoint.

    Raises:
        CheckpointError: it is damaged, or was written by a run divided in another way.
    """
    tensors, remembered = checkpoint.read_misc(names)
    if isinstance(run.weights, ShardedWeights) and isinstance(run.optimizer, ShardedOptimizer):
        if not names.shards.is_dir():
            raise CheckpointError(f"{names.misc}: written without fsdp2; start a new run from it with --load")
        read_shards(names.shards, run.weights, run.optimizer)
    else:
        assert isinstance(run.weights, FlatWeights)
        if names.shards.is_dir():
            raise CheckpointError(f"{names.misc}: written with fsdp2; resume with it, or start a new run with --load")
        for role in run.models:
            for rate in (None, *run.loop.ema_rate):
                expected, stem = run.weights.state(role, rate), names.model(role, rate)
                if run.lora is not None:
                    expected, stem = adapter_state(expected), names.adapters(role, rate)
                run.weights.restore(role, checkpoint.read_model(stem, expected), rate)
        run.weights.publish()
    run.optimizer.restore(tensors, remembered)
    run.elastic.restore(remembered.get("elastic"))
    run.step = remembered["step"]
