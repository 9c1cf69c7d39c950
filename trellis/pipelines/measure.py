"""How long each stage of a pipeline takes and how much memory it needs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class StageMeter:
    """Collects ``{stage: {"seconds", "peak_rss_mb"[, "peak_cuda_mb"]}}`` for a report."""

    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, device: torch.device) -> Iterator[None]:
        """Measure what runs inside; repeated names add up their time and keep the larger peak."""
        _reset_peak_rss()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        entry = self.stages.setdefault(name, {"seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + time.perf_counter() - start, 4)
        peaks = {"peak_rss_mb": _peak_rss_mb()}
        if device.type == "cuda":
            peaks["peak_cuda_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
        for key, value in peaks.items():
            if value is not None:
                entry[key] = round(max(entry.get(key, 0.0), value), 1)


def _reset_peak_rss() -> None:
    """Start a new peak of the resident set (Linux; elsewhere the peak is that of the whole process)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        try:
            clear.write_text("5")
        except OSError:  # a hardened kernel refuses; the peak is then that of the process so far
            return


def _peak_rss_mb() -> float | None:
    """Peak resident memory in MiB since the last reset; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
