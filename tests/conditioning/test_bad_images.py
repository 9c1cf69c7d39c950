import io
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trellis.conditioning.imaging import load_image


def encoded(image: Image.Image, format_name: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_name, **options)
    return stream.getvalue()


def noise(mode: str = "RGB", size: int = 32) -> Image.Image:
    channels = len(mode)
    values = np.random.default_rng(0).integers(0, 256, (size, size, channels), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values, mode if channels == 1 else None)


def png(width: int, height: int, rows: bytes) -> bytes:
    """A 1-bit gray PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_30000_by_30000_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png(30000, 30000, bytes(3751) * 30000))
    assert path.stat().st_size < 200_000
    message = r"huge.png must have at most 178000000 pixels; got 30000 x 30000 = 900000000 \(shrink it, or raise max_p"
    with pytest.raises(ValueError, match=message):
        load_image(path)


def test_the_pixel_cap_can_be_moved_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="at most 100 pixels; got 32 x 32"):
        load_image(encoded(noise(), "PNG"), max_pixels=100)
    # Pillow's own limit is a global, so it must not matter.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert load_image(encoded(noise(), "PNG")).size == (32, 32)


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_every_format_is_read_and_a_truncated_one_refused(format_name: str, tmp_path: Path) -> None:
    data = encoded(noise(), format_name)
    assert load_image(data).size == (32, 32)
    path = tmp_path / "half"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"image .*half is a .*damaged {format_name}"):
        load_image(path)


@pytest.mark.parametrize("length", [1, 4, 9, 12, 20, 30])
@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_file_cut_in_its_header_is_refused(format_name: str, length: int) -> None:
    with pytest.raises(ValueError, match=f"image of {length} bytes"):
        load_image(encoded(noise(), format_name)[:length])


def test_missing_empty_folder_and_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image at .*none\.png"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="must be a file; got a folder"):
        load_image(tmp_path)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.png is empty \(0 bytes\)"):
        load_image(str(tmp_path / "empty.png"))
    (tmp_path / "text.png").write_text("not an image at all, though it says so")
    with pytest.raises(ValueError, match=r"text\.png must be PNG, JPEG, WEBP, BMP, TIFF or GIF"):
        load_image(tmp_path / "text.png")


def test_formats_off_the_list_are_refused() -> None:
    with pytest.raises(ValueError, match="must be PNG"):
        load_image(encoded(noise(), "PPM"))
    with pytest.raises(TypeError, match="must be a path, bytes, PIL image, array or tensor; got int"):
        load_image(7)


def test_cmyk_becomes_rgb() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    result = load_image(encoded(image, "JPEG", quality=100))
    assert result.mode == "RGB"
    red, green, blue = result.getpixel((8, 8))
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(format_name: str) -> None:
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    result = np.asarray(load_image(encoded(Image.fromarray(values), format_name)))
    np.testing.assert_array_equal(result[..., 0].ravel(), np.arange(256))
    np.testing.assert_array_equal(result[..., 0], result[..., 2])


def test_16_bits_are_rounded_to_the_nearest() -> None:
    values = np.array([[0, 128, 129, 256, 257, 385, 386, 65406, 65407, 65535]], np.uint16)
    expected = np.round(values / 257)
    np.testing.assert_array_equal(np.asarray(load_image(values))[..., 0], expected)


def test_palette_with_and_without_transparency() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 2)
    assert load_image(encoded(palette, "PNG")).mode == "RGB"
    result = load_image(encoded(palette, "PNG", transparency=2))
    assert result.mode == "RGBA"
    assert result.getpixel((0, 0)) == (0, 255, 0, 0)
    assert result.getpixel((5, 5)) == (255, 0, 0, 255)


def test_gray_with_alpha_becomes_rgba() -> None:
    result = load_image(encoded(Image.new("LA", (4, 4), (100, 50)), "PNG"))
    assert result.mode == "RGBA"
    assert result.getpixel((0, 0)) == (100, 100, 100, 50)


@pytest.mark.parametrize("mode", ["1", "L", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert load_image(Image.new(mode, (4, 4))).mode == "RGB"


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (40, 20), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 10, 20))  # red at the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise: left becomes top
    result = load_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert result.size == (20, 40)
    assert result.getpixel((10, 2))[0] > 200
    assert result.getpixel((10, 38))[2] > 200


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_used_and_logged(format_name: str, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], format_name, save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING):
        result = load_image(data)
    assert result.getpixel((4, 4))[0] > 240
    assert "several frames or pages; the first is used" in caplog.text


def test_arrays_and_tensors() -> None:
    values = np.array(noise())
    for source in (values, values / 255, values.astype(np.uint16) * 257, torch.from_numpy(values)):
        np.testing.assert_array_equal(np.asarray(load_image(source)), values)
    np.testing.assert_array_equal(np.asarray(load_image(torch.from_numpy(values).permute(2, 0, 1))), values)
    assert load_image(values[..., 0]).mode == "RGB"
    assert load_image(values[..., :2]).mode == "RGBA"
    assert load_image(torch.rand(4, 5, 6, dtype=torch.bfloat16)).size == (6, 5)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4, 3), 1.5), "finite values in"),
        (np.full((4, 4, 3), np.nan), "finite values in"),
        (np.zeros((4, 4, 5), np.uint8), "1 to 4 channels"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (np.zeros((2, 4, 4, 3), np.uint8), "1 to 4 channels"),
    ],
)
def test_bad_arrays_are_named(array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=rf"image array \[.*{message}"):
        load_image(array)


def test_the_callers_image_is_never_shared() -> None:
    image = noise()
    load_image(image).putpixel((0, 0), (1, 2, 3))
    assert image.tobytes() == noise().tobytes()
