"""Reading other people's weights: transformers folders and Hub ids, `.pth` and `.safetensors` files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trellis.checkpoints import CheckpointError


def transformers_model(class_name: str, name: str, **hub: Any) -> Any:
    """A transformers model or tokenizer by its class's name, from a Hub id or folder; safetensors or nothing.

    Raises:
        CheckpointError: it is not there, cannot be reached, or lacks weights.
    """
    import transformers

    is_model = class_name.endswith("Model")
    options = {"output_loading_info": True, "use_safetensors": True} if is_model else {}
    try:
        loaded = getattr(transformers, class_name).from_pretrained(str(name), **options, **hub)
    except Exception as error:  # the Hub client and transformers raise many unrelated types
        raise CheckpointError(f"cannot load {class_name} from {name}: {error}") from error
    if not is_model:
        return loaded
    model, info = loaded
    problems = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
    if problems:
        raise CheckpointError(f"{name}: {sorted(problems)[0]} is missing or mis-shaped")
    return model


def open_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pth` read with ``weights_only=True``.

    Raises:
        CheckpointError: unreadable, not a flat dictionary of tensors, or values that are not finite.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged or refused files the readers raise many unrelated types
        raise CheckpointError(f"{path}: cannot be read as weights: {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: must hold a dictionary of tensors")
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{path}: {key} has values that are not finite")
    return dict(state)
