"""What can be measured on a mesh: how it hangs together, area and volume."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from trellis.representations.mesh import Mesh


def mesh_statistics(mesh: Mesh) -> dict[str, Any]:
    """Measure a mesh. Everything is plain Python, ready for JSON.

    Faces that name a vertex twice are counted and otherwise passed over; so are vertices without a face. Vertices at
    the same place are different vertices.

    Returns:
        ``vertices``, ``faces``: how many are stored. ``unreferenced_vertices``, ``degenerate_faces``: how many of them
        are passed over.

        ``components``: parts without a common vertex. ``euler_characteristic``: V - E + F; 2 for each sphere.

        ``boundary_edges``: edges of one face. ``nonmanifold_edges``: edges of three or more.
        ``nonmanifold_vertices``: vertices whose faces form several fans.
        ``manifold``: there is no nonmanifold edge or vertex. ``watertight``: every edge has exactly two faces.
        ``winding_consistent``: the two faces of an edge run along it in opposite directions. All three are False for a
        mesh without faces.

        ``area``: in square world units. ``volume``: in cubic world units, positive if faces are counterclockwise seen
        from outside; it means something if the mesh is watertight and consistently wound.

    Raises:
        ValueError: a face names a vertex that is not there, or a vertex of a face is not finite.
    """
    mesh.check_indices()
    stored = mesh.faces.detach().cpu().numpy()
    proper = (stored[:, 0] != stored[:, 1]) & (stored[:, 1] != stored[:, 2]) & (stored[:, 2] != stored[:, 0])
    faces = stored[proper]
    names, faces = _renumber(faces, len(mesh.vertices))
    area, volume = _area_and_volume(mesh.vertices.detach().cpu().double().numpy()[names], faces)
    return {
        "vertices": len(mesh.vertices),
        "faces": len(stored),
        "unreferenced_vertices": len(mesh.vertices) - len(names),
        "degenerate_faces": len(stored) - len(faces),
        **_topology(faces, len(names)),
        "area": area,
        "volume": volume,
    }


def _renumber(faces: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The vertices in use, and the faces in terms of these; `numpy.unique` without its sort."""
    used = np.zeros(count, dtype=bool)
    used[faces] = True
    return np.flatnonzero(used), (np.cumsum(used) - 1)[faces]


def _topology(faces: np.ndarray, vertices: int) -> dict[str, Any]:
    """All that does not depend on positions; every vertex is used."""
    start, end = faces.ravel(), np.roll(faces, -1, axis=1).ravel()  # half-edge 3 f + k leaves corner k of face f
    backward = start > end
    undirected = np.where(backward, end, start) * vertices + np.where(backward, start, end)
    order = np.argsort(undirected)
    undirected, backward = undirected[order], backward[order]
    first = np.flatnonzero(np.diff(undirected, prepend=-1))  # where the half-edges of each edge begin
    sizes = np.diff(first, append=len(order))
    pairs = first[sizes == 2]
    boundary, crowded = int((sizes == 1).sum()), int((sizes > 2).sum())

    low, high = np.divmod(undirected[first], max(vertices, 1))
    components = _roots(vertices, low, high).sum()
    follows = np.ones(len(order), dtype=bool)
    follows[first] = False
    second = np.flatnonzero(follows)  # half-edges that have one of the same edge just before
    following = order - order % 3 + (order + 1) % 3  # the corner where each half-edge ends
    at_low, at_high = np.where(backward, following, order), np.where(backward, order, following)
    fans = _roots(
        len(order),
        np.concatenate([at_low[second - 1], at_high[second - 1]]),
        np.concatenate([at_low[second], at_high[second]]),
    )
    pinched = int((np.bincount(faces.ravel()[fans], minlength=vertices) > 1).sum())
    return {
        "components": int(components),
        "watertight": len(faces) > 0 and boundary == crowded == 0,
        "manifold": len(faces) > 0 and crowded == pinched == 0,
        "boundary_edges": boundary,
        "nonmanifold_edges": crowded,
        "nonmanifold_vertices": pinched,
        "winding_consistent": len(faces) > 0 and bool((backward[pairs] != backward[pairs + 1]).all()),
        "euler_characteristic": vertices - len(first) + len(faces),
    }


def _roots(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One True per connected component of a graph with edges (a, b), at its least node.

    Trees are hooked to the least neighboring tree and flattened, until no edge joins two: O(log) rounds in practice.
    """
    parent = np.arange(count)
    while len(a):
        a, b = parent[a], parent[b]
        differ = a != b
        a, b = a[differ], b[differ]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(flatter := parent[parent], parent):
            parent = flatter
    return parent == np.arange(count)


def _area_and_volume(vertices: np.ndarray, faces: np.ndarray) -> tuple[float, float]:
    if not len(faces):
        return 0.0, 0.0
    if not np.isfinite(vertices).all():
        raise ValueError("vertices must be finite; some that faces use are not")
    middle = (vertices.min(0) + vertices.max(0)) / 2  # near the mesh, where the tetrahedra below cancel least
    a, b, c = np.moveaxis((vertices - middle)[faces], 1, 0)
    normals = np.cross(b - a, c - a)
    return float(np.sqrt((normals**2).sum(1)).sum() / 2), float((a * normals).sum() / 6)
