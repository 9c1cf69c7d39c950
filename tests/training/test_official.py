"""The official configurations at reduced size, from the prepared folder to checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.prepared import CHANNELS, FEATURES, LATENTS, STRUCTURE, prepared_root
from trellis import load_model
from trellis.training.config import TrainingConfig, load_config
from trellis.training.log import read_log
from trellis.training.loop import Options, train

OFFICIAL = json.loads((Path(__file__).parents[1] / "data" / "official_training_configs.json").read_text())
SMALL = {"model_channels": 32, "num_blocks": 1, "num_heads": 2, "cond_channels": 6, "window_size": 4, "resolution": 16}
FLOW = {"text_cond_model": "minilm", "batch_size_per_gpu": 3, "batch_split": 3}
RENDERING = {"lambda_lpips": 0.0}


def reduced(name: str) -> TrainingConfig:
    """The configuration with small models, on the small prepared folder."""
    config = load_config(Path(name).stem).to_json()
    for model in config["models"].values():
        args = model["args"] = dict(model["args"])
        args |= {key: value for key, value in SMALL.items() if key in args}
        if "in_channels" in args and model["name"] == "ElasticSLatEncoder":
            args["in_channels"] = CHANNELS
        if "Mesh" in model["name"]:
            args["model_channels"] = 256
        if "channels" in args:
            args |= {"channels": [4, 8] if args["channels"][0] == 32 else [8, 4], "num_res_blocks": 1}
        if model["name"] == "SparseStructureFlowModel":
            args["resolution"] = 4
        if "io_block_channels" in args:
            args |= {"io_block_channels": [8], "num_io_res_blocks": 1}
        if "num_gaussians" in args.get("representation_config", {}):
            args["representation_config"] = args["representation_config"] | {"num_gaussians": 2}
    dataset, trainer = config["dataset"], config["trainer"]
    ours: dict[str, Any] = {"image_size": 16, "resolution": 16, "model": FEATURES, "latent_model": LATENTS}
    if "StructureLatent" in dataset["name"]:
        ours["latent_model"] = STRUCTURE
    dataset["args"] = {**dataset["args"], **{key: ours[key] for key in ours if key in dataset["args"]}}
    dataset["args"].pop("min_aesthetic_score")
    if "Conditioned" in dataset["name"]:
        dataset["args"]["cond_model"] = FEATURES  # tokens that were kept: nothing is downloaded
    flow = "Flow" in trainer["name"]
    changes = FLOW if flow else {} if "Structure" in trainer["name"] else RENDERING
    batch = {} if flow else {"batch_size_per_gpu": 2}
    if "Mesh" in trainer["name"]:  # a second each
        batch = {"batch_size_per_gpu": 1, "batch_split": 1, "max_steps": 1}
    trainer["args"] = {**trainer["args"], "max_steps": 2, **changes, **batch}
    return TrainingConfig.from_json(config)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_root(tmp_path_factory.mktemp("prepared"))


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_an_official_configuration_trains_at_reduced_size(name: str, root: Path, tmp_path: Path) -> None:
    config = reduced(name)
    run = train(config, [root], tmp_path, Options())
    lines = read_log(tmp_path)
    assert all(line["loss"] > 0 for line in lines)
    assert lines[-1]["grad_norm"] > 0
    for role, model in run.models.items():
        stem = tmp_path / "ckpts" / f"{role}_ema0.9999_step{run.step:07d}"
        assert json.loads(Path(f"{stem}.json").read_text())["args"]["use_fp16"] is True
        loaded = load_model(stem, dtype=torch.float32)
        assert loaded.state_dict().keys() == model.state_dict().keys()
