"""Pictures as the conditioner sees them: framed as officially, and disturbed as photographs are."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image

MARGIN = 1.2  # side of the frame over the longer side of the object's box
# How strong, and how often, each disturbance is. Colors change little: the object's own have to be recognised.
TURN = 8.0  # degrees
SCALE = (0.85, 1.1)
SHIFT = 0.05  # of the side
HUE = 6.0  # degrees
SATURATION = (0.7, 1.3)
GAIN = (0.75, 1.3)
BALANCE = 0.06  # of each channel
GAMMA = (0.8, 1.25)
CONTRAST = (0.8, 1.25)
LIGHT = 0.25  # brighter at one side of the picture than in the middle
BLUR = 1.2  # pixels
COARSE = 0.4  # of the pixels per side are left
NOISE = 0.04
JPEG = (35, 95)
RIM = 3  # pixels that the matte is too wide or too narrow


def framed(picture: Image.Image, size: int) -> np.ndarray:
    """The box around alpha > 0, made square and 1.2 times as large, at `size` pixels a side (Lanczos).

    Args:
        picture: RGBA.
        size: S.

    Returns:
        ``[S, S, 4]`` float32. sRGB in [0, 1], multiplied by alpha: on black, as the conditioner is given it; and alpha.

    Raises:
        ValueError: the picture is transparent everywhere, or has no alpha.

    Source:
        Official `ImageConditionedMixin` at 6b0d647.
    """
    if picture.mode != "RGBA":
        raise ValueError(f"picture must be RGBA; got {picture.mode}")
    box = picture.getchannel("A").getbbox()
    if box is None:
        raise ValueError("picture must show something; got one that is transparent everywhere")
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1  # of pixels, as officially
    x, y = (left + right) / 2, (top + bottom) / 2
    half = max(1.0, max(right - left, bottom - top) / 2 * MARGIN)
    frame = picture.crop((int(x - half), int(y - half), int(x + half), int(y + half)))
    resized = frame.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(resized, np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    return pixels


def disturbed(picture: np.ndarray, random: Generator) -> np.ndarray:
    """A picture as it might come from a camera and a program that removes backgrounds.

    Moved, turned and scaled a little; other light, colors and contrast; before a background that shows where the matte
    is too wide or soft; blurred, coarse, noisy, compressed; parts cut off. Each with some probability.

    Args:
        picture: ``[S, S, 4]`` float32, see `framed`.
        random: all randomness comes from it.

    Returns:
        ``[S, S, 3]`` float32 in [0, 1], on black.
    """
    moved = _moved(picture, random)
    alpha = moved[..., 3:]
    photo = _colored(moved[..., :3] / np.maximum(alpha, np.float32(1e-3)), random) * alpha
    leaks = random.random() < 0.6
    if leaks:
        photo += _background(len(picture), random) * (1 - alpha)
    photo = _photographed(photo, random)
    matte = _matte(alpha[..., 0], random) if leaks else (alpha[..., 0] > 0).astype(np.float32)
    return np.clip(photo * matte[..., None], 0, 1)


def _moved(picture: np.ndarray, random: Generator) -> np.ndarray:
    """Turned, scaled and shifted."""
    size = len(picture)
    angle, scale = random.uniform(-TURN, TURN), random.uniform(*SCALE)
    matrix = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), angle, scale)
    matrix[:, 2] += random.uniform(-SHIFT, SHIFT, 2) * size
    return np.asarray(cv2.warpAffine(picture, matrix, (size, size), flags=cv2.INTER_LINEAR), np.float32)


def _colored(color: np.ndarray, random: Generator) -> np.ndarray:
    """Hue, saturation, white balance, brightness, gamma, contrast, and light from one side."""
    mix = _saturation_and_hue(_log_uniform(random, *SATURATION), math.radians(random.uniform(-HUE, HUE)))
    gain = _log_uniform(random, *GAIN) * random.uniform(1 - BALANCE, 1 + BALANCE, 3)
    color = cv2.transform(color, (gain[:, None] * mix).astype(np.float32))
    gamma, contrast = _log_uniform(random, *GAMMA), _log_uniform(random, *CONTRAST)
    values = np.clip((np.linspace(0, 1, 256) ** gamma - 0.5) * contrast + 0.5, 0, 1).astype(np.float32)
    color = cv2.LUT(np.clip(color * 255 + 0.5, 0, 255).astype(np.uint8), values)
    if random.random() < 0.5:
        color = color * (1 + _slope(len(color), random) * LIGHT)[..., None]
    return np.asarray(color, np.float32)


def _photographed(photo: np.ndarray, random: Generator) -> np.ndarray:
    """Blurred, coarse, noisy, compressed."""
    size = len(photo)
    if random.random() < 0.3:
        photo = cv2.GaussianBlur(photo, (0, 0), random.uniform(0.3, BLUR))
    if random.random() < 0.25:
        few = round(size * random.uniform(COARSE, 1))
        photo = cv2.resize(photo, (few, few), interpolation=cv2.INTER_AREA)
        photo = cv2.resize(photo, (size, size), interpolation=cv2.INTER_LINEAR)
    if random.random() < 0.4:
        noise = random.standard_normal(photo.shape, np.float32)
        photo = photo + noise * np.float32(random.uniform(0, NOISE))
    if random.random() < 0.4:
        coded = np.clip(photo * 255 + 0.5, 0, 255).astype(np.uint8)
        done, data = cv2.imencode(".jpg", coded, [cv2.IMWRITE_JPEG_QUALITY, int(random.integers(*JPEG))])
        assert done
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
        assert decoded is not None
        photo = decoded.astype(np.float32) / 255
    return photo


def _background(size: int, random: Generator) -> np.ndarray:
    """A wall: one color, or two that run into each other, or blotches."""
    first, second = random.random((2, 3), np.float32)
    kind = random.random()
    if kind < 0.4:
        return np.broadcast_to(first, (size, size, 3))
    if kind < 0.7:
        share = (_slope(size, random) + 1)[..., None] / 2
    else:
        few = int(random.integers(3, 24))
        share = cv2.resize(random.random((few, few), np.float32), (size, size), interpolation=cv2.INTER_LINEAR)[
            ..., None
        ]
    return first * share + second * (1 - share)


def _matte(alpha: np.ndarray, random: Generator) -> np.ndarray:
    """What a program might take for the object: too wide, too narrow, soft, with a piece too much or too little."""
    size = len(alpha)
    matte = alpha
    rim = int(random.integers(-RIM, RIM + 1)) if random.random() < 0.5 else 0
    if rim:
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * abs(rim) + 1,) * 2)
        matte = cv2.dilate(matte, disc) if rim > 0 else cv2.erode(matte, disc)
    if random.random() < 0.4:
        matte = cv2.GaussianBlur(matte, (0, 0), random.uniform(0.5, 2.5))
    if random.random() < 0.15:  # a piece at the edge
        edge = np.argwhere((alpha > 0.5) & (cv2.erode(alpha, np.ones((3, 3))) <= 0.5))
        if len(edge):
            y, x = edge[random.integers(len(edge))]
            axes = (random.uniform(0.02, 0.08, 2) * size).astype(int)
            piece = np.zeros_like(matte)
            cv2.ellipse(piece, (int(x), int(y)), axes.tolist(), random.uniform(0, 180), 0, 360, 1.0, -1)
            matte = np.maximum(matte, piece) if random.random() < 0.5 else matte * (1 - piece)
    return matte


def _slope(size: int, random: Generator) -> np.ndarray:
    """``[S, S]`` in [-1, 1]: a plane, steepest in a random direction."""
    angle = random.uniform(0, 2 * math.pi)
    line = np.linspace(-1, 1, size, dtype=np.float32)
    return (line[:, None] * np.float32(math.sin(angle)) + line * np.float32(math.cos(angle))) / np.float32(math.sqrt(2))


def _saturation_and_hue(saturation: float, turn: float) -> np.ndarray:
    """``[3, 3]``: scale by `saturation` and turn by `turn` radians about the gray axis."""
    gray = np.full((3, 3), 1 / 3)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # cross product with the gray axis
    return gray + saturation * (math.cos(turn) * (np.eye(3) - gray) + math.sin(turn) * across)


def _log_uniform(random: Generator, low: float, high: float) -> float:
    return math.exp(random.uniform(math.log(low), math.log(high)))
