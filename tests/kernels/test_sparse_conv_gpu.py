"""GPU kernels of sparse_conv: parity on every backend, plans, what the compiler makes of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.kernels.test_sparse_conv import assert_kernels_agree_with_references
from tests.support import aot
from tests.support.backends import TRITON_BACKENDS, to_backend
from tests.support.scenes import random_voxels, sphere_voxels
from tests.support.sparse_maps import children_of, neighbors_of
from trellis_kernels import (
    conv_plan,
    subdivide,
    subdivided_conv,
    submanifold_conv,
    submanifold_conv_weight_gradient,
    use_reference,
)
from trellis_kernels.sparse_conv.orders import plan_orders

Conv = Callable[..., Tensor]


def neighbors_on(backend: str, scene: Callable[[], Tensor], kernel: int = 3) -> Tensor:
    with torch.device("cpu"):
        return to_backend(neighbors_of(scene(), kernel), backend)


@TRITON_BACKENDS
@pytest.mark.parametrize(
    ("channels", "occupancy", "dtype"),
    [
        ((1, 1), 1.0, torch.float32),
        ((17, 33), 0.2, torch.bfloat16),
    ],
)
def test_kernels_agree_with_references(
    backend: str, channels: tuple[int, int], occupancy: float, dtype: torch.dtype
) -> None:
    neighbors = neighbors_on(backend, lambda: random_voxels(4, occupancy, batch=2))
    assert_kernels_agree_with_references(neighbors, *channels, dtype)


@TRITON_BACKENDS
@pytest.mark.parametrize("voxels", [0, 1])
def test_none_or_one_voxel(backend: str, voxels: int) -> None:
    neighbors = neighbors_on(backend, lambda: random_voxels(2, 1.0)[:voxels])
    assert_kernels_agree_with_references(neighbors.view(voxels, 27), 3, 5, torch.float32)


@TRITON_BACKENDS
@pytest.mark.parametrize("kernel", [1, 5])
def test_other_kernel_sizes(backend: str, kernel: int) -> None:
    neighbors = neighbors_on(backend, lambda: random_voxels(4, 0.3), kernel)
    assert_kernels_agree_with_references(neighbors, 6, 10, torch.float32)


@TRITON_BACKENDS
@pytest.mark.parametrize("channels", [(520, 20), (20, 96)], ids="{0[0]}->{0[1]}".format)  # 520: an order per plane
def test_agree_with_references_where_channels_are_blocked(backend: str, channels: tuple[int, int]) -> None:
    neighbors = neighbors_on(backend, lambda: random_voxels(4, 0.5))
    feats, weight = torch.randn(len(neighbors), channels[0]), torch.randn(channels[1], 27, channels[0])
    x, w = feats.half(), weight.half()
    gradient = submanifold_conv(x, neighbors, w)
    for call in (
        lambda: submanifold_conv(x, neighbors, w),
        lambda: torch.ops.trellis_kernels.submanifold_conv_input_gradient(gradient, neighbors, w),
        lambda: submanifold_conv_weight_gradient(x, neighbors, gradient),
    ):
        actual = call()
        with use_reference():
            expected = call()
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize(("voxels", "kernel"), [(0, 3), (1, 3), (300, 3), (90, 1), (40, 5)])
def test_plan_agrees_with_the_reference(backend: str, voxels: int, kernel: int) -> None:
    neighbors = neighbors_on(backend, lambda: random_voxels(8, 0.7)[:voxels], kernel).view(voxels, kernel**3)
    orders = plan_orders(voxels, kernel**3)
    for gradients in (False, True):
        actual = conv_plan(neighbors, gradients)
        with use_reference():
            expected = conv_plan(neighbors, gradients)
        assert actual.shape == expected.shape == (2 * orders + kernel**3 * gradients, voxels + 1)
        assert torch.equal(actual[: 2 * orders, :voxels], expected[: 2 * orders, :voxels])
        for ours, theirs in zip(actual[2 * orders :], expected[2 * orders :], strict=True):
            count = int(theirs[voxels])
            assert int(ours[voxels]) == count
            assert torch.equal(ours[:count], theirs[:count])


@TRITON_BACKENDS
def test_results_are_the_same_with_and_without_a_plan(backend: str) -> None:
    neighbors = neighbors_on(backend, lambda: sphere_voxels(6))
    feats, weight, gradient = (torch.randn(*s) for s in ((len(neighbors), 7), (5, 27, 7), (len(neighbors), 5)))
    small, large = conv_plan(neighbors), conv_plan(neighbors, gradients=True)
    for plan in (small, large):
        for planned, bare in (
            (submanifold_conv(feats, neighbors, weight, None, plan), submanifold_conv(feats, neighbors, weight)),
            (
                submanifold_conv_weight_gradient(feats, neighbors, gradient, plan),
                submanifold_conv_weight_gradient(feats, neighbors, gradient),
            ),
        ):
            assert torch.equal(planned, bare)


@pytest.mark.parametrize("backend", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_what_a_gpu_kernel_does_not_take_is_an_error(backend: str) -> None:
    neighbors = neighbors_on(backend, lambda: random_voxels(3, 0.5))
    other = conv_plan(neighbors[:-1].clone())
    feats, weight = torch.zeros(len(neighbors), 2), torch.zeros(3, 27, 2)
    with pytest.raises(ValueError, match="plan must be the conv_plan of these neighbors"):
        submanifold_conv(feats, neighbors, weight, None, other)
    with pytest.raises(TypeError, match=r"feats must be torch.float16 or torch.bfloat16 or torch.float32 on a GPU"):
        submanifold_conv(feats.double(), neighbors, weight.double())


@pytest.mark.parametrize("backend", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_a_neighbor_out_of_range_counts_as_absent(backend: str) -> None:
    neighbors = neighbors_on(backend, lambda: random_voxels(2, 0.9))
    wrong = neighbors.clone()
    wrong[:, 3], wrong[:, 5] = len(neighbors), -7
    right = neighbors.clone()
    right[:, 3], right[:, 5] = -1, -1
    feats, weight = torch.randn(len(neighbors), 3), torch.randn(4, 27, 3)
    gradient, fine = torch.randn(len(neighbors), 4), torch.randn(8 * len(neighbors), 4)
    for conv, arguments in (
        (submanifold_conv, (feats, weight)),
        (subdivided_conv, (feats, weight)),
        (submanifold_conv_weight_gradient, (feats, gradient)),
        (torch.ops.trellis_kernels.subdivided_conv_input_gradient, (fine, weight)),
    ):
        expected = conv(arguments[0], right, arguments[1])
        assert torch.equal(conv(arguments[0], wrong, arguments[1]), expected)


@TRITON_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("conv", [submanifold_conv, subdivided_conv], ids=lambda f: f.__name__)
def test_errors_are_at_most_twice_those_of_plain_torch(backend: str, dtype: torch.dtype, conv: Conv) -> None:
    """... in the same dtype, against float32; those of gradients at most three times."""
    divided = conv is subdivided_conv
    coarse = neighbors_on(backend, lambda: random_voxels(3, 0.8))
    fine = neighbors_on(backend, lambda: children_of(random_voxels(3, 0.8))) if divided else coarse
    inputs = torch.randn(len(coarse), 20).to(dtype), (torch.randn(24, 27, 20) / (27 * 20) ** 0.5).to(dtype)
    out_gradient = torch.randn(len(fine), 24).to(dtype)

    def plain(feats: Tensor, weight: Tensor) -> Tensor:
        source = pad(subdivide(feats) if divided else feats, (0, 0, 0, 1))
        return sum((source[fine[:, k].long()] @ weight[:, k].T for k in range(27)), feats.new_zeros(()))

    def results(run: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, out_gradient.to(dtype))]

    exact, peer = results(plain, torch.float32), results(plain, dtype)
    ours = results(lambda feats, weight: conv(feats, coarse, weight), dtype)
    for actual, theirs, expected, factor in zip(ours, peer, exact, (2, 3, 3), strict=True):
        assert (actual - expected).abs().max() <= factor * (theirs - expected).abs().max()


@pytest.mark.aot
def test_compiled_kernels_use_tensor_cores_and_spill_nothing() -> None:
    found = aot.compile_launches("tests.kernels.aot_sparse_conv:launches")
    aot.check_limits(found)
    wanted = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for row in found:
        half = "float16" in row.constants  # or bfloat16
        if row.kernel in ("gather_gemm", "pair_gemm") and half:
            assert wanted[row.arch] in row.instructions, row


@pytest.mark.aot
def test_sizes_of_one_compile() -> None:
    aot.check_limits(aot.compile_launches("tests.kernels.aot_sparse_conv:ones", [90]))
