"""A small prepared folder in the official layout, complete with latents, conditions and renders of a real object."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from trellis.preparation.job import Job, Settings
from trellis.preparation.metadata import read_metadata, write_metadata
from trellis.preparation.scene import Part, normalised
from trellis.preparation.views import render_cond_step, render_step, voxelize_step

FEATURES, ENCODER, STRUCTURE = "efficientnet_lite0", "slat_enc_tiny", "ss_enc_tiny"
LATENTS = f"{FEATURES}_{ENCODER}"
CHANNELS = 5  # of the features


def box(width: float, depth: float, height: float, color: tuple[float, float, float, float]) -> Part:
    """A closed box with outward faces."""
    corners = torch.tensor([(x, y, z) for x in (0, width) for y in (0, depth) for z in (0, height)]).float()
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [face for a, b, c, d in quads for face in ((a, b, c), (a, c, d))]
    return Part(corners, torch.tensor(faces, dtype=torch.int32), color)


def prepared_root(root: Path, objects: int = 3, resolution: int = 16, size: int = 24) -> Path:
    """Write `objects` boxes: renders, pictures, voxels by the real steps; features, latents, tokens at random.

    The last object is of the test split, all others of the training split.
    """
    settings = Settings(
        views=4,
        resolution=size,
        ssaa=1,
        depth=True,
        cond_views=2,
        cond_resolution=size,
        cond_azimuth=45,
        cond_elevation=(0, 40),
        voxel_resolution=resolution,
        feature_model=FEATURES,
        image_encoder=FEATURES,
        text_encoder="minilm",
        structure_encoder=f"runs/{STRUCTURE}",
        latent_encoder=f"runs/{ENCODER}",
    )
    root.mkdir(parents=True, exist_ok=True)
    settings.save(root)
    rows, rng = [], np.random.default_rng(0)
    for index in range(objects):
        sha = f"{index:064x}"
        color = (0.2 + 0.6 * index / objects, 0.4, 0.8 - 0.6 * index / objects, 1.0)
        row = {
            "sha256": sha,
            "name": f"box {index}",
            "split": "test" if index == objects - 1 and objects > 1 else "train",
            "variant": 0,
            "base": sha,
            "captions": json.dumps([f"box {index}", f"a box, number {index}"]),
            "local_path": f"raw/{index}.obj",
        }
        job = Job(root, sha, row, settings)
        job.__dict__["scene"] = normalised([box(1, 1 + 0.3 * index, 1.5, color)])
        for step in (render_step, render_cond_step, voxelize_step):
            row |= step(job)
        coords = voxels_of(root, sha, resolution)
        count = len(coords)
        arrays = {
            f"features/{FEATURES}": {"indices": coords, "patchtokens": rng.normal(size=(count, CHANNELS))},
            f"latents/{LATENTS}": {"coords": coords, "feats": rng.normal(size=(count, 8)).astype(np.float32)},
            f"ss_latents/{STRUCTURE}": {"mean": rng.normal(size=(8, 4, 4, 4)).astype(np.float32)},
            f"conditions/{FEATURES}": {"tokens": rng.normal(size=(3, 7, 6)).astype(np.float16)},
            "conditions/minilm": {"tokens": rng.normal(size=(2, 7, 6)).astype(np.float16)},
        }
        arrays[f"features/{FEATURES}"]["patchtokens"] = arrays[f"features/{FEATURES}"]["patchtokens"].astype(np.float16)
        for folder, content in arrays.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            np.savez(root / folder / f"{sha}.npz", **content)
        done = ("rendered", "cond_rendered", "voxelized", f"feature_{FEATURES}", f"latent_{LATENTS}")
        rows.append(row | dict.fromkeys((*done, f"ss_latent_{STRUCTURE}", f"condition_{FEATURES}"), True))
    write_metadata(root, rows)
    assert len(read_metadata(root)) == objects
    return root


def voxels_of(root: Path, sha: str, resolution: int) -> np.ndarray:
    """``[N, 3]`` uint8 of an object."""
    from trellis.preparation.arrays import read_voxels

    return read_voxels(root / "voxels" / f"{sha}.ply", resolution).numpy().astype(np.uint8)
