"""`prepare`: runs steps over all objects, in processes or on Ray; what is done is not done again."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trellis.atomic import disk_is_full
from trellis.preparation.job import STEPS, Job, Settings, step_function
from trellis.preparation.metadata import done, merge_records, note_failure, read_metadata, write_records

logger = logging.getLogger(__name__)
FLUSH_SECONDS = 20.0


@dataclass(frozen=True)
class Task:
    """Steps still to be done for one object."""

    job: Job
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a task: columns of each step that succeeded, and why another did not."""

    sha256: str
    columns: dict[str, dict[str, Any]]
    failures: dict[str, str]
    stop: str = ""  # why no other object can be prepared either


@dataclass(frozen=True)
class Summary:
    """Of a whole run: objects that needed something, steps done, steps failed."""

    objects: int
    done: int
    failed: int


def prepare(
    root: Path,
    steps: Sequence[str],
    *,
    jobs: int = 1,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    choose: Callable[[dict[str, Any]], bool] | None = None,
    ray: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Run steps for every object of `root`/metadata.csv that lacks them.

    A failure is written to failures/ and the step tried again in the next run; the steps of that object that follow
    it are not tried in this one. A worker that dies (memory, a crash) costs its object two attempts, not the run.

    Args:
        root: a folder with metadata.csv and preparation.json.
        steps: of `STEPS`, in order.
        jobs: worker processes; 1: this process.
        rank: this machine's share is every `world_size`-th object from here.
        world_size: machines.
        limit: at most so many objects.
        choose: whether an object, by its line, takes part.
        ray: address of a Ray cluster that sees the same folder, or "local"; `jobs` is then the number of its workers.
        progress: told how many objects are through, and of how many.

    Raises:
        ValueError: an argument is out of range.
        OSError: the disk is full; what was done is kept, and the next run goes on from there.
    """
    for step in steps:
        step_function(step)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}); got {rank}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1; got {jobs}")
    settings = Settings.load(root)
    merge_records(root, STEPS)
    tasks = _tasks(root, steps, settings, choose)[rank::world_size][:limit]
    run = _on_ray(tasks, ray, jobs) if ray else _here(tasks) if jobs == 1 else _in_processes(tasks, jobs)
    found: dict[str, dict[str, dict[str, Any]]] = {step: {} for step in steps}
    failed, through, flushed = 0, 0, time.monotonic()
    try:
        for outcome in run:
            through += 1
            for step, columns in outcome.columns.items():
                found[step][outcome.sha256] = columns | {settings.column(step): True}
            for step, error in outcome.failures.items():
                failed += 1
                note_failure(root, step, outcome.sha256, error)
                logger.info("%s of %s failed: %s", step, outcome.sha256, error)
            if outcome.stop:
                raise OSError(f"nothing can be written any more, the next run goes on from here: {outcome.stop}")
            if progress is not None:
                progress(through, len(tasks))
            if time.monotonic() - flushed > FLUSH_SECONDS:
                _flush(root, found, rank)
                flushed = time.monotonic()
    finally:
        _flush(root, found, rank)
    if world_size == 1:
        merge_records(root, STEPS)
    return Summary(len(tasks), sum(len(rows) for rows in found.values()), failed)


def _flush(root: Path, found: dict[str, dict[str, dict[str, Any]]], rank: int) -> None:
    for step, rows in found.items():
        write_records(root, step, rank, rows)


def _tasks(
    root: Path, steps: Sequence[str], settings: Settings, choose: Callable[[dict[str, Any]], bool] | None
) -> list[Task]:
    tasks = []
    for sha, row in read_metadata(root).items():
        missing = tuple(step for step in steps if not done(row.get(settings.column(step), "")))
        if missing and (choose is None or choose(row)):
            tasks.append(Task(Job(root, sha, row, settings), missing))
    return tasks


def run_task(task: Task) -> Outcome:
    """Do the steps of one object; whatever one raises is its failure, and ends the object."""
    columns: dict[str, dict[str, Any]] = {}
    for step in task.steps:
        try:
            columns[step] = step_function(step)(task.job)
        except Exception as error:  # one bad object never stops a run
            if disk_is_full(error):
                return Outcome(task.job.sha256, columns, {}, stop=f"{type(error).__name__}: {error}")
            return Outcome(task.job.sha256, columns, {step: f"{type(error).__name__}: {error}"})
    return Outcome(task.job.sha256, columns, {})


def _here(tasks: Iterable[Task]) -> Iterator[Outcome]:
    return map(run_task, tasks)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _in_processes(tasks: Sequence[Task], jobs: int) -> Iterator[Outcome]:
    """Spawned workers; when one dies, what was in flight is tried again one at a time, to find who did it."""
    queue = list(reversed(tasks))
    suspects: list[Task] = []
    while queue:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _one_thread) as pool:
            running: dict[Future[Outcome], Task] = {}
            try:
                while queue or running:
                    while queue and len(running) < 2 * jobs:
                        running[pool.submit(run_task, queue[-1])] = queue[-1]
                        queue.pop()  # not before: a broken pool refuses it
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        outcome = future.result()
                        del running[future]
                        yield outcome
            except BrokenProcessPool:
                suspects += running.values()
    for task in suspects:
        yield _alone(task)


def _alone(task: Task) -> Outcome:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _one_thread) as pool:
        try:
            return pool.submit(run_task, task).result()
        except BrokenProcessPool:
            return Outcome(task.job.sha256, {}, {task.steps[0]: "the worker process died"})


def _on_ray(tasks: Sequence[Task], address: str, workers: int) -> Iterator[Outcome]:
    """The same tasks as a Ray Data set, a block each; those whose worker dies again and again are failures."""
    import ray

    if not tasks:
        return
    ours = not ray.is_initialized()
    if ours and address == "local":
        ray.init("local", num_cpus=workers, include_dashboard=False, logging_level=logging.WARNING)
    elif ours:
        ray.init(address, logging_level=logging.WARNING)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # there is one already
        context.max_errored_blocks = -1  # blocks are left out instead of ending the run
        items = ray.data.from_items([{"task": _packed(task)} for task in tasks], override_num_blocks=len(tasks))
        missing = {task.job.sha256: task for task in tasks}
        for row in items.map(_on_worker, concurrency=workers).iter_rows():
            outcome = Outcome(**json.loads(row["outcome"]))
            del missing[outcome.sha256]
            yield outcome
        for sha, task in missing.items():
            yield Outcome(sha, {}, {task.steps[0]: "the worker process died"})
    finally:
        if ours:
            ray.shutdown()


def _on_worker(row: dict[str, str]) -> dict[str, str]:
    _one_thread()
    entries = json.loads(row["task"])
    entries["settings"]["cond_elevation"] = tuple(entries["settings"]["cond_elevation"])
    job = Job(Path(entries["root"]), entries["row"]["sha256"], entries["row"], Settings(**entries["settings"]))
    return {"outcome": json.dumps(dataclasses.asdict(run_task(Task(job, tuple(entries["steps"])))), default=str)}


def _packed(task: Task) -> str:
    """As text: Ray's tables would wrap objects of ours, and a worker on another machine might not unwrap them."""
    job = task.job
    settings = dataclasses.asdict(job.settings)
    return json.dumps(
        {"root": str(job.root.resolve()), "row": dict(job.row), "settings": settings, "steps": task.steps}
    )
