"""What spherical harmonics mean, in plain PyTorch, in the signs and order of the 3D Gaussian files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from trellis_kernels.precision import compute_dtype

_C0 = 0.28209479177387814
_C1 = 0.4886025119029199
_C2 = (1.0925484305920792, -1.0925484305920792, 0.31539156525252005, -1.0925484305920792, 0.5462742152960396)
_C3 = (
    -0.5900435899266435,
    2.890611442640554,
    -0.4570457994644658,
    0.3731763325901154,
    -0.4570457994644658,
    1.445305721320277,
    -0.5900435899266435,
)


def constant(coefficients: Tensor) -> Tensor:
    """Degree 0, the same from everywhere: ``[G, 3]`` from ``[G, 1, 3]``."""
    return (_C0 * coefficients[:, 0] + 0.5).clamp_min(0)


def spherical_harmonics(coefficients: Tensor, directions: Tensor) -> Tensor:
    dtype = coefficients.dtype
    wide, directions = (tensor.to(compute_dtype(dtype)) for tensor in (coefficients, directions))
    terms = basis(_unit(directions), coefficients.shape[1])
    return ((terms[..., None] * wide).sum(-2) + 0.5).clamp_min(0).to(dtype)


def spherical_harmonics_gradient(
    out_gradient: Tensor, coefficients: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """The derivative of the reference by torch's autograd."""

    def differentiate() -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (coefficients, directions)]
        return torch.autograd.grad(spherical_harmonics(*leaves), leaves, out_gradient)

    # Within an operator autograd is switched off, for its thread.
    with ThreadPoolExecutor(1) as pool:
        by_coefficients, by_directions = pool.submit(differentiate).result()
    return by_coefficients.contiguous(), by_directions.contiguous()


def basis(directions: Tensor, count: int) -> Tensor:
    """The first `count` terms in directions of length 1: ``[..., count]`` from ``[..., 3]``."""
    x, y, z = directions.unbind(-1)
    terms = [torch.full_like(x, _C0), -_C1 * y, _C1 * z, -_C1 * x]
    if count > 4:
        xx, yy, zz = x * x, y * y, z * z
        terms += [_C2[0] * x * y, _C2[1] * y * z, _C2[2] * (2 * zz - xx - yy), _C2[3] * x * z, _C2[4] * (xx - yy)]
    if count > 9:
        terms += [
            _C3[0] * y * (3 * xx - yy),
            _C3[1] * x * y * z,
            _C3[2] * y * (4 * zz - xx - yy),
            _C3[3] * z * (2 * zz - 3 * xx - 3 * yy),
            _C3[4] * x * (4 * zz - xx - yy),
            _C3[5] * z * (xx - yy),
            _C3[6] * x * (xx - 3 * yy),
        ]
    return torch.stack(terms, -1)


def _unit(directions: Tensor) -> Tensor:
    """Of length 1; 0 where there is no length or no finite one."""
    square = directions.square().sum(-1, keepdim=True)
    usable = (square > 1e-24) & (square <= 3e38)
    return torch.where(usable, directions, 0) / torch.where(usable, square, 1).sqrt()
