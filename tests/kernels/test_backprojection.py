"""backproject: reference, golden value, grid_sample, visibility, derivatives."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.golden import golden
from trellis.renderers.camera import Cameras
from trellis_kernels import backproject, use_reference
from trellis_kernels.backprojection import reference

OPS = torch.ops.trellis_kernels
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SIZES = [(0, 3, 5, 4), (3, 0, 5, 4), (1, 1, 1, 1), (5, 7, 9, 3), (37, 9, 11, 70), (300, 5, 6, 129)]


def scene(
    points: int, views: int, side: int, channels: int, dtype: torch.dtype = torch.float32, depths: bool = False
) -> dict[str, Any]:
    """Points in and around the unit cube, some behind a camera or outside its picture."""
    cameras = Cameras.sphere_hammersley(max(views, 1), radius=1.5, fov=math.radians(40))[:views]
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "features": torch.randn(views, side, side + 2, channels).to(dtype),
        "positions": ((torch.rand(points, 3) - 0.5) * 3).to(geometry),
        "extrinsics": cameras.extrinsics.to(geometry),
        "intrinsics": cameras.intrinsics.to(geometry),
        "depths": (torch.rand(views, 13, 17) * 3 * (torch.rand(views, 13, 17) > 0.2)).to(geometry) if depths else None,
        "tolerance": 0.05,
    }


def assert_agrees(sizes: tuple[int, ...], dtype: torch.dtype, depths: bool, aggregate: str) -> None:
    arguments = scene(*sizes, dtype=dtype, depths=depths)
    results = []
    for context in (torch.no_grad, use_reference):
        features = arguments["features"].clone()
        with context():
            out, counts, winners = OPS.backproject(*(arguments | {"features": features}).values(), aggregate == "max")
            gradient = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
            back = OPS.backproject_gradient(
                gradient, counts, winners, *list(arguments.values())[1:], aggregate == "max", *features.shape[1:3]
            )
        results.append((out, back))
        assert out.dtype == back.dtype == dtype
        assert back.shape == features.shape
    for actual, expected in zip(*results, strict=True):
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depths", [False, True])
@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_kernels_agree_with_references(
    sizes: tuple[int, ...], dtype: torch.dtype, depths: bool, aggregate: str, instruction_set: str
) -> None:
    assert_agrees(sizes, dtype, depths, aggregate)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_half_precision_is_rounded_once_however_many_views(dtype: torch.dtype, aggregate: str) -> None:
    assert_agrees((40, 19, 7, 9), dtype, True, aggregate)


def test_agrees_with_the_official_features() -> None:
    item = golden("cameras_backproject")
    features = item["in.patchtokens"].permute(0, 2, 3, 1).contiguous()
    arguments = item["in.points"], item["out.extrinsics"], item["out.intrinsics"]
    item.check("out.backproj_mean_f32", backproject(features, *arguments))
    rounded = backproject(features, *arguments).half()
    torch.testing.assert_close(rounded, item["out.backproj_mean_f16"], rtol=1e-3, atol=1e-4)


def test_samples_are_those_of_grid_sample() -> None:
    arguments = scene(200, 4, 8, 5, dtype=torch.float64)
    cameras = Cameras(arguments["extrinsics"], arguments["intrinsics"])
    uv, depths = cameras.project(arguments["positions"])
    samples = torch.nn.functional.grid_sample(
        arguments["features"].permute(0, 3, 1, 2), (uv * 2 - 1)[:, :, None], align_corners=False
    )[..., 0].transpose(1, 2)
    samples = torch.where(depths[..., None] > 0, samples, 0)
    torch.testing.assert_close(backproject(**arguments), samples.mean(0))


def test_what_is_hidden_or_behind_the_camera_is_not_seen() -> None:
    """A wall 2 in front of a camera at z = -2; points before, in and behind it, beside it and behind the camera."""
    extrinsics = torch.eye(4)[None]
    extrinsics[0, 2, 3] = 2
    intrinsics = torch.tensor([[[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]])
    positions = torch.tensor([[0, 0, -0.5], [0, 0, 0.04], [0, 0, 0.5], [0, 0, -3], [5.0, 0, 0], [math.nan, 0, 0]])
    features, wall = torch.full((1, 4, 4, 2), 3.0), torch.full((1, 8, 8), 2.0)
    for aggregate in ("mean", "max"):
        seen = backproject(features, positions, extrinsics, intrinsics, wall, 0.05, aggregate)
        assert seen[:, 0].tolist() == [3, 3, 0, 0, 0, 0]
        nothing = backproject(features, positions, extrinsics, intrinsics, wall * 0, 0.05, aggregate)
        assert nothing[:, 0].tolist() == [3, 3, 3, 0, 0, 0]
    two = [torch.cat([x, x]) for x in (features, extrinsics, intrinsics)]
    depths = torch.cat([wall, wall / 2])  # the second view sees a nearer wall and nothing behind it
    kept = backproject(two[0], positions, *two[1:], depths, 0.05)
    assert kept[:, 0].tolist() == [3, 3, 0, 0, 0, 0]  # the mean of the views that see it
    assert backproject(two[0], positions, *two[1:])[:, 0].tolist() == [3, 3, 3, 0, 0, 0]


@given(seed=st.integers(0, 999), aggregate=st.sampled_from(["mean", "max"]))
@settings(max_examples=20, deadline=None)
def test_order_of_points_and_views_and_constants(seed: int, aggregate: str) -> None:
    torch.manual_seed(seed)
    arguments = scene(30, 6, 5, 4, dtype=torch.float64, depths=True)
    out = backproject(**arguments, aggregate=aggregate)  # type: ignore[arg-type]
    points, views = torch.randperm(30), torch.randperm(6)
    shuffled = {k: v[views] for k, v in arguments.items() if k not in ("positions", "tolerance")}
    shuffled |= {"positions": arguments["positions"][points], "tolerance": 0.05}
    torch.testing.assert_close(backproject(**shuffled, aggregate=aggregate), out[points])  # type: ignore[arg-type]
    assert out.abs().max() <= arguments["features"].abs().max()


@pytest.mark.parametrize("aggregate", ["mean", "max"])
@pytest.mark.parametrize("depths", [False, True])
def test_derivatives(aggregate: str, depths: bool) -> None:
    arguments = scene(12, 3, 3, 2, dtype=torch.float64, depths=depths)
    features = arguments.pop("features").requires_grad_()

    def run(x: Tensor) -> Tensor:
        return backproject(x, **arguments, aggregate=aggregate)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(run, (features,))
    gradient = torch.randn(12, 2, dtype=torch.float64)
    (ours,) = torch.autograd.grad(run(features), features, gradient)
    out, _, _ = reference.backproject(features, *arguments.values(), aggregate == "max")
    torch.testing.assert_close(ours, torch.autograd.grad(out, features, gradient)[0])


def test_results_do_not_depend_on_the_thread_count() -> None:
    arguments, threads, results = scene(400, 9, 6, 33), torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        features = arguments["features"].clone().requires_grad_()
        out = backproject(**(arguments | {"features": features}))
        results.append((out.detach(), torch.autograd.grad(out.square().sum(), features)[0]))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operator_contract() -> None:
    arguments = scene(9, 3, 4, 5, depths=True)
    arguments["features"].requires_grad_()
    for maximum in (False, True):
        torch.library.opcheck(OPS.backproject.default, (*arguments.values(), maximum))
    compiled = torch.compile(backproject, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments), backproject(**arguments))
    arguments["positions"].requires_grad_()
    with pytest.raises(NotImplementedError, match="differentiable in features only"):
        backproject(**arguments).sum().backward()


def test_arguments_that_do_not_fit_are_named() -> None:
    good = scene(4, 2, 3, 5)
    with pytest.raises(ValueError, match=r"positions must be \[N, 3\] with N=4; got \[4, 2\]"):
        backproject(**(good | {"positions": good["positions"][:, :2]}))
    with pytest.raises(ValueError, match=r"extrinsics must be \[V, 4, 4\] with V=2; got \[1, 4, 4\]"):
        backproject(**(good | {"extrinsics": good["extrinsics"][:1]}))
    with pytest.raises(TypeError, match=r"depths must be torch.float32; got torch.float64"):
        backproject(**(good | {"depths": torch.zeros(2, 3, 3, dtype=torch.float64)}))
    with pytest.raises(ValueError, match=r"tolerance must be finite and at least 0; got -1"):
        backproject(**(good | {"tolerance": -1}))
    with pytest.raises(ValueError, match=r"aggregate must be 'mean' or 'max'; got 'sum'"):
        backproject(**good, aggregate="sum")  # type: ignore[arg-type]
