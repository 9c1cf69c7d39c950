import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trellis.checkpoints import CheckpointError
from trellis.conditioning import CONDITIONERS, PRETRAINED, load_conditioner
from trellis.conditioning.image import DinoV2

ARGS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    DinoV2(**ARGS).save(tmp_path / "ckpts" / "encoder.v1")
    return {"name": "DinoV2", "args": ARGS, "path": "ckpts/encoder.v1"}


def test_saved_and_loaded_is_identical(tmp_path: Path, spec: dict[str, Any]) -> None:
    first, second = (load_conditioner(spec, root=tmp_path, kind="image") for _ in range(2))
    second.save(tmp_path / "again")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "ckpts/encoder.v1.safetensors").read_bytes()
    stored = load_file(tmp_path / "again.safetensors")
    assert {"cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma", "norm.bias"} <= set(stored)
    images = torch.rand(1, 3, 28, 28)
    assert torch.equal(first(images), second(images))
    assert (first.image_size, first.channels, first.tokens, first.training) == (28, 32, 9, False)
    assert load_conditioner(spec, root=tmp_path, kind="image", dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "../x"}, r"must be relative and stay inside its folder; got '\.\./x'"),
        ({"path": "/etc/x"}, "must be relative and stay inside"),
        ({"path": "link/x"}, "a link out of it"),
        ({"path": "ckpts/none"}, r"none\.safetensors: cannot be read"),
        ({"path": 7}, "path a string"),
        ({"name": "os.system"}, "unknown conditioner 'os.system'; known are DinoV2, ClipText, Eff"),
        ({"name": ["DinoV2"]}, "unknown conditioner"),
        ({"name": "ClipText"}, "conditioner must take image; got ClipText, which takes text"),
        ({"args": {**ARGS, "depth": 3}}, "DinoV2: .*'depth'"),
        ({"args": {**ARGS, "hidden_size": "32"}}, "DinoV2: hidden_size must be a positive int; got '32'"),
        ({"args": {**ARGS, "num_hidden_layers": 2}}, r"blocks\.1\..* is missing"),
        ({"args": {**ARGS, "hidden_size": 2**20}}, "is of shape"),  # and no memory was asked for
        ({"args": []}, "args must be an object"),
        ({"speed": 1}, "unknown entry 'speed'"),
    ],
)
def test_names_what_is_wrong(tmp_path: Path, spec: dict[str, Any], change: dict[str, Any], message: str) -> None:
    (tmp_path / "link").symlink_to("/")
    with pytest.raises(CheckpointError, match=message):
        load_conditioner(spec | change, root=tmp_path, kind="image")


def test_wrong_weights_are_named(tmp_path: Path, spec: dict[str, Any]) -> None:
    path = tmp_path / "ckpts/encoder.v1.safetensors"
    state = load_file(path)
    save_file({**state, "extra": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="extra is not part of the model"):
        load_conditioner(spec, root=tmp_path, kind="image")


def test_a_path_needs_a_local_folder(spec: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="needs a local pipeline folder"):
        load_conditioner(spec, root=None, kind="image")


def test_official_names_choose_the_class() -> None:
    assert set(CONDITIONERS) == {"DinoV2", "ClipText", "EfficientNetLite0", "MiniLM"}
    with pytest.raises(CheckpointError, match="cannot load CLIPTextModel from none/none"):
        load_conditioner("none/none", root=None, kind="text", local_files_only=True)


def test_names_of_weights_choose_their_class() -> None:
    assert set(PRETRAINED.values()) <= set(CONDITIONERS)
    with pytest.raises(CheckpointError, match="conditioner must take text; got EfficientNetLite0, which takes image"):
        load_conditioner("efficientnet_lite0", root=None, kind="text")


def test_nothing_heavy_is_imported_early() -> None:
    rooms = ("", ".image", ".text", ".minilm", ".efficientnet", ".imaging")
    code = f"import sys, {', '.join(f'trellis.conditioning{room}' for room in rooms)}; "
    code += "assert not {'transformers', 'cv2', 'rembg', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
