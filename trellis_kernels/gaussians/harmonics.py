"""Colors that depend on the direction of view: real spherical harmonics up to degree 3."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trellis_kernels.gaussians import harmonics_reference as reference
from trellis_kernels.operator import Operator
from trellis_kernels.shapes import FLOATS, expect

_KERNELS = {"cpu": "trellis_kernels.gaussians.cpu", "cuda": "trellis_kernels.gaussians.cuda"}


def spherical_harmonics(coefficients: Tensor, directions: Tensor) -> Tensor:
    """Evaluate colors in a direction of view: ``max(0, sum_k basis_k(direction) coefficients_k + 0.5)``.

    The offset and the clamp belong to the format of 3D Gaussians; they are applied here and nowhere else.
    Differentiable once in both arguments (no gradient where the clamp acts); the gradient of the coefficients is the
    sum over views, in order. A direction without length (below 1e-12) or not finite sees degree 0 only and has no
    gradient; coefficients that are not finite give colors that are not.

    Args:
        coefficients: ``[G, K, 3]`` float; K is 1, 4, 9 or 16 for degree 0 to 3. Order: degree, then order -l to l.
            Half precision is computed in float32 and rounded once; float64 is for the CPU only.
        directions: ``[G, 3]``, or ``[V, G, 3]`` for V eyes; same dtype. From the eye to the Gaussian, of any length;
            not looked at at degree 0.

    Returns:
        ``[G, 3]`` or ``[V, G, 3]``, dtype of `coefficients`, at least 0.

    Raises:
        ValueError, TypeError: if a shape or dtype is not the one above, or there is no kernel for the dtype.

    Source:
        Kerbl et al. 2023, "3D Gaussian Splatting"; Sloan 2008, "Stupid Spherical Harmonics Tricks", appendix A2.
    """
    sizes = expect(
        coefficients=(coefficients, "G K 3", FLOATS),
        directions=(directions, "V G 3" if directions.ndim == 3 else "G 3", coefficients.dtype),
    )
    if sizes["K"] not in (1, 4, 9, 16):
        raise ValueError(f"coefficients must be [G, K, 3] with K = 1, 4, 9 or 16; got {list(coefficients.shape)}")
    if sizes["K"] == 1:
        return reference.constant(coefficients).expand(directions.shape)
    return _colors(coefficients, directions if directions.ndim == 3 else directions[None]).view(directions.shape)


_colors = Operator(
    "spherical_harmonics(Tensor coefficients, Tensor directions) -> Tensor",
    reference=reference.spherical_harmonics,
    kernels=_KERNELS,
)
_gradient = Operator(
    "spherical_harmonics_gradient(Tensor out_gradient, Tensor coefficients, Tensor directions) "
    "-> (Tensor coefficients, Tensor directions)",
    reference=reference.spherical_harmonics_gradient,
    kernels=_KERNELS,
)


@_colors.fake
def _(coefficients: Tensor, directions: Tensor) -> Tensor:
    return directions.new_empty(directions.shape)


@_gradient.fake
def _(out_gradient: Tensor, coefficients: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    return coefficients.new_empty(coefficients.shape), directions.new_empty(directions.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, out_gradient: Tensor) -> tuple[Tensor, Tensor]:
    return _gradient(out_gradient, *ctx.saved_tensors)


def _setup_nothing(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    pass


def _refuse(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
    raise NotImplementedError("the second derivative of spherical_harmonics is not implemented")


_colors.autograd(_differentiate, _setup)
_gradient.autograd(_refuse, _setup_nothing)
