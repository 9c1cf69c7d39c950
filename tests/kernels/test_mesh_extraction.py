from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.support.golden import golden
from tests.support.mesh_network import mesh_features
from tests.support.meshes import euler_characteristic, signed_volume
from trellis_kernels import ExtractedMesh, extract_mesh, use_reference
from trellis_kernels.mesh_extraction.tables import corner_offsets


def full_grid(resolution: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(resolution)] * 3).int().reshape(-1, 3)


def sphere(resolution: int, radius: float = 0.35, colors: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Network output for a sphere on the full grid: zero weights and deformation, the sdf exact, colors 0."""
    coords = full_grid(resolution)
    points = (coords[:, None] + corner_offsets()).to(dtype) / resolution - 0.5
    feats = torch.zeros(len(coords), 53 + 8 * colors, dtype=dtype)
    feats[:, :8] = points.norm(dim=2) - radius + 1 / resolution
    return feats


def extract(coords: Tensor, feats: Tensor, resolution: int, training: bool, kernel: str) -> ExtractedMesh:
    if kernel == "native":
        return extract_mesh(coords, feats, resolution, training)
    with use_reference():
        return extract_mesh(coords, feats, resolution, training)


@cache
def network_output() -> tuple[Tensor, Tensor]:
    return mesh_features(golden("slat_dec_mesh"))


KERNELS = ["reference"]


def test_the_network_behind_the_golden_mesh_is_the_official_one() -> None:
    coords, feats = network_output()
    golden("slat_dec_mesh").check("out.coords", coords)
    golden("slat_dec_mesh").check("out.feats", feats, max_abs=2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sample", [0, 1])
def test_extraction_gives_the_official_mesh(sample: int, kernel: str) -> None:
    item = golden("slat_dec_mesh")
    coords, feats = network_output()
    rows = coords[:, 0] == sample
    coords, feats, resolution = coords[rows, 1:].contiguous(), feats[rows], item.info["dense_res"]

    mesh = extract(coords, feats, resolution, False, kernel)
    assert [len(mesh.vertices), len(mesh.faces)] == item[f"out.{sample}.num"].tolist()
    distance, nearest = torch.cdist(item[f"out.{sample}.vertices"].double(), mesh.vertices.double()).min(1)
    assert distance.max() <= 5e-5
    assert (mesh.attributes[nearest] - item[f"out.{sample}.vertex_attrs"]).abs().max() <= 2e-4
    corners = item[f"out.{sample}.face_corners"].double().flatten(0, 1)
    distance, nearest = torch.cdist(corners, mesh.vertices.double()).min(1)
    assert distance.max() <= 5e-5
    stored = {min((a, b, c), (b, c, a), (c, a, b)) for a, b, c in nearest.view(-1, 3).tolist()}
    assert stored <= {min((a, b, c), (b, c, a), (c, a, b)) for a, b, c in mesh.faces.tolist()}

    mesh = extract(coords, feats, resolution, True, kernel)
    assert [len(mesh.vertices), len(mesh.faces)] == item[f"train.{sample}.num"].tolist()
    terms = mesh.terms
    assert terms is not None
    regularization = terms.consistency + 0.5 * terms.deviation + 0.2 * terms.weight_magnitude
    assert math.isclose(regularization, item[f"train.{sample}.reg_loss"], rel_tol=1e-6)
    item.check(f"train.{sample}.tsdf_v", terms.grid_positions)
    item.check(f"train.{sample}.tsdf_s", terms.grid_sdf)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("training", [False, True])
def test_a_sphere_becomes_a_closed_surface_of_its_size_facing_outward(training: bool, kernel: str) -> None:
    errors = []
    for resolution in (10, 20):
        mesh = extract(full_grid(resolution), sphere(resolution), resolution, training, kernel)
        assert mesh.success
        assert euler_characteristic(mesh.faces) == 2
        assert (mesh.vertices.norm(dim=1) - 0.35).abs().max() < 1.5 / resolution**2
        torch.testing.assert_close(mesh.attributes, torch.full_like(mesh.attributes, 0.5))
        errors.append(signed_volume(mesh.vertices, mesh.faces) / (4 / 3 * math.pi * 0.35**3) - 1)
    assert abs(errors[1]) < 0.03
    assert errors[1] / errors[0] == pytest.approx(1 / 4, rel=0.3)  # second order


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_cubes_or_no_change_of_sign_is_an_empty_mesh(kernel: str) -> None:
    coords = full_grid(2)
    for count, training in ((0, False), (0, True), (8, False), (8, True)):
        mesh = extract(coords[:count], torch.ones(count, 53 + 16), 2, training, kernel)
        assert not mesh.success
        assert mesh.vertices.shape == (0, 3)
        assert mesh.faces.shape == (0, 3)
        assert mesh.attributes.shape == (0, 2)
        if mesh.terms is not None:
            assert torch.equal(torch.stack(mesh.terms[:3]), torch.tensor([0.0, 0.0, 1.0 * (count > 0)]))
            assert mesh.terms.grid_sdf.shape == ((27 if count else 0),)
