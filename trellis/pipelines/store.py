"""`ModelStore`: where a pipeline's models come from, and how long they stay in which memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trellis.checkpoints import CheckpointError, HubOptions, confined, load_model, read_json
from trellis.models.config import Model
from trellis.models.structure_flow import StructureFlow
from trellis.pipelines.memory import Plan, Stage, activation_bytes, plan, to_host, visiting, weight_bytes
from trellis.pipelines.settings import MAX_VOXELS
from trellis.sampling.graphs import GraphedFlow

TEXT_FILE = "text_pipeline.json"  # of a folder whose pipeline.json is that of the image pipeline
BUNDLED = Path(__file__).parents[1] / "pretrained" / "nano"


class ModelStore:
    """The models of one pipeline, by role.

    Args:
        paths: role -> path inside `source`, or ``owner/repo/stem`` elsewhere on the Hub.
        source: local folder, or Hub repository ``owner/repo``.
        device: where models compute.
        dtype: of the torsos; None keeps what the checkpoints say.
        hub: how to fetch.
        low_memory: load a model when its stage begins and drop it when the stage ends.
        memory: bytes that may be used on a GPU: models that do not fit beside the others wait in host memory, once
            `adopt` or `place` has said so. None: all models are on the device.
        cuda_graphs: replay the structure flow as a CUDA graph.
    """

    def __init__(
        self,
        paths: Mapping[str, str],
        source: str | Path,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        hub: HubOptions,
        low_memory: bool,
        memory: int | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        if low_memory and memory is not None:
            raise ValueError(
                "low_memory and memory exclude each other: one drops models, the other keeps them on the host"
            )
        self.paths, self.source, self.hub = dict(paths), source, hub
        self.device, self.dtype, self.low_memory, self.memory = device, dtype, low_memory, memory
        if cuda_graphs and (low_memory or memory is not None):
            raise ValueError("cuda_graphs needs the models to stay where they are: not with low_memory or memory")
        self.cuda_graphs = cuda_graphs
        self._graphed: dict[str, GraphedFlow] = {}
        self.plan: Plan | None = None
        self._loaded: dict[str, Model] = {}
        self._adopted: dict[str, nn.Module] = {}
        self._sizes: dict[str, int] = {}
        if not low_memory:
            for role in self.paths:
                self._loaded[role] = self._load(role)

    def __contains__(self, role: str) -> bool:
        return role in self.paths

    def put(self, role: str, model: Model) -> None:
        """Use this model for a role."""
        self.paths.setdefault(role, "")
        self._loaded[role] = model.eval()
        self.place()

    def adopt(self, role: str, module: nn.Module) -> None:
        """Take in a module that was loaded elsewhere, the conditioner, to be used and planned for like the rest."""
        self._adopted[role] = module
        self.place()

    def adopted(self, role: str) -> Any:
        return self._adopted[role]

    @contextmanager
    def use(self, role: str) -> Iterator[Any]:
        """The model of a role, on the device. With `low_memory` it is dropped afterwards.

        Under a `memory` budget a model may be there for this time only: changes of its weights do not outlast it.
        """
        if role not in self.paths and role not in self._adopted:
            raise ValueError(f"this pipeline has no {role}; it has {', '.join(sorted(self.paths))}")
        kept = self._modules().get(role)
        if kept is not None:
            waits = self.plan is not None and role not in self.plan.resident
            with visiting(kept, self.device) if waits else nullcontext():
                yield self._graphed.get(role, kept)
            return
        model = self._load(role)
        yield model
        if not self.low_memory:
            self._loaded[role] = model

    def to(self, device: torch.device) -> None:
        self.device = device
        self.place()

    def place(self) -> None:
        """Put every module where it belongs: on the device, or as the memory budget says.

        Raises:
            ValueError: the budget is too small even for an object of one voxel.
        """
        if self.cuda_graphs and self.device.type != "cuda":
            raise ValueError(f"cuda_graphs needs a CUDA device; got {self.device}")
        self.plan = None
        if self.memory is not None and self.device.type != "cpu" and self._modules():
            self._sizes = {role: weight_bytes(module) for role, module in self._modules().items()}
            self._follow(self._plan(self._feasible(MAX_VOXELS, 1), 1))
        else:
            for module in self._modules().values():
                module.to(self.device)
        # New ones after every move: a graph knows its weights by their addresses.
        flows = {role: model for role, model in self._loaded.items() if isinstance(model, StructureFlow)}
        self._graphed = {role: GraphedFlow(model) for role, model in flows.items()} if self.cuda_graphs else {}

    def prepare(self, voxels: int, batch: int) -> None:
        """Make room for objects of up to `voxels` voxels, `batch` of them at a time.

        Raises:
            ValueError: the budget is too small for that; what would fit is said.
        """
        if self.plan is None:
            return
        try:
            found = self._plan(voxels, batch)
        except ValueError as error:
            feasible = self._feasible(voxels, batch)
            raise ValueError(f"{error}, with max_voxels={voxels}; max_voxels={feasible} would fit") from None
        self._follow(found)

    def _modules(self) -> dict[str, nn.Module]:
        return {**self._adopted, **self._loaded}

    def _follow(self, found: Plan) -> None:
        self.plan = found
        for role, module in self._modules().items():
            if role not in found.resident:
                to_host(module)
        for role in found.resident:
            self._modules()[role].to(self.device)

    def _plan(self, voxels: int, batch: int) -> Plan:
        assert self.memory is not None
        stages = [
            Stage(role, self._sizes[role], activation_bytes(module, voxels, batch))
            for role, module in self._modules().items()
        ]
        return plan(stages, self.memory)

    def _feasible(self, voxels: int, batch: int) -> int:
        """The largest number of voxels, at most `voxels`, that the budget has room for."""
        low, high = 0, voxels + 1
        while high - low > 1:
            middle = voxels if high > voxels else (low + high) // 2
            try:
                self._plan(middle, batch)
                low = middle
            except ValueError:
                high = middle
        if low == 0:
            self._plan(1, batch)  # says why
        return low

    def _load(self, role: str) -> Model:
        path = str(confined(self.paths[role]))
        device = self.device if self.memory is None else torch.device("cpu")  # `place` moves it on
        if isinstance(self.source, Path):
            inside = self.source / path
            if inside.with_name(inside.name + ".json").is_file():
                return load_model(inside, device=device, dtype=self.dtype)
            if path.count("/") < 2:
                raise CheckpointError(f"{self.source}: {role} is at {path!r}, which does not exist there")
            stem = path  # a model of another repository, as the official text pipelines have
        else:
            stem = f"{self.source}/{path}"
            if path.count("/") >= 2 and not self._in_repository(path):
                stem = path
        return load_model(
            stem,
            device=device,
            dtype=self.dtype,
            revision=self.hub.revision if stem != path else None,
            local_files_only=self.hub.local_files_only,
            token=self.hub.token,
        )

    def _in_repository(self, path: str) -> bool:
        try:
            self.hub.fetch(str(self.source), f"{path}.json")
        except CheckpointError:
            return False
        return True


def open_source(name: str | Path | None, hub: HubOptions, wanted: str) -> tuple[str | Path, dict[str, Any]]:
    """Where a pipeline lives, and its `pipeline.json`; where that is of another class, its `text_pipeline.json`.

    Args:
        name: local folder, Hub repository ``owner/repo``, or None for the bundled model.
        hub: how to fetch.
        wanted: class of the pipeline.
    """
    folder = BUNDLED if name is None else Path(name)
    if name is None or (folder / "pipeline.json").is_file():
        description = read_json(folder / "pipeline.json")
        other = description.get("name") != wanted and (folder / TEXT_FILE).is_file()
        return folder, read_json(folder / TEXT_FILE) if other else description
    text = str(name)
    if folder.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")) or ".." in text:
        raise CheckpointError(f"no pipeline at {text}: {folder / 'pipeline.json'} does not exist")
    description = read_json(hub.fetch(text, "pipeline.json"))
    if description.get("name") != wanted:
        with suppress(CheckpointError):  # the caller says that the first is of another class
            description = read_json(hub.fetch(text, TEXT_FILE))
    return text, description
