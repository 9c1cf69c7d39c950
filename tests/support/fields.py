"""Strivec fields and their cameras, shared by tests and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.support.gaussians import orbit_cameras
from tests.support.golden import golden
from tests.support.scenes import sphere_voxels

BOX = (-0.5, -0.5, -0.5, 1.0, 1.0, 1.0)
ASIDE = (-0.3, -0.3, -0.5, 1.0, 1.0, 1.0)  # a box in which the world's z axis is on no face of a leaf


class Field(NamedTuple):
    """The tensors of `render_radiance_field`, and what else it needs."""

    positions: Tensor
    trivec: Tensor
    density: Tensor
    features: Tensor
    extrinsics: Tensor
    intrinsics: Tensor
    background: Tensor
    jitter: Tensor | None
    depth: int
    box: tuple[float, ...]
    width: int
    height: int

    def to(self, target: torch.dtype | torch.device | str) -> Field:
        return Field(*(x.to(target) if isinstance(x, Tensor) else x for x in self))

    def arguments(self) -> tuple[Any, ...]:
        """Of the public function."""
        field, cameras = self[:4], self[4:6]
        return *field, self.depth, self.box, *cameras, self.width, self.height, self.background, self.jitter

    def operands(self) -> tuple[Any, ...]:
        """Of the operator."""
        return *self[:9], list(self.box), self.width, self.height


def field_of(
    cells: Tensor,
    depth: int,
    width: int,
    height: int,
    *,
    views: int = 1,
    rank: int = 5,
    entries: int = 4,
    seed: int = 0,
    opacity: float = 1.0,
    box: tuple[float, ...] = BOX,
) -> Field:
    """Random factors in the given cells ``[N, 3]``; made on the host, moved to the default device."""
    with torch.device("cpu"):
        cells = cells.cpu()
        generator = torch.Generator().manual_seed(seed)
        count = len(cells)
        trivec = 1 + 0.5 * torch.randn(count, rank, 3, entries, generator=generator)
        density = (0.3 * torch.randn(count, rank, generator=generator) + 0.25 * opacity) * 2**depth / rank**0.5
        features = torch.randn(count, rank, 3, generator=generator)
        jitter = torch.rand(views, height, width, generator=generator)
        background = torch.rand(views, 3, generator=generator)
        positions = (cells + 0.5) / 2**depth
        cameras = orbit_cameras(views)
    made = Field(
        positions, trivec, density, features, *cameras, background, jitter, depth, box, width, height
    )  # fmt: skip
    return made.to(torch.get_default_device())


def random_field(count: int, depth: int, width: int, height: int, **options: Any) -> Field:
    """`count` different cells anywhere in the box."""
    generator = torch.Generator().manual_seed(options.get("seed", 0))
    chosen = torch.randperm(8**depth, generator=generator, device="cpu")[:count]
    cells = torch.stack([chosen >> (2 * depth), chosen >> depth & 2**depth - 1, chosen & 2**depth - 1], 1)
    return field_of(cells, depth, width, height, **options)


def surface_field(depth: int, width: int, height: int, radius: float = 0.38, **options: Any) -> Field:
    """As decoded objects are: a shell one or two leaves thick, rank 16, 8 entries per axis."""
    cells = sphere_voxels(2**depth, radius=radius)[:, 1:]
    return field_of(cells, depth, width, height, **{"rank": 16, "entries": 8} | options)


def oracle() -> tuple[dict[str, Tensor], Field]:
    item = golden("render_trivec_oracle").tensors
    field = Field(
        item["in.position"],
        item["in.trivec"],
        item["in.density"],
        item["in.features_dc"][:, :, 0],
        item["in.extrinsics"][None],
        item["in.intrinsics"][None],
        item["in.bg"][None],
        item["in.jitter"][None],
        3,
        BOX,
        28,
        28,
    )
    device = torch.get_default_device()
    return {key: value.to(device) for key, value in item.items()}, field.to(device)


def assert_close_outside_thresholds(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal but for the few values where rounding moves a sample across a threshold."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isfinite(), expected.isfinite())
    different = int(((actual - expected).abs() > tolerance).sum())
    assert different <= max(2, actual.numel() // 1000), f"{different} of {actual.numel()} values differ"


def uniform(cells: list[list[int]] | Tensor, depth: int, sums: float, **options: Any) -> Field:
    """All factors 1, so that every sample of every leaf has the density softplus(sums)."""
    field = field_of(torch.as_tensor(cells), depth, **{"width": 3, "height": 2, "rank": 2, "entries": 4} | options)
    return field._replace(trivec=torch.ones_like(field.trivec), density=torch.full_like(field.density, sums / 2))


def facing(field: Field, distance: float) -> Field:
    """Seen along z from `distance` before the origin, through a lens so long that rays are parallel."""
    extrinsics = torch.eye(4, dtype=field.trivec.dtype)[None].clone()
    extrinsics[0, 2, 3] = distance
    intrinsics = torch.tensor([[[1e9, 0, 0.5], [0, 1e9, 0.5], [0, 0, 1]]], dtype=field.trivec.dtype)
    return field._replace(extrinsics=extrinsics, intrinsics=intrinsics)


def whole_grid(depth: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(2**depth)] * 3).reshape(-1, 3)


def operands_with_gradient(field: Field) -> tuple[list[Any], list[Tensor]]:
    operands = list(field.operands())
    places = (1, 2, 3, 6)
    for i in places:
        operands[i] = operands[i].detach().clone().requires_grad_()
    return operands, [operands[i] for i in places]


def loss(outputs: tuple[Tensor, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in outputs[:3]]
    return sum(((x * w).sum() for x, w in zip(outputs[:3], weights, strict=True)), torch.zeros(()))
