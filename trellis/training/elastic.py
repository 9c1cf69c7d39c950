"""The memory controller: how much may be recomputed so that any number of voxels fits ("elastic" training)."""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trellis.models.config import Model
from trellis.nn.sparse import SparseTensor
from trellis.training.blocks import Recomputation
from trellis.training.config import ConfigError, Named

GIB = float(1 << 30)
_KNOWN = ("target_ratio", "available_memory", "max_mem_ratio_start", "buffer_size", "update_every")


class LinearMemoryController:
    """Keeps the share of activations with which a pass should just fill its budget.

    Memory is fitted as ``k tokens ratio + b`` over the last passes. Until there is a fit the share is drawn at random
    below its maximum, so that the fit has something to see; the maximum grows with each fit.

    Args:
        available_memory: GiB.
        target_ratio: of it that a pass may use.
        max_mem_ratio_start: largest share of activations kept at first; grows by 0.1 with each fit, up to 1.
        buffer_size: passes that are remembered.
        update_every: passes between fits.

    Source:
        microsoft/TRELLIS 6b0d647, utils/elastic_utils.py (section 15 of the facts).
    """

    def __init__(
        self,
        available_memory: float,
        target_ratio: float = 0.75,
        max_mem_ratio_start: float = 0.1,
        buffer_size: int = 1000,
        update_every: int = 500,
    ) -> None:
        if available_memory <= 0 or not 0 < target_ratio <= 1 or not 0 <= max_mem_ratio_start <= 1:
            raise ConfigError(
                "elastic needs available_memory > 0, target_ratio in (0, 1] and max_mem_ratio_start in [0, 1]; got"
                f" {available_memory}, {target_ratio}, {max_mem_ratio_start}"
            )
        self.budget = available_memory * target_ratio
        self.limit, self.update_every = max_mem_ratio_start, update_every
        self.seen: deque[tuple[float, float]] = deque(maxlen=buffer_size)  # tokens times ratio, GiB
        self.fitted: tuple[float, float] | None = None
        self.count = 0

    def ratio(self, tokens: int, generator: torch.Generator) -> float:
        """Share of the activations that a pass over so many tokens may keep, in [0, 1]."""
        if self.fitted is None:
            return self.limit * float(torch.rand((), generator=generator))
        slope, offset = self.fitted
        if slope <= 0:  # memory does not grow with what is kept: nothing to save
            return self.limit
        return min(self.limit, max(0.0, (self.budget - offset) / (slope * max(1, tokens))))

    def observe(self, tokens: int, ratio: float, memory: float) -> None:
        """Learn from a pass: its tokens, the share that was kept, and the GiB it used at its peak."""
        self.seen.append((tokens * ratio, memory))
        self.count += 1
        if self.count % self.update_every == 0:
            kept, used = np.array(self.seen).T
            if float(np.ptp(kept)) > 0:
                slope, offset = np.polyfit(kept, used, 1)
                self.fitted = (float(slope), float(offset))
                self.limit = min(1.0, self.limit + 0.1)

    def state(self) -> dict[str, Any]:
        return {"limit": self.limit, "fitted": self.fitted, "count": self.count, "seen": [list(s) for s in self.seen]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.limit, self.count = state["limit"], state["count"]
        self.fitted = None if state["fitted"] is None else (state["fitted"][0], state["fitted"][1])
        self.seen.extend((kept, used) for kept, used in state["seen"])


def build_controller(described: Named | None, device: torch.device) -> LinearMemoryController | None:
    """What `trainer.args.elastic` describes; None where it is not used.

    On a GPU the memory available is all of it unless given; on a CPU it must be given, else there is no controller.

    Raises:
        ConfigError: the name or an argument is unknown.
    """
    if described is None:
        return None
    if described.name != "LinearMemoryController":
        raise ConfigError(f"elastic must be LinearMemoryController; got {described.name!r}")
    unknown = sorted(set(described.args) - set(_KNOWN))
    if unknown:
        raise ConfigError(f"LinearMemoryController has no {unknown[0]!r}; known are {', '.join(_KNOWN)}")
    arguments = dict(described.args)
    if arguments.get("available_memory") is None:
        if device.type != "cuda":
            return None
        arguments["available_memory"] = torch.cuda.get_device_properties(device).total_memory / GIB
    return LinearMemoryController(**arguments)


class Elastic:
    """Fits each pass into its memory: asks the controller, recomputes blocks, tells the controller what it took.

    Args:
        controller: None: everything is kept, nothing measured.
        models: whose blocks are recomputed.
        device: whose memory.
    """

    def __init__(
        self, controller: LinearMemoryController | None, models: Iterable[Model], device: torch.device
    ) -> None:
        self.controller, self.device = controller, device
        self.recomputation = None if controller is None else Recomputation(models)

    @contextmanager
    def fitting(self, batch: Mapping[str, Any], generator: torch.Generator) -> Iterator[float]:
        """The context of one pass, forward and backward; gives the share of the activations that is kept."""
        if self.controller is None or self.recomputation is None:
            yield 1.0
            return
        tokens = tokens_of(batch)
        exact = self.recomputation.set_ratio(self.controller.ratio(tokens, generator))
        peak = PeakMemory(self.device)
        peak.start()
        yield exact
        self.controller.observe(tokens, exact, peak.read())

    def state(self) -> dict[str, Any] | None:
        return None if self.controller is None else self.controller.state()

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue from `state`; a controller that is new starts afresh."""
        if self.controller is not None and state is not None:
            self.controller.restore(state)


def tokens_of(batch: Mapping[str, Any]) -> int:
    """How large a batch is: the voxels of its sparse tensors, else the elements of its largest tensor."""
    sparse = [len(value.coords) for value in batch.values() if isinstance(value, SparseTensor)]
    dense = [value.numel() for value in batch.values() if isinstance(value, torch.Tensor)]
    return max(sparse or dense or [1])


class PeakMemory:
    """GiB at the peak since `start`: what torch has allocated on a GPU, what the process has resident on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again (Linux)

    def read(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / GIB
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / GIB


def memory_in_use(device: torch.device) -> float:
    """GiB at the peak of the whole run, for the log."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
