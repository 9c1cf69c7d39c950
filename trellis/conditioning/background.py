"""Background removal: the alpha channel, else rembg where it is installed, else GrabCut."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

RemovalMethod = Literal["alpha", "rembg", "grabcut"]
MAX_SIDE = 1024  # of an image whose background is to be removed, as in the official pipeline
REMBG_MODEL = "u2net"
REMBG_MD5 = "60024c5c889badc19c04ad937298a77b"
GRABCUT_SIDE = 512  # its time grows faster than the pixels; its edges come from the full image's smooth mask anyway
GRABCUT_MARGIN = 0.02  # of each side, taken to be background
LARGEST_HOLE = 0.05  # of the object: smaller ones are reflections, larger ones are likely real


def remove_background(image: Image.Image) -> tuple[Image.Image, RemovalMethod]:
    """Make what does not belong to the object transparent.

    Args:
        image: RGB or RGBA.

    Returns:
        RGBA image, shrunk to at most 1024 pixels a side unless it came with alpha; and the method used: "alpha"
        (the image's own, unless it is opaque everywhere), "rembg" (u2net; if the package is installed and its model
        file lies in its folder: nothing is downloaded) or "grabcut" (a guess from the colors at the image's border).

    Raises:
        ValueError: the image is too small for GrabCut.
    """
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        return image, "alpha"
    image = image.convert("RGB")
    scale = min(1, MAX_SIDE / max(image.size))
    if scale < 1:
        width, height = image.size
        size = (max(1, int(width * scale)), max(1, int(height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    if rembg_is_ready():
        logger.info("background removed with rembg (%s)", REMBG_MODEL)
        return _rembg(image), "rembg"
    logger.warning(
        "background removed with GrabCut, which guesses from the colors at the border; for better results give an "
        "image with an alpha channel, or install trellis[background] and its model with `rembg d %s`",
        REMBG_MODEL,
    )
    return _grabcut(image), "grabcut"


def rembg_model_path() -> Path:
    """Where rembg, which must be installed, keeps its model file: it knows (``U2NET_HOME``, else ``~/.u2net``)."""
    from rembg.sessions.u2net import U2netSession

    return Path(U2netSession.u2net_home()) / f"{REMBG_MODEL}.onnx"


def rembg_is_ready() -> bool:
    """Whether rembg and its onnxruntime are installed and its model file is whole, so that it will not download."""
    if any(importlib.util.find_spec(package) is None for package in ("rembg", "onnxruntime")):
        return False
    path = rembg_model_path()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "md5") if hasattr(hashlib, "file_digest") else hashlib.md5(file.read())
    if digest.hexdigest() != REMBG_MD5:  # rembg would replace it from the network
        logger.warning("%s is not the file that rembg expects, so rembg is not used", path)
        return False
    return True


def _rembg(image: Image.Image) -> Image.Image:
    import rembg

    result: Image.Image = rembg.remove(image, session=rembg.new_session(REMBG_MODEL))
    return result


def _grabcut(image: Image.Image) -> Image.Image:
    import cv2

    if min(image.size) < 16:
        raise ValueError(
            f"image must have at least 16 x 16 pixels to find its background; got {image.size[0]} x {image.size[1]} "
            "(or give it an alpha channel)"
        )
    small = image.copy()
    small.thumbnail((GRABCUT_SIDE, GRABCUT_SIDE), Image.Resampling.BOX)
    pixels = np.ascontiguousarray(np.asarray(small)[..., ::-1])
    height, width = pixels.shape[:2]
    mask = np.full((height, width), cv2.GC_BGD, np.uint8)
    y, x = max(1, round(height * GRABCUT_MARGIN)), max(1, round(width * GRABCUT_MARGIN))
    mask[y:-y, x:-x] = cv2.GC_PR_FGD
    cv2.setRNGSeed(0)  # its k-means starts at random; this generator is OpenCV's own
    cv2.grabCut(pixels, mask, None, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_MASK)
    solid = _one_object((mask & 1).astype(np.uint8))
    soft = cv2.GaussianBlur(solid * np.float32(255), (0, 0), 0.8)
    soft = cv2.resize(soft, image.size, interpolation=cv2.INTER_LINEAR)
    cutout = image.convert("RGBA")
    cutout.putalpha(Image.fromarray(np.clip(np.round(soft), 0, 255).astype(np.uint8)))
    return cutout


def _one_object(solid: np.ndarray) -> np.ndarray:
    """The largest connected part of a 0/1 mask, smoothed, its small holes filled."""
    import cv2

    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    solid = cv2.morphologyEx(cv2.morphologyEx(solid, cv2.MORPH_OPEN, disc), cv2.MORPH_CLOSE, disc)
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(solid, connectivity=4)
    if len(statistics) < 2:
        return solid
    areas = statistics[:, cv2.CC_STAT_AREA]
    largest = 1 + int(areas[1:].argmax())
    solid = (labels == largest).astype(np.uint8)
    _, holes, statistics, _ = cv2.connectedComponentsWithStats(1 - solid, connectivity=8)
    border = np.unique(np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]]))
    small = statistics[:, cv2.CC_STAT_AREA] < LARGEST_HOLE * areas[largest]
    small[border] = False
    small[0] = False  # the object itself
    return solid | small[holes].astype(np.uint8)
