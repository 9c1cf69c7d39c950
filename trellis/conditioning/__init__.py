"""Images and sentences to the tokens that condition the flows. Nothing heavy is imported until it is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# Name in pipeline.json -> module, kind of input. Only these can be named there.
CONDITIONERS = {
    "DinoV2": ("trellis.conditioning.image", "image"),
    "ClipText": ("trellis.conditioning.text", "text"),
    "EfficientNetLite0": ("trellis.conditioning.efficientnet", "image"),
    "MiniLM": ("trellis.conditioning.minilm", "text"),
}
# Names of weights -> the class that reads them. Other names are those of the first class of the kind, as officially.
PRETRAINED = {
    "efficientnet_lite0": "EfficientNetLite0",
    "minilm": "MiniLM",
    "sentence-transformers/all-MiniLM-L6-v2": "MiniLM",
}


def load_conditioner(
    spec: str | Mapping[str, Any],
    *,
    root: Path | None,
    kind: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    **hub: Any,
) -> Any:
    """The conditioner that a `pipeline.json` names.

    Args:
        spec: official name (``dinov2_vitl14_reg``, ``openai/clip-vit-large-patch14``), a name of `PRETRAINED`,
            another Hub id, or ``{"name", "args", "path"}``: a class of `CONDITIONERS`, its arguments, and its weights
            inside `root` without suffix.
        root: the pipeline's folder; None: it is on the Hub, where only names are possible.
        kind: "image" or "text".
        device: where to.
        dtype: of the weights; None: float32.
        **hub: `revision`, `local_files_only`, `token`.

    Returns:
        Module with `encode`, `forward`, `channels`, `image_size` and `tokens`, in evaluation mode.

    Raises:
        CheckpointError: the class is unknown or of the other kind, the path leaves `root`, or the weights do not fit.
    """
    from trellis.checkpoints import CheckpointError, confined

    if isinstance(spec, str):
        default = next(name for name, (_, of) in CONDITIONERS.items() if of == kind)
        chosen = PRETRAINED.get(spec, default)
        _expect_kind(chosen, kind)
        return _class(chosen).from_pretrained(spec, dtype=dtype, **hub).to(device)
    unknown = sorted(set(spec) - {"name", "args", "path"})
    name, args, path = spec.get("name"), spec.get("args", {}), spec.get("path")
    if unknown:
        raise CheckpointError(f"conditioner: unknown entry {unknown[0]!r}; there are name, args and path")
    if not isinstance(name, str) or name not in CONDITIONERS:
        raise CheckpointError(f"unknown conditioner {name!r}; known are {', '.join(CONDITIONERS)}")
    _expect_kind(name, kind)
    if not isinstance(args, Mapping) or not isinstance(path, str):
        raise CheckpointError(f"conditioner {name}: args must be an object and path a string; got {args!r}, {path!r}")
    inside = confined(path)
    if root is None:
        raise CheckpointError(f"conditioner {name} at {path!r} needs a local pipeline folder: download it first")
    if not (root / inside).parent.resolve().is_relative_to(root.resolve()):
        raise CheckpointError(f"path must be relative and stay inside its folder; got {path!r}, a link out of it")
    return _class(name).load(args, root / inside).to(device=device, dtype=dtype or torch.float32)


def _expect_kind(name: str, kind: str) -> None:
    from trellis.checkpoints import CheckpointError

    if CONDITIONERS[name][1] != kind:
        raise CheckpointError(f"conditioner must take {kind}; got {name}, which takes {CONDITIONERS[name][1]}")


def _class(name: str) -> Any:
    return getattr(importlib.import_module(CONDITIONERS[name][0]), name)
