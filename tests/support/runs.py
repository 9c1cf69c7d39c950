"""Folders as `trellis train` leaves them, of untrained models small enough for tests, which go through a pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.support.bert import tiny_bert
from tests.support.efficientnet import original_state
from trellis.checkpoints import official_name, save_model
from trellis.conditioning.efficientnet import EfficientNetLite0, folded
from trellis.models.config import Model
from trellis.pretrained.initialise import MODELS, calibrate, seeded
from trellis.training.checkpoint import Names, write_misc, write_model
from trellis.training.config import Named

SMALL = {"model_channels": 32, "num_blocks": 1, "num_heads": 2}
CHANGES: dict[str, dict[str, Any]] = {
    "sparse_structure_flow_model": {**SMALL, "patch_size": 2, "cond_channels": 384},
    "sparse_structure_decoder": {"channels": [16, 16, 8], "num_res_blocks_middle": 0},
    "slat_flow_model": {**SMALL, "num_io_res_blocks": 1, "io_block_channels": [16], "cond_channels": 384},
    "slat_decoder_gs": SMALL,
    "slat_decoder_mesh": {"num_blocks": 1},
}
MEAN, STD = [0.5] * 8, [2.0] * 8


def tiny_bundle(folder: Path) -> Path:
    """A folder of both pipelines, whose conditioners are an EfficientNet with random weights and a tiny BERT."""
    models = tiny_models()
    for role, model in models.items():
        save_model(model, folder / "ckpts" / role)
    tiny_bert(folder / "words")
    network = EfficientNetLite0()
    network.load_state_dict(folded(original_state()))
    network.save(folder / "ckpts" / "image")
    sampler = {"name": "FlowEulerSampler", "args": {"sigma_min": 1e-5}, "params": {"steps": 1, "cfg_strength": 0.0}}
    args = {
        "models": {role: f"ckpts/{role}" for role in models},
        "sparse_structure_sampler": sampler,
        "slat_sampler": sampler,
        "slat_normalization": {"mean": [0.0] * 8, "std": [1.0] * 8},
    }
    image = {"name": "EfficientNetLite0", "args": network.args, "path": "ckpts/image"}
    text = {"name": "MiniLM", "args": {}, "path": "words"}
    for file, name, conditioner in (
        ("pipeline.json", "TrellisImageTo3DPipeline", {"image_cond_model": image}),
        ("text_pipeline.json", "TrellisTextTo3DPipeline", {"text_cond_model": text}),
    ):
        (folder / file).write_text(json.dumps({"name": name, "args": {**args, **conditioner}}))
    return folder


def write_run(
    run: Path, models: Mapping[str, Model], *, dataset: dict[str, Any] | None = None, step: int = 20, rate: float = 0.9
) -> Path:
    """A run with one checkpoint, whose averaged weights are those of `models` and whose others are half of them."""
    described = {role: Named(official_name(model), model.config.to_args()) for role, model in models.items()}
    config = {
        "models": {role: named.to_json() for role, named in described.items()},
        "dataset": {"name": "Toys", "args": dataset or {}},
        "trainer": {"name": "ToyTrainer", "args": {"max_steps": step, "batch_size": 1, "ema_rate": [rate]}},
    }
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(config))
    (run / "log.txt").write_text("".join(json.dumps({"step": i, "seconds": 36.0}) + "\n" for i in range(step)))
    names = Names(run, step)
    for role, model in models.items():
        state = model.state_dict()
        write_model(names.model(role, rate), described[role].to_json(), state)
        write_model(names.model(role), described[role].to_json(), {key: value / 2 for key, value in state.items()})
    write_misc(names, {"x": torch.zeros(1)}, {"step": step})
    return run


def tiny_models() -> dict[str, Model]:
    """Role in a pipeline -> model; a structure of 32^3 voxels of which a few percent are occupied."""
    generator = torch.Generator().manual_seed(7)
    models = {role: seeded(MODELS[role][1], MODELS[role][2] | change, generator) for role, change in CHANGES.items()}
    calibrate(models["sparse_structure_flow_model"], models["sparse_structure_decoder"], generator)
    return models


def tiny_runs(folder: Path, models: Mapping[str, Model] | None = None) -> list[Path]:
    """Runs of a structure VAE, both flows and two decoders."""
    models = models or tiny_models()
    normal = {"normalization": {"mean": MEAN, "std": STD}}
    encoder = {"in_channels": 1, "latent_channels": 8, "num_res_blocks": 1, "channels": [8, 16, 16], "use_fp16": False}
    vae = {
        "encoder": seeded("SparseStructureEncoder", encoder, torch.Generator().manual_seed(1)),
        "decoder": models["sparse_structure_decoder"],
    }
    return [
        write_run(folder / "structure_vae", vae),
        write_run(folder / "structure_flow", {"denoiser": models["sparse_structure_flow_model"]}),
        write_run(folder / "latent_flow", {"denoiser": models["slat_flow_model"]}, dataset=normal),
        write_run(folder / "gaussians", {"decoder": models["slat_decoder_gs"]}),
        write_run(folder / "mesh", {"decoder": models["slat_decoder_mesh"]}),
    ]
