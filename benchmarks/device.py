"""Where benchmarks run, and how they are timed and their memory measured there.

A GPU if there is one, else the CPU: ``with device(): ...`` makes a problem's tensors there (tensors of a CPU generator
are moved with ``.to(device())``), `measure` times one row. Timing happens outside that block, which would slow each
torch call down.

On a GPU a round is what passes between two CUDA events around the call, after two calls or more to warm up (compiling,
autotuning, filling the allocator). Before each round `_FLUSH` bytes are written, so that no input is found in the L2
cache; while the GPU does that, the host is already launching, so launches are not part of a round unless the host
cannot keep up. On a CPU a round is the wall time of the call, caches as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks.memory import peak_rss

ON_GPU = pytest.mark.gpu  # sizes for a GPU; skipped without one (conftest.py)
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a problem for the CPU")
_FLUSH = 256 << 20  # bytes; the largest L2 of a current GPU is 126 MB
_SECONDS = 0.4  # of rounds per row on a GPU
_ROUNDS = 5, 50


@cache
def device() -> torch.device:
    """The GPU if there is one, else the CPU. It is a context manager, too: tensors made in it are made there."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_gpu() -> bool:
    return device().type == "cuda"


def peak_memory(run: Callable[[], Any]) -> float:
    """MiB that ``run()`` adds at its peak: allocated on the GPU, resident on the CPU. Its result counts."""
    if not on_gpu():
        return peak_rss(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def seconds(run: Callable[[], Any]) -> float:
    """Duration of one call, which must be warm."""
    if on_gpu():
        return _rounds(run, 1)[0]
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    benchmark: Any,
    run: Callable[[], Any],
    *,
    rounds: int,
    warmup: int = 0,
    gflop: float = 0,
    gigabytes: float = 0,
    dtype: torch.dtype | str = torch.float32,
) -> None:
    """Time one row of a benchmark, with its peak memory and its rates in ``extra_info``.

    Args:
        benchmark: pytest-benchmark's fixture.
        run: the call.
        rounds: on a CPU. On a GPU as many as take half a second, between 5 and 50.
        warmup: calls before the first round on a CPU.
        gflop: floating-point operations the problem requires, in 1e9; a peer that does more gets no credit for it.
        gigabytes: that must be read or written at least, in 1e9 bytes.
        dtype: of the products, or "tf32": the report compares with the matmul rate of the same dtype.
    """
    if not benchmark.enabled:  # each row once, to see that it works
        benchmark.pedantic(run)
        return
    info = benchmark.extra_info
    if on_gpu():
        run()
        first = _rounds(run, 1)[0]
        samples = _rounds(run, min(max(int(_SECONDS / first), _ROUNDS[0]), _ROUNDS[1]))
        TIMER.replay(samples)
        benchmark.pedantic(_nothing, rounds=len(samples))
    else:
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=warmup)
    info["peak MiB"] = round(peak_memory(run), 1)
    middle = median(benchmark.stats.stats.data)
    info["dtype"] = str(dtype).removeprefix("torch.")
    if gflop:
        info["GFLOP/s"] = float(f"{gflop / middle:.4g}")
    if gigabytes:
        info["GB/s"] = float(f"{gigabytes / middle:.4g}")


class _Timer:
    """pytest-benchmark's timer: replays durations that CUDA events gave; else wall time, the GPU being idle."""

    __name__ = "cuda_events"

    def __init__(self) -> None:
        self._marks: list[float] = []

    def replay(self, samples: list[float]) -> None:
        """Let the rounds of the next `pedantic` call last this long each."""
        self._marks = [mark for sample in samples for mark in (0.0, sample)][::-1]

    def __call__(self) -> float:
        if self._marks:
            return self._marks.pop()
        if on_gpu():
            torch.cuda.synchronize()
        return time.perf_counter()


TIMER = _Timer()


def _nothing() -> None:
    pass


def _rounds(run: Callable[[], Any], rounds: int) -> list[float]:
    flushed = torch.empty(_FLUSH, dtype=torch.int8, device=device())
    torch.cuda.synchronize()
    pairs = []
    for _ in range(rounds):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        flushed.zero_()
        events[0].record()
        run()
        events[1].record()
        pairs.append(events)
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairs]
