"""Real spherical harmonics up to degree 3, in the signs and order of the 3D Gaussian files."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trellis_kernels.shapes import FLOATS, expect

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


def spherical_harmonics(coefficients: Tensor, directions: Tensor) -> Tensor:
    """Evaluate colors in a direction of view: ``max(0, sum_k basis_k(direction) coefficients_k + 0.5)``.

    The offset and the clamp belong to the format of 3D Gaussians; they are applied here and nowhere else. Plain
    PyTorch, differentiable in both arguments (no gradient where the clamp acts).

    Args:
        coefficients: ``[G, K, 3]`` float; K is 1, 4, 9 or 16 for degree 0 to 3. Order: degree, then order -l to l.
        directions: ``[G, 3]``, same dtype. From the eye to the Gaussian, of any length; unused at degree 0.

    Returns:
        ``[G, 3]``, dtype of `coefficients`, at least 0.

    Raises:
        ValueError, TypeError: if a shape or dtype is not the one above.

    Source:
        Kerbl et al. 2023, "3D Gaussian Splatting"; Sloan 2008, "Stupid Spherical Harmonics Tricks", appendix A2.
    """
    sizes = expect(
        coefficients=(coefficients, "G K 3", FLOATS),
        directions=(directions, "G 3", coefficients.dtype),
    )
    if sizes["K"] not in (1, 4, 9, 16):
        raise ValueError(f"coefficients must be [G, K, 3] with K = 1, 4, 9 or 16; got {list(coefficients.shape)}")
    if sizes["K"] == 1:
        return (_C0 * coefficients[:, 0] + 0.5).clamp_min(0)
    basis = _basis(normalize(directions, dim=-1), sizes["K"])
    return ((basis[:, :, None] * coefficients).sum(1) + 0.5).clamp_min(0)


def _basis(directions: Tensor, count: int) -> Tensor:
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
