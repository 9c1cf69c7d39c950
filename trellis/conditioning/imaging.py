"""From whatever a user has to the official 518 x 518 picture of an object on black."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor

from trellis.conditioning.background import RemovalMethod, remove_background

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_000_000
IMAGE_SIZE = 518
# Importing a plugin registers its format; the others stay unregistered as far as `load_image` is concerned.
_PLUGINS = (BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")


def load_image(source: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image and bring it to 8-bit RGB, or RGBA if it has transparency, upright as its EXIF says.

    Args:
        source: path, bytes, PIL image, array ``[H, W]`` or ``[H, W, 1|2|3|4]``, or tensor ``[H, W]`` or
            ``[1|2|3|4, H, W]`` (2 and 4: the last is alpha), if uint8 also ``[H, W, 3|4]``;
            uint8, uint16, bool, or float in [0, 1]. A file may be
            PNG, JPEG, WebP, BMP, TIFF or GIF; of several frames or pages the first is read.
        max_pixels: larger images are refused; a file before it is decoded, going by its header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the source is no image, damaged, too large, or has values out of range; it is named.
        TypeError: the source is of another type.
    """
    if isinstance(source, Image.Image):
        return _converted(source, "the given image", max_pixels)
    if isinstance(source, Tensor):
        array = source.detach().cpu()
        array = array.float() if array.dtype in (torch.bfloat16, torch.float16) else array
        # A first axis of 1 to 4 is channels; a picture that is no higher than that has to be given that way.
        last = array.dtype == torch.uint8 and array.ndim == 3 and array.shape[0] > 4 and array.shape[2] in (3, 4)
        array = array.permute(1, 2, 0) if array.ndim == 3 and not last else array
        return _from_array(array.numpy(), f"image tensor {list(source.shape)}", max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, f"image array {list(source.shape)}", max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), f"image of {len(bytes(source))} bytes", max_pixels)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            raise ValueError(f"image {path} must be a file; got a folder")
        if not path.exists():
            raise FileNotFoundError(f"no image at {path}")
        with path.open("rb") as file:
            return _decode(file, f"image {path}", max_pixels)
    raise TypeError(f"image must be a path, bytes, PIL image, array or tensor; got {type(source).__name__}")


def prepare_image(image: Image.Image, background: Literal["auto"] | None = "auto") -> tuple[Image.Image, RemovalMethod]:
    """Cut out the object and frame it as the official pipeline does, to the pixel.

    The box around alpha > 0.8, made square and 1.2 times as large, is resized with Lanczos and multiplied by alpha.

    Args:
        image: RGB or RGBA, see `load_image`.
        background: "auto": remove it if alpha does not tell; None: an image without alpha is an error.

    Returns:
        The ``518 x 518`` RGB image, object on black; and how the background was removed, see `remove_background`.

    Raises:
        ValueError: no foreground is found.

    Source:
        Official `TrellisImageTo3DPipeline.preprocess_image` at 6b0d647.
    """
    if background is None and (image.mode != "RGBA" or image.getchannel("A").getextrema() == (255, 255)):
        raise ValueError("image must have an alpha channel that is not opaque everywhere if background is None")
    cutout, method = remove_background(image)
    alpha = np.asarray(cutout)[..., 3]
    solid = alpha > 0.8 * 255
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) if len(rows) else 0
    half = int(extent * 1.2) // 2
    if half == 0:
        raise ValueError(
            f"image has no foreground (opaque part; background removed by {method}): give a picture of one object on a "
            "plain background, or cut it out yourself and give an image with an alpha channel"
        )
    x, y = (columns[0] + columns[-1]) / 2, (rows[0] + rows[-1]) / 2
    framed = cutout.crop((x - half, y - half, x + half, y + half))  # Pillow rounds to the nearest pixel
    rgba = np.asarray(framed.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)).astype(np.float32) / 255
    return Image.fromarray((rgba[..., :3] * rgba[..., 3:] * 255).astype(np.uint8)), method


def preprocess(image: Any, background: Literal["auto"] | None = "auto") -> Image.Image:
    """`load_image`, then `prepare_image`, whose arguments these are."""
    return prepare_image(load_image(image), background)[0]


def _decode(stream: Any, name: str, max_pixels: int) -> Image.Image:
    prefix = stream.read(16)
    if not prefix:
        raise ValueError(f"{name} is empty (0 bytes)")
    stream.seek(0)
    # Not Image.open: its own limit on pixels is a global, and it would try every format there is.
    found = [name for name in FORMATS if _accepts(name, prefix)]
    if not found:
        raise ValueError(f"{name} must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; got something else")
    try:
        opened = Image.OPEN[found[0]][0](stream, "")
    except Exception as error:  # on damaged files the decoders raise many unrelated types
        raise ValueError(f"{name} is a damaged {found[0]}: {error}") from error
    _check_size(opened.size, name, max_pixels)
    try:
        opened.load()
    except Exception as error:  # as above
        raise ValueError(f"{name} is a truncated or damaged {found[0]}: {error}") from error
    if getattr(opened, "is_animated", False) and opened.format != "MPO":  # a phone's JPEG with a depth map or preview
        logger.warning("%s has several frames or pages; the first is used", name)
    return _converted(opened, name, max_pixels)


def _accepts(format_name: str, prefix: bytes) -> bool:
    accept = Image.OPEN[format_name][1]
    return accept is not None and accept(prefix) is True


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name} must have at least one pixel; got {width} x {height}")
    if width * height > max_pixels:
        raise ValueError(
            f"{name} must have at most {max_pixels} pixels; got {width} x {height} = {width * height} "
            "(shrink it, or raise max_pixels)"
        )


def _converted(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(image.size, name, max_pixels)
    try:
        # A copy in any case, so that the caller's image is never shared.
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return _from_array(np.asarray(image).astype(np.uint16), name, max_pixels)
        if image.mode == "I":  # Pillow's mode for 16 bits in some files; wider integers have no known white
            values = np.asarray(image)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError("32-bit integers must be in [0, 65535]")
            return _from_array(values.astype(np.uint16), name, max_pixels)
        if image.mode == "F":
            return _from_array(np.asarray(image), name, max_pixels)
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except Exception as error:  # a PIL image that the caller opened is decoded only here, hence as in `_decode`
        raise ValueError(str(error) if name in str(error) else f"{name} cannot be read: {error}") from error


def _from_array(array: np.ndarray, name: str, max_pixels: int) -> Image.Image:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not 1 <= array.shape[2] <= 4:
        raise ValueError(f"{name} must be [H, W] or have 1 to 4 channels (arrays last, tensors first)")
    _check_size((array.shape[1], array.shape[0]), name, max_pixels)
    if array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{name} must have finite values in [0, 1] if they are floats")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise TypeError(f"{name} must be uint8, uint16, bool or float; got {array.dtype}")
    if array.shape[2] <= 2:
        array = np.concatenate([array[..., :1]] * 3 + [array[..., 1:]], axis=2)
    return Image.fromarray(np.ascontiguousarray(array))
