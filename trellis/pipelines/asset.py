"""`Asset`: what a pipeline returns, and how it is saved."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trellis.atomic import atomic_path
from trellis.nn.sparse import SparseTensor
from trellis.representations.gaussians import Gaussians
from trellis.representations.mesh import Mesh
from trellis.representations.radiance_field import RadianceField


@dataclass(frozen=True, eq=False)
class Asset:
    """One generated object. Representations that were not asked for are None.

    Args:
        slat: the structured latent, denormalised: ``coords [N, 4]`` int32 (batch 0, x, y, z), ``feats [N, 8]``.
        gaussians: 3D Gaussians.
        radiance_field: Strivec radiance field.
        mesh: triangle mesh with vertex colors.
        timings: stage -> seconds and peak memory.
        meta: model, seed, sampling parameters, how the background was removed.
    """

    slat: SparseTensor
    gaussians: Gaussians | None = None
    radiance_field: RadianceField | None = None
    mesh: Mesh | None = None
    timings: dict[str, dict[str, float]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def report(self) -> dict[str, Any]:
        """What was made and how: settings, versions, time and memory per stage, measured mesh quality."""
        from trellis import __version__
        from trellis.representations.mesh import mesh_statistics

        return {
            **self.meta,
            "versions": {"trellis": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "stages": self.timings,
            "voxels": self.slat.coords.shape[0],
            "gaussians": None if self.gaussians is None else len(self.gaussians),
            "mesh": None if self.mesh is None else mesh_statistics(self.mesh),
        }

    def save(self, path: str | Path) -> None:
        """Write a file; its suffix says which.

        ``.glb .obj .stl``: the mesh. ``.ply``: the Gaussians (`asset.mesh.save` writes a mesh as PLY).
        ``.png``: a contact sheet of the Gaussians; ``.mp4``: a turntable. ``.json``: the report.
        ``.safetensors``: the radiance field.

        Raises:
            ValueError: the suffix is unknown, or the asset lacks the representation; both are named.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in (".glb", ".obj", ".stl"):
            self._need("mesh", suffix).save(path)
        elif suffix == ".ply":
            self._need("gaussians", suffix).save(path)
        elif suffix == ".safetensors":
            self._need("radiance_field", suffix).save(path)
        elif suffix == ".png":
            from trellis.renderers.turntable import preview

            preview(self._need("gaussians", suffix), path)
        elif suffix == ".mp4":
            from trellis.renderers.turntable import save_video, turntable_frames

            save_video(turntable_frames(self._need("gaussians", suffix)), path)
        elif suffix == ".json":
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(self.report, indent=2) + "\n")
        else:
            raise ValueError(
                f"path must end in .glb, .obj, .stl, .ply, .png, .mp4, .json or .safetensors; got {path.name!r}"
            )

    def _need(self, name: str, suffix: str) -> Any:
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"saving {suffix} needs {name}, which this asset has not: generate with formats including it"
            )
        return value
