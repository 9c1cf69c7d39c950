"""Which samples a step reads, how they are divided, and reading them ahead: functions of (seed, step) alone."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)
TRIES = 10  # other samples that are tried where one cannot be read


class Dataset(Protocol):
    """What the loop needs of a dataset."""

    def __len__(self) -> int: ...

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample; everything random in it is drawn from `generator`."""

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of samples."""

    def num_voxels(self, index: int) -> int:
        """The weight of a sample in balancing."""


def seeded(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on all `numbers`; different tuples give unrelated ones."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=seeded(seed, 0, epoch))


def samples_of_step(count: int, batch: int, seed: int, step: int) -> list[int]:
    """The dataset indices of step `step`: the dataset is passed through in a new order each epoch.

    Args:
        count: samples of the dataset.
        batch: samples per step, of all processes.
        seed: of the run.
        step: from 0.
    """
    if count < 1:
        raise ValueError("dataset must have at least one sample; got an empty one")
    places = [divmod(step * batch + i, count) for i in range(batch)]
    return [int(_permutation(count, seed, epoch)[place]) for epoch, place in places]


def balanced_groups(loads: Sequence[int], count: int) -> list[list[int]]:
    """Divide positions into `count` groups of nearly equal load: largest first, each to the least loaded group.

    Source:
        microsoft/TRELLIS 6b0d647, utils/data_utils.py (checked against its values in tests/golden/train_utils).
    """
    if len(loads) < count:
        raise ValueError(f"a step must have a sample for each of its {count} passes; it has {len(loads)}")
    groups: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for position in sorted(range(len(loads)), key=lambda i: -loads[i]):
        group = totals.index(min(totals))
        groups[group].append(position)
        totals[group] += loads[position]
    return groups


@dataclass(frozen=True)
class Plan:
    """How the samples of each step are divided over processes and passes.

    Args:
        seed: of the run.
        batch: samples per step, of all processes.
        groups: passes per step, of all processes.
        mine: the passes of this process.
    """

    seed: int
    batch: int
    groups: int
    mine: range

    def passes(self, dataset: Dataset, step: int) -> list[list[tuple[int, int]]]:
        """For each pass of this process in `step`, its samples as (position in the step, dataset index)."""
        samples = samples_of_step(len(dataset), self.batch, self.seed, step)
        groups = balanced_groups([dataset.num_voxels(index) for index in samples], self.groups)
        return [[(position, samples[position]) for position in groups[group]] for group in self.mine]

    def generator(self, step: int, group: int, device: torch.device | str) -> torch.Generator:
        """What the objective draws from in one pass; the same however the passes lie on processes."""
        return seeded(self.seed, 2, step, group, device=device)


def read_sample(dataset: Dataset, seed: int, step: int, position: int, index: int) -> dict[str, Any]:
    """Load one sample; where it cannot be read, say so and take another.

    Raises:
        RuntimeError: ten others could not be read either.
    """
    generator = seeded(seed, 1, step, position)
    for _ in range(TRIES):
        try:
            return dataset.load(index, generator)
        except (OSError, ValueError, KeyError) as error:
            logger.warning("sample %d cannot be read, another is taken: %s", index, error)
            index = int(torch.randint(len(dataset), (), generator=generator))
    raise RuntimeError(f"{TRIES} samples in a row could not be read; the last is {index}")


class Reader:
    """Reads the samples of coming steps in the background.

    Args:
        dataset: what to read; with workers it must pickle.
        plan: which samples.
        first: the first step.
        last: the step after the last.
        workers: processes; 0: one thread of this process.
        ahead: steps that are read in advance.
        finish: done to each pass's batch in the background.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        first: int,
        last: int,
        *,
        workers: int = 0,
        ahead: int = 3,
        finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.dataset, self.plan, self.steps = dataset, plan, range(first, last)
        self.ahead, self.finish = ahead, finish
        self.workers = workers
        self.processes: Executor | None = self._pool() if workers else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="reader")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown(cancel_futures=True)
        if self.processes is not None:
            self.processes.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Each step and the batches of its passes.

        Raises:
            BrokenProcessPool: workers die again and again.
        """
        waiting: list[Future[list[dict[str, Any]]]] = []
        deaths = 0
        for step in self.steps:
            while True:
                try:
                    while len(waiting) <= self.ahead and step + len(waiting) < self.steps.stop:
                        waiting.append(self._submit(step + len(waiting)))
                    batches = waiting[0].result()
                    break
                except BrokenProcessPool:
                    deaths += 1
                    if deaths > TRIES:
                        raise
                    # What it read is lost, and read again: samples depend on the step alone.
                    logger.warning("a process that reads samples died; they are started again")
                    waiting.clear()
                    self.processes = self._pool()
            del waiting[0]
            yield step, batches

    def _pool(self) -> Executor:
        context = torch.multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(
            self.workers, mp_context=context, initializer=_start_worker, initargs=(self.dataset,)
        )

    def _submit(self, step: int) -> Future[list[dict[str, Any]]]:
        passes = self.plan.passes(self.dataset, step)
        if self.processes is None:
            return self.thread.submit(self._read, step, passes)
        pending = [
            [self.processes.submit(_work, self.plan.seed, step, *place) for place in samples] for samples in passes
        ]
        return self.thread.submit(self._gather, pending)

    def _read(self, step: int, passes: list[list[tuple[int, int]]]) -> list[dict[str, Any]]:
        return [
            self._batch([read_sample(self.dataset, self.plan.seed, step, *place) for place in samples])
            for samples in passes
        ]

    def _gather(self, pending: list[list[Future[dict[str, Any]]]]) -> list[dict[str, Any]]:
        return [self._batch([_unpacked(item.result()) for item in items]) for items in pending]

    def _batch(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.dataset.collate(items)
        return batch if self.finish is None else self.finish(batch)


_WORKER: dict[str, Dataset] = {}  # the dataset of a worker process


def _start_worker(dataset: Dataset) -> None:
    torch.set_num_threads(1)
    _WORKER["dataset"] = dataset


def _work(seed: int, step: int, position: int, index: int) -> Any:
    return _packed(read_sample(_WORKER["dataset"], seed, step, position, index))


class _Packed(NamedTuple):
    """A tensor between processes: as a tensor it would go through shared memory, one open file each."""

    array: np.ndarray


def _packed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Packed(value.numpy())
    if isinstance(value, Mapping):
        return {key: _packed(part) for key, part in value.items()}
    return type(value)(map(_packed, value)) if type(value) in (list, tuple) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, _Packed):
        return torch.from_numpy(value.array)
    if isinstance(value, Mapping):
        return {key: _unpacked(part) for key, part in value.items()}
    return type(value)(map(_unpacked, value)) if type(value) in (list, tuple) else value


def to_device(value: Any, device: torch.device | str) -> Any:
    """`value` with all tensors in it on `device`; anything with a ``to`` moves itself."""
    if isinstance(value, Mapping):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(part, device) for part in value)
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return value.to(device) if hasattr(value, "to") else value
