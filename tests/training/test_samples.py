import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.prepared import prepared_root
from tests.training.test_official import reduced
from tests.training.tiny import Balls, Reconstruction, vae_config
from trellis.training.config import TrainingConfig
from trellis.training.loop import Options, train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_root(tmp_path_factory.mktemp("prepared"))


def sheet(run: Path, step: int = 1) -> np.ndarray:
    return np.asarray(Image.open(run / "samples" / f"step{step:07d}.png")).astype(float)


def with_args(config: TrainingConfig, dataset: dict, **trainer: object) -> TrainingConfig:
    json = config.to_json()
    json["dataset"]["args"] = {**json["dataset"]["args"], **dataset}
    json["trainer"]["args"] = {**json["trainer"]["args"], **trainer}
    return TrainingConfig.from_json(json)


def test_reconstructions_of_a_structure_vae_come_to_look_like_the_objects(tmp_path: Path) -> None:
    config = vae_config(max_steps=60, i_sample=60, i_save=100)
    train(config, [], tmp_path, dataset=Balls(), objective=Reconstruction())
    picture = sheet(tmp_path, 60)
    assert picture.shape == (512, 1024, 3)
    truth, made = picture[:256], picture[256:]
    assert truth.std() > 10
    assert np.abs(truth - made).mean() < 0.2 * truth.mean()


@pytest.mark.parametrize("name", ["vae/slat_vae_enc_dec_gs_swin8_B_64l8_fp16", "vae/slat_vae_dec_rf_swin8_B_64l8_fp16"])
def test_decoders_are_shown_beside_the_pictures(name: str, root: Path, tmp_path: Path) -> None:
    train(with_args(reduced(name), {}, max_steps=1, i_sample=1), [root], tmp_path)
    assert sheet(tmp_path).shape == (32, 48, 3)


def test_flows_are_shown_through_the_decoder_of_their_latents(root: Path, tmp_path: Path) -> None:
    vae = reduced("vae/ss_vae_conv3d_16l8_fp16").to_json()
    for model in vae["models"].values():  # 16 -> 4, the side of the latents of the small folder
        model["args"]["channels"] = [4, 8, 8] if model["args"]["channels"][0] == 4 else [8, 8, 4]
    train(with_args(TrainingConfig.from_json(vae), {}, max_steps=1), [root], tmp_path / "vae")
    decoder = {"pretrained_ss_dec": str(tmp_path / "vae/ckpts/decoder_step0000001")}
    flow = with_args(reduced("generation/ss_flow_img_dit_L_16l8_fp16"), decoder, max_steps=1, i_sample=1)
    train(flow, [root], tmp_path / "flow")
    assert sheet(tmp_path / "flow").shape == (512, 768, 3)

    gaussians = with_args(reduced("vae/slat_vae_enc_dec_gs_swin8_B_64l8_fp16"), {}, max_steps=1)
    train(gaussians, [root], tmp_path / "gs")
    decoder = {"pretrained_slat_dec": str(tmp_path / "gs/ckpts/decoder_step0000001")}
    latent = with_args(reduced("generation/slat_flow_img_dit_L_64l8p2_fp16"), decoder, max_steps=1, i_sample=1)
    train(latent, [root], tmp_path / "latent")
    assert sheet(tmp_path / "latent").shape == (512, 768, 3)


def test_without_a_decoder_latents_are_not_shown_and_it_is_said(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flow = with_args(reduced("generation/ss_flow_img_dit_L_16l8_fp16"), {"pretrained_ss_dec": None}, i_sample=1)
    with caplog.at_level(logging.WARNING):
        train(flow, [root], tmp_path)
    assert caplog.text.count("samples are not shown: dataset.args has no pretrained_ss_dec") == 1
    assert not (tmp_path / "samples").exists()


def test_curves_and_pictures_go_to_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = vae_config(max_steps=4, i_log=2, i_sample=4)
    train(config, [], tmp_path, Options(tensorboard=True), dataset=Balls(), objective=Reconstruction())
    events = accumulator.EventAccumulator(str(tmp_path / "tb_logs")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4]
    assert {"bce", "kl", "grad_norm", "lr", "seconds", "samples_per_second", "memory_gib"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Tags()["images"] == ["samples"]
