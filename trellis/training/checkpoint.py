"""Checkpoints of a run: official names, safetensors and JSON, each written whole, the last one says all are there.

``ckpts/{role}_step0001000``, ``ckpts/{role}_ema0.9999_step0001000`` (each ``.json`` + ``.safetensors``, loadable with
`trellis.load_model`) and ``ckpts/misc_step0001000`` (optimiser, clipper, loss scale, memory controller). A step counts
as saved when its ``misc_stepNNNNNNN.json`` exists, which is written last.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trellis.atomic import atomic_path
from trellis.checkpoints import CheckpointError, read_json, read_state_dict, with_suffix

FOLDER = "ckpts"


@dataclass(frozen=True)
class Names:
    """The files of one step in a run's folder."""

    run: Path
    step: int

    def model(self, role: str, ema_rate: float | None = None) -> Path:
        """Stem of a model's files."""
        average = "" if ema_rate is None else f"_ema{ema_rate}"
        return self.run / FOLDER / f"{role}{average}_step{self.step:07d}"

    def adapters(self, role: str, ema_rate: float | None = None) -> Path:
        """Stem of a model's low-rank adapters."""
        return self.model(f"{role}_lora", ema_rate)

    @property
    def misc(self) -> Path:
        return self.run / FOLDER / f"misc_step{self.step:07d}"

    @property
    def shards(self) -> Path:
        """Folder of what the processes of FSDP2 hold, in the format of `torch.distributed.checkpoint`."""
        return self.run / FOLDER / f"shards_step{self.step:07d}"

    def delete(self) -> None:
        """Remove the step, its mark of completeness first."""
        with_suffix(self.misc, ".json").unlink(missing_ok=True)
        for path in (self.run / FOLDER).glob(f"*_step{self.step:07d}.*"):
            path.unlink(missing_ok=True)


def saved_steps(run: Path) -> list[int]:
    """Steps that are saved completely, in order."""
    found = (re.fullmatch(r"misc_step(\d{7,})\.json", path.name) for path in (run / FOLDER).glob("misc_step*.json"))
    return sorted(int(match[1]) for match in found if match)


def write_model(stem: Path, described: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write one model in the official format, or adapters: weights as they are in `state`, and their description."""
    _write_tensors(with_suffix(stem, ".safetensors"), state)
    _write_json(with_suffix(stem, ".json"), described)


def read_model(stem: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the weights of one model; keys and shapes must be those of `expected`."""
    return read_state_dict(with_suffix(stem, ".safetensors"), expected, "cpu")


def write_misc(names: Names, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write what is not a model, and with it declare the step complete."""
    _write_tensors(with_suffix(names.misc, ".safetensors"), tensors)
    _write_json(with_suffix(names.misc, ".json"), state)


def read_misc(names: Names) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_misc` wrote.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = read_json(with_suffix(names.misc, ".json"))
    try:
        return load_file(with_suffix(names.misc, ".safetensors")), state
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{names.misc}.safetensors cannot be read: {error}") from error


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    contiguous = {}
    for name, tensor in tensors.items():
        host = tensor.detach().to("cpu").contiguous()
        # safetensors refuses tensors that share memory, as the parameters of a run do.
        shared = host.untyped_storage().nbytes() != host.numel() * host.element_size()
        contiguous[name] = host.clone() if shared else host
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary)
        with temporary.open("rb+") as file:
            _flush(file)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=4)
        file.write("\n")
        _flush(file)


def _flush(file: Any) -> None:
    """The bytes reach the disk before the name does."""
    file.flush()
    os.fsync(file.fileno())
