"""`train`: one loop for every model."""

from __future__ import annotations

import importlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trellis.atomic import atomic_path
from trellis.checkpoints import build_model
from trellis.models.config import Model
from trellis.training import checkpoint
from trellis.training.batches import Dataset, Plan, Reader, to_device
from trellis.training.clip import build_clipper
from trellis.training.config import ConfigError, LoopConfig, TrainingConfig
from trellis.training.log import RunLog
from trellis.training.optim import FlatOptimizer, LossScale, StepReport, learning_rate_factor
from trellis.training.start import start_from, starting_stems
from trellis.training.weights import FlatWeights

logger = logging.getLogger(__name__)
PATIENCE = 100  # steps in a row that may not be finite


class Objective(Protocol):
    """What is minimised: the scalars of one pass, of which ``loss`` is the one."""

    def __call__(
        self, models: Mapping[str, nn.Module], batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Options:
    """How a run is run; none of it changes what is computed except `precision` and `steps`.

    Args:
        steps: stop after this many steps in all, before `max_steps`.
        device: where to train.
        precision: fp32, bf16, fp16 or amp; auto: what the configuration says on a GPU, float32 on a CPU.
        workers: processes that read samples; 0: one thread.
        ahead: steps read in advance.
        resume: go on from the newest checkpoint in the folder.
        load: a run's folder (its newest checkpoint), or the stem or Hub path of a model, to start from.
        minutes: stop after this time.
        tensorboard: write TensorBoard files.
    """

    steps: int | None = None
    device: str = "cpu"
    precision: str = "auto"
    workers: int = 0
    ahead: int = 3
    resume: bool = False
    load: str | None = None
    minutes: float | None = None
    tensorboard: bool = False


@dataclass(frozen=True)
class Progress:
    """Where a run is, for a progress bar.

    Args:
        step: steps done in all.
        steps: to do in all.
        line: what was written to the log.
    """

    step: int
    steps: int
    line: Mapping[str, Any]


@dataclass
class Run:
    """A run as it was when it ended.

    Args:
        models: role -> model, with the weights of the last step.
        weights: the float32 weights and their averages.
        step: steps done.
        stopped: why it ended before its last step; None: it did not.
    """

    models: dict[str, Model]
    weights: FlatWeights
    optimizer: FlatOptimizer
    step: int = 0
    stopped: str | None = None
    skipped: int = 0
    started: float = field(default_factory=time.monotonic)


def train(
    config: TrainingConfig,
    roots: Sequence[Path],
    run: Path,
    options: Options | None = None,
    *,
    dataset: Dataset | None = None,
    objective: Objective | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], str | None] | None = None,
) -> Run:
    """Train the models of a configuration.

    Everything random is a function of the seed, the step and the place in it, so a resumed run goes on to the last bit
    as if it had not been interrupted.

    Args:
        config: models, dataset and trainer.
        roots: folders of prepared data.
        run: folder of the run; checkpoints, log and samples go there.
        options: how it is run.
        dataset: instead of that of the configuration.
        objective: instead of that of the configuration.
        progress: called after each step.
        stop: asked after each step; a reason to save and stop, or None.

    Raises:
        ConfigError: the configuration does not fit.
        CheckpointError: weights to load do not fit.
        FileExistsError: `run` has checkpoints and it was not said to resume.
        FloatingPointError: many steps in a row were not finite.
    """
    options = options or Options()
    loop, objective, dataset = _parts(config, roots, dataset, objective)
    start = _start(run, options)
    state = _build(config, loop, options, start)
    if start:
        _restore(state, loop, checkpoint.Names(run, start))
    last = min(loop.max_steps, options.steps or loop.max_steps)
    _describe(run, config)
    batch, split = loop.per_process(1), loop.batch_split
    plan = Plan(loop.seed, batch, split, range(split))
    with ExitStack() as stack:
        log = stack.enter_context(RunLog(run, start, tensorboard=options.tensorboard))
        reader = stack.enter_context(Reader(dataset, plan, start, last, workers=options.workers, ahead=options.ahead))
        clock = time.monotonic()
        for step, batches in reader:
            report, terms = _step(state, loop, plan, objective, step, batches, options)
            state.step = step + 1
            now = time.monotonic()
            line = _line(step, report, terms, now - clock, batch)
            clock = now
            log.write(line)
            if state.step % loop.i_log == 0:
                log.scalars(state.step, {key: value for key, value in line.items() if key != "step"})
            if progress is not None:
                progress(Progress(state.step, last, line))
            state.stopped = _reason(state, options, stop) if state.step < last else None
            if state.step % loop.i_save == 0 or state.step == last or state.stopped:
                _save(state, config, loop, checkpoint.Names(run, state.step))
            if state.stopped:
                break
    return state


def _parts(
    config: TrainingConfig, roots: Sequence[Path], dataset: Dataset | None, objective: Objective | None
) -> tuple[LoopConfig, Objective, Dataset]:
    name, args = config.trainer.name, config.trainer.args
    if objective is None:
        objectives = importlib.import_module("trellis.training.objectives")
        loop, rest = LoopConfig.of(args, objectives.objective_arguments(name))
        built: Objective = objectives.build_objective(name, rest)
        objective = built
    else:
        loop, _ = LoopConfig.of(args, getattr(objective, "arguments", ()))
    if dataset is None:
        data = importlib.import_module("trellis.data")
        read: Dataset = data.build_dataset(config.dataset.name, config.dataset.args, roots)
        dataset = read
    return loop, objective, dataset


def _start(run: Path, options: Options) -> int:
    saved = checkpoint.saved_steps(run)
    if saved and not options.resume:
        raise FileExistsError(f"{run} has a checkpoint of step {saved[-1]}: resume it, or train into another folder")
    return saved[-1] if saved else 0


def _build(config: TrainingConfig, loop: LoopConfig, options: Options, start: int) -> Run:
    precision = chosen_precision(loop, options)
    models: dict[str, Model] = {}
    stems = {} if start else starting_stems(config.models, options.load, loop.finetune_ckpt)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(loop.seed)
        for role, described in config.models.items():
            model = build_model(described.name, described.args)
            half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
            model.set_torso_dtype(torch.float32)
            if role in stems:
                start_from(model, stems[role])
            models[role] = model.to(options.device).train()
            if half != torch.float32:
                model.set_torso_dtype(half)
    weights = FlatWeights(models, loop.ema_rate)
    scale = LossScale(growth=loop.fp16_scale_growth) if precision == "fp16" else LossScale(0.0, 0.0, enabled=False)
    optimizer = FlatOptimizer(loop.optimizer, weights, build_clipper(loop.grad_clip), scale)
    learning_rate_factor(loop.lr_scheduler, 0, loop.max_steps)
    return Run(models, weights, optimizer)


def chosen_precision(loop: LoopConfig, options: Options) -> str:
    """fp32, bf16, fp16 or amp.

    Raises:
        ConfigError: it is none of these.
    """
    chosen = options.precision
    if chosen == "auto" and loop.precision is not None:
        chosen = loop.precision
    if chosen == "auto":
        on_gpu = torch.device(options.device).type != "cpu"
        chosen = {"inflat_all": "fp16", "amp": "amp"}.get(str(loop.fp16_mode), "fp32") if on_gpu else "fp32"
    if chosen not in ("fp32", "bf16", "fp16", "amp"):
        raise ConfigError(f"precision must be auto, fp32, bf16, fp16 or amp; got {chosen!r}")
    return chosen


def _step(
    state: Run,
    loop: LoopConfig,
    plan: Plan,
    objective: Objective,
    step: int,
    batches: list[dict[str, Any]],
    options: Options,
) -> tuple[StepReport, dict[str, float]]:
    device = torch.device(options.device)
    amp: AbstractContextManager[Any] = nullcontext()
    if chosen_precision(loop, options) == "amp":
        amp = torch.autocast(device.type, torch.bfloat16)
    state.weights.zero_gradient()
    sums: dict[str, Tensor] = {}
    for group, batch in zip(plan.mine, batches, strict=True):
        with amp:
            terms = objective(state.models, to_device(batch, device), plan.generator(step, group, device))
        (terms["loss"] * (state.optimizer.scale.factor / plan.groups)).backward()
        for name, term in terms.items():
            value = term.detach().float()
            sums[name] = sums[name] + value if name in sums else value
    names = list(sums)
    values = (torch.stack([sums[name] for name in names]) / plan.groups).tolist()
    report = state.optimizer.step(learning_rate_factor(loop.lr_scheduler, step, loop.max_steps))
    state.skipped = 0 if report.finite else state.skipped + 1
    if state.skipped >= PATIENCE:
        raise FloatingPointError(f"{PATIENCE} steps in a row were not finite; the last is {step}")
    return report, dict(zip(names, values, strict=True))


def _line(step: int, report: StepReport, terms: Mapping[str, float], seconds: float, batch: int) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step, **terms, "grad_norm": report.grad_norm, "lr": report.lr}
    if report.clipped != 1.0:
        line["clipped"] = report.clipped
    if not report.finite:
        line["skipped"] = True
    line |= {"seconds": round(seconds, 4), "samples_per_second": round(batch / seconds, 3)}
    # JSON has no infinity: what is not finite is written as null.
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }


def _reason(state: Run, options: Options, stop: Callable[[], str | None] | None) -> str | None:
    if stop is not None and (reason := stop()):
        return reason
    if options.minutes is not None and time.monotonic() - state.started >= 60 * options.minutes:
        return "time limit"
    return None


def _describe(run: Path, config: TrainingConfig) -> None:
    with atomic_path(run / "config.json") as temporary:
        temporary.write_text(json.dumps(config.to_json(), indent=4) + "\n", encoding="utf-8")


def _save(state: Run, config: TrainingConfig, loop: LoopConfig, names: checkpoint.Names) -> None:
    for role, described in config.models.items():
        for rate in (None, *loop.ema_rate):
            checkpoint.write_model(names.model(role, rate), described, state.weights.state(role, rate))
    checkpoint.write_misc(names, state.optimizer.tensors(), {"step": state.step, **state.optimizer.state()})
    if loop.keep_checkpoints is not None:
        for step in checkpoint.saved_steps(names.run)[: -1 - loop.keep_checkpoints]:
            checkpoint.Names(names.run, step).delete()


def _restore(state: Run, loop: LoopConfig, names: checkpoint.Names) -> None:
    for role in state.models:
        for rate in (None, *loop.ema_rate):
            expected = state.weights.state(role, rate)
            state.weights.restore(role, checkpoint.read_model(names.model(role, rate), expected), rate)
    state.weights.publish()
    tensors, remembered = checkpoint.read_misc(names)
    state.optimizer.restore(tensors, remembered)
    state.step = remembered["step"]
