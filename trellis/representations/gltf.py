"""Meshes as binary glTF 2.0 (GLB), with linear vertex colors and a matte material.

Source: Khronos glTF 2.0 specification. Its world has y up and z toward the viewer, its vertex colors are linear.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from trellis.atomic import atomic_path

_FLOAT, _UNSIGNED_INT, _UNSIGNED_SHORT = 5126, 5125, 5123
_VERTICES, _INDICES = 34962, 34963  # targets of buffer views
_TYPES = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}
_LARGEST = 2**32 - 1  # bytes: the format stores its length as uint32


class _Buffer:
    """Arrays on their way into the binary chunk, with the JSON that says where they lie."""

    def __init__(self) -> None:
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []
        self.chunks: list[bytes] = []
        self.size = 0

    def add(self, array: np.ndarray, component: int, target: int, **fields: Any) -> int:
        """Append ``[N]`` or ``[N, C]`` little-endian rows; the number of the accessor."""
        data = array.tobytes()
        view = {"buffer": 0, "byteOffset": self.size, "byteLength": len(data), "target": target}
        if target == _VERTICES:
            view["byteStride"] = len(data) // len(array)
        self.views.append(view)
        kind = _TYPES[1 if array.ndim == 1 else array.shape[1]]
        accessor = {"bufferView": len(self.views) - 1, "componentType": component, "count": len(array), "type": kind}
        self.accessors.append(accessor | fields)
        self.chunks.append(data + bytes(-len(data) % 4))
        self.size += len(self.chunks[-1])
        return len(self.accessors) - 1


def save_glb(
    path: str | Path, positions: np.ndarray, faces: np.ndarray, normals: np.ndarray, colors: np.ndarray | None
) -> None:
    """Write one mesh as a GLB file, whole or not at all.

    Args:
        path: the file; missing folders are made.
        positions: ``[V, 3]``. In the world of glTF, y up.
        faces: ``[F, 3]``. In [0, V), F > 0, counterclockwise seen from outside.
        normals: ``[V, 3]``. Of length 1, in the same world.
        colors: ``[V, 3]`` sRGB in [0, 1], or None. Stored linear, in 16 bits per channel.

    Raises:
        ValueError: the file would exceed 4 GiB, the most that the format can hold.
    """
    buffer = _Buffer()
    positions = positions.astype("<f4")
    bounds = {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}
    attributes = {
        "POSITION": buffer.add(positions, _FLOAT, _VERTICES, **bounds),
        "NORMAL": buffer.add(normals.astype("<f4"), _FLOAT, _VERTICES),
    }
    if colors is not None:
        # With alpha, because rows must begin at multiples of four bytes.
        rows = np.full((len(colors), 4), 65535, dtype="<u2")
        rows[:, :3] = np.rint(srgb_to_linear(colors) * 65535)
        attributes["COLOR_0"] = buffer.add(rows, _UNSIGNED_SHORT, _VERTICES, normalized=True)
    indices = buffer.add(faces.astype("<u4").ravel(), _UNSIGNED_INT, _INDICES)
    document = _document(buffer, {"attributes": attributes, "indices": indices, "material": 0, "mode": 4})
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    length = 12 + 8 + len(text) + 8 + buffer.size
    if length > _LARGEST:
        raise ValueError(f"mesh must fit in a GLB file of at most {_LARGEST} bytes; it needs {length}")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, length))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", buffer.size, b"BIN\0"))
        file.writelines(buffer.chunks)


def srgb_to_linear(colors: np.ndarray) -> np.ndarray:
    """Linear values of sRGB ones in [0, 1] (IEC 61966-2-1)."""
    return np.where(colors <= 0.04045, colors / 12.92, ((np.maximum(colors, 0) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(colors: np.ndarray) -> np.ndarray:
    """Values in sRGB of linear ones in [0, 1]."""
    return np.where(colors <= 0.0031308, colors * 12.92, 1.055 * np.maximum(colors, 0) ** (1 / 2.4) - 0.055)


def _document(buffer: _Buffer, primitive: dict[str, Any]) -> dict[str, Any]:
    from trellis import __version__

    return {
        "asset": {"version": "2.0", "generator": f"trellis {__version__}"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "materials": [{"pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1}, "doubleSided": False}],
        "accessors": buffer.accessors,
        "bufferViews": buffer.views,
        "buffers": [{"byteLength": buffer.size}],
    }
