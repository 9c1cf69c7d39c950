"""submanifold_conv, subdivided_conv and their gradients: reference, dense convolution, golden values."""

import torch
from torch import Tensor
from torch.nn.functional import conv3d

from tests.support.golden import golden
from tests.support.sparse_maps import children_of, neighbors_of
from trellis_kernels import (
    pointwise_conv,
    subdivide,
    subdivided_conv,
    submanifold_conv,
    use_reference,
)


def test_golden_convolution() -> None:
    item = golden("sparse_ops")
    parameters, coords = item.parameters(), item["in.coords"]
    weight = parameters["conv.conv.weight"].view(5, 27, 6)
    arguments = item["in.feats"], neighbors_of(coords), weight, parameters["conv.conv.bias"]
    item.check("out.subm_conv3", submanifold_conv(*arguments))
    with use_reference():
        item.check("out.subm_conv3", submanifold_conv(*arguments))


def test_golden_pointwise_convolution_reads_the_stored_memory_again() -> None:
    item = golden("sparse_ops")
    parameters = item.parameters()
    weight, bias = parameters["conv1.conv.weight"], parameters["conv1.conv.bias"]
    item.check("out.subm_conv1x1", pointwise_conv(item["in.feats"], weight, bias))
    item.check("out.subm_conv1x1", pointwise_conv(item["in.feats"], weight.view(4, 1, 6), bias))


def dense(coords: Tensor, feats: Tensor, weight: Tensor, resolution: int) -> Tensor:
    """conv3d over the grid of one sample, read at the voxels."""
    _, x, y, z = coords.long().T
    grid = feats.new_zeros(feats.shape[1], *(resolution,) * 3)
    grid[:, x, y, z] = feats.T
    kernel = weight.unflatten(1, (3, 3, 3)).movedim(-1, 1)
    return conv3d(grid[None], kernel, padding=1)[0][:, x, y, z].T


def test_reference_is_dense_convolution_read_at_the_occupied_voxels() -> None:
    coords = (torch.rand(1, 6, 6, 6) < 0.3).nonzero().int()
    feats = torch.randn(len(coords), 4, dtype=torch.float64)
    weight = torch.randn(7, 27, 4, dtype=torch.float64)
    with use_reference():
        actual = submanifold_conv(feats, neighbors_of(coords), weight)
    torch.testing.assert_close(actual, dense(coords, feats, weight, 6))


def test_reference_of_subdivided_is_dense_convolution_of_the_children() -> None:
    coords = (torch.rand(1, 5, 5, 5) < 0.3).nonzero().int()
    feats = torch.randn(len(coords), 4, dtype=torch.float64)
    weight = torch.randn(3, 27, 4, dtype=torch.float64)
    with use_reference():
        actual = subdivided_conv(feats, neighbors_of(coords), weight)
    torch.testing.assert_close(actual, dense(children_of(coords), subdivide(feats), weight, 10))
