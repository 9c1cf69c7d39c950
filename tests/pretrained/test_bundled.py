"""The model that ships with the package."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

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


def cabinet(width: int, height: int) -> Image.Image:
    """A brown box with a lighter door, seen from the front, alone on a transparent picture."""
    picture = Image.new("RGBA", (256, 256))
    draw = ImageDraw.Draw(picture)
    box = (128 - width // 2, 128 - height // 2, 128 + width // 2, 128 + height // 2)
    draw.rectangle(box, fill=(120, 70, 35, 255))
    draw.rectangle([value + (12 if index < 2 else -12) for index, value in enumerate(box)], fill=(150, 95, 50, 255))
    return picture


def test_what_is_wide_in_the_picture_is_wide_in_space() -> None:
    pipe = ImageTo3D.from_pretrained(dtype=torch.float32)
    sides = []
    for width, height in ((200, 70), (70, 200)):
        asset = pipe(cabinet(width, height), seed=1, formats=["gaussians"])
        opaque = asset.gaussians.xyz[asset.gaussians.opacities > 0.5]
        low, high = torch.quantile(opaque, 0.05, dim=0), torch.quantile(opaque, 0.95, dim=0)
        sides.append((high - low).tolist())
        red, _, blue = asset.gaussians.colors.mean(0).tolist()
        assert red > blue  # brown
    (wide_x, _, wide_z), (tall_x, _, tall_z) = sides
    assert wide_x > 1.5 * wide_z
    assert tall_z > 1.5 * tall_x


def test_the_evaluation_it_ships_with_is_better_than_the_baselines() -> None:
    found = json.loads((BUNDLED / "evaluation.json").read_text())
    for baseline in ("retrieval", "mean_shape"):
        for metric in ("fscore_0.05", "psnr"):
            assert found["image_to_3d"][metric] > found[baseline][metric]
    assert found["image_to_3d"]["n"] == found["retrieval"]["n"] == found["settings"]["held_out"]


@pytest.mark.skipif(len(descriptions()) < 2, reason="the bundled model has no text pipeline")
def test_a_sentence_becomes_an_asset() -> None:
    pytest.importorskip(minilm.PACKAGE)
    pipe = TextTo3D.from_pretrained(dtype=torch.float32)
    assert len(pipe("a red chair", seed=1, steps=4, formats=["gaussians"]).gaussians) > 50
