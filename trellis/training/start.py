"""Where a run's weights start: fresh, from another run, or from a published model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trellis.checkpoints import CheckpointError, load_model
from trellis.models.config import Model
from trellis.training import checkpoint
from trellis.training.config import ConfigError


def starting_stems(roles: Mapping[str, object], load: str | None, finetune: Mapping[str, str] | None) -> dict[str, str]:
    """Role -> stem of the weights to start from, for the roles that do not start fresh.

    Args:
        roles: of the configuration.
        load: ``--load``: a run's folder (its newest checkpoint), ``role=stem`` parts divided by commas, or one stem
            if there is one role. It has precedence.
        finetune: ``finetune_ckpt`` of the configuration.

    Raises:
        ConfigError: a role is unknown, or one stem is given for several.
        CheckpointError: the folder has no checkpoint.
    """
    stems = dict(finetune or {})
    if load is not None:
        folder = Path(load)
        if folder.is_dir():
            steps = checkpoint.saved_steps(folder)
            if not steps:
                raise CheckpointError(f"{folder} has no complete checkpoint (ckpts/misc_stepNNNNNNN.json)")
            names = checkpoint.Names(folder, steps[-1])
            stems |= {role: str(names.model(role)) for role in roles if _exists(names.model(role))}
        elif "=" in load:
            stems |= dict(part.split("=", 1) for part in load.split(",") if "=" in part)
        elif len(roles) == 1:
            stems = {next(iter(roles)): load}
        else:
            raise ConfigError(f"--load of {', '.join(roles)} must be a run's folder or role=stem,...; got {load!r}")
    unknown = sorted(set(stems) - set(roles))
    if unknown:
        raise ConfigError(f"no model has the role {unknown[0]!r}; there are {', '.join(roles)}")
    return stems


def start_from(model: Model, stem: str) -> None:
    """Give a float32 model the weights at `stem` (local, or on the Hub), which must have its keys and shapes.

    Raises:
        CheckpointError: they do not fit; the first that does not is named.
    """
    loaded = load_model(stem, dtype=model.torso_dtype).state_dict()
    own = model.state_dict()
    for key in [*own, *loaded]:
        ours, theirs = own.get(key), loaded.get(key)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = [None if tensor is None else list(tensor.shape) for tensor in (theirs, ours)]
            raise CheckpointError(f"{stem} does not fit: {key} has shape {shapes[0]}, must have {shapes[1]}")
    model.load_state_dict(loaded)


def _exists(stem: Path) -> bool:
    return stem.with_name(f"{stem.name}.safetensors").is_file()
