"""What the benchmarks prepare for other libraries, checked where those are missing."""

import torch

from benchmarks.peers import convolution_matrix
from tests.support.scenes import sphere_voxels
from tests.support.sparse_maps import neighbors_of
from trellis_kernels import submanifold_conv


def test_the_sparse_matrix_of_a_neighbor_map_gives_the_convolution() -> None:
    neighbors = neighbors_of(sphere_voxels(8))
    feats, weight = torch.randn(len(neighbors), 5), torch.randn(7, 27, 5)
    offsets, columns = convolution_matrix(neighbors)
    rows, taps = neighbors.shape
    matrix = torch.sparse_csr_tensor(offsets, columns, torch.ones(len(columns)), size=(rows, taps * rows))
    products = (feats @ weight.permute(2, 1, 0).flatten(1)).view(rows * taps, -1)
    torch.testing.assert_close(matrix @ products, submanifold_conv(feats, neighbors, weight), rtol=1e-4, atol=1e-4)
