"""Pull the vertices of a sphere to a shape of which only silhouettes are seen, through `antialias` alone.

    python -m examples.fit_silhouette --out out/silhouette

The vertices are moved in the smooth coordinates of Nicolet et al. 2021, "Large Steps in Inverse Rendering of
Geometry": a gradient that only the few vertices along a silhouette have is spread over their surroundings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import print_json
from torch import Tensor

from examples.fitting import LAST_RATE, Metrics, drawn_views, iou, optimizer, save_results
from examples.scene import held_out_cameras, sphere, stone, training_cameras
from trellis.renderers.camera import Cameras
from trellis.renderers.mesh import render_mesh
from trellis.representations.mesh import Mesh


def main(
    steps: Annotated[int, typer.Option(help="one view each")] = 600,
    resolution: Annotated[int, typer.Option(help="pixels per side")] = 256,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="folder of metrics.json, views.png and fit.glb")] = Path("out/silhouette"),
) -> None:
    """Fit, show the measures and write them with pictures."""
    metrics, mesh = fit(steps, resolution, seed)
    cameras = held_out_cameras()[:4]
    save_results(out, metrics, *(shaded(shape, cameras, resolution) for shape in (stone(), mesh)))
    mesh.save(out / "fit.glb")
    print_json(data=metrics)


def fit(steps: int, resolution: int, seed: int, columns: int = 96, smoothness: float = 20.0) -> tuple[Metrics, Mesh]:
    """Fit the silhouettes of 24 views.

    Args:
        steps: one view each.
        resolution: pixels per side.
        seed: of the order of the views.
        columns: of triangles around the sphere.
        smoothness: how far a gradient reaches: about its root, in edges.

    Returns:
        IoU of training and held-out views before and after; the mesh.
    """
    cameras, others = training_cameras(), held_out_cameras()
    with torch.no_grad():
        targets, held_out = (masks(stone(), some, resolution) for some in (cameras, others))
    start = sphere(columns)
    factor = torch.linalg.cholesky(torch.eye(len(start.vertices)) + smoothness * laplacian(start))
    smooth = (factor @ (factor.T @ start.vertices)).requires_grad_()
    adam = optimizer([{"params": [smooth], "lr": 5e-3}])
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: LAST_RATE ** (step / steps))

    def current() -> Mesh:
        return Mesh(torch.cholesky_solve(smooth, factor), start.faces)

    for view in drawn_views(len(cameras), steps, torch.Generator().manual_seed(seed), "silhouette"):
        loss = (masks(current(), cameras[view], resolution) - targets[view]).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        decay.step()
    mesh = current().detach()
    metrics = {}
    for moment, shape in (("before", start), ("after", mesh)):
        for name, some, truth in (("training", cameras, targets), ("held_out", others, held_out)):
            with torch.no_grad():
                metrics[f"iou_{name}_{moment}"] = iou(masks(shape, some, resolution), truth)
    return metrics, mesh


def shaded(mesh: Mesh, cameras: Cameras, resolution: int) -> Tensor:
    """``[V, 3, H, W]``: normals as colors."""
    normals = render_mesh(mesh, cameras, resolution, returns=("normals",)).normals
    assert normals is not None
    return normals


def masks(mesh: Mesh, cameras: Cameras, resolution: int) -> Tensor:
    """``[V, H, W]``: coverage, one sample per pixel and antialiased."""
    mask = render_mesh(mesh, cameras, resolution, ssaa=1, returns=("mask",)).mask
    assert mask is not None
    return mask


def laplacian(mesh: Mesh) -> Tensor:
    """``[V, V]`` dense: number of neighbors on the diagonal, -1 for each of them."""
    edges = torch.cat([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    adjacency = torch.zeros(len(mesh.vertices), len(mesh.vertices))
    adjacency[edges[:, 0], edges[:, 1]] = adjacency[edges[:, 1], edges[:, 0]] = 1.0
    return torch.diag(adjacency.sum(1)) - adjacency


if __name__ == "__main__":
    typer.run(main)
