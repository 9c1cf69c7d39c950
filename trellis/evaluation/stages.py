"""What a pipeline makes of a held-out object, as a whole and stage by stage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trellis.checkpoints import load_model
from trellis.evaluation.baselines import QUERY
from trellis.evaluation.metrics import Shape
from trellis.evaluation.truth import RESOLUTION, VIEWS, fixed_cameras, surface_points
from trellis.models.structure_vae import occupied_coords
from trellis.nn.sparse import SparseTensor
from trellis.pipelines.image_to_3d import ImageTo3D
from trellis.pipelines.stages import Condition, Run, StructureError, decode, sample_latent
from trellis.pipelines.store import BUNDLED
from trellis.pipelines.text_to_3d import TextTo3D
from trellis.preparation.arrays import read_arrays, read_picture, read_voxels
from trellis.preparation.conditions import captions_of
from trellis.preparation.job import Job
from trellis.renderers.gaussians import render_gaussians
from trellis.representations.gaussians import Gaussians
from trellis.representations.mesh import Mesh


class Nothing(Exception):  # noqa: N818 - as below
    """The pipeline made nothing of an object; the message says why. Counted as the worst there is."""


class Missing(Exception):  # noqa: N818 - as below
    """A file of a held-out object is missing or damaged, so this object is not measured; the message says which."""


class Unavailable(Exception):  # noqa: N818 - it is no error, the report says why
    """A stage cannot be measured at all; the message says why."""


@dataclass(frozen=True)
class Models:
    """The models that are measured; each is loaded when it is first used.

    Args:
        source: folder or Hub id of the pipeline; None: the bundled one.
        seed: of all sampling.
        steps: of both flows; None: the pipeline's.
        structure_encoder: stem of the structure VAE's encoder; "": that of the prepared folder's settings.
        latent_model: folder of the kept latents; "": that of the settings.
    """

    source: str | None = None
    seed: int = 42
    steps: int | None = None
    structure_encoder: str = ""
    latent_model: str = ""

    @cached_property
    def pipeline(self) -> ImageTo3D:
        """For pictures; it has the decoders too."""
        return ImageTo3D.from_pretrained(self.source, dtype=torch.float32)

    @cached_property
    def text_pipeline(self) -> TextTo3D:
        """For sentences."""
        try:
            pipeline = TextTo3D.from_pretrained(self.source, dtype=torch.float32)
        except ValueError as error:  # no such pipeline, or its encoder is not installed
            raise Unavailable(str(error)) from error
        return pipeline

    @cached_property
    def weights(self) -> str:
        """A hash of the pipeline's files and the structure encoder's; of a repository on the Hub its name."""
        folder = BUNDLED if self.source is None else Path(self.source)
        files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".safetensors")]
        if self.structure_encoder:
            files.append(Path(f"{self.structure_encoder}.safetensors"))
        if not folder.is_dir():
            return str(self.source)
        digest = hashlib.sha256()
        for path in files:
            if path.is_file() and path.name != "evaluation.json":
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]

    def image_to_3d(self, job: Job, formats: tuple[str, ...] = ("gaussians", "mesh")) -> Any:
        """The asset made from the first conditioning picture.

        Raises:
            Nothing: the structure came out empty or too large.
        """
        return self._made(self.pipeline, _picture(job), formats)

    def text_to_3d(self, job: Job) -> Any:
        """The asset made from the first caption, of which there must be one.

        Raises:
            Nothing: as `image_to_3d`.
            Unavailable: there is no pipeline for sentences.
        """
        return self._made(self.text_pipeline, captions_of(job.row)[0], ("gaussians", "mesh"))

    def _made(self, pipeline: Any, condition: Any, formats: tuple[str, ...]) -> Any:
        wanted = [name for name in formats if name in pipeline.formats]
        try:
            return pipeline(condition, seed=self.seed, steps=self.steps, formats=wanted)
        except StructureError as error:
            raise Nothing(str(error)) from error

    @torch.inference_mode()
    def latent_flow(self, job: Job) -> Shape:
        """The latent flow alone: the true structure is given."""
        pipe, run = self.pipeline, Run(None)
        condition: Condition = pipe.condition([_picture(job)], None, run)[0]
        params = pipe.sampler("latent", self.steps, None, None)
        grid = SparseTensor.from_coords(*self._structure(job)).grid
        generators = [torch.Generator().manual_seed(self.seed)]
        return self._decoded(sample_latent(pipe.store, condition, params, generators, grid, pipe.settings, run))

    @torch.inference_mode()
    def slat_vae(self, job: Job) -> Shape:
        """The decoders alone: the latents that the trained encoder gave are given."""
        name = self.latent_model or job.settings.latent_model
        if not name:
            raise Unavailable("neither the prepared folder's settings nor --latent-model name the latents")
        with reading():
            feats, coords = read_arrays(job.root / "latents" / name / f"{job.sha256}.npz", "feats", "coords")
        rows = torch.from_numpy(np.pad(coords.astype(np.int32), ((0, 0), (1, 0))))
        resolution = job.settings.voxel_resolution
        return self._decoded(SparseTensor.from_coords(rows, torch.from_numpy(feats), resolution))

    @torch.inference_mode()
    def structure_vae(self, job: Job) -> Shape:
        """The structure VAE alone: encoded and decoded."""
        resolution = job.settings.voxel_resolution
        grid = torch.zeros(1, 1, *(resolution,) * 3)
        x, y, z = _voxels(job).long().unbind(1)
        grid[0, 0, x, y, z] = 1
        mean, _ = self._encoder(self.structure_encoder or job.settings.structure_encoder)(grid)
        with self.pipeline.store.use("sparse_structure_decoder") as decoder:
            return Shape(voxels=occupied_coords(decoder(mean))[:, 1:])

    def _encoder(self, stem: str) -> Any:
        if not stem:
            raise Unavailable("neither the prepared folder's settings nor --structure-encoder name an encoder")
        if stem not in self._encoders:
            self._encoders[stem] = load_model(stem, dtype=torch.float32)
        return self._encoders[stem]

    @cached_property
    def _encoders(self) -> dict[str, Any]:
        return {}

    def _structure(self, job: Job) -> tuple[Tensor, Tensor, int]:
        voxels = _voxels(job)
        rows = torch.cat([torch.zeros_like(voxels[:, :1]), voxels], 1)
        return rows, torch.zeros(len(rows), 1), job.settings.voxel_resolution

    def _decoded(self, slat: SparseTensor) -> Shape:
        wanted = [name for name in ("gaussians", "mesh") if name in self.pipeline.formats]
        decoded = decode(self.pipeline.store, slat, wanted, Run(None))
        return shape_of(*(decoded[name][0] if name in decoded else None for name in ("gaussians", "mesh")))


def asset_shape(asset: Any) -> Shape:
    """What of an asset is measured."""
    shape = shape_of(asset.gaussians, asset.mesh)
    return Shape(asset.slat.coords[:, 1:], shape.points, shape.images)


@torch.inference_mode()
def shape_of(gaussians: Gaussians | None, mesh: Mesh | None) -> Shape:
    """Surface of the mesh, pictures of the Gaussians."""
    images = None
    if gaussians is not None:
        images = render_gaussians(gaussians, fixed_cameras(), RESOLUTION, 1.0).colors.clamp(0, 1)
    return Shape(None, None if mesh is None else surface_points(mesh), images)


def nothing() -> Shape:
    """An object that is not there."""
    white = torch.ones(VIEWS, 3, RESOLUTION, RESOLUTION)
    return Shape(torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0, 3), white)


@contextmanager
def reading() -> Iterator[None]:
    """What cannot be read of an object is `Missing`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Missing(str(error)) from error


def _picture(job: Job) -> Image.Image:
    with reading():
        return read_picture(job.root / "renders_cond" / job.sha256 / QUERY)


def _voxels(job: Job) -> Tensor:
    path: Path = job.root / "voxels" / f"{job.sha256}.ply"
    with reading():
        return read_voxels(path, job.settings.voxel_resolution)
