"""The steps that keep the latents that trained encoders give, and their statistics."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trellis.atomic import atomic_path
from trellis.checkpoints import load_model
from trellis.nn.sparse import SparseTensor
from trellis.preparation.arrays import is_whole, read_arrays, read_voxels, write_arrays
from trellis.preparation.features import features_path

if TYPE_CHECKING:
    from trellis.preparation.job import Job

MOST_OBJECTS = 50_000  # whose latents are looked at, as officially
logger = logging.getLogger(__name__)


def structure_latent_step(job: Job) -> dict[str, Any]:
    """Write ``ss_latents/<model>/<sha>.npz``: ``mean [C, r, r, r]`` float32 of the trained structure encoder.

    Raises:
        ValueError: the settings name no encoder, or voxels are missing or damaged.
        CheckpointError: the encoder cannot be loaded.
    """
    settings = job.settings
    model = _model(settings.structure_encoder, "structure_encoder", "StructureEncoder")
    path = job.root / "ss_latents" / settings.structure_model / f"{job.sha256}.npz"
    if not is_whole(path, "mean"):
        resolution = settings.voxel_resolution
        x, y, z = read_voxels(job.root / "voxels" / f"{job.sha256}.ply", resolution).long().unbind(1)
        grid = torch.zeros(1, 1, *(resolution,) * 3)
        grid[0, 0, x, y, z] = 1
        with torch.inference_mode():
            mean, _ = model(grid)
        write_arrays(path, mean=_finite(mean[0].float().numpy()))
    return {}


def latent_step(job: Job) -> dict[str, Any]:
    """Write ``latents/<feature model>_<encoder>/<sha>.npz``: ``feats [N, C]`` float32 and ``coords [N, 3]`` uint8.

    Raises:
        ValueError: the settings name no encoder, or features are missing or damaged, or do not fit it.
        CheckpointError: the encoder cannot be loaded.
    """
    settings = job.settings
    model = _model(settings.latent_encoder, "latent_encoder", "LatentEncoder")
    path = job.root / "latents" / settings.latent_model / f"{job.sha256}.npz"
    if not is_whole(path, "feats", "coords"):
        source = features_path(job.root, settings.feature_model, job.sha256)
        indices, tokens = read_arrays(source, "indices", "patchtokens")
        if tokens.ndim != 2 or tokens.shape != (len(indices), model.config.in_channels):
            raise ValueError(f"{source} must have {model.config.in_channels} channels; got {list(tokens.shape)}")
        coords = torch.from_numpy(np.pad(indices.astype(np.int32), ((0, 0), (1, 0))))
        feats = torch.from_numpy(tokens.astype(np.float32))
        with torch.inference_mode():
            mean, _ = model(SparseTensor.from_coords(coords, feats, model.config.resolution))
        write_arrays(path, feats=_finite(mean.feats.float().numpy()), coords=indices.astype(np.uint8))
    return {}


def latent_statistics(
    root: Path, latent_model: str, ids: Iterable[str] | None = None, limit: int = MOST_OBJECTS
) -> dict[str, list[float]]:
    """Mean and scale of the structured latents of a prepared folder: the ``normalization`` of a latent flow.

        mean = E[m_i],  std = sqrt(E[s_i] - mean^2),  m_i, s_i: mean and mean square over the voxels of object i

    Args:
        root: the prepared folder.
        latent_model: whose latents.
        ids: sha256 of the objects; None: all that have latents.
        limit: at most so many objects, the first by id.

    Returns:
        ``{"mean": [C], "std": [C]}``.

    Raises:
        ValueError: there are no latents, or a file is damaged.

    Source:
        Official stat_latent.py at 6b0d647.
    """
    folder = root / "latents" / latent_model
    wanted = sorted(path.stem for path in folder.glob("*.npz"))
    if ids is not None:
        chosen = set(ids)
        wanted = [sha for sha in wanted if sha in chosen]
    if not wanted:
        raise ValueError(f"{folder} must have latents; it has none of the objects asked for")
    means, squares = [], []
    for sha in wanted[:limit]:
        feats = read_arrays(folder / f"{sha}.npz", "feats")[0].astype(np.float64)
        means.append(feats.mean(0))
        squares.append(np.square(feats).mean(0))
    mean = np.mean(means, 0)
    return {"mean": mean.tolist(), "std": np.sqrt(np.mean(squares, 0) - np.square(mean)).tolist()}


def main() -> None:
    """Write ``latents/<model>/normalization.json`` of the training objects, and log it."""
    from trellis.preparation.metadata import read_metadata

    parser = argparse.ArgumentParser(prog="python -m trellis.preparation.latents", description=main.__doc__)
    parser.add_argument("data", type=Path, help="prepared folder")
    parser.add_argument("latent_model", help="name of a folder in DATA/latents")
    values = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ids = [sha for sha, row in read_metadata(values.data).items() if row.get("split") != "test"]
    text = json.dumps(latent_statistics(values.data, values.latent_model, ids), indent=4)
    with atomic_path(values.data / "latents" / values.latent_model / "normalization.json") as path:
        path.write_text(text + "\n")
    logger.info(text)


@lru_cache(maxsize=2)
def _model(stem: str, setting: str, kind: str) -> Any:
    """The trained encoder, loaded once per process."""
    if not stem:
        raise ValueError(f"the settings must name a {setting}: the path of a trained one without suffix")
    model = load_model(stem, dtype=torch.float32)
    if type(model).__name__ != kind:
        raise ValueError(f"{setting} must be a {kind}; {stem} is a {type(model).__name__}")
    return model


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("latents must be finite; the encoder gave some that are not")
    return values


if __name__ == "__main__":
    main()
