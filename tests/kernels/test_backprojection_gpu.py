"""The GPU kernels of backprojection: parity, an independent truth, the error rule, compilation ahead of time."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_backprojection import OPS, TOLERANCE, scene
from tests.support import aot
from tests.support.backends import TRITON_BACKENDS, to_backend
from trellis.renderers.camera import Cameras
from trellis_kernels import backproject, use_reference
from trellis_kernels.backprojection.order import morton_order
from trellis_kernels.backprojection.triton import channels_at_once

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
GPU = pytest.mark.parametrize("backend", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
# Points, views, side, channels. Scattered points see whole pictures: more pixels than are multiplied at once.
CASES = [
    pytest.param((0, 3, 5, 4), SINGLE, id="no points"),
    pytest.param((3, 0, 5, 4), SINGLE, id="no views"),
    pytest.param((5, 2, 0, 4), SINGLE, id="narrow pictures"),
    pytest.param((5, 2, 3, 0), SINGLE, id="no channels"),
    pytest.param((1, 1, 1, 1), SINGLE, id="one"),
    pytest.param((70, 9, 9, 20), SINGLE, id="two tiles, views of two programs"),
    pytest.param((30, 3, 6, 300), HALF, id="two blocks of channels, float16"),
    pytest.param((30, 3, 6, 70), BRAIN, id="bfloat16"),
]


@TRITON_BACKENDS
@pytest.mark.parametrize(("sizes", "dtype"), CASES)
@pytest.mark.parametrize("depths", [False, True])
@pytest.mark.parametrize("maximum", [False, True])
def test_agrees_with_reference_in_both_directions(
    backend: str, sizes: tuple[int, ...], dtype: torch.dtype, depths: bool, maximum: bool
) -> None:
    arguments = on_backend(scene(*sizes, dtype=dtype, depths=depths), backend)
    features, *geometry = arguments.values()
    out, counts, winners = OPS.backproject(features, *geometry, maximum)
    gradient = torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype)
    back = OPS.backproject_gradient(gradient, counts, winners, *geometry, maximum, *features.shape[1:3])
    with use_reference():
        expected, expected_counts, expected_winners = OPS.backproject(features, *geometry, maximum)
        expected_back = OPS.backproject_gradient(
            gradient, counts, winners, *geometry, maximum, *features.shape[1:3]
        )  # of the same winners: halves may tie
    assert torch.equal(counts, expected_counts)
    if dtype == SINGLE:
        assert torch.equal(winners, expected_winners)
    assert (out.dtype, back.dtype, back.shape) == (dtype, dtype, features.shape)
    torch.testing.assert_close(out, expected, rtol=0, atol=4 * TOLERANCE[dtype])
    torch.testing.assert_close(back, expected_back, rtol=0, atol=4 * TOLERANCE[dtype])


@TRITON_BACKENDS
def test_many_tiles_are_what_grid_sample_and_its_derivative_are(backend: str) -> None:
    """More than a group of tiles, on a curve through a surface; windows end anywhere in several squares of pixels."""
    directions = torch.nn.functional.normalize(torch.randn(1100, 3), dim=1) * 0.45
    cameras = Cameras.sphere_hammersley(1, radius=2, fov=math.radians(40))
    arguments = {
        "features": torch.randn(1, 17, 16, 4),
        "positions": directions,
        "extrinsics": cameras.extrinsics.to(directions),
        "intrinsics": cameras.intrinsics.to(directions),
    }
    arguments = on_backend(arguments, backend)
    arguments["features"].requires_grad_()
    uv, _ = Cameras(arguments["extrinsics"], arguments["intrinsics"]).project(arguments["positions"])
    pictures = arguments["features"].permute(0, 3, 1, 2)
    expected = (
        torch.nn.functional.grid_sample(pictures, (uv * 2 - 1)[:, :, None], align_corners=False).mean(0)[..., 0].T
    )
    out = backproject(**arguments)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn(out.shape)
    (ours,), (theirs,) = (torch.autograd.grad(x, arguments["features"], gradient) for x in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@TRITON_BACKENDS
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(backend: str, dtype: torch.dtype) -> None:
    """And of the gradients at most three times; both against float64."""
    arguments = on_backend(scene(40, 4, 7, 24, dtype=dtype), backend)
    cameras = Cameras(arguments["extrinsics"], arguments["intrinsics"])
    uv, depths = cameras.project(arguments["positions"])

    def by_grid_sample(features: Tensor) -> Tensor:
        places = (uv * 2 - 1).to(features.dtype)[:, :, None]
        samples = torch.nn.functional.grid_sample(features.permute(0, 3, 1, 2), places, align_corners=False)
        return torch.where((depths > 0)[:, None], samples[..., 0], 0).mean(0).T

    exact = arguments["features"].double().requires_grad_()
    half = arguments["features"].requires_grad_()
    outs = backproject(**arguments), by_grid_sample(half), by_grid_sample(exact)
    gradient = torch.randn(outs[0].shape).to(dtype)
    leaves = (half, half, exact)
    backs = [torch.autograd.grad(out, x, gradient.to(out.dtype))[0] for out, x in zip(outs, leaves, strict=True)]
    assert error(outs[0], outs[2]) <= 2 * error(outs[1], outs[2])
    assert error(backs[0], backs[2]) <= 3 * error(backs[1], backs[2])


def error(out: Tensor, truth: Tensor) -> float:
    return float((out.detach().double() - truth.detach()).norm())


@TRITON_BACKENDS
def test_inputs_of_any_strides_and_points_that_are_nowhere(backend: str) -> None:
    arguments = on_backend(scene(20, 3, 5, 6, depths=True), backend)
    arguments["positions"][3] = math.nan
    arguments["positions"][7, 1] = math.inf
    strided = {
        k: v.transpose(0, 1).contiguous().transpose(0, 1) if torch.is_tensor(v) else v for k, v in arguments.items()
    }
    out = backproject(**strided)
    with use_reference():
        torch.testing.assert_close(out, backproject(**arguments))
    assert out[3].tolist() == out[7].tolist() == [0] * 6


@TRITON_BACKENDS
def test_results_do_not_change_from_call_to_call_and_follow_their_points(backend: str) -> None:
    arguments = on_backend(scene(130, 5, 6, 8, depths=True), backend)
    first, second = (OPS.backproject(*arguments.values(), True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    shuffle = torch.randperm(130)
    moved = OPS.backproject(*(arguments | {"positions": arguments["positions"][shuffle]}).values(), True)
    torch.testing.assert_close(moved[0], first[0][shuffle])
    assert torch.equal(moved[1], first[1][shuffle])


@GPU
def test_says_what_a_gpu_does_not_have(backend: str) -> None:
    arguments = scene(4, 2, 3, 5, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"features must be torch.float16, .* on a GPU; got torch.float64"):
        backproject(**arguments)
    arguments = scene(4, 2, 3, 5)
    with pytest.raises(
        ValueError, match=r"sides of at most 32000 and less than 2\^31 values on a GPU; got 1 x 33000 x 1"
    ):
        backproject(**(arguments | {"features": torch.zeros(2, 1, 33000, 1)}))


def test_order_is_a_permutation_along_a_curve() -> None:
    grid = torch.cartesian_prod(*[torch.arange(8.0)] * 3)
    shuffle = torch.randperm(512)
    order = morton_order(grid[shuffle])
    assert order.sort().values.equal(torch.arange(512))
    cubes = grid[shuffle][order].view(8, 64, 3)  # 64 points that follow each other fill a cube
    assert (cubes.amax(1) - cubes.amin(1)).unique().tolist() == [3.0]
    for odd in (grid[:0], grid[:1], torch.full((3, 3), math.nan), torch.tensor([[math.inf, -math.inf, 0]] * 2)):
        assert morton_order(odd).sort().values.equal(torch.arange(len(odd)))


def test_blocks_of_channels_are_powers_of_two() -> None:
    blocks = {c: channels_at_once(HALF, c, False) for c in (1, 16, 67, 1024)}
    assert blocks == {1: 16, 16: 16, 67: 128, 1024: 256}
    assert channels_at_once(SINGLE, 1024, False) == channels_at_once(HALF, 1024, True) == 64


@pytest.mark.aot
def test_compiled_for_each_architecture_without_spills() -> None:
    found = aot.compile_launches("tests.kernels.aot_backprojection:launches")
    aot.check_limits(found)
    assert {row.kernel for row in found} == {"morton_keys", "see_points", "gather_points", "gather_pixels"}
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for row in found:
        if row.kernel.startswith("gather"):
            assert row.instructions == (instruction[row.arch],), row
    for row in found:  # two programs on a multiprocessor, or more
        if row.kernel == "gather_points" and row.arch == 90 and "MAXIMUM=False" in row.constants:
            assert row.registers <= 128, row


def on_backend(arguments: dict[str, Any], backend: str) -> dict[str, Any]:
    return {k: to_backend(v, backend) if torch.is_tensor(v) else v for k, v in arguments.items()}
