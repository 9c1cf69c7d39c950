"""Several processes, started by ``torchrun``: who is who, and what they must agree on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trellis.training.config import ConfigError

PARALLEL = ("ddp", "fsdp2")


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Args:
        rank: number of this one.
        count: of all, on all machines.
        device: of this one.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one writes the files."""
        return self.rank == 0

    def agree(self, value: int) -> int:
        """The largest of everyone's values."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of everyone's values."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def wait(self) -> None:
        """Go on when everyone is here."""
        if self.count > 1:
            dist.barrier()

    def check_equal(self, vector: Tensor) -> None:
        """Compare a vector with that of the first process.

        Raises:
            RuntimeError: it differs: the processes have drifted apart.
        """
        if self.count > 1:
            first = vector.clone()
            dist.broadcast(first, 0)
            if self.agree(int(not torch.equal(first, vector))):
                raise RuntimeError("the processes have different weights: they no longer train one model")


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The processes of this run: those that ``torchrun`` started, or this one alone.

    Args:
        device: ``cpu``, ``cuda`` (each process takes the GPU of its number on its machine), ...
    """
    chosen = torch.device(device)
    if not (dist.is_available() and (dist.is_initialized() or dist.is_torchelastic_launched())):
        yield Processes(0, 1, chosen)
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo" if chosen.type == "cpu" else "nccl")
    try:
        if chosen.type == "cuda":
            chosen = torch.device("cuda", dist.get_node_local_rank(0))
            torch.cuda.set_device(chosen)
        yield Processes(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        if ours:
            dist.destroy_process_group()


class Pass(nn.Module):
    """One pass of the objective as a module, so that whatever methods of the models it calls are synchronised."""

    def __init__(self, objective: Any, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.objective = objective
        self.models = nn.ModuleDict(models)

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        return self.objective(dict(self.models.items()), batch, generator)


class Replica:
    """Runs passes; gradients are averaged over the processes in the last of a step."""

    def __init__(self, objective: Any, models: Mapping[str, nn.Module], team: Processes) -> None:
        self.module: nn.Module = Pass(objective, models)
        if team.count > 1:
            # Buffers are constants here. Newer versions of torch renamed the argument that says so.
            parameters = inspect.signature(nn.parallel.DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
            constant: dict[str, Any] = {name: False}
            self.module = nn.parallel.DistributedDataParallel(self.module, bucket_cap_mb=128, **constant)

    def __call__(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        return self.module(batch, generator)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """The context of a pass, forward and backward; gradients are exchanged in the last one."""
        if last or not isinstance(self.module, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()


class Sharded(Replica):
    """The same with FSDP2: parameters, gradients and optimiser are divided over the processes.

    Each block is gathered when it is needed; call it before the optimiser is made, as parameters change.
    """

    def __init__(self, objective: Any, models: Mapping[str, nn.Module], team: Processes) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(team.device.type, (team.count,))
        for model in models.values():
            for child in model.modules():
                if isinstance(child, nn.ModuleList):
                    for block in child:
                        fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            for method in ("features", "context"):
                if hasattr(model, method):
                    register_fsdp_forward_method(model, method)
        self.module = Pass(objective, models)
        self.models = list(models.values())

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        from torch.distributed.fsdp import FSDPModule

        for model in self.models:
            assert isinstance(model, FSDPModule)
            model.set_requires_gradient_sync(last)
        return nullcontext()


def check_parallel(parallel: str, precision: str) -> None:
    """Whether this way to divide the work exists for this precision.

    Raises:
        ConfigError: it does not.
    """
    if parallel not in PARALLEL:
        raise ConfigError(f"parallel must be one of {', '.join(PARALLEL)}; got {parallel!r}")
    if parallel == "fsdp2" and precision not in ("fp32", "amp"):
        raise ConfigError(f"fsdp2 trains float32 weights: precision must be fp32 or amp; got {precision}")
