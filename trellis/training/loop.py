"""`train`: one loop for every model."""

from __future__ import annotations

import json
import logging
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trellis.atomic import atomic_path
from trellis.data import build_dataset
from trellis.training import checkpoint
from trellis.training.batches import Dataset, Plan, Reader, seeded, to_device
from trellis.training.conditions import Conditions
from trellis.training.config import LoopConfig, TrainingConfig
from trellis.training.distributed import check_parallel, processes
from trellis.training.elastic import memory_in_use
from trellis.training.log import RunLog
from trellis.training.objectives import Objective, build_objective, objective_arguments
from trellis.training.optim import StepReport, learning_rate_factor
from trellis.training.samples import Samples, save_sheet
from trellis.training.sharded import ShardedWeights
from trellis.training.start import starting_stems
from trellis.training.state import Run, build_run, chosen_precision, restore_run, save_run

logger = logging.getLogger(__name__)
PATIENCE = 100  # steps in a row that may not be finite


@dataclass(frozen=True)
class Options:
    """How a run is run; none of it changes what is computed except `precision` and `steps`.

    Args:
        steps: stop after this many steps in all, before `max_steps`.
        device: where to train.
        precision: fp32, bf16, fp16 or amp; auto: what the configuration says on a GPU, float32 on a CPU.
        parallel: with several processes, `ddp` (each has the whole model) or `fsdp2` (it is divided).
        workers: processes that read samples; 0: one thread.
        ahead: steps read in advance.
        resume: go on from the newest checkpoint in the folder.
        load: what to start from, see `trellis.training.start`.
        minutes: stop after this time.
        tensorboard: write TensorBoard files.
    """

    steps: int | None = None
    device: str = "cpu"
    precision: str = "auto"
    parallel: str = "ddp"
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


def train(
    config: TrainingConfig,
    roots: Sequence[Path],
    folder: Path,
    options: Options | None = None,
    *,
    dataset: Dataset | None = None,
    objective: Objective | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], str | None] | None = None,
    command: Sequence[str] = (),
) -> Run:
    """Train the models of a configuration.

    Everything random is a function of the seed, the step and the place in it, so a resumed run goes on to the last bit
    as if it had not been interrupted, and does the same on any number of processes.

    Args:
        config: models, dataset and trainer.
        roots: folders of prepared data.
        folder: of the run; checkpoints, log and samples go there.
        options: how it is run.
        dataset: instead of that of the configuration.
        objective: instead of that of the configuration.
        progress: called after each step.
        stop: asked after each step; a reason to save and stop, or None.
        command: what was typed to start it, for ``command.txt``.

    Raises:
        ConfigError: the configuration does not fit.
        CheckpointError: weights to load do not fit.
        FileExistsError: the folder has checkpoints and it was not said to resume.
        FloatingPointError: many steps in a row were not finite.
    """
    options = options or Options()
    loop, objective, dataset = _parts(config, roots, dataset, objective)
    start = _start(folder, options)
    with processes(options.device) as team:
        precision = chosen_precision(loop, options.precision, team.device)
        check_parallel(options.parallel, precision)
        if start:  # only what is not trained is needed again: frozen models, and what adapters were added to
            names = checkpoint.Names(folder, start)
            stems = checkpoint.read_misc(names)[1]["base"] if loop.lora else {}
            stems |= {role: str(names.model(role)) for role in loop.frozen}
        else:
            stems = starting_stems(config.models, options.load, loop.finetune_ckpt)
        run = build_run(config, loop, objective, team, precision=precision, parallel=options.parallel, stems=stems)
        if start:
            restore_run(run, checkpoint.Names(folder, start))
        if team.first:
            _describe(folder, config, command)
        _loop(run, folder, options, dataset, progress, stop)
    return run


def _loop(
    run: Run,
    folder: Path,
    options: Options,
    dataset: Dataset,
    progress: Callable[[Progress], None] | None,
    stop: Callable[[], str | None] | None,
) -> None:
    loop, team = run.loop, run.team
    start, last = run.step, min(loop.max_steps, options.steps or loop.max_steps)
    batch, split = loop.per_process(team.count) * team.count, loop.batch_split
    plan = Plan(loop.seed, batch, split * team.count, range(split * team.rank, split * (team.rank + 1)))
    conditions = Conditions(loop, team.device, getattr(dataset, "neg_cond", None))
    samples: Samples | None = None
    if not isinstance(run.weights, ShardedWeights):  # whose models can only be asked by all processes together
        samples = Samples(dataset, run.config.dataset.args, conditions, team.device)
    with ExitStack() as stack:
        log: RunLog | None = None
        if team.first:
            log = stack.enter_context(RunLog(folder, start, tensorboard=options.tensorboard))
        reader = stack.enter_context(Reader(dataset, plan, start, last, workers=options.workers, ahead=options.ahead))
        clock = time.monotonic()
        for step, batches in reader:
            report, terms = _step(run, plan, conditions, step, batches)
            run.step = step + 1
            clock, before = time.monotonic(), clock
            line = _line(step, report, terms, clock - before, batch)
            line["memory_gib"] = round(memory_in_use(team.device), 3)
            if log is not None:
                log.write(line)
                if run.step % loop.i_log == 0:
                    log.scalars(run.step, {key: value for key, value in line.items() if key != "step"})
                if progress is not None:
                    progress(Progress(run.step, last, line))
                if samples is not None and run.step % loop.i_sample == 0 and (sheet := samples.draw(run)) is not None:
                    save_sheet(sheet, folder / "samples" / f"step{run.step:07d}.png")
                    log.images(run.step, {"samples": sheet})
            run.stopped = _reason(run, options, stop) if run.step < last else None
            if loop.i_ddpcheck and run.step % loop.i_ddpcheck == 0 and not isinstance(run.weights, ShardedWeights):
                team.check_equal(run.weights.master)
            if run.step % loop.i_save == 0 or run.step == last or run.stopped:
                error = save_run(run, checkpoint.Names(folder, run.step))
                if error is not None and (run.step == last or run.stopped):
                    raise error
                if error is not None:  # a full disk, perhaps: the next checkpoint may succeed
                    logger.error("step %d could not be saved, training goes on: %s", run.step, error)
            if run.stopped:
                break


def _parts(
    config: TrainingConfig, roots: Sequence[Path], dataset: Dataset | None, objective: Objective | None
) -> tuple[LoopConfig, Objective, Dataset]:
    name, args = config.trainer.name, config.trainer.args
    if objective is None:
        loop, rest = LoopConfig.of(args, objective_arguments(name))
        objective = build_objective(name, rest)
    else:
        loop, _ = LoopConfig.of(args, getattr(objective, "arguments", ()))
    learning_rate_factor(loop.lr_scheduler, 0, loop.max_steps)
    if dataset is None:
        dataset = build_dataset(config.dataset.name, config.dataset.args, roots)
    return loop, objective, dataset


def _start(folder: Path, options: Options) -> int:
    saved = checkpoint.saved_steps(folder)
    if saved and not options.resume:
        raise FileExistsError(f"{folder} has a checkpoint of step {saved[-1]}: resume it, or train into another folder")
    return saved[-1] if saved else 0


def _step(
    run: Run, plan: Plan, conditions: Conditions, step: int, batches: list[dict[str, Any]]
) -> tuple[StepReport, dict[str, float]]:
    device = run.team.device
    run.weights.zero_gradient()
    sums: dict[str, Tensor] = {}
    for group, batch in zip(plan.mine, batches, strict=True):
        ready = conditions(to_device(batch, device))
        with (
            run.elastic.fitting(ready, seeded(run.loop.seed, 3, step, group)),
            run.passes.accumulating(last=group == plan.mine[-1]),
        ):
            terms = run.passes(ready, plan.generator(step, group, device))
            (terms["loss"] * (run.optimizer.scale.factor / len(plan.mine))).backward()
        for name, term in terms.items():
            value = term.detach().float()
            sums[name] = sums[name] + value if name in sums else value
    # The processes log the same terms, in the same order: they are one vector.
    names = list(sums)
    values = run.team.mean(torch.stack([sums[name] for name in names]) / len(plan.mine)).tolist()
    report = run.optimizer.step(learning_rate_factor(run.loop.lr_scheduler, step, run.loop.max_steps))
    run.skipped = 0 if report.finite else run.skipped + 1
    if run.skipped >= PATIENCE:
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


def _reason(run: Run, options: Options, stop: Callable[[], str | None] | None) -> str | None:
    reason = stop() if stop is not None else None
    late = options.minutes is not None and time.monotonic() - run.started >= 60 * options.minutes
    # One process may be told to stop, or be late, before the others: all save the same step.
    agreed = run.team.agree(2 if reason else int(late))
    return (None, "time limit", reason or "another process was stopped")[agreed]


def _describe(folder: Path, config: TrainingConfig, command: Sequence[str]) -> None:
    with atomic_path(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config.to_json(), indent=4) + "\n", encoding="utf-8")
    if command:
        with (folder / "command.txt").open("a", encoding="utf-8") as file:
            file.write(shlex.join(command) + "\n")
