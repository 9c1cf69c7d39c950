import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trellis import load_model, save_model
from trellis.checkpoints import MODELS, CheckpointError, build_model, confined, official_name
from trellis.models.config import Model

DATA = Path(__file__).parents[1] / "data"
CHECKPOINTS: dict[str, Any] = json.loads((DATA / "official_state_dicts.json").read_text())
TRAINING: dict[str, Any] = json.loads((DATA / "official_training_configs.json").read_text())
TINY_DECODER = {
    "out_channels": 1,
    "latent_channels": 2,
    "num_res_blocks": 1,
    "num_res_blocks_middle": 1,
    "channels": [8, 4],
    "use_fp16": True,
}


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Model, Path]:
    model = build_model("SparseStructureDecoder", TINY_DECODER)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -1, 1)
    save_model(model, tmp_path / "ckpts" / "decoder.v1")
    return model, tmp_path / "ckpts" / "decoder.v1"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_keys_shapes_and_dtypes_are_those_of_the_official_checkpoint(name: str) -> None:
    official = CHECKPOINTS[name]
    with torch.device("meta"):
        model = build_model(official["class_in_official_json"], official["args"])
    ours = {key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in model.state_dict().items()}
    assert ours == official["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == official["num_params"]
    assert model.config.to_args() == official["args"]


@pytest.mark.parametrize("name", TRAINING)
def test_official_training_configs_survive_the_round_trip(name: str) -> None:
    for entry in TRAINING[name]["models"].values():
        with torch.device("meta"):
            model = build_model(entry["name"], entry["args"])
        assert {"name": official_name(model), "args": model.config.to_args()} == entry


def test_load_after_save_is_the_identity(tiny: tuple[Model, Path], tmp_path: Path) -> None:
    model, stem = tiny
    loaded = load_model(stem)
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    save_model(loaded, tmp_path / "again")
    assert (tmp_path / "again.json").read_text() == stem.with_name("decoder.v1.json").read_text()
    assert (tmp_path / "again.safetensors").read_bytes() == stem.with_name("decoder.v1.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_sets_the_torso_and_nothing_else(tiny: tuple[Model, Path], dtype: torch.dtype) -> None:
    loaded = load_model(tiny[1], dtype=dtype)
    state = loaded.state_dict()
    assert loaded.torso_dtype == dtype
    assert state["blocks.0.conv1.weight"].dtype == dtype
    assert state["blocks.0.norm1.weight"].dtype == torch.float32
    assert state["out_layer.2.weight"].dtype == torch.float32


def test_elastic_name_is_kept(tmp_path: Path) -> None:
    args = CHECKPOINTS["slat_dec_rf_swin8_B_64l8r16_fp16"]["args"] | {"model_channels": 12, "num_heads": 1}
    save_model(build_model("ElasticSLatRadianceFieldDecoder", args | {"use_checkpoint": True}), tmp_path / "m")
    description = json.loads((tmp_path / "m.json").read_text())
    assert description["name"] == "ElasticSLatRadianceFieldDecoder"
    assert description["args"]["use_checkpoint"] is True
    assert official_name(load_model(tmp_path / "m")) == "ElasticSLatRadianceFieldDecoder"


def _edit_weights(stem: Path, change: Any) -> None:
    path = stem.with_name(stem.name + ".safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path)


def _edit_json(stem: Path, **changes: Any) -> None:
    path = stem.with_name(stem.name + ".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("input_layer.bias"), "input_layer.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is not part of the model"),
        (
            lambda s: s.update({"input_layer.bias": torch.zeros(9)}),
            r"input_layer.bias is of shape \[9\], must be \[8\]",
        ),
        (lambda s: s["input_layer.bias"].fill_(float("nan")), "input_layer.bias has values that are not finite"),
        (lambda s: s.update({"input_layer.bias": torch.zeros(8, dtype=torch.int32)}), "of type I32, must be one of"),
    ],
)
def test_names_the_tensor_that_does_not_fit(tiny: tuple[Model, Path], change: Any, message: str) -> None:
    _edit_weights(tiny[1], change)
    with pytest.raises(CheckpointError, match=message):
        load_model(tiny[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "SparseStructureDcoder"}, "unknown model class 'SparseStructureDcoder'; known are SparseStructureE"),
        ({"args": TINY_DECODER | {"chanels": 3}}, "has no argument 'chanels'; it accepts channels, latent_channels"),
        ({"args": TINY_DECODER | {"latent_channels": "2"}}, "latent_channels must be int; got '2'"),
        ({"args": {"use_fp16": True}}, "missing"),
        ({"args": 3}, "must have a string 'name' and an object 'args'"),
    ],
)
def test_names_what_is_wrong_in_the_json(tiny: tuple[Model, Path], changes: dict[str, Any], message: str) -> None:
    _edit_json(tiny[1], **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(tiny[1])


def test_truncated_weights_are_a_clear_error(tiny: tuple[Model, Path]) -> None:
    path = tiny[1].with_name("decoder.v1.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_model(tiny[1])


def test_missing_model_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model at .*nothing\.json and .*nothing\.safetensors do not exist"):
        load_model(tmp_path / "nothing")


def test_interrupted_save_leaves_the_old_checkpoint(tiny: tuple[Model, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in tiny[1].parent.iterdir()}

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny[0], tiny[1])
    assert {path.name: path.read_bytes() for path in tiny[1].parent.iterdir()} == before


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a\\b", "c:x", ""])
def test_paths_from_files_stay_inside(path: str) -> None:
    with pytest.raises(CheckpointError, match="must be relative and stay inside"):
        confined(path)


def test_every_official_class_is_known() -> None:
    used = {entry["class_in_official_json"] for entry in CHECKPOINTS.values()}
    assert used <= set(MODELS)
