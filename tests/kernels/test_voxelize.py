"""voxelize_mesh: the thirteen-axis definition, sampled surfaces, closed forms, symmetries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trellis_kernels import use_reference, voxelize_mesh

OPS = torch.ops.trellis_kernels


def triangles(count: int, spread: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Triangles of every size, some beyond the cube."""
    centers = torch.rand(count, 1, 3, dtype=dtype) * 1.2 - 0.6
    size = spread * torch.rand(count, 1, 1, dtype=dtype) ** 3
    vertices = (centers + size * torch.randn(count, 3, 3, dtype=dtype)).reshape(-1, 3)
    return vertices, torch.arange(3 * count, dtype=torch.int32).view(-1, 3)


@pytest.mark.parametrize("resolution", [1, 2, 7, 33, 64, 70])
@pytest.mark.parametrize("count", [0, 1, 5, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_agrees_with_reference(resolution: int, count: int, dtype: torch.dtype) -> None:
    vertices, faces = triangles(count, 0.2, dtype)
    actual = voxelize_mesh(vertices, faces, resolution)
    with use_reference():
        expected = voxelize_mesh(vertices, faces, resolution)
    assert actual.dtype == torch.int32
    assert torch.equal(actual, expected)


@given(seed=st.integers(0, 9999), snap=st.booleans())
@settings(max_examples=20, deadline=None)
def test_every_sample_of_the_surface_lies_in_a_voxel_and_every_voxel_near_the_surface(seed: int, snap: bool) -> None:
    torch.manual_seed(seed)
    vertices, faces = triangles(4, 0.4, torch.float64)
    if snap:  # onto the grid's own planes
        vertices = (vertices * 16).round() / 16
    coords = voxelize_mesh(vertices, faces, 16)
    weights = torch.rand(4, 20000, 3, dtype=torch.float64)
    weights = torch.cat([weights, torch.eye(3, dtype=torch.float64).expand(4, 3, 3)], 1)
    samples = ((weights / weights.sum(-1, keepdim=True)) @ vertices[faces.long()]).view(-1, 3)
    inside = samples[(samples.abs() < 0.5).all(-1)]
    found = set(map(tuple, coords.tolist()))
    assert set(map(tuple, ((inside + 0.5) * 16).floor().clamp(0, 15).long().tolist())) <= found
    if len(coords):
        centers = (coords + 0.5) / 16 - 0.5
        reach = torch.cdist(centers.double(), samples).amin(1)
        assert reach.max() < 0.5 * 3**0.5 / 16 + 0.12  # half a diagonal, and how far apart the samples are


def test_an_axis_aligned_square_touches_the_layers_on_both_sides() -> None:
    vertices = torch.tensor([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)
    assert voxelize_mesh(vertices, faces, 8)[:, 2].unique().tolist() == [3, 4]
    lifted = voxelize_mesh(vertices + torch.tensor([0, 0, 0.01]), faces, 8)
    assert lifted.tolist() == torch.cartesian_prod(torch.arange(8), torch.arange(8), torch.tensor([4])).tolist()


@given(seed=st.integers(0, 9999))
@settings(max_examples=20, deadline=None)
def test_turned_meshes_give_turned_voxels_and_unions_are_unions(seed: int) -> None:
    torch.manual_seed(seed)
    vertices, faces = triangles(6, 0.3, torch.float64)
    coords = voxelize_mesh(vertices, faces, 12)
    turned = voxelize_mesh(vertices[:, [1, 2, 0]], faces.flip(1), 12)
    assert set(map(tuple, turned.tolist())) == set(map(tuple, coords[:, [1, 2, 0]].tolist()))
    mirrored = voxelize_mesh(-vertices, faces, 12)
    assert set(map(tuple, mirrored.tolist())) == set(map(tuple, (11 - coords).tolist()))
    parts = torch.cat([voxelize_mesh(vertices, faces[:2], 12), voxelize_mesh(vertices, faces[2:], 12)])
    assert torch.equal(parts.unique(dim=0), coords)


def test_degenerate_and_broken_triangles() -> None:
    point, far = torch.full((1, 3), 0.1), torch.tensor([[0.1, 0.1, 0.45]])
    vertices = torch.cat([point, far, torch.full((1, 3), float("nan")), torch.full((1, 3), 1e30), torch.zeros(1, 3)])
    assert voxelize_mesh(vertices, torch.tensor([[0, 0, 0]], dtype=torch.int32), 8).tolist() == [[4, 4, 4]]
    segment = voxelize_mesh(vertices, torch.tensor([[0, 1, 0]], dtype=torch.int32), 8)
    assert segment.tolist() == [[4, 4, z] for z in range(4, 8)]
    assert len(voxelize_mesh(vertices, torch.tensor([[0, 1, 2]], dtype=torch.int32), 8)) == 0
    assert len(voxelize_mesh(vertices, torch.tensor([[3, 3, 3]], dtype=torch.int32), 8)) == 0
    huge = voxelize_mesh(vertices, torch.tensor([[3, 4, 4]], dtype=torch.int32), 8)  # a ray along the diagonal
    assert {(i, i, i) for i in range(4, 8)} <= set(map(tuple, huge.tolist()))


def test_result_does_not_depend_on_the_thread_count() -> None:
    vertices, faces = triangles(3000, 0.05)
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(voxelize_mesh(vertices, faces, 64))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_operator_contract() -> None:
    vertices, faces = triangles(5, 0.2)
    torch.library.opcheck(OPS.voxelize_mesh.default, (vertices, faces, 8))


def test_arguments_that_do_not_fit_are_named() -> None:
    vertices, faces = triangles(2, 0.2)
    with pytest.raises(ValueError, match=r"resolution must be in \[1, 1024\]; got 0"):
        voxelize_mesh(vertices, faces, 0)
    with pytest.raises(ValueError, match=r"faces must be rows of vertices, in \[0, 6\); got 6"):
        voxelize_mesh(vertices, faces + 1, 8)
    with pytest.raises(TypeError, match=r"faces must be torch.int32; got torch.int64"):
        voxelize_mesh(vertices, faces.long(), 8)
