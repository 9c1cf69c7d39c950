"""Convolutions and resampling of features on occupied voxels.

A convolution is one trilinear form in (features, weight, output gradient). Each of the two convolutions has three
operators, the forward one and its two gradients, and their derivatives are again these operators: the second
derivative needs no code of its own.

Taps are numbered as the stored kernel has them, ``k = (kx * 3 + ky) * 3 + kz``, and tap ``(kx, ky, kz)`` reads the
voxel at offset ``(kx - 1, ky - 1, kz - 1)``. Weights come in the stored layout ``(out, kx, ky, kz, in)``, viewed as
``[Co, K, Ci]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis_kernels.operator import Operator
from trellis_kernels.shapes import FLOATS, expect
from trellis_kernels.sparse_conv import reference
from trellis_kernels.sparse_conv.orders import plan_orders
from trellis_kernels.sparse_conv.resampling import POOL_MODES, sparse_pool, subdivide, upsample

__all__ = [
    "POOL_MODES",
    "conv_plan",
    "pointwise_conv",
    "sparse_pool",
    "subdivide",
    "subdivided_conv",
    "submanifold_conv",
    "submanifold_conv_weight_gradient",
    "upsample",
]

_KERNELS = {"cpu": "trellis_kernels.sparse_conv.cpu", "cuda": "trellis_kernels.sparse_conv.triton"}


def submanifold_conv(
    feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor | None = None, plan: Tensor | None = None
) -> Tensor:
    """Convolve voxel features over their occupied neighbors; the outputs are the voxels of the input.

        out[n] = bias + sum_k weight[:, k] @ feats[neighbors[n, k]]      (absent neighbors contribute nothing)

    Differentiable twice in `feats`, `weight` and `bias`. Half precision is accumulated in float32 and rounded once.
    The result does not depend on the number of threads, and is the same every time on a GPU. There float32 products
    are exact unless ``torch.backends.cuda.matmul.allow_tf32``, and there is no float64.

    Args:
        feats: ``[N, Ci]`` float. One row per voxel.
        neighbors: ``[N, K]`` int32, from `neighbor_map`. Row index of each voxel's K neighbors, -1 where there is
            none, and ``neighbors[neighbors[n, k], K - 1 - k] == n``. Only the range is checked; the gradient in
            `feats` relies on the symmetry.
        weight: ``[Co, K, Ci]``, dtype of `feats`. The stored ``(out, kx, ky, kz, in)`` seen as three dimensions; the
            kernel packs it itself, so no permuted copy is needed.
        bias: ``[Co]``, dtype of `feats`, or None.
        plan: ``conv_plan(neighbors)``, or None. It saves a GPU making it for this call.

    Returns:
        ``[N, Co]``, dtype of `feats`.

    Raises:
        ValueError: if a shape does not fit or a neighbor is not in ``[-1, N)``; on a GPU the latter is not checked, as
            that would wait for it, and such neighbors count as absent.
        TypeError: if a dtype does not fit.

    Source:
        Graham & van der Maaten 2017, "Submanifold Sparse Convolutional Networks", sec. 3.
    """
    expect(
        feats=(feats, "N Ci", FLOATS),
        neighbors=(neighbors, "N K", torch.int32),
        weight=(weight, "Co K Ci", feats.dtype),
        **({} if bias is None else {"bias": (bias, "Co", feats.dtype)}),
    )
    return _conv(feats, neighbors, weight, bias, plan)


def submanifold_conv_weight_gradient(
    feats: Tensor, neighbors: Tensor, out_gradient: Tensor, plan: Tensor | None = None
) -> Tensor:
    """The gradient of `submanifold_conv` in its weight.

        out[o, k, i] = sum_n out_gradient[n, o] * feats[neighbors[n, k], i]

    Args:
        feats: ``[N, Ci]`` float.
        neighbors: ``[N, K]`` int32, as for `submanifold_conv`.
        out_gradient: ``[N, Co]``, dtype of `feats`.
        plan: ``conv_plan(neighbors, gradients=True)``, or None.

    Returns:
        ``[Co, K, Ci]``, dtype of `feats`; the same for any number of threads.

    Raises:
        ValueError: if a shape does not fit or a neighbor is not in ``[-1, N)``; on a GPU the latter is not checked, as
            that would wait for it, and such neighbors count as absent.
        TypeError: if a dtype does not fit.
    """
    expect(
        feats=(feats, "N Ci", FLOATS),
        neighbors=(neighbors, "N K", torch.int32),
        out_gradient=(out_gradient, "N Co", feats.dtype),
    )
    return _conv_weight_gradient(feats, neighbors, out_gradient, plan)


def conv_plan(neighbors: Tensor, gradients: bool = False) -> Tensor:
    """Prepare what a GPU's convolutions need to know of a neighbor map, once for all convolutions on it.

    A GPU makes tiles of rows and skips a tap that no row of a tile has, so rows that have the same taps must come
    together. The plan holds the rows in such orders, beside them the taps of each row as a word of bits, and with
    `gradients` the rows that have each tap. Only this module reads it. Results are the same with and without.

    Args:
        neighbors: ``[N, K]`` int32, as for `submanifold_conv`.
        gradients: whether the weight gradient will be needed, too; without it the plan is much smaller.

    Returns:
        On a GPU ``[2 P + K * gradients, N + 1]`` int32, with P orders: 2 p holds order p, row 2 p + 1 the taps of each
        of its rows; then for each tap the rows that have it, ascending, and in column N how many they are. P is 1;
        4 for K = 27 and N <= 100,000, the last three for the taps of one plane each; 0 for K > 27. On a CPU, whose
        kernels find pairs on their own, it is empty.

    Raises:
        ValueError: if `neighbors` does not have two dimensions.
        TypeError: if `neighbors` is not int32.

    Source:
        Orders by tap masks, among them Gray-code order: the implicit GEMMs of spconv 2 and FlexGEMM.
    """
    expect(neighbors=(neighbors, "N K", torch.int32))
    return _plan(neighbors, gradients)


def pointwise_conv(feats: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a stored 1x1x1 submanifold convolution the way the released models were trained with it.

        out = feats @ weight.reshape(Ci, Co) + bias

    The stored ``[Co, 1, 1, 1, Ci]`` memory is *read again* as ``[Ci, Co]``; it is not transposed. That looks like a
    mistake and is one, of the library the models were trained with, and their weights have adapted to it: for
    ``Ci != Co`` the entries a column uses come from several stored rows. A composition of torch operations.

    Args:
        feats: ``[N, Ci]`` float.
        weight: ``[Co, 1, 1, 1, Ci]`` or ``[Co, 1, Ci]``, dtype of `feats`.
        bias: ``[Co]``, dtype of `feats`, or None.

    Returns:
        ``[N, Co]``, dtype of `feats`.

    Raises:
        ValueError: if a shape does not fit.
        TypeError: if a dtype does not fit.

    Source:
        Golden value ``sparse_ops`` ``out.subm_conv1x1``, computed by the official code at commit 6b0d647.
    """
    expect(
        feats=(feats, "N Ci", FLOATS),
        weight=(weight, "Co 1 1 1 Ci" if weight.ndim == 5 else "Co 1 Ci", feats.dtype),
        **({} if bias is None else {"bias": (bias, "Co", feats.dtype)}),
    )
    matrix = weight.reshape(feats.shape[1], weight.shape[0])
    return feats @ matrix if bias is None else torch.addmm(bias, feats, matrix)


def subdivided_conv(
    feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor | None = None, plan: Tensor | None = None
) -> Tensor:
    """Subdivide every voxel into its 8 children and convolve those, from the coarse voxels alone.

    Equal, up to rounding, to ``submanifold_conv(subdivide(feats), neighbors of the children, weight, bias)``. The
    children carry the features of their parents and all 8 exist, so that along each axis, with parents ``p-, p0, p+``
    and taps ``w-, w0, w+``,

        even child = S p0 + w- (p- - p0)        odd child = S p0 + w+ (p+ - p0)        S = w- + w0 + w+

    also where a parent is missing (p = 0). Over three axes this takes 27 products per parent, 3.4 per child, where
    the plain form takes one per occupied neighbor of each child (17 to 22 on surfaces), and no map of the children.
    A GPU sums the taps of each child that read the same parent instead, at most 8 products per child and 4 to 6 on
    surfaces: differences rounded to half precision would cost accuracy, and their operands a pass over memory.

    Args:
        feats: ``[N, Ci]`` float, of the parents.
        neighbors: ``[N, 27]`` int32, of the parents, as for `submanifold_conv`.
        weight: ``[Co, 27, Ci]``, dtype of `feats`: the kernel of the fine convolution, as for `submanifold_conv`.
        bias: ``[Co]``, dtype of `feats`, or None.
        plan: ``conv_plan(neighbors)``, or None, as for `submanifold_conv`.

    Returns:
        ``[8 N, Co]``, dtype of `feats`. Children of parent n at rows ``8 n + 4 dx + 2 dy + dz``, as in `subdivide`.

    Raises:
        ValueError: if a shape does not fit or a neighbor is not in ``[-1, N)``; on a GPU the latter is not checked, as
            that would wait for it, and such neighbors count as absent.
        TypeError: if a dtype does not fit.
    """
    expect(
        feats=(feats, "N Ci", FLOATS),
        neighbors=(neighbors, "N 27", torch.int32),
        weight=(weight, "Co 27 Ci", feats.dtype),
        **({} if bias is None else {"bias": (bias, "Co", feats.dtype)}),
    )
    return _subdivided(feats, neighbors, weight, bias, plan)


_plan = Operator(
    "conv_plan(Tensor neighbors, bool gradients) -> Tensor", reference=reference.conv_plan, kernels=_KERNELS
)
_conv = Operator(
    "submanifold_conv(Tensor feats, Tensor neighbors, Tensor weight, Tensor? bias, Tensor? plan=None) -> Tensor",
    reference=reference.submanifold_conv,
    kernels=_KERNELS,
)
_conv_input_gradient = Operator(
    "submanifold_conv_input_gradient(Tensor out_gradient, Tensor neighbors, Tensor weight, Tensor? plan=None)"
    " -> Tensor",
    reference=reference.submanifold_conv_input_gradient,
    kernels=_KERNELS,
)
_conv_weight_gradient = Operator(
    "submanifold_conv_weight_gradient(Tensor feats, Tensor neighbors, Tensor out_gradient, Tensor? plan=None)"
    " -> Tensor",
    reference=reference.submanifold_conv_weight_gradient,
    kernels=_KERNELS,
)
_subdivided = Operator(
    "subdivided_conv(Tensor feats, Tensor neighbors, Tensor weight, Tensor? bias, Tensor? plan=None) -> Tensor",
    reference=reference.subdivided_conv,
    kernels=_KERNELS,
)
_subdivided_input_gradient = Operator(
    "subdivided_conv_input_gradient(Tensor out_gradient, Tensor neighbors, Tensor weight, Tensor? plan=None) -> Tensor",
    reference=reference.subdivided_conv_input_gradient,
    kernels=_KERNELS,
)
_subdivided_weight_gradient = Operator(
    "subdivided_conv_weight_gradient(Tensor feats, Tensor neighbors, Tensor out_gradient, Tensor? plan=None) -> Tensor",
    reference=reference.subdivided_conv_weight_gradient,
    kernels=_KERNELS,
)


@_plan.fake
def _(neighbors: Tensor, gradients: bool) -> Tensor:
    if neighbors.device.type == "cpu":
        return neighbors.new_empty(0, 0)
    rows, taps = neighbors.shape
    return neighbors.new_empty(2 * plan_orders(rows, taps) + taps * gradients, rows + 1)


def _complete(forward: Operator, input_gradient: Operator, weight_gradient: Operator, children: int) -> None:
    """Fakes and derivatives of three operators that belong together.

    With f, w, g for features, weight and output gradient, all three are partial derivatives of one trilinear form
    T(f, w, g) = <forward(f, w), g>; the derivative of any of them in any argument is therefore one of the three.
    """

    @forward.fake
    def _(feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor | None, plan: Tensor | None = None) -> Tensor:
        return feats.new_empty(children * feats.shape[0], weight.shape[0])

    @input_gradient.fake
    def _(out_gradient: Tensor, neighbors: Tensor, weight: Tensor, plan: Tensor | None = None) -> Tensor:
        return out_gradient.new_empty(neighbors.shape[0], weight.shape[2])

    @weight_gradient.fake
    def _(feats: Tensor, neighbors: Tensor, out_gradient: Tensor, plan: Tensor | None = None) -> Tensor:
        return feats.new_empty(out_gradient.shape[1], neighbors.shape[1], feats.shape[1])

    def save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3], inputs[-1])

    def forward_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        feats, neighbors, weight, plan = ctx.saved_tensors
        need = ctx.needs_input_grad
        return (
            input_gradient(gradient, neighbors, weight, plan) if need[0] else None,
            None,
            weight_gradient(feats, neighbors, gradient, plan) if need[2] else None,
            gradient.sum(0) if need[3] else None,
            None,
        )

    def input_gradient_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        out_gradient, neighbors, weight, plan = ctx.saved_tensors
        need = ctx.needs_input_grad
        return (
            forward(gradient, neighbors, weight, None, plan) if need[0] else None,
            None,
            weight_gradient(gradient, neighbors, out_gradient, plan) if need[2] else None,
            None,
        )

    def weight_gradient_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        feats, neighbors, out_gradient, plan = ctx.saved_tensors
        need = ctx.needs_input_grad
        return (
            input_gradient(out_gradient, neighbors, gradient, plan) if need[0] else None,
            None,
            forward(feats, neighbors, gradient, None, plan) if need[2] else None,
            None,
        )

    forward.autograd(forward_backward, save)
    input_gradient.autograd(input_gradient_backward, save)
    weight_gradient.autograd(weight_gradient_backward, save)


_complete(_conv, _conv_input_gradient, _conv_weight_gradient, children=1)
_complete(_subdivided, _subdivided_input_gradient, _subdivided_weight_gradient, children=8)
