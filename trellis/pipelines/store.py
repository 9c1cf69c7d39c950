"""`ModelStore`: where a pipeline's models come from, and whether they stay in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trellis.checkpoints import CheckpointError, HubOptions, confined, load_model, read_json
from trellis.models.config import Model

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
    ) -> None:
        self.paths, self.source, self.hub = dict(paths), source, hub
        self.device, self.dtype, self.low_memory = device, dtype, low_memory
        self._loaded: dict[str, Model] = {}
        if not low_memory:
            for role in self.paths:
                self._loaded[role] = self._load(role)

    def __contains__(self, role: str) -> bool:
        return role in self.paths

    def put(self, role: str, model: Model) -> None:
        """Use this model for a role."""
        self.paths.setdefault(role, "")
        self._loaded[role] = model.to(self.device).eval()

    @contextmanager
    def use(self, role: str) -> Iterator[Any]:
        """The model of a role; with `low_memory` it is dropped afterwards."""
        if role not in self.paths:
            raise ValueError(f"this pipeline has no {role}; it has {', '.join(sorted(self.paths))}")
        kept = self._loaded.get(role)
        model = kept if kept is not None else self._load(role)
        yield model
        if kept is None and not self.low_memory:
            self._loaded[role] = model

    def to(self, device: torch.device) -> None:
        self.device = device
        for model in self._loaded.values():
            model.to(device)

    def _load(self, role: str) -> Model:
        path = str(confined(self.paths[role]))
        if isinstance(self.source, Path):
            inside = self.source / path
            if inside.with_name(inside.name + ".json").is_file():
                return load_model(inside, device=self.device, dtype=self.dtype)
            if path.count("/") < 2:
                raise CheckpointError(f"{self.source}: {role} is at {path!r}, which does not exist there")
            stem = path  # a model of another repository, as the official text pipelines have
        else:
            stem = f"{self.source}/{path}"
            if path.count("/") >= 2 and not self._in_repository(path):
                stem = path
        return load_model(
            stem,
            device=self.device,
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


def open_source(name: str | Path | None, hub: HubOptions) -> tuple[str | Path, dict[str, Any]]:
    """Where a pipeline lives, and its `pipeline.json`.

    Args:
        name: local folder, Hub repository ``owner/repo``, or None for the bundled model.
        hub: how to fetch.
    """
    if name is None:
        return BUNDLED, read_json(BUNDLED / "pipeline.json")
    folder = Path(name)
    if (folder / "pipeline.json").is_file():
        return folder, read_json(folder / "pipeline.json")
    text = str(name)
    if folder.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")) or ".." in text:
        raise CheckpointError(f"no pipeline at {text}: {folder / 'pipeline.json'} does not exist")
    return text, read_json(hub.fetch(text, "pipeline.json"))
