"""3D Gaussians as the decoder predicts them, and what a renderer needs of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from trellis_kernels import spherical_harmonics
from trellis_kernels.shapes import FLOATS, expect


@dataclass(frozen=True)
class GaussianConfig:
    """How raw values become means, scales and opacities; the defaults are the released decoder's.

    Args:
        aabb: origin and size of the box, in world units, that the unit cube of `Gaussians.xyz` is mapped to.
        scaling_bias: scale, in world units, of a raw scaling of 0.
        scaling_activation: what maps raw scalings to positive numbers.
        opacity_bias: opacity of a raw opacity of 0.
        filter_kernel_size_3d: smallest scale in world units: ``scale = sqrt(activated^2 + filter^2)``.
        filter_kernel_size_2d: variance in pixels^2 that the rasteriser adds (the mip filter); `rasterize_gaussians`
            takes it as ``kernel_size``.
    """

    aabb: tuple[float, float, float, float, float, float] = (-0.5, -0.5, -0.5, 1.0, 1.0, 1.0)
    scaling_bias: float = 4e-3
    scaling_activation: Literal["softplus", "exp"] = "softplus"
    opacity_bias: float = 0.1
    filter_kernel_size_3d: float = 9e-4
    filter_kernel_size_2d: float = 0.1

    def __post_init__(self) -> None:
        if self.scaling_activation not in ("softplus", "exp"):
            raise ValueError(f"scaling_activation must be 'softplus' or 'exp'; got {self.scaling_activation!r}")
        if not self.scaling_bias > 0:
            raise ValueError(f"scaling_bias must be positive; got {self.scaling_bias}")
        if not 0 < self.opacity_bias < 1:
            raise ValueError(f"opacity_bias must be in (0, 1); got {self.opacity_bias}")

    @property
    def raw_scaling_bias(self) -> float:
        """`scaling_bias` before the activation; what is added to a raw scaling."""
        if self.scaling_activation == "exp":
            return math.log(self.scaling_bias)
        return self.scaling_bias + math.log(-math.expm1(-self.scaling_bias))

    @property
    def raw_opacity_bias(self) -> float:
        """`opacity_bias` before the sigmoid; what is added to a raw opacity."""
        return math.log(self.opacity_bias / (1 - self.opacity_bias))


@dataclass(frozen=True)
class Gaussians:
    """G Gaussians in the official parametrisation: raw network outputs, activated by the properties.

    Args:
        xyz: ``[G, 3]`` float. Centers in the unit cube of ``config.aabb``.
        features_dc: ``[G, 1, 3]``. Spherical harmonics of degree 0, per color channel.
        scaling: ``[G, 3]``. Raw, see `GaussianConfig`.
        rotation: ``[G, 4]``. Quaternion (w, x, y, z) minus the identity (1, 0, 0, 0), of any length.
        opacity: ``[G, 1]``. Raw, see `GaussianConfig`.
        config: how the raw values are read.

    Raises:
        ValueError, TypeError: if a shape or dtype is not the one above.
    """

    xyz: Tensor
    features_dc: Tensor
    scaling: Tensor
    rotation: Tensor
    opacity: Tensor
    config: GaussianConfig = field(default_factory=GaussianConfig)

    def __post_init__(self) -> None:
        expect(
            xyz=(self.xyz, "G 3", FLOATS),
            features_dc=(self.features_dc, "G 1 3", FLOATS),
            scaling=(self.scaling, "G 3", FLOATS),
            rotation=(self.rotation, "G 4", FLOATS),
            opacity=(self.opacity, "G 1", FLOATS),
        )

    def __len__(self) -> int:
        return len(self.xyz)

    @property
    def means(self) -> Tensor:
        """``[G, 3]`` centers in world units."""
        box = self.xyz.new_tensor(self.config.aabb)
        return self.xyz * box[3:] + box[:3]

    @property
    def scales(self) -> Tensor:
        """``[G, 3]`` standard deviations along the axes of each Gaussian, in world units."""
        raw = self.scaling + self.config.raw_scaling_bias
        activated = raw.exp() if self.config.scaling_activation == "exp" else softplus(raw)
        return (activated.square() + self.config.filter_kernel_size_3d**2).sqrt()

    @property
    def quats(self) -> Tensor:
        """``[G, 4]`` unit quaternions (w, x, y, z)."""
        return normalize(self.rotation + self.rotation.new_tensor([1, 0, 0, 0]), dim=-1)

    @property
    def opacities(self) -> Tensor:
        """``[G]`` in (0, 1)."""
        return torch.sigmoid(self.opacity + self.config.raw_opacity_bias).squeeze(-1)

    @property
    def colors(self) -> Tensor:
        """``[G, 3]`` sRGB, at least 0, mostly below 1: ``max(0, C0 features_dc + 0.5)``."""
        return spherical_harmonics(self.features_dc, torch.zeros_like(self.xyz))

    def to(self, *args: Any, **kwargs: Any) -> Gaussians:
        """The same Gaussians on another device or in another dtype; arguments of `torch.Tensor.to`."""
        moved = {
            name: getattr(self, name).to(*args, **kwargs)
            for name in ("xyz", "features_dc", "scaling", "rotation", "opacity")
        }
        return dataclasses.replace(self, **moved)

    def save_ply(self, path: str | Path) -> None:
        """Write a ``.ply`` in the orientation that viewers expect: the official name of `save`."""
        from trellis.representations.gaussian_ply import save_ply

        save_ply(self, path)

    def save(self, path: str | Path) -> None:
        """Write a file; its suffix says which (``.ply``, in the orientation that viewers expect)."""
        if Path(path).suffix.lower() != ".ply":
            raise ValueError(f"path must end in .ply; got {path}")
        self.save_ply(path)
