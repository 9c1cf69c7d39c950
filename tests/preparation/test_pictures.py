import numpy as np
import pytest
from PIL import Image, ImageDraw

from trellis.preparation.pictures import MARGIN, disturbed, framed


def drawing(size: int = 200, box: tuple[int, int, int, int] = (40, 60, 120, 100)) -> Image.Image:
    """An ellipse of one color on nothing."""
    picture = Image.new("RGBA", (size, size))
    ImageDraw.Draw(picture).ellipse(box, (200, 100, 50, 255))
    return picture


def extent(alpha: np.ndarray) -> tuple[int, int]:
    rows, columns = np.flatnonzero((alpha > 0.5).any(1)), np.flatnonzero((alpha > 0.5).any(0))
    return int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


def test_the_object_fills_the_frame_but_for_the_margin() -> None:
    frame = framed(drawing(), 96)
    assert frame.shape == (96, 96, 4)
    assert frame.dtype == np.float32
    width, height = extent(frame[..., 3])
    assert abs(width - 96 / MARGIN) <= 2
    assert abs(height - 48 / MARGIN) <= 2
    center = frame[48, 48]
    np.testing.assert_allclose(center, np.array([200, 100, 50, 255]) / 255, atol=0.01)
    assert not frame[0].any()


def test_the_frame_is_the_official_one() -> None:
    """The official steps, written again: indices of alpha, center, half the longer side times 1.2, int corners."""
    picture = drawing(130, (1, 11, 56, 77))
    picture.paste((10, 200, 90, 128), (56, 30, 90, 50))
    alpha = np.array(picture)[..., 3].nonzero()
    box = [alpha[1].min(), alpha[0].min(), alpha[1].max(), alpha[0].max()]
    center = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
    half = max(box[2] - box[0], box[3] - box[1]) / 2 * 1.2
    corners = [int(center[0] - half), int(center[1] - half), int(center[0] + half), int(center[1] + half)]
    resized = np.array(picture.crop(corners).resize((64, 64), Image.Resampling.LANCZOS)).astype(np.float32) / 255
    np.testing.assert_allclose(framed(picture, 64)[..., :3], resized[..., :3] * resized[..., 3:], atol=1e-6)


def test_half_transparent_is_darker_on_black() -> None:
    picture = Image.new("RGBA", (50, 50), (255, 255, 255, 128))
    np.testing.assert_allclose(framed(picture, 32)[16, 16], [128 / 255] * 4, atol=0.01)


def test_pictures_without_an_object_are_named() -> None:
    with pytest.raises(ValueError, match="transparent everywhere"):
        framed(Image.new("RGBA", (9, 9)), 32)
    with pytest.raises(ValueError, match="picture must be RGBA; got RGB"):
        framed(Image.new("RGB", (9, 9)), 32)
    one = Image.new("RGBA", (9, 9))
    one.putpixel((4, 4), (255, 255, 255, 255))
    assert framed(one, 32)[..., 3].max() > 0.5


def test_disturbances_are_many_and_repeatable() -> None:
    frame = framed(drawing(), 96)
    before = frame.copy()
    copies = [disturbed(frame, np.random.default_rng(seed)) for seed in range(40)]
    np.testing.assert_array_equal(frame, before)
    for copy in copies:
        assert copy.shape == (96, 96, 3)
        assert copy.dtype == np.float32
        assert copy.min() >= 0
        assert copy.max() <= 1
    np.testing.assert_array_equal(disturbed(frame, np.random.default_rng(3)), copies[3])
    assert len({copy.tobytes() for copy in copies}) == 40


def test_the_object_stays_recognisable() -> None:
    frame = framed(drawing(), 96)
    solid, colors = frame[..., 3] > 0.5, []
    for seed in range(60):
        copy = disturbed(frame, np.random.default_rng(seed))
        shown = copy.max(-1) > 0.08
        both, either = (shown & solid).sum(), (shown | solid).sum()
        assert both / either > 0.5
        colors.append(copy[44:52, 44:52].mean((0, 1)))
        assert colors[-1].argmax() == 0  # red stays red
        assert colors[-1].argmin() == 2
    assert np.std(colors, axis=0).min() > 0.02
    np.testing.assert_allclose(np.median(colors, axis=0), [200 / 255, 100 / 255, 50 / 255], atol=0.1)


def test_backgrounds_leak_at_some_edges_only() -> None:
    frame = framed(drawing(), 96)
    far = frame[..., 3] == 0
    leaks = [float(disturbed(frame, np.random.default_rng(seed))[far].max()) for seed in range(60)]
    assert sum(leak > 0.2 for leak in leaks) > 10
    corner = np.stack([disturbed(frame, np.random.default_rng(seed))[:4, :4] for seed in range(60)])
    assert corner.max() == 0  # what is far from the object is always removed
