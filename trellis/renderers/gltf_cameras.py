"""The cameras of a glTF scene.

Source: Khronos glTF 2.0 specification, 3.10 and 5.12-5.14. A camera looks along -z of its node, with y up; its world
has y up too, which is our z.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trellis.representations.rotation import quat_to_matrix

_LARGEST = 64 << 20  # bytes of JSON
_FROM_Y_UP = ((1, 0, 0, 0), (0, 0, -1, 0), (0, 1, 0, 0), (0, 0, 0, 1))
_FAR = 1000.0  # where a file says that there is no far plane


def read_gltf_cameras(path: str | Path) -> tuple[Tensor, Tensor, float, float]:
    """Cameras of the scene in a ``.glb`` or ``.gltf`` file, in the order of its nodes from the root down.

    Returns:
        ``[V, 4, 4]`` camera to world as in Blender (z up; the camera's y up, z backward), ``[V, 3, 3]`` normalised
        intrinsics, the nearest near and the farthest far.

    Raises:
        ValueError: naming what is wrong with the file; it has no perspective camera.
    """
    path = Path(path)
    try:
        document = _document(path)
        found = _walk(document)
    except (KeyError, TypeError, IndexError, json.JSONDecodeError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"{path} must be a valid glTF file: {type(error).__name__} {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} must be a valid glTF file: {error}") from error
    if not found:
        raise ValueError(f"{path} must have a perspective camera in its scene; it has none")
    poses = torch.stack([pose for pose, _ in found])
    lenses = [lens for _, lens in found]
    intrinsics = torch.zeros(len(found), 3, 3, dtype=torch.float64)
    for matrix, lens in zip(intrinsics, lenses, strict=True):
        focal = 0.5 / math.tan(lens["yfov"] / 2)
        matrix[0, 0], matrix[1, 1] = focal / lens.get("aspectRatio", 1.0), focal
        matrix[:2, 2], matrix[2, 2] = 0.5, 1.0
    near, far = min(lens["znear"] for lens in lenses), max(lens.get("zfar", _FAR) for lens in lenses)
    return (torch.tensor(_FROM_Y_UP).to(poses) @ poses).float(), intrinsics.float(), near, far


def _document(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        head = file.read(20)
        if head.startswith(b"glTF"):
            _, version, _, length, kind = struct.unpack("<4sIII4s", head)
            if version != 2 or kind != b"JSON" or length > _LARGEST:
                raise ValueError(
                    f"version 2 with at most {_LARGEST} bytes of JSON first; got version {version}, {length}"
                )
            text = file.read(length)
        else:
            text = head + file.read(_LARGEST)
    document = json.loads(text)
    if not isinstance(document, dict):
        raise ValueError("its JSON is no object")
    return document


def _walk(document: Mapping[str, Any]) -> list[tuple[Tensor, dict[str, float]]]:
    nodes, cameras = document.get("nodes", []), document.get("cameras", [])
    scenes = document.get("scenes", [{"nodes": range(len(nodes))}])
    pending = [
        (index, torch.eye(4, dtype=torch.float64)) for index in scenes[document.get("scene", 0)].get("nodes", [])
    ]
    pending.reverse()
    found, visited = [], set()
    while pending:
        index, parent = pending.pop()
        if index in visited:
            raise ValueError(f"node {index} is reached twice")
        visited.add(index)
        node = nodes[index]
        pose = parent @ _transform(node)
        if "camera" in node and cameras[node["camera"]]["type"] == "perspective":
            lens = {key: float(value) for key, value in cameras[node["camera"]]["perspective"].items() if key in _LENS}
            _check(lens)
            found.append((_unscaled(pose, index), lens))
        pending += [(child, pose) for child in reversed(node.get("children", []))]
    return found


_LENS = ("yfov", "aspectRatio", "znear", "zfar")


def _check(lens: Mapping[str, float]) -> None:
    finite = all(math.isfinite(value) and value > 0 for value in lens.values())
    if not finite or lens["yfov"] >= math.pi or lens["znear"] >= lens.get("zfar", _FAR):
        raise ValueError(f"a perspective must have 0 < yfov < pi and 0 < znear < zfar; got {dict(lens)}")


def _transform(node: Mapping[str, Any]) -> Tensor:
    if "matrix" in node:
        return torch.tensor(node["matrix"], dtype=torch.float64).view(4, 4).T  # stored by columns
    matrix = torch.eye(4, dtype=torch.float64)
    x, y, z, w = node.get("rotation", (0.0, 0.0, 0.0, 1.0))
    scale = torch.tensor(node.get("scale", (1.0, 1.0, 1.0)), dtype=torch.float64)
    matrix[:3, :3] = quat_to_matrix(torch.tensor([w, x, y, z], dtype=torch.float64)) * scale
    matrix[:3, 3] = torch.tensor(node.get("translation", (0.0, 0.0, 0.0)), dtype=torch.float64)
    return matrix


def _unscaled(pose: Tensor, index: int) -> Tensor:
    """The specification wants a camera unscaled; a uniform scale of a parent does not matter and is taken out."""
    lengths = pose[:3, :3].norm(dim=0)
    rotation = pose[:3, :3] / lengths
    error = (rotation.T @ rotation - torch.eye(3, dtype=pose.dtype)).abs().max()
    if not (error < 1e-4 and torch.linalg.det(rotation) > 0):
        raise ValueError(f"the camera of node {index} must be turned and moved only; its transform shears or mirrors")
    pose = pose.clone()
    pose[:3, :3] = rotation
    return pose
