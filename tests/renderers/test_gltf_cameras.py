import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from trellis.renderers.camera import Cameras

LENS = {"yfov": math.radians(40), "znear": 0.5, "zfar": 20.0}


def scene(nodes: list[dict[str, Any]], lens: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:
    cameras = [{"type": "perspective", "perspective": LENS | (lens or {})}, {"type": "orthographic"}]
    roots = {"scene": 0, "scenes": [{"nodes": [0]}]}
    return {"asset": {"version": "2.0"}, "nodes": nodes, "cameras": cameras} | roots | more


def written(folder: Path, document: Any) -> Path:
    path = folder / "scene.gltf"
    path.write_text(json.dumps(document))
    return path


def test_sees_the_object_from_the_front(tmp_path: Path) -> None:
    """glTF's +z is our -y, its +y our +z: a camera at (0, 1, 2) there is at (0, -2, 1) here."""
    pitch = -math.atan2(1, 2)
    node = {"camera": 0, "translation": [0, 1, 2], "rotation": [math.sin(pitch / 2), 0, 0, math.cos(pitch / 2)]}
    cameras = Cameras.from_gltf(written(tmp_path, scene([node])))
    expected = Cameras.look_at((0.0, -2.0, 1.0), fov=LENS["yfov"])
    torch.testing.assert_close(cameras.extrinsics, expected.extrinsics, rtol=0, atol=1e-6)
    torch.testing.assert_close(cameras.intrinsics, expected.intrinsics)
    assert (cameras.near, cameras.far) == (0.5, 20.0)


def test_transforms_of_parents_add_up_and_orthographic_cameras_are_passed_over(tmp_path: Path) -> None:
    turn = [0, 0, -1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]  # by columns: 90 degrees about y, z to x
    nodes = [
        {"children": [1, 2, 3], "matrix": turn, "scale": [9, 9, 9]},
        {"camera": 1},
        {"camera": 0, "translation": [0, 0, 3]},
        {"children": [4], "scale": [2, 2, 2]},
        {"camera": 0, "translation": [0, 0, 2]},
    ]
    cameras = Cameras.from_gltf(written(tmp_path, scene(nodes)))
    torch.testing.assert_close(cameras.centers, torch.tensor([[3.0, 0, 0], [4.0, 0, 0]]))
    torch.testing.assert_close(cameras.extrinsics[:1], Cameras.look_at((3.0, 0.0, 0.0)).extrinsics, rtol=0, atol=1e-6)


def test_aspect_ratio_and_missing_far_plane(tmp_path: Path) -> None:
    document = scene([{"camera": 0, "translation": [0, 0, 2]}], {"aspectRatio": 2.0})
    del document["cameras"][0]["perspective"]["zfar"]
    cameras = Cameras.from_gltf(written(tmp_path, document))
    torch.testing.assert_close(cameras.intrinsics[0, 0, 0] * 2, cameras.intrinsics[0, 1, 1])
    assert cameras.far == 1000


def test_reads_the_binary_form(tmp_path: Path) -> None:
    text = json.dumps(scene([{"camera": 0}])).encode()
    text += b" " * (-len(text) % 4)
    path = tmp_path / "scene.glb"
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 20 + len(text)) + struct.pack("<I4s", len(text), b"JSON") + text)
    assert Cameras.from_gltf(path).centers.abs().max() == 0


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (scene([{}]), "must have a perspective camera in its scene"),
        (scene([{"camera": 1}]), "must have a perspective camera in its scene"),
        (scene([{"camera": 7}]), "must be a valid glTF file: IndexError"),
        (scene([{"children": [0]}]), "node 0 is reached twice"),
        (scene([{"camera": 0, "scale": [1, -1, 1]}]), "shears or mirrors"),
        (scene([{"camera": 0, "scale": [0, 0, 0]}]), "shears or mirrors"),
        (scene([{"camera": 0}], {"yfov": 4.0}), "0 < yfov < pi"),
        (scene([{"camera": 0}], {"zfar": 0.1}), "0 < znear < zfar"),
        (scene([{"camera": 0, "rotation": [1, 2]}]), "must be a valid glTF file"),
        ([1, 2], "its JSON is no object"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cameras.from_gltf(written(tmp_path, document))


def test_says_what_is_wrong_with_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.glb"
    for data in (b"", b"glTF", b"\xff\xfe{", struct.pack("<4sIII4s", b"glTF", 1, 20, 0, b"JSON")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="must be a valid glTF file"):
            Cameras.from_gltf(path)
