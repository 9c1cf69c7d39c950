import threading

import pytest
import torch
from torch import Tensor

from tests.support.scenes import random_voxels, shuffled_within_samples
from trellis.nn.attention import AttentionMode, Windows, attention_layout
from trellis.nn.block import ModulatedBlock, TransformerBlock
from trellis.nn.segments import Segments
from trellis.nn.sparse import SparseTensor, VoxelGrid, coarser, finer, neighbors, repeated


def voxels(batch: int = 2) -> SparseTensor:
    coords = shuffled_within_samples(random_voxels(12, 0.05, batch))
    return SparseTensor.from_coords(coords, torch.randn(len(coords), 24), 12)


def test_keeps_the_order_of_the_voxels() -> None:
    coords = shuffled_within_samples(random_voxels(6, 0.2, 2))
    feats = torch.randn(len(coords), 3)
    x = SparseTensor.from_coords(coords, feats)
    assert torch.equal(x.coords, coords)
    assert torch.equal(x.feats, feats)


def test_a_trailing_empty_sample_needs_batch_size() -> None:
    coords, feats = torch.tensor([[0, 1, 2, 3]]), torch.zeros(1, 2)
    assert len(SparseTensor.from_coords(coords, feats)) == 1
    padded = SparseTensor.from_coords(coords, feats, batch_size=3)
    assert padded.segments.lengths == (1, 0, 0)
    assert padded.sample(2).coords.shape == (0, 4)


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]), "non-decreasing batch index"),
        (torch.tensor([[0, -1, 0, 0], [0, 0, 0, 0]]), "must not be negative; the least is -1"),
        (torch.tensor([[0, 0, 8, 0], [0, 0, 0, 0]]), "must be below resolution=8; the largest is 8"),
        (torch.zeros(2, 3, dtype=torch.int32), r"coords must be \[N, 4\] integer"),
        (torch.zeros(2, 4), r"coords must be \[N, 4\] integer"),
        (torch.zeros(3, 4, dtype=torch.int32), r"feats must be \[N, C\] with N=3; got \[2, 1\]"),
        (torch.tensor([[0, 0, 0, 0], [5, 0, 0, 0]]), "batch indices below batch_size=4; got 5"),
    ],
)
def test_names_what_is_wrong_with_coords(coords: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseTensor.from_coords(coords, torch.zeros(2, 1), resolution=8, batch_size=4)


def test_tensors_of_different_grids_do_not_add() -> None:
    with pytest.raises(ValueError, match="only on the same VoxelGrid"):
        voxels() + voxels()


def test_unknown_resolution_is_said_when_it_is_needed() -> None:
    grid = SparseTensor.from_coords(torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 1)).grid
    with pytest.raises(ValueError, match="needs the grid's resolution"):
        grid.require_resolution()


def test_what_is_derived_is_built_once_even_by_many_threads() -> None:
    x, built = voxels(), []

    def build(grid: VoxelGrid) -> object:
        built.append(object())
        return built[-1]

    threads = [threading.Thread(target=x.grid.derive, args=(build,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_what_inference_derives_can_be_trained_on_later() -> None:
    x = voxels()
    with torch.inference_mode():
        x.grid.derive(neighbors, 3)
        x.grid.derive(coarser, 2)
    assert not x.grid.derive(neighbors, 3).is_inference()
    assert not x.grid.derive(coarser, 2).inverse.is_inference()


def test_the_finer_grid_knows_its_neighbors() -> None:
    fine = voxels().grid.derive(finer)
    expected = VoxelGrid(fine.coords, fine.segments, fine.resolution).derive(neighbors, 3)
    assert torch.equal(fine.derive(neighbors, 3), expected)


def test_the_maps_of_a_repeated_grid_are_those_that_would_be_found() -> None:
    grid = voxels(2).grid
    thrice = grid.derive(repeated, 3)
    assert thrice.segments.lengths == grid.segments.lengths * 3
    found = VoxelGrid(thrice.coords, thrice.segments, 12)
    assert torch.equal(thrice.derive(neighbors, 3), found.derive(neighbors, 3))
    ours, expected = thrice.derive(coarser, 2), found.derive(coarser, 2)
    assert torch.equal(ours.inverse, expected.inverse)
    assert torch.equal(ours.grid.coords, expected.grid.coords)
    assert ours.grid.segments.lengths == expected.grid.segments.lengths
    assert torch.equal(ours.grid.derive(neighbors, 3), expected.grid.derive(neighbors, 3))


@pytest.mark.parametrize("mode", ["full", "swin", "shift_window", "shift_sequence", "shift_order"])
@pytest.mark.parametrize("block", range(4))
def test_attention_layouts_partition_each_sample(mode: AttentionMode, block: int) -> None:
    x = voxels(3)
    layout = attention_layout(x.grid, mode, 8, block)
    if isinstance(layout, Segments):
        assert layout is x.segments
        return
    assert isinstance(layout, Windows)
    assert torch.equal(layout.order.sort().values, torch.arange(len(x.coords), dtype=torch.int32))
    lengths = layout.offsets.diff()
    assert int(lengths.min()) > 0
    if mode != "swin":
        assert int(lengths.max()) <= 8
    sample_of = x.coords[layout.order.long(), 0].split(lengths.tolist())
    assert all(len(rows.unique()) == 1 for rows in sample_of)


def test_alternate_blocks_shift_their_windows() -> None:
    coords = random_voxels(64, 0.001, 2)
    grid = SparseTensor.from_coords(coords, torch.zeros(len(coords), 1)).grid
    for mode in ("swin", "shift_window", "shift_sequence", "shift_order"):
        even, odd = (attention_layout(grid, mode, 8, block) for block in (0, 1))
        assert not (torch.equal(even.order, odd.order) and torch.equal(even.offsets, odd.offsets))
        assert attention_layout(grid, mode, 8, 0) is even


@pytest.mark.parametrize("mode", ["full", "swin"])
def test_block_on_a_batch_is_the_block_on_each_sample(mode: AttentionMode) -> None:
    block, x = TransformerBlock(24, 2, qk_norm=True).requires_grad_(False), voxels(3)
    together = block(x.feats, attention_layout(x.grid, mode, 8, 1))
    alone = [x.sample(i) for i in range(3)]
    apart = torch.cat([block(s.feats, attention_layout(s.grid, mode, 8, 1)) for s in alone])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_modulated_block_on_ragged_samples_is_the_block_on_each() -> None:
    block = ModulatedBlock(24, 10, 2, qk_norm=True)
    torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    block.requires_grad_(False)
    lengths, context_lengths = (5, 1, 9), (3, 4, 2)
    x, timestep, context = torch.randn(15, 24), torch.randn(3, 24), torch.randn(9, 10)
    together = block(x, Segments.of(lengths), timestep, context, Segments.of(context_lengths))
    parts = zip(x.split(lengths), timestep.split(1), context.split(context_lengths), strict=True)
    apart = [block(part, Segments.of([len(part)]), t, c, Segments.of([len(c)])) for part, t, c in parts]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)
