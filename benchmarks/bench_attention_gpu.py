"""Attention in half precision on a GPU, beside what torch and flash-attn offer there.

    pytest benchmarks/bench_attention_gpu.py            # `--full` adds other configurations of our kernels

Windows: 8^3 over thin shells, 12 heads of 64, as in the released latent decoders; the peer gathers the rows window by
window, runs flash attention over packed sequences and scatters the result. Full attention: 16 heads of 64 or 80, token
counts of the flow models, two sequences as guidance needs them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as dense_attention

from benchmarks.device import ON_GPU, device, measure
from benchmarks.peers import flash_varlen
from tests.support.scenes import sphere_voxels
from trellis_kernels import varlen_attention, window_partition, windowed_attention

pytestmark = [ON_GPU, pytest.mark.priority(1)]
FULL = pytest.mark.full
HEADS, WIDTH = 12, 64
WINDOWS = [pytest.param(36, id="5k"), pytest.param(70, id="20k"), pytest.param(86, id="30k", marks=FULL)]
DENSE = [  # sequences, queries, keys, width
    pytest.param(2, 4096, 4096, 64, id="4096"),
    pytest.param(1, 4096, 4096, 64, id="4096, one sequence"),
    pytest.param(2, 4096, 1374, 64, id="4096 to 1374"),
    pytest.param(2, 5657, 5657, 64, id="5657"),
    pytest.param(2, 4096, 4096, 80, id="4096, width 80"),
    pytest.param(1, 20000, 20000, 64, id="20000", marks=FULL),
]
DIRECTIONS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
Windowed = Callable[[Tensor], Tensor]


def trellis(order: Tensor, offsets: Tensor) -> Windowed:
    return lambda qkv: windowed_attention(qkv, order, offsets)


def gather_flash_scatter(order: Tensor, offsets: Tensor) -> Windowed:
    attend, longest = flash_varlen(), int(offsets.diff().max())
    forth = order.long()
    back = forth.argsort()

    def run(qkv: Tensor) -> Tensor:
        return attend(*qkv[forth].unbind(1), offsets, offsets, longest, longest)[back]

    return run


def plain_partition(coords: Tensor, window_size: int, shift: int) -> tuple[Tensor, Tensor]:
    """Sort by window number, count, and bring the lengths to the host."""
    batch, *axes = coords.long().unbind(1)
    number = batch
    for axis in axes:
        cell = (axis + shift) // window_size
        number = number * (cell.max() + 1) + cell
    lengths = number.bincount()
    lengths = lengths[lengths > 0].tolist()
    return number.argsort(stable=True).int(), torch.tensor([0, *lengths], device=coords.device).cumsum(0).int()


def time_direction(
    benchmark, run: Callable[[], Tensor], inputs: list[Tensor], gflop: float, backward: bool, gigabytes: float = 0
) -> None:
    """`gflop` of one product; forward makes 2 of them, backward 5 more."""
    dtype = inputs[0].dtype
    if backward:
        upstream = torch.randn_like(run())
        step = lambda: torch.autograd.grad(run(), inputs, upstream)  # noqa: E731
        measure(benchmark, step, rounds=2, gflop=7 * gflop, dtype=dtype)
    else:
        with torch.inference_mode():
            measure(benchmark, run, rounds=3, gflop=2 * gflop, gigabytes=gigabytes, dtype=dtype)


def check(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=5e-3)


@DIRECTIONS
@pytest.mark.parametrize("implementation", [trellis, gather_flash_scatter], ids=lambda f: f.__name__)
@pytest.mark.parametrize("edge", WINDOWS)
def test_windows(benchmark, implementation: Callable[..., Windowed], edge: int, backward: bool) -> None:
    coords, order, offsets, qkv = windows(edge, backward)
    run = implementation(order, offsets)
    benchmark.group = (
        f"windows float16 {'forward and backward' if backward else 'forward'}, {len(coords)} voxels, {HEADS} x {WIDTH}"
    )
    check(run(qkv), trellis(order, offsets)(qkv))
    read_and_written = 1e-9 * qkv.nbytes * 4 / 3
    time_direction(benchmark, lambda: run(qkv), [qkv], products_of(offsets), backward, read_and_written)


@pytest.mark.parametrize("implementation", [trellis, gather_flash_scatter], ids=lambda f: f.__name__)
def test_windows_with_their_partition(benchmark, implementation: Callable[..., Windowed]) -> None:
    coords, _, offsets, qkv = windows(70, backward=False)
    benchmark.group = f"partition and windows float16, {len(coords)} voxels, {HEADS} x {WIDTH}"
    partition = window_partition if implementation is trellis else plain_partition
    assert all(torch.equal(a, b) for a, b in zip(partition(coords, 8, 4), window_partition(coords, 8, 4), strict=True))
    run = lambda: implementation(*partition(coords, 8, 4))(qkv)  # noqa: E731
    time_direction(benchmark, run, [qkv], products_of(offsets), backward=False)


def windows(edge: int, backward: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    coords = sphere_voxels(edge).to(device())
    order, offsets = window_partition(coords, 8, 4)
    qkv = torch.randn(len(coords), 3, HEADS, WIDTH, dtype=torch.float16, device=device(), requires_grad=backward)
    return coords, order, offsets, qkv


def products_of(offsets: Tensor) -> float:
    return 2e-9 * int(offsets.diff().long().square().sum()) * HEADS * WIDTH


@DIRECTIONS
@pytest.mark.parametrize("implementation", ["trellis", "flash varlen", "sdpa flash", "sdpa cudnn"])
@pytest.mark.parametrize(("sequences", "queries", "keys", "width"), DENSE)
def test_full(
    benchmark, implementation: str, sequences: int, queries: int, keys: int, width: int, backward: bool
) -> None:
    with device():
        inputs = [
            torch.randn(sequences * n, 16, width, dtype=torch.float16, requires_grad=backward)
            for n in (queries, keys, keys)
        ]
        offsets = [torch.arange(sequences + 1, dtype=torch.int32) * n for n in (queries, keys)]
    benchmark.group = (
        f"full float16 {'forward and backward' if backward else 'forward'}, "
        f"{sequences} x {queries} to {keys} tokens, 16 x {width}"
    )

    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            heads_first = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in inputs)
            with sdpa_kernel(backend):
                return dense_attention(*heads_first).transpose(1, 2).flatten(0, 1)

        return run

    run = {
        "trellis": lambda: lambda: varlen_attention(*inputs, *offsets),
        "flash varlen": lambda: (attend := flash_varlen()) and (lambda: attend(*inputs, *offsets, queries, keys)),
        "sdpa flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
    }[implementation]()
    check(run(), varlen_attention(*inputs, *offsets))
    time_direction(benchmark, run, inputs, 2e-9 * sequences * queries * keys * 16 * width, backward)


TILES = {  # queries, keys, warps, stages of what our kernels could be launched with instead: see triton.py
    "forward_tiles": [(128, 64, 4, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3)],
    "query_tiles": [(128, 64, 8, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 128, 8, 2)],
    "key_tiles": [(64, 64, 4, 2), (64, 128, 8, 3), (32, 128, 4, 3), (128, 128, 8, 1)],
}


@FULL
@pytest.mark.parametrize(
    ("kernel", "tiles"), [(k, t) for k, several in TILES.items() for t in [None, *several]], ids=str
)
def test_configurations_of_full(
    benchmark, monkeypatch: pytest.MonkeyPatch, kernel: str, tiles: tuple[int, ...] | None
) -> None:
    backward = kernel != "forward_tiles"
    choose(monkeypatch, kernel, tiles)
    benchmark.group = f"{kernel} of full attention, 2 x 4096 tokens, 16 x 64"
    with device():
        inputs = [torch.randn(8192, 16, 64, dtype=torch.float16, requires_grad=backward) for _ in range(3)]
        offsets = torch.arange(3, dtype=torch.int32) * 4096
    run = lambda: varlen_attention(*inputs, offsets, offsets)  # noqa: E731
    time_direction(benchmark, run, inputs, 2e-9 * 2 * 4096**2 * 16 * 64, backward)


WINDOW_TILES = {
    "forward_tiles": [(64, 64, 4, 1), (64, 64, 8, 2), (64, 32, 4, 2), (128, 64, 8, 2), (32, 64, 2, 2), (64, 64, 4, 3)],
    "window_tiles": [(64, 64, 8, 1), (64, 64, 4, 2), (32, 32, 4, 1), (32, 32, 2, 1), (128, 128, 8, 1)],
}


@FULL
@pytest.mark.parametrize(
    ("kernel", "tiles"), [(k, t) for k, several in WINDOW_TILES.items() for t in [None, *several]], ids=str
)
def test_configurations_of_windows(
    benchmark, monkeypatch: pytest.MonkeyPatch, kernel: str, tiles: tuple[int, ...] | None
) -> None:
    backward = kernel == "window_tiles"
    choose(monkeypatch, kernel, tiles)
    coords, order, offsets, qkv = windows(70, backward)
    benchmark.group = f"{kernel} of windows, {len(coords)} voxels, {HEADS} x {WIDTH}"
    time_direction(benchmark, lambda: windowed_attention(qkv, order, offsets), [qkv], products_of(offsets), backward)


def choose(monkeypatch: pytest.MonkeyPatch, kernel: str, tiles: tuple[int, ...] | None) -> None:
    from trellis_kernels.attention import triton

    if tiles:
        monkeypatch.setattr(triton, kernel, lambda *_, **__: triton.Tiles(*tiles))
