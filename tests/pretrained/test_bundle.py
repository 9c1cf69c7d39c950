import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.pipelines.test_image_to_3d import picture
from tests.support.bert import tiny_bert
from tests.support.efficientnet import original_state
from tests.support.runs import MEAN, STD, tiny_models, tiny_runs, write_run
from trellis import ImageTo3D, TextTo3D
from trellis.checkpoints import CheckpointError
from trellis.conditioning import efficientnet, minilm
from trellis.models.config import Model
from trellis.pipelines.settings import SamplerParams
from trellis.pretrained import bundle as module
from trellis.pretrained.bundle import Options, bundle, find_models

OPTIONS = Options(structure=SamplerParams(steps=3, guidance=2.0), latent=SamplerParams(steps=2, guidance=0.0))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The packages with the encoders' weights are not asked for: small or random ones stand in."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.save(original_state(), folder / "image.pth")
    tiny_bert(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficientnet, "_package_file", lambda: folder / "image.pth")
        patch.setattr(minilm, "_package_folder", lambda: folder / "text")
        yield


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return tiny_models()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: Mapping[str, Model]) -> list[Path]:
    return tiny_runs(tmp_path_factory.mktemp("runs"), models)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, runs: list[Path], encoders: None) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "nano"
    size = bundle(runs, path, replace(OPTIONS, notice="A test."))
    assert size == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path


def test_a_picture_becomes_an_asset(folder: Path) -> None:
    pipe = ImageTo3D.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert pipe.formats == ("gaussians", "mesh")
    assert pipe.notice == "A test."
    assert (pipe.conditioner.tokens, pipe.settings.structure.steps, pipe.settings.latent.steps) == (49, 3, 2)
    steps: list[tuple[str, int]] = []
    asset = pipe(picture(), seed=1, callback=lambda progress: steps.append((progress.stage, progress.step)))
    assert [step for step in steps if "flow" in step[0]] == [
        *(("structure_flow", i) for i in range(3)),
        *(("latent_flow", i) for i in range(2)),
    ]
    assert asset.slat.grid.resolution == 32
    assert 100 < len(asset.slat.coords) < 5000
    assert len(asset.gaussians) > 0
    assert len(asset.mesh.faces) > 0


def test_a_sentence_becomes_an_asset(folder: Path, encoders: None) -> None:
    pipe = TextTo3D.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    first, second = pipe(["a red chair", "table"], seed=1, formats=["gaussians"])
    assert first.meta["prompt"] == "a red chair"
    assert len(first.gaussians) > 0
    assert first.slat.feats.shape != second.slat.feats.shape or not torch.equal(first.slat.feats, second.slat.feats)


def test_weights_are_the_averaged_ones_in_half_precision(folder: Path, models: Mapping[str, Model]) -> None:
    description = json.loads((folder / "pipeline.json").read_text())["args"]
    assert set(description["models"]) == set(models)
    for role, model in models.items():
        stored, state = load_file(folder / f"{description['models'][role]}.safetensors"), model.state_dict()
        assert set(stored) == set(state)
        assert torch.float16 in {value.dtype for value in stored.values()}
        for key, value in stored.items():
            torch.testing.assert_close(value.float(), state[key], rtol=1e-3, atol=1e-4)
    assert description["slat_normalization"] == {"mean": MEAN, "std": STD}
    text = json.loads((folder / "text_pipeline.json").read_text())["args"]
    assert text["models"] == description["models"]
    assert text["text_cond_model"] == "minilm"
    assert description["image_cond_model"]["path"] == "ckpts/image_encoder_nano"


def test_the_weights_themselves_on_demand(runs: list[Path]) -> None:
    found = find_models(runs, 0)
    assert found["slat_flow_model"].stem.name == "denoiser_step0000020"
    assert find_models(runs)["slat_flow_model"].stem.name == "denoiser_ema0.9_step0000020"
    with pytest.raises(CheckpointError, match=r"no weights were averaged with the rate 0\.5; there are \[0\.9\]"):
        find_models(runs, 0.5)


def test_a_step_can_be_chosen(runs: list[Path], models: Mapping[str, Model], tmp_path: Path) -> None:
    gaussians = {"decoder": models["slat_decoder_gs"]}
    for step in (10, 30):
        write_run(tmp_path / "run", gaussians, step=step)
    others = [run for run in runs if run.name != "gaussians"]
    assert find_models([*others, tmp_path / "run"])["slat_decoder_gs"].step == 30
    assert find_models([*others, f"{tmp_path}/run@10"])["slat_decoder_gs"].step == 10
    assert "ema" not in find_models([*others, f"{tmp_path}/run@10:0"])["slat_decoder_gs"].stem.name
    averaged = find_models([*others, f"{tmp_path}/run@10:0.9"], ema=0)
    assert averaged["slat_decoder_gs"].stem.name == "decoder_ema0.9_step0000010"
    assert averaged["slat_flow_model"].stem.name == "denoiser_step0000020"
    with pytest.raises(CheckpointError, match="has no complete checkpoint of step 20"):
        find_models([*others, f"{tmp_path}/run@20"])


def test_it_says_what_it_is_and_whose_work_is_in_it(runs: list[Path], encoders: None, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = ["sha256,name,creator,license,split,voxelized"]
    rows += ["a,chair,Ann,CC-BY,train,True", "b,table,Ann,CC-BY,train,True", "f,door,Ann,CC-BY,train,"]
    rows += ["c,sofa,Bob,CC0,train,True", "d,lamp,Eve,CC-BY,test,True", "e,chair,Ann,CC-BY,train,1"]
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "about.md").write_text("It cannot draw hands.")
    scores = {"image_to_3d": {"iou": 0.25, "psnr": 20.0}, "objects": 65}
    (tmp_path / "evaluation.json").write_text(json.dumps(scores))
    options = replace(OPTIONS, data=tmp_path / "data", about=tmp_path / "about.md")
    bundle(runs, tmp_path / "nano", replace(options, evaluation=tmp_path / "evaluation.json"))
    card = (tmp_path / "nano" / "README.md").read_text()
    assert "It cannot draw hands." in card
    assert "| image_to_3d | 0.250 | 20.000 |" in card
    assert "| `slat_decoder_gs` | SLatGaussianDecoder | " in card
    assert "| ToyTrainer | Toys | 20 | 0.20 |" in card
    assert json.loads((tmp_path / "nano" / "evaluation.json").read_text()) == scores
    text = (tmp_path / "nano" / "ATTRIBUTION.md").read_text()
    assert "### CC-BY\n\n- Ann: chair, table\n" in text
    assert "### CC0\n\n- Bob: sofa\n" in text
    assert "lamp" not in text
    assert "Apache License" in text
    assert "Apache License" in (tmp_path / "nano" / "LICENSE-Apache-2.0.txt").read_text()


def test_it_is_written_whole_or_not_at_all(runs: list[Path], encoders: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bytes and may have 100000; its largest files: \w+.safetensors \d+\.\d MB"):
        bundle(runs, tmp_path / "nano", replace(OPTIONS, limit=100_000))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "nano").mkdir()
    bundle(runs, tmp_path / "nano", replace(OPTIONS, text_encoder=""))
    assert not (tmp_path / "nano" / "text_pipeline.json").exists()
    with pytest.raises(CheckpointError, match="name must be 'TrellisTextTo3DPipeline'"):
        TextTo3D.from_pretrained(tmp_path / "nano")
    with pytest.raises(CheckpointError, match="nowhere is no run of trellis train"):
        bundle([tmp_path / "nowhere"], tmp_path / "nano", OPTIONS)
    assert (tmp_path / "nano" / "pipeline.json").exists()
    bundle(runs, tmp_path / "nano", OPTIONS)
    assert (tmp_path / "nano" / "text_pipeline.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").touch()
    with pytest.raises(FileExistsError, match="is no bundle"):
        bundle(runs, tmp_path / "mine", OPTIONS)


def test_parts_that_do_not_fit_are_named(
    runs: list[Path],
    models: Mapping[str, Model],
    encoders: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(CheckpointError, match="no run has a slat_flow_model; found are"):
        find_models([run for run in runs if run.name != "latent_flow"])
    with pytest.raises(CheckpointError, match=r"slat_decoder_mesh is in two runs: .*mesh and .*mesh"):
        find_models([*runs, runs[-1]])
    helped = write_run(tmp_path / "helped", {"decoder": models["slat_decoder_mesh"]})
    config = json.loads((helped / "config.json").read_text())
    config["trainer"]["args"]["frozen"] = ["decoder"]  # it only helped to train another
    (helped / "config.json").write_text(json.dumps(config))
    assert find_models([*runs, helped]) == find_models(runs)
    flow = {"denoiser": models["slat_flow_model"]}
    others = [run for run in runs if run.name != "latent_flow"]
    write_run(tmp_path / "silent", flow)
    with pytest.raises(CheckpointError, match="must have a normalization"):
        bundle([*others, tmp_path / "silent"], tmp_path / "nano", OPTIONS)
    write_run(tmp_path / "short", flow, dataset={"normalization": {"mean": [0.0] * 4, "std": [1.0] * 4}})
    with pytest.raises(CheckpointError, match="normalization is for 4 channels; the latent flow makes 8"):
        bundle([*others, tmp_path / "short"], tmp_path / "nano", OPTIONS)
    monkeypatch.setattr(efficientnet.EfficientNetLite0, "channels", 304)
    with pytest.raises(CheckpointError, match=r"image encoder gives 304 channels; sparse_\w+_flow_model takes 384"):
        bundle(runs, tmp_path / "nano", OPTIONS)
    assert not (tmp_path / "nano").exists()


def test_the_command_line(runs: list[Path], encoders: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["bundle", *map(str, runs), "-o", str(tmp_path / "nano"), "--latent-steps", "8", "--text-encoder", ""]
    arguments += ["--structure-interval", "0.2", "1", "--latent-guidance", "1.5", "--structure-temperature", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    args = json.loads((tmp_path / "nano" / "pipeline.json").read_text())["args"]
    assert args["slat_sampler"]["params"] == {
        "steps": 8,
        "cfg_strength": 1.5,
        "cfg_interval": [0.0, 1.0],
        "rescale_t": 1.0,
    }  # as the official code takes them
    assert args["sparse_structure_sampler"]["params"]["temperature"] == 0
    assert args["sparse_structure_sampler"]["params"]["steps"] == 12
    assert args["sparse_structure_sampler"]["params"]["cfg_interval"] == [0.2, 1.0]
    assert np.isclose(args["sparse_structure_sampler"]["args"]["sigma_min"], 1e-5)
