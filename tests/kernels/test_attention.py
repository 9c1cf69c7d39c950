import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as dense_attention

from tests.support.golden import golden
from tests.support.scenes import random_voxels, shuffled_within_samples
from trellis_kernels import use_reference, varlen_attention, window_partition, windowed_attention


def offsets_of(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def by_sequence(query: Tensor, key: Tensor, value: Tensor, queries: list[int], keys: list[int]) -> Tensor:
    """The independent truth: torch's attention, in float64, one sequence after the other."""
    sequences = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
    out = [dense_attention(*(x.double().transpose(0, 1) for x in sequence)).transpose(0, 1) for sequence in sequences]
    return torch.cat(out)


def test_reference_agrees_with_torch_on_each_sequence() -> None:
    queries, keys = [5, 1, 30], [7, 2, 40]
    query, key, value = torch.randn(36, 3, 8), torch.randn(49, 3, 8), torch.randn(49, 3, 8)
    with use_reference():
        out = varlen_attention(query, key, value, offsets_of(*queries), offsets_of(*keys))
    torch.testing.assert_close(out.double(), by_sequence(query, key, value, queries, keys), rtol=1e-5, atol=1e-6)


def test_reference_differentiates() -> None:
    query, key, value = (torch.randn(n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (6, 9, 9))
    with use_reference():
        assert torch.autograd.gradcheck(
            lambda *x: varlen_attention(*x, offsets_of(2, 4, 0), offsets_of(5, 0, 4)), (query, key, value)
        )
        qkv = torch.randn(7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
        order = torch.randperm(7).int()
        assert torch.autograd.gradcheck(lambda x: windowed_attention(x, order, offsets_of(3, 4)), qkv)


@pytest.mark.parametrize(("window_size", "shift"), [(4, 0), (4, 2), (8, 0), (8, 4)])
def test_windows_are_the_official_ones(window_size: int, shift: int) -> None:
    item, name = golden("sparse_ops"), f"out.win{window_size}_s{shift}"
    coords = item["in.coords"]
    with use_reference():
        order, offsets = window_partition(coords, window_size, shift)
    lengths = offsets.diff()
    rank = torch.empty_like(order)
    rank[order.long()] = torch.arange(len(lengths)).repeat_interleave(lengths).int()
    item.check(f"{name}.window_rank_per_voxel", rank)
    item.check(f"{name}.seq_lens", lengths)
    item.check(f"{name}.seq_batch", coords[order[offsets[:-1].long()].long(), 0])


def test_windows_are_attended_one_by_one() -> None:
    coords = shuffled_within_samples(random_voxels(12, 0.1, batch=2))
    qkv = torch.randn(len(coords), 3, 2, 8)
    with use_reference():
        order, offsets = window_partition(coords, 4, 2)
        out = windowed_attention(qkv, order, offsets)
    for rows in order.long().split(offsets.diff().tolist()):
        expected = by_sequence(*qkv[rows].unbind(1), [len(rows)], [len(rows)])
        torch.testing.assert_close(out[rows].double(), expected, rtol=1e-5, atol=1e-6)
