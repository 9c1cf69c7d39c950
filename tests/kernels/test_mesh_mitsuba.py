"""A textured mesh beside Mitsuba's scalar renderer: coverage, triangles, depth, interpolated and textured color."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.solids import torus
from trellis.renderers.camera import Cameras
from trellis_kernels import interpolate, rasterize_mesh, sample_texture

SIZE = 56


def test_every_pixel_agrees_with_mitsuba(tmp_path: Path) -> None:
    mi = pytest.importorskip("mitsuba")
    mi.set_variant("scalar_rgb")
    torch.manual_seed(3)
    mesh = torus()
    assert mesh.colors is not None
    uv, image = torch.rand(len(mesh.vertices), 2), torch.rand(7, 5, 3)

    solid = mi.Mesh("torus", len(mesh.vertices), len(mesh.faces), has_vertex_texcoords=True)
    parameters = mi.traverse(solid)
    parameters["vertex_positions"] = mesh.vertices.flatten().tolist()
    parameters["faces"] = mesh.faces.flatten().tolist()
    parameters["vertex_texcoords"] = uv.flatten().tolist()
    parameters.update()
    path = str(tmp_path / "torus.ply")
    solid.write_ply(path)
    scene = mi.load_dict({"type": "scene", "torus": {"type": "ply", "filename": path}})
    bitmap = {"type": "bitmap", "bitmap": mi.Bitmap(image.numpy()), "raw": True, "filter_type": "bilinear"}
    texture = mi.load_dict(bitmap)

    camera = Cameras.look_at((0.9, 1.0, 0.7), near=0.5, far=4.0)
    steps = (torch.arange(SIZE) + 0.5) / SIZE
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    local = torch.stack([x, y, torch.ones_like(x)], -1).view(-1, 3) @ torch.linalg.inv(camera.intrinsics[0]).T
    rays = local @ camera.extrinsics[0, :3, :3]  # of depth 1
    rows = []
    for ray in rays.tolist():
        found = scene.ray_intersect(mi.Ray3f(camera.centers[0].tolist(), ray))
        if found.is_valid():
            preliminary = scene.ray_intersect_preliminary(mi.Ray3f(camera.centers[0].tolist(), ray))
            color = np.array(texture.eval_3(found)).ravel()
            rows.append([found.prim_index, found.t, *np.array(preliminary.prim_uv).ravel(), *color])
        else:
            rows.append([-1.0, *[0.0] * 6])
    ids, depths, b, c, *colors = torch.tensor(rows).view(SIZE, SIZE, 7).unbind(-1)

    clip = torch.nn.functional.pad(mesh.vertices, (0, 1), value=1.0) @ (camera.projection @ camera.extrinsics).mT
    faces = mesh.faces.int()
    drawn = rasterize_mesh(clip, faces, SIZE, SIZE)
    assert ((drawn.faces[0] >= 0) != (ids >= 0)).sum() <= 1
    same = (drawn.faces[0] == ids) & (ids >= 0)
    assert same.sum() > 300
    assert same.sum() > 0.99 * (ids >= 0).sum()  # rays through edges may hit either side
    z = interpolate(clip[..., 3:], faces, drawn)[0, ..., 0]
    torch.testing.assert_close(z[same], depths[same], rtol=0, atol=1e-5)
    weights = torch.stack([1 - b - c, b, c], -1)
    corners = mesh.colors[mesh.faces[ids.long().clamp_min(0)]]
    shown = interpolate(mesh.colors[None], faces, drawn)[0]
    torch.testing.assert_close(shown[same], (corners * weights[..., None]).sum(2)[same], rtol=0, atol=1e-4)
    at = interpolate(uv[None], faces, drawn)
    textured = sample_texture(image[None], at)[0]
    torch.testing.assert_close(textured[same], torch.stack(colors, -1)[same], rtol=0, atol=1e-3)
