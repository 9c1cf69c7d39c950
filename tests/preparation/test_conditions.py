import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tests.support.bert import tiny_bert
from tests.support.efficientnet import original_state
from trellis.conditioning.efficientnet import EfficientNetLite0, folded
from trellis.conditioning.minilm import MiniLM
from trellis.preparation import conditions
from trellis.preparation.conditions import captions_of, condition_step, tokens_path
from trellis.preparation.job import Job, Settings
from trellis.preparation.pictures import framed

SHA = "0123456789abcdef" * 4
SETTINGS = {"image_encoder": "efficientnet_lite0", "text_encoder": "minilm", "augmentations": 2}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    small = EfficientNetLite0(image_size=64)
    small.load_state_dict(folded(original_state()))
    return {"image": small, "text": MiniLM.from_pretrained(tiny_bert(tmp_path_factory.mktemp("bert")))}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, encoders: dict[str, Any]) -> list[str]:
    """The encoders are small ones; the names under which they are asked for are noted."""
    asked: list[str] = []

    def encoder(name: str, kind: str) -> Any:
        asked.append(name)
        return encoders[kind]

    monkeypatch.setattr(conditions, "encoder", encoder)
    return asked


def job(root: Path, sha: str = SHA, captions: list[str] | None = None, **settings: Any) -> Job:
    row = {"captions": float("nan") if captions is None else json.dumps(captions)}
    return Job(root, sha, row, Settings(**SETTINGS | settings))


def draw(root: Path, count: int = 3, sha: str = SHA) -> list[Image.Image]:
    folder = root / "renders_cond" / sha
    folder.mkdir(parents=True)
    (folder / "transforms.json").write_text("{}")
    pictures = []
    for index in range(count):
        picture = Image.new("RGBA", (100, 100))
        ImageDraw.Draw(picture).rectangle((20, 30, 50 + 10 * index, 60), (200, 40 * index, 50, 255))
        picture.save(folder / f"{index:03}.png")
        pictures.append(picture)
    return pictures


def tokens(root: Path, name: str, sha: str = SHA) -> np.ndarray:
    with np.load(tokens_path(root, name, sha)) as file:
        assert file.files == ["tokens"]
        return file["tokens"]


def test_each_picture_comes_first_and_then_its_copies(
    tmp_path: Path, loads: list[str], encoders: dict[str, Any]
) -> None:
    pictures = draw(tmp_path)
    columns = condition_step(job(tmp_path, captions=["a red chair", "table", " "]))
    assert columns == {"condition_efficientnet_lite0": True, "condition_minilm": True}
    kept = tokens(tmp_path, "efficientnet_lite0")
    assert (kept.shape, kept.dtype) == ((9, 4, 384), np.float16)
    assert np.isfinite(kept).all()
    for index, picture in enumerate(pictures):
        image = torch.from_numpy(framed(picture, 64)[..., :3].copy()).permute(2, 0, 1)[None]
        expected = encoders["image"](image)[0]
        torch.testing.assert_close(torch.from_numpy(kept[3 * index]).float(), expected, atol=5e-3, rtol=5e-3)
        assert not np.array_equal(kept[3 * index], kept[3 * index + 1])
        assert not np.array_equal(kept[3 * index + 2], kept[3 * index + 1])
    words = torch.from_numpy(tokens(tmp_path, "minilm")).float()
    assert words.shape == (2, 49, 384)
    torch.testing.assert_close(words, encoders["text"].encode(["a red chair", "table"]), atol=5e-3, rtol=5e-3)


def test_what_is_there_is_not_made_again(tmp_path: Path, loads: list[str]) -> None:
    draw(tmp_path)
    condition_step(job(tmp_path, captions=["a"]))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "conditions").rglob("*.npz")}
    assert len(before) == 2
    loads.clear()
    assert condition_step(job(tmp_path, captions=["a"]))["condition_minilm"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert loads == []


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not whole"])
def test_damaged_files_and_other_counts_are_made_again(tmp_path: Path, loads: list[str], damage: bytes) -> None:
    draw(tmp_path)
    condition_step(job(tmp_path))
    first = tokens(tmp_path, "efficientnet_lite0")
    tokens_path(tmp_path, "efficientnet_lite0", SHA).write_bytes(damage)
    condition_step(job(tmp_path))
    np.testing.assert_array_equal(tokens(tmp_path, "efficientnet_lite0"), first)
    condition_step(job(tmp_path, augmentations=0))
    assert len(tokens(tmp_path, "efficientnet_lite0")) == 3


def test_copies_depend_on_object_and_seed(tmp_path: Path, loads: list[str]) -> None:
    other = "f" * 64
    draw(tmp_path, 1)
    draw(tmp_path, 1, other)
    for sha in (SHA, other):
        condition_step(job(tmp_path, sha))
    first, second = (tokens(tmp_path, "efficientnet_lite0", sha) for sha in (SHA, other))
    np.testing.assert_array_equal(first[0], second[0])
    assert not np.array_equal(first[1], second[1])
    tokens_path(tmp_path, "efficientnet_lite0", SHA).unlink()
    condition_step(job(tmp_path, seed=1))
    assert not np.array_equal(tokens(tmp_path, "efficientnet_lite0")[1], first[1])


def test_without_captions_there_are_no_tokens_of_them(tmp_path: Path, loads: list[str]) -> None:
    draw(tmp_path, 1)
    assert condition_step(job(tmp_path))["condition_minilm"] is False
    assert not tokens_path(tmp_path, "minilm", SHA).exists()
    assert condition_step(job(tmp_path, text_encoder="")) == {"condition_efficientnet_lite0": True}


def test_what_is_wrong_is_named(tmp_path: Path, loads: list[str]) -> None:
    with pytest.raises(ValueError, match="has no conditioning pictures: run the step render_cond first"):
        condition_step(job(tmp_path))
    draw(tmp_path)
    (tmp_path / "renders_cond" / SHA / "001.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"001\.png cannot be read"):
        condition_step(job(tmp_path))
    assert not (tmp_path / "conditions").exists()
    with pytest.raises(ValueError, match="captions must be a JSON list of strings"):
        captions_of({"captions": '{"a": 1}'})
    assert tokens_path(tmp_path, "openai/clip", SHA).parent.name == "openai_clip"


def test_encoders_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(conditions, "load_conditioner", lambda name, **_: loaded.append(name) or object())
    assert conditions.encoder("x", "image") is conditions.encoder("x", "image")
    assert loaded == ["x"]
    conditions.encoder.cache_clear()
