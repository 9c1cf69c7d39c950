"""Gaussians in the PLY layout of 3D Gaussian Splatting, which most viewers read.

A vertex holds x y z nx ny nz f_dc_0..2 opacity scale_0..2 rot_0..3, all float32: the world position, zeros, spherical
harmonics of degree 0, the logit of the opacity, the logarithm of the scale and the quaternion (w, x, y, z).

Values are computed in float64 and stay finite. The logit of an opacity is its raw value plus the bias; the official
writer takes the detour through a float32 sigmoid, and so do we where it costs no digits, to write the same file.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trellis.atomic import atomic_path
from trellis.representations.gaussians import GaussianConfig, Gaussians
from trellis.representations.rotation import matrix_to_quat, quat_to_matrix

Transform = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]

Y_DOWN: Transform = ((1, 0, 0), (0, 0, -1), (0, 1, 0))
"""(x, y, z) to (x, -z, y): turns our upward z into the downward y of Gaussian viewers."""

PROPERTIES = (
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)
_UNUSED = frozenset({"nx", "ny", "nz"})
_OPAQUE = 4.0  # logit beyond which a float32 sigmoid loses digits
_MAX_HEADER = 64 * 1024  # bytes
_TYPES = dict(
    zip(
        ["char", "uchar", "short", "ushort", "int", "uint", "float", "double"],
        ["i1", "u1", "<i2", "<u2", "<i4", "<u4", "<f4", "<f8"],
        strict=True,
    )
)
_TYPES |= dict(
    zip(["int8", "uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"], _TYPES.values(), strict=True)
)


def save_ply(gaussians: Gaussians, path: str | Path, transform: Transform | None = Y_DOWN) -> None:
    """Write Gaussians as a binary PLY file, whole or not at all.

    Args:
        gaussians: any dtype and device; stored as float32.
        path: the file; missing folders are made.
        transform: rotation applied to positions and orientations. With None quaternions are stored as they are,
            unnormalised.
    """
    rows = _rows(gaussians, transform)
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    lines += [f"property float {name}" for name in PROPERTIES] + ["end_header", ""]
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write("\n".join(lines).encode("ascii"))
        file.write(rows.tobytes())


def load_ply(path: str | Path, transform: Transform | None = Y_DOWN, config: GaussianConfig | None = None) -> Gaussians:
    """Read Gaussians from a binary PLY file; the inverse of `save_ply` with the same transform and config.

    The file need not be ours: properties may come in any order and others, except higher spherical harmonics, are
    passed over. Nothing is allocated before the sizes it claims are checked against its length.

    Args:
        path: the file.
        transform: the rotation that was applied on writing, undone here.
        config: how the raw values are to be read. A scale below its ``filter_kernel_size_3d`` cannot be represented
            and becomes that.

    Returns:
        float32 Gaussians on the CPU.

    Raises:
        ValueError: naming what is wrong with the file.
    """
    config = config or GaussianConfig()
    table = _read(Path(path))

    def columns(*names: str) -> Tensor:
        return torch.from_numpy(np.stack([table[name].astype(np.float64) for name in names], -1))

    world = columns("x", "y", "z")
    quats = columns("rot_0", "rot_1", "rot_2", "rot_3")
    if transform is not None:
        turn = torch.tensor(transform, dtype=torch.float64)
        world = world @ turn
        quats = matrix_to_quat(turn.T @ quat_to_matrix(quats))
    box = torch.tensor(config.aabb, dtype=torch.float64)
    activated = (columns("scale_0", "scale_1", "scale_2").exp().square() - config.filter_kernel_size_3d**2).sqrt()
    activated = activated.nan_to_num(0.0, posinf=math.inf).clamp_min(1e-10)
    raw = activated.log() if config.scaling_activation == "exp" else activated + (-torch.expm1(-activated)).log()
    identity = torch.tensor([1, 0, 0, 0], dtype=torch.float64)
    gaussians = Gaussians(
        xyz=((world - box[:3]) / box[3:]).float(),
        features_dc=columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None].float(),
        scaling=(raw - config.raw_scaling_bias).float(),
        rotation=(quats - identity).float(),
        opacity=(columns("opacity") - config.raw_opacity_bias).float(),
        config=config,
    )
    for name in ("xyz", "features_dc", "scaling", "rotation", "opacity"):
        if not getattr(gaussians, name).isfinite().all():
            raise ValueError(f"{path} must hold finite values; {name} does not")
    return gaussians


def _rows(gaussians: Gaussians, transform: Transform | None) -> np.ndarray:
    """``[G, 17]`` little-endian float32."""
    config, g = gaussians.config, gaussians.to(device="cpu", dtype=torch.float64)
    means, quats = g.means, g.rotation + torch.tensor([1, 0, 0, 0], dtype=torch.float64)
    if transform is not None:
        turn = torch.tensor(transform, dtype=torch.float64)
        means = means @ turn.T
        quats = matrix_to_quat(turn @ quat_to_matrix(quats))
    logits = g.opacity + config.raw_opacity_bias
    logits = torch.where(logits.abs() < _OPAQUE, logits.float().sigmoid().logit().double(), logits)
    columns = [means, torch.zeros_like(means), g.features_dc[:, 0], logits, g.scales.log(), quats]
    return torch.cat(columns, -1).detach().numpy().astype("<f4")


def _read(path: Path) -> np.ndarray:
    """The vertices as a structured array with a field per property."""
    with path.open("rb") as file:
        head = file.read(_MAX_HEADER)
        if not head.startswith((b"ply\n", b"ply\r\n")):
            raise ValueError(f"{path} must be a PLY file; it does not begin with 'ply'")
        end = head.find(b"end_header")
        newline = head.find(b"\n", end)
        if end < 0 or newline < 0:
            raise ValueError(f"{path} must have a PLY header of at most {_MAX_HEADER} bytes; its end was not found")
        count, layout = _header(path, head[:end].decode("ascii", "replace").splitlines())
        available = os.fstat(file.fileno()).st_size - (newline + 1)
        if count * layout.itemsize > available:
            raise ValueError(
                f"{path} must hold {count} vertices of {layout.itemsize} bytes; it has {available} bytes of data"
            )
        file.seek(newline + 1)
        return np.fromfile(file, dtype=layout, count=count)


def _header(path: Path, lines: list[str]) -> tuple[int, np.dtype]:
    """Number of vertices and layout of one; the vertices must come first in the file."""
    count: int | None = None
    fields: list[tuple[str, str]] = []
    binary = elements = 0
    for line in lines[1:]:
        match line.split():
            case ["format", "binary_little_endian", "1.0"]:
                binary = 1
            case ["format", *rest]:
                raise ValueError(f"{path} must be in format binary_little_endian 1.0; got {' '.join(rest)}")
            case ["element", name, number]:
                elements += 1
                if elements == 1:
                    if name != "vertex" or not number.isdecimal() or len(number) > 18:
                        raise ValueError(f"{path} must begin with a vertex element and its count; got {line!r}")
                    count = int(number)
            case ["property", kind, name] if elements == 1:
                if kind not in _TYPES:
                    raise ValueError(f"{path} must have properties of plain PLY types; got {line!r}")
                fields.append((name, _TYPES[kind]))
            case ["property", *_] if elements > 1:
                pass  # of an element after the vertices, which is not read
            case [] | ["comment", *_] | ["obj_info", *_]:
                pass
            case _:
                raise ValueError(f"{path} must have a valid PLY header; got the line {line!r}")
    if not binary or count is None:
        raise ValueError(f"{path} must have a PLY header with a format and a vertex element")
    names = [name for name, _ in fields]
    if len(set(names)) != len(names):
        raise ValueError(f"{path} must name every vertex property once; got {', '.join(names)}")
    missing = [name for name in PROPERTIES if name not in names and name not in _UNUSED]
    if missing:
        raise ValueError(f"{path} must have the vertex properties of 3D Gaussians; missing: {', '.join(missing)}")
    if any(name.startswith("f_rest_") for name in names):
        raise ValueError(f"{path} must have spherical harmonics of degree 0 only; it has higher ones (f_rest_*)")
    return count, np.dtype(fields)
