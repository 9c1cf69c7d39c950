"""FlexiCubes on sparse cubes: from what a network says about cubes near a surface to the mesh of that surface.

Two operators: `surface_topology` finds grid points, crossed cells, dual vertices and quads (integers, sizes from data);
`surface_values` computes everything real on them and carries the gradient. Memory grows with the number of cubes.
Results are the same in every run, the topology also on a CPU and a GPU. On a GPU the host waits once, for the
sizes of the surface (up to four times where the grid is larger than about 512 cells per axis).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trellis_kernels.mesh_extraction import reference
from trellis_kernels.operator import Operator
from trellis_kernels.shapes import FLOATS, expect

__all__ = ["ExtractedMesh", "ExtractionTerms", "extract_mesh"]


class ExtractionTerms(NamedTuple):
    """What training adds: three regularizers (scalars) and the grid points that the cubes touch, sorted by x, y, z.

    The official regularization is ``consistency + 0.5 * deviation + 0.2 * weight_magnitude``, without the middle
    term where nothing was extracted (`ExtractedMesh.success`).
    """

    deviation: Tensor  #: mean over dual vertices and their edges of | |z - v| - mean |z - v| |, z the zero crossings
    consistency: Tensor  #: mean square of corner minus mean over the cubes that share it: sdf, deformation, colors
    weight_magnitude: Tensor  #: mean |raw alpha and beta|
    grid_positions: Tensor  #: ``[G, 3]`` deformed grid points, world units
    grid_sdf: Tensor  #: ``[G]`` their sdf


class ExtractedMesh(NamedTuple):
    """A triangle mesh, counterclockwise seen from outside (the side of positive sdf)."""

    vertices: Tensor  #: ``[V, 3]`` world units, [-0.5, 0.5] (a deformed boundary may leave it by half a cell)
    faces: Tensor  #: ``[F, 3]`` int64
    attributes: Tensor  #: ``[V, C]`` in [0, 1]
    terms: ExtractionTerms | None  #: only in the training form

    @property
    def success(self) -> bool:
        """Whether there is any surface."""
        return len(self.faces) > 0


def extract_mesh(coords: Tensor, feats: Tensor, resolution: int, training: bool = False) -> ExtractedMesh:
    """Extract the zero level set of a signed distance given on sparse cubes, with FlexiCubes.

    The corners of the cubes are grid points; what several cubes say about one is averaged. Where no cube touches, a
    point is outside (sdf +1), and a cell without a cube has zero weights. A dual vertex of a cell is

        v = sum_e beta_e u_e / sum_e beta_e,    u_e = (s1 a1 p0 - s0 a0 p1) / (s1 a1 - s0 a0)

    over a group of its crossed edges, with deformed grid points ``p = index / R - 1/2 + tanh(deform) / 2R``, weights
    ``a = 1 + 0.99 tanh(alpha)``, ``beta`` likewise; attributes are interpolated with the same weights. Each crossed
    edge inside the grid gives the quad of its four cells: cut along the diagonal with the greater product of
    ``gamma = 0.005 + 0.99 sigmoid(.)``, or in training into four triangles around a center weighted by these products.

    Args:
        coords: ``[N, 3]`` int32, distinct, in [0, resolution). The cubes of one sample, in any order.
        feats: ``[N, 53 + 8 C]`` float, raw network output; channels: sdf ``8`` (before its bias of ``-1 / resolution``,
            which is added here; negative inside), deformation ``8 x 3``, weights ``21`` (beta of 12 edges, alpha of 8
            corners, gamma), colors ``8 x C``. Corner k of a cube is at ``(k & 1, k >> 1 & 1, k >> 2)``.
        resolution: cells per axis R, 1 to 4095.
        training: return four triangles per quad, and `ExtractionTerms`.

    Returns:
        The mesh, in the dtype of `feats`, differentiable with respect to `feats`. No surface is an empty mesh.
        Vertices come cell by cell (sorted by x, y, z), the centers of quads after them.

    Raises:
        ValueError, TypeError: if a shape, dtype or range is not the one above, or a cube occurs twice.

    Source:
        Shen et al. 2023, "Flexible Isosurface Extraction for Gradient-Based Mesh Optimization", with the tables of its
        implementation; the sparse-to-dense conventions of TRELLIS (commit 6b0d647). One difference: where a grid
        point has sdf exactly 0 the quad still faces outward.
    """
    expect(coords=(coords, "N 3", torch.int32), feats=(feats, "N D", FLOATS))
    channels, remainder = divmod(feats.shape[1] - 53, 8)
    if channels < 0 or remainder:
        raise ValueError(f"feats must have 53 + 8 C channels; got {feats.shape[1]}")
    if not 1 <= resolution <= 4095:
        raise ValueError(f"resolution must be in [1, 4095]; got {resolution}")
    *topology, quads = _topology(coords, feats.detach(), resolution)
    vertices, attributes, gammas, terms, grid_positions, grid_sdf = _values(feats, *topology, resolution, training)
    if not training:
        return ExtractedMesh(vertices, _split(quads, gammas.detach()), attributes, None)
    quads = quads.long()
    gamma = gammas[quads]
    along_02, along_13 = gamma[:, 0] * gamma[:, 2], gamma[:, 1] * gamma[:, 3]
    share = (along_02 / (along_02 + along_13 + 1e-8))[:, None], (along_13 / (along_02 + along_13 + 1e-8))[:, None]
    vertices, attributes = (
        torch.cat([values, share[0] * _midpoints(values, quads, 0, 2) + share[1] * _midpoints(values, quads, 1, 3)])
        for values in (vertices, attributes)
    )
    center = torch.arange(len(gammas), len(vertices), device=quads.device)
    faces = torch.stack([quads, quads.roll(-1, 1), center[:, None].expand(-1, 4)], 2)
    extra = ExtractionTerms(terms[0], terms[1], terms[2], grid_positions, grid_sdf)
    return ExtractedMesh(vertices, faces.reshape(-1, 3), attributes, extra)


def _midpoints(values: Tensor, quads: Tensor, first: int, second: int) -> Tensor:
    # index_select, not indexing: its gradient is added in a fixed order
    return (values.index_select(0, quads[:, first]) + values.index_select(0, quads[:, second])) / 2


_KERNELS = {"cpu": "trellis_kernels.mesh_extraction.cpu", "cuda": "trellis_kernels.mesh_extraction.cuda"}

# Of G grid points, S crossed cells, V dual vertices, Q quads (int32): points [G, 3], the cubes around each point by the
# corner they have there [G, 8], cells [S, 3], their cubes [S], their points [S, 8], their cases [S], the cell of each
# dual vertex [V], quads of dual vertices [Q, 4]. -1 where there is none.
_topology = Operator(
    "surface_topology(Tensor coords, Tensor feats, int resolution)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.surface_topology,
    kernels=_KERNELS,
)

_TOPOLOGY_ARGUMENTS = (
    "Tensor points, Tensor point_cubes, Tensor cells, Tensor cell_cubes, Tensor cell_points, Tensor cases,"
    " Tensor vertex_cells, int resolution, bool training"
)
# vertices [V, 3], attributes [V, C], gammas [V]; in training the three terms [3], grid_positions [G, 3], grid_sdf [G]
_values = Operator(
    f"surface_values(Tensor feats, {_TOPOLOGY_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.surface_values,
    kernels=_KERNELS,
)
_values_gradient = Operator(
    f"surface_values_gradient(Tensor feats, {_TOPOLOGY_ARGUMENTS}, Tensor vertices_gradient,"
    " Tensor attributes_gradient, Tensor gammas_gradient, Tensor terms_gradient, Tensor positions_gradient,"
    " Tensor sdf_gradient) -> Tensor",
    reference=reference.surface_values_gradient,
    kernels=_KERNELS,
)


# quads [Q, 4] of vertices with gammas [V] -> faces [2 Q, 3] int64
_split = Operator(
    "split_quads(Tensor quads, Tensor gammas) -> Tensor", reference=reference.split_quads, kernels=_KERNELS
)


@_split.fake
def _(quads: Tensor, gammas: Tensor) -> Tensor:
    return quads.new_empty(2 * quads.shape[0], 3, dtype=torch.int64)


@_topology.fake
def _(coords: Tensor, feats: Tensor, resolution: int) -> tuple[Tensor, ...]:
    size = torch.library.get_ctx().new_dynamic_size
    points, cells, vertices, quads = size(), size(), size(), size()
    shapes = ((points, 3), (points, 8), (cells, 3), (cells,), (cells, 8), (cells,), (vertices,), (quads, 4))
    return tuple(coords.new_empty(shape) for shape in shapes)


@_values.fake
def _(feats: Tensor, points: Tensor, *topology: Any) -> tuple[Tensor, ...]:
    *_, vertex_cells, _resolution, training = topology
    vertices, grid = vertex_cells.shape[0], points.shape[0] if training else 0
    shapes = ((vertices, 3), (vertices, (feats.shape[1] - 53) // 8), (vertices,), (3,), (grid, 3), (grid,))
    return tuple(feats.new_empty(shape) for shape in shapes)


@_values_gradient.fake
def _(feats: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(feats)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.resolution, ctx.training = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    contiguous = (gradient.contiguous() for gradient in gradients)
    feats_gradient = _values_gradient(*ctx.saved_tensors, ctx.resolution, ctx.training, *contiguous)
    return feats_gradient, *(None,) * 9


_values.autograd(_backward, _setup_context)
