import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, __version__

from tests.support.golden import golden
from trellis.conditioning import background
from trellis.conditioning.imaging import load_image, prepare_image, preprocess


def test_agrees_with_the_official_preprocessing_to_the_pixel() -> None:
    item = golden("preprocess_image")
    result = np.asarray(preprocess(item["in.rgba"].numpy()))
    difference = np.abs(result[::7, ::7].astype(int) - item["out.rgb518_stride7"].numpy().astype(int)).max()
    same_pillow = __version__ == item.info["pillow"]
    assert difference <= (0 if same_pillow else 1)
    np.testing.assert_allclose(result.reshape(-1, 3).mean(0), item.info["mean"], atol=1e-9 if same_pillow else 1)


def cup() -> np.ndarray:
    """A red disc with a white reflection on a noisy blue background."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:120, :160]
    image = np.full((120, 160, 3), (40, 60, 160)) + generator.integers(-20, 20, (120, 160, 3))
    image[(y - 60) ** 2 + (x - 70) ** 2 < 40**2] = (200, 30, 20)
    image[(y - 60) ** 2 + (x - 70) ** 2 < 5**2] = (250, 250, 250)
    return np.clip(image, 0, 255).astype(np.uint8)


def test_grabcut_finds_the_object_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cutout, method = background.remove_background(Image.fromarray(cup()))
    assert method == "grabcut"
    assert "GrabCut" in caplog.text
    y, x = np.mgrid[:120, :160]
    truth = (y - 60) ** 2 + (x - 70) ** 2 < 40**2
    found = np.asarray(cutout)[..., 3] > 204
    assert (found & truth).sum() / (found | truth).sum() > 0.95
    assert found[60, 70], "the reflection is a hole"


def test_grabcut_is_repeatable() -> None:
    first, second = (np.asarray(prepare_image(Image.fromarray(cup()))[0]) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_alpha_channel_is_used_if_it_tells_something() -> None:
    rgba = np.concatenate([cup(), np.full((120, 160, 1), 255, np.uint8)], axis=2)
    assert prepare_image(Image.fromarray(rgba))[1] == "grabcut"
    rgba[:20, ..., 3] = 0
    assert prepare_image(Image.fromarray(rgba))[1] == "alpha"


def test_rembg_is_used_when_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    cutout = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    cutout.paste((255, 0, 0, 255), (16, 16, 48, 48))
    monkeypatch.setattr(background, "rembg_is_ready", lambda: True)
    monkeypatch.setattr(background, "_rembg", lambda image: cutout)
    assert background.remove_background(Image.new("RGB", (64, 64))) == (cutout, "rembg")


def test_rembg_without_its_model_is_not_ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(background.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(background, "rembg_model_path", lambda: tmp_path / "u2net.onnx")
    assert not background.rembg_is_ready()
    (tmp_path / "u2net.onnx").write_bytes(b"half a model")
    assert not background.rembg_is_ready()


def test_an_opaque_image_is_shrunk_to_1024() -> None:
    cutout, _ = background.remove_background(Image.fromarray(np.kron(cup(), np.ones((12, 12, 1), np.uint8))))
    assert cutout.size == (1024, 768)


@pytest.mark.parametrize("solid", [0, 1])
def test_an_empty_foreground_says_what_to_do(solid: int) -> None:
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[10, 10 : 10 + solid] = 255
    with pytest.raises(ValueError, match=r"image has no foreground.*plain background, or cut it out yourself"):
        preprocess(rgba)


def test_a_single_color_is_an_empty_foreground() -> None:
    with pytest.raises(ValueError, match=r"image has no foreground.*grabcut"):
        preprocess(np.full((64, 64, 3), 128, np.uint8))


def test_an_image_too_small_for_grabcut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 16 x 16 pixels.*got 8 x 8"):
        preprocess(np.zeros((8, 8, 3), np.uint8))


def test_without_background_removal_alpha_is_required() -> None:
    with pytest.raises(ValueError, match="must have an alpha channel"):
        preprocess(cup(), background=None)


def test_an_object_at_the_edge_is_padded_with_black() -> None:
    rgba = np.zeros((50, 50, 4), np.uint8)
    rgba[:20, :20] = 255
    result = np.asarray(prepare_image(load_image(rgba))[0])
    assert result.shape == (518, 518, 3)
    assert result[:5].max() < 20  # black but for the ringing of Lanczos
    assert result[259, 259].min() == 255
