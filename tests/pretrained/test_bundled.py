"""The model that ships with the package."""

import json
from pathlib import Path

import pytest
import torch

from trellis import ImageTo3D, TextTo3D
from trellis.conditioning import minilm
from trellis.pipelines.store import BUNDLED, TEXT_FILE

PHOTO = Path(__file__).parents[2] / "examples" / "coffee.png"


def descriptions() -> list[dict[str, object]]:
    files = [BUNDLED / "pipeline.json", BUNDLED / TEXT_FILE]
    return [json.loads(path.read_text())["args"] for path in files if path.is_file()]


def test_it_is_small_and_official_in_form() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) <= 25e6
    for args in descriptions():
        for path in args["models"].values():
            assert set(json.loads((BUNDLED / f"{path}.json").read_text())) == {"name", "args"}


def test_a_photo_becomes_an_asset() -> None:
    pipe = ImageTo3D.from_pretrained(dtype=torch.float32)
    asset = pipe(PHOTO, seed=1, steps=2, formats=["gaussians"])
    assert len(asset.slat.coords) > 50
    assert torch.isfinite(asset.gaussians.xyz).all()


@pytest.mark.skipif(len(descriptions()) < 2, reason="the bundled model has no text pipeline")
def test_a_sentence_becomes_an_asset() -> None:
    pytest.importorskip(minilm.PACKAGE)
    pipe = TextTo3D.from_pretrained(dtype=torch.float32)
    assert len(pipe("a red chair", seed=1, steps=4, formats=["gaussians"]).gaussians) > 50
