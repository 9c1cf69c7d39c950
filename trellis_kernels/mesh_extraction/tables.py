"""The dual marching cubes tables: which crossed edges of a cell share a dual vertex.

A case is the sum of 2^k over the corners k inside the surface; corner k of a cell sits at (k & 1, k >> 1 & 1, k >> 2).
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor


class Tables(NamedTuple):
    """The tables as int64 tensors, -1 where there is nothing."""

    edges: Tensor  # [12, 2] the corners each edge of a cell joins, in the direction of its axis (y edges: against it)
    groups: Tensor  # [256, 4, 7] the edges of each dual vertex of a case
    counts: Tensor  # [256] dual vertices of a case
    vertex_of_edge: Tensor  # [256, 12] the inverse of `groups`
    ambiguous: Tensor  # [256, 4] 0, or 1 and the direction of the neighbor that resolves the ambiguity


def corner_offsets(device: torch.device | str | None = None) -> Tensor:
    """``[8, 3]`` int64: the corners of a cell, x fastest."""
    k = torch.arange(8, device=device)
    return torch.stack([k & 1, k >> 1 & 1, k >> 2], 1)


@cache
def tables(device: torch.device | str = "cpu") -> Tables:
    with torch.inference_mode(False):
        data = json.loads(files(__package__).joinpath("flexicubes_tables.json").read_text())
        groups = torch.full((256, 4, 7), -1)
        vertex_of_edge = torch.full((256, 12), -1)
        for case, vertices in enumerate(data["dual_vertices"]):
            for vertex, edges in enumerate(vertices):
                groups[case, vertex, : len(edges)] = torch.tensor(edges)
                vertex_of_edge[case, edges] = vertex
        ambiguous = torch.zeros(256, 4, dtype=torch.int64)
        for case, (dx, dy, dz, inverted) in data["ambiguous_cases"].items():
            assert inverted == 255 - int(case)
            ambiguous[int(case)] = torch.tensor([1, dx, dy, dz])
        counts = (groups[:, :, 0] >= 0).sum(1)
        edges = torch.tensor(data["cube_edges"])
        return Tables(*(t.to(device) for t in (edges, groups, counts, vertex_of_edge, ambiguous)))
