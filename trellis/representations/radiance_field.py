"""A Strivec radiance field: voxels that hold low-rank factors of density and color."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trellis.atomic import atomic_path
from trellis_kernels.shapes import FLOATS, expect

AABB = (-0.5, -0.5, -0.5, 1.0, 1.0, 1.0)
TENSORS = ("positions", "trivec", "density", "features_dc")
FORMAT = "trellis.radiance_field.1"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True, eq=False)
class RadianceField:
    """N voxels of one size with R trivectors of length 3 x D each.

    At a point of a voxel, ``f_r`` is the product over the three axes of the linearly interpolated ``trivec[r, axis]``;
    density is ``softplus(sum_r density_r f_r)`` per world unit, color is ``sigmoid(C0 sum_r features_dc_r f_r)``, sRGB.

    Args:
        positions: ``[N, 3]`` float. Voxel centers in the unit cube of `aabb`.
        depth: octree level: a voxel's side is ``2^-depth`` of the box, so ``2^depth`` is the resolution rounded down
            to a power of two; 0 to 10.
        trivec: ``[N, R, 3, D]``. Factors along x, y and z.
        density: ``[N, R]``. Raw.
        features_dc: ``[N, R, 1, 3]``. Spherical harmonics of degree 0, per color channel; raw.
        resolution: voxels per axis of the grid that `positions` lie on.
        aabb: origin and size, in world units, of the box that the unit cube is mapped to.

    Raises:
        ValueError, TypeError: if a shape, dtype or range is not the one above.
    """

    positions: Tensor
    depth: int
    trivec: Tensor
    density: Tensor
    features_dc: Tensor
    resolution: int
    aabb: tuple[float, float, float, float, float, float] = AABB

    def __post_init__(self) -> None:
        expect(
            positions=(self.positions, "N 3", FLOATS),
            trivec=(self.trivec, "N R 3 D", FLOATS),
            density=(self.density, "N R", FLOATS),
            features_dc=(self.features_dc, "N R 1 3", FLOATS),
        )
        if not 1 <= self.resolution <= 2**10:
            raise ValueError(f"resolution must be in [1, 1024]; got {self.resolution}")
        if self.depth != self.resolution.bit_length() - 1:
            raise ValueError(f"depth must be floor(log2({self.resolution})); got {self.depth}")
        if len(self.aabb) != 6 or not all(map(math.isfinite, self.aabb)) or min(self.aabb[3:]) <= 0:
            raise ValueError(f"aabb must be an origin and three positive sizes, all finite; got {self.aabb}")

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, *args: Any, **kwargs: Any) -> RadianceField:
        """The same field on another device or in another dtype; arguments of `torch.Tensor.to`."""
        tensors = {name: getattr(self, name).to(*args, **kwargs) for name in TENSORS}
        return RadianceField(**tensors, depth=self.depth, resolution=self.resolution, aabb=self.aabb)

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file, whole or not at all: the tensors in their dtypes, the rest as metadata.

        Raises:
            ValueError: the suffix is another.
        """
        from safetensors.torch import save_file

        if Path(path).suffix.lower() != ".safetensors":
            raise ValueError(f"path must end in .safetensors; got {Path(path).name!r}")
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in TENSORS}
        values = {"depth": self.depth, "resolution": self.resolution, "aabb": list(self.aabb)}
        metadata = {"format": FORMAT} | {name: json.dumps(value) for name, value in values.items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path) -> RadianceField:
        """Read a file of `save`, onto the CPU. Keys, shapes and dtypes are compared before any tensor is read.

        Raises:
            ValueError: naming what is wrong with the file.
            FileNotFoundError: there is none.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata, stored = _read_metadata(file.metadata() or {}), set(file.keys())
                if stored != set(TENSORS):
                    raise ValueError(f"keys must be {', '.join(sorted(TENSORS))}; got {', '.join(sorted(stored))}")
                slices = {name: file.get_slice(name) for name in TENSORS}
                for name, part in slices.items():
                    if part.get_dtype() not in _DTYPES:
                        raise TypeError(f"{name} must be {' or '.join(_DTYPES)}; got {part.get_dtype()}")
                shapes: dict[str, Any] = {
                    name: torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")
                    for name, part in slices.items()
                }
                cls(**shapes, **metadata)  # for its checks
                # Copies, not views of the mapped file: the file may be replaced while the field lives.
                tensors: dict[str, Any] = {name: file.get_tensor(name).clone() for name in TENSORS}
        except (SafetensorError, ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{path} must be a radiance field: {error}") from error
        for name, value in tensors.items():
            if not value.isfinite().all():
                raise ValueError(f"{path} must be a radiance field: {name} has values that are not finite")
        return cls(**tensors, **metadata)


def _read_metadata(metadata: dict[str, str]) -> dict[str, Any]:
    """Checked types; the constructor checks the values."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"metadata 'format' must be {FORMAT!r}; got {metadata.get('format')!r}")
    values: dict[str, Any] = {}
    for name in ("depth", "resolution", "aabb"):
        text = metadata.get(name, "")
        try:
            values[name] = json.loads(text) if len(text) < 1000 else None
        except (json.JSONDecodeError, RecursionError):
            values[name] = None
        numbers = values[name] if name == "aabb" else [values[name]]
        allowed = (int, float) if name == "aabb" else (int,)
        if not isinstance(numbers, list) or not all(type(number) in allowed for number in numbers):
            raise ValueError(
                f"metadata {name!r} must be {'six numbers' if name == 'aabb' else 'an integer'}; got {text[:80]!r}"
            )
    values["aabb"] = tuple(float(number) for number in values["aabb"])
    return values
