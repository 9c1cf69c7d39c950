import json
from pathlib import Path

import pytest
import torch

from trellis.checkpoints import build_model
from trellis.data import build_dataset
from trellis.preparation.metadata import write_metadata
from trellis.training.config import ConfigError, LoopConfig, Named, TrainingConfig, load_config, shipped_configs
from trellis.training.objectives import build_objective, objective_arguments
from trellis.training.optim import learning_rate_factor

OFFICIAL = json.loads((Path(__file__).parents[1] / "data" / "official_training_configs.json").read_text())
OBJECTIVE = {
    *("p_uncond", "t_schedule", "sigma_min", "loss_type", "lambda_kl", "lambda_ssim", "lambda_lpips"),
    *("lambda_tsdf", "lambda_depth", "lambda_color", "depth_loss_type", "regularizations"),
}


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_official_configurations_are_shipped_accepted_and_written_back(name: str) -> None:
    config = load_config(Path(name).stem)
    assert config.to_json() == OFFICIAL[name] == load_config(shipped_configs()[Path(name).stem]).to_json()
    loop, rest = LoopConfig.of(config.trainer.args, OBJECTIVE)
    assert loop.max_steps == 1_000_000
    assert loop.optimizer == Named("AdamW", {"lr": 1e-4, "weight_decay": 0.0})
    assert loop.per_process(8) == config.trainer.args["batch_size_per_gpu"]
    assert set(rest) <= OBJECTIVE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "models must be"),
        ({"extra": 1}, "has no key 'extra'; known are models, dataset, trainer"),
        ({"dataset": {"name": "SLat", "arguments": {}}}, "dataset has no key 'arguments'; known are name, args"),
        ({"trainer": {"args": {}}}, "trainer must have a string 'name'"),
        ({"models": {"denoiser": {"name": 3}}}, "models.denoiser must have"),
    ],
)
def test_malformed_configurations_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("{", "\\{")):
        TrainingConfig.from_json(OFFICIAL["vae/ss_vae_conv3d_16l8_fp16.json"] | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_siez": 1}, "trainer.args has no 'batch_siez'; known are batch_size, .*loss_type"),
        ({"batch_size": 8}, "one of batch_size and batch_size_per_gpu"),
        ({"batch_split": 0}, "batch_split must be a positive integer; got 0"),
        ({"optimizer": {"name": "Lion", "args": {}}}, "optimizer must be one of AdamW, Adam, SGD; got 'Lion'"),
        ({"lr_scheduler": {"name": "step", "args": {}}}, "lr_scheduler must be one of"),
        ({"ema_rate": [1.5]}, "ema_rate must be in"),
        ({"fp16_mode": "yes"}, "fp16_mode must be one of"),
        ({"max_steps": None}, "max_steps is missing"),
    ],
)
def test_unknown_or_impossible_trainer_arguments_are_refused(change: dict, message: str) -> None:
    args = OFFICIAL["vae/ss_vae_conv3d_16l8_fp16.json"]["trainer"]["args"] | change
    with pytest.raises(ConfigError, match=message):
        LoopConfig.of(args, OBJECTIVE)


def test_an_unknown_name_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a file nor one of .*ss_vae_nano"):
        load_config("nothing")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        load_config(tmp_path / "bad.json")


def test_model_arguments_are_strict_too() -> None:
    with pytest.raises(ValueError, match="has no argument 'widht'"):
        build_model("SparseStructureEncoder", {"widht": 3})


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.endswith("_nano")])
def test_what_the_small_configurations_say_is_understood(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    loop, rest = LoopConfig.of(config.trainer.args, objective_arguments(config.trainer.name))
    build_objective(config.trainer.name, rest)
    learning_rate_factor(loop.lr_scheduler, 0, loop.max_steps)
    assert set(loop.frozen) <= set(config.models)
    with torch.device("meta"):
        for model in config.models.values():
            build_model(model.name, model.args)
    write_metadata(tmp_path, [{"sha256": "0" * 64}])
    with pytest.raises(ValueError, match="no object"):  # but no unknown argument
        build_dataset(config.dataset.name, config.dataset.args, [tmp_path])
