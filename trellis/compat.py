"""The official names, for scripts written against the original: change the import line, keep the rest.

    from trellis.compat import TrellisImageTo3DPipeline, TrellisTextTo3DPipeline, postprocessing_utils, render_utils

Calls and results are the official ones: ``run(image, seed=1, sparse_structure_sampler_params={"steps": 12,
"cfg_strength": 7.5})["gaussian"][0]``. New code should use `trellis.ImageTo3D` and `trellis.TextTo3D`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from trellis.pipelines.base import Pipeline
from trellis.pipelines.image_to_3d import ImageTo3D
from trellis.pipelines.settings import MAX_VOXELS, SamplerParams
from trellis.pipelines.stages import Condition, Run, ViewMode
from trellis.pipelines.text_to_3d import TextTo3D

FORMATS = {"gaussian": "gaussians", "radiance_field": "radiance_field", "mesh": "mesh"}
_PARAMETERS = {"steps": "steps", "cfg_strength": "guidance", "cfg_interval": "interval", "rescale_t": "rescale_t"}
Self = TypeVar("Self", bound="_Official")


class _Official:
    """What the two official pipelines share."""

    pipeline: Pipeline
    pipeline_class: type[Pipeline]

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    @classmethod
    def from_pretrained(cls: type[Self], path: str, **options: Any) -> Self:
        """As `trellis.ImageTo3D.from_pretrained`."""
        return cls(cls.pipeline_class.from_pretrained(path, **options))

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    def to(self: Self, device: torch.device | str) -> Self:
        self.pipeline.to(device)
        return self

    def cuda(self: Self) -> Self:
        return self.to("cuda")

    def cpu(self: Self) -> Self:
        return self.to("cpu")

    def _run(
        self,
        condition: Condition,
        count: int,
        seed: int,
        structure: Mapping[str, Any] | None,
        latent: Mapping[str, Any] | None,
        formats: Sequence[str],
    ) -> dict[str, list[Any]]:
        unknown = [name for name in formats if name not in FORMATS]
        if unknown:
            raise ValueError(f"formats must be among {', '.join(FORMATS)}; got {unknown[0]!r}")
        if condition.view_mode is None:
            condition = replace(condition, tokens=condition.tokens.expand(count, -1, -1))
        elif count != 1:
            raise ValueError(f"num_samples must be 1 with several images; got {count}")
        settings = self.pipeline.settings
        assets = self.pipeline.generate(
            condition,
            seeds=[seed] * count,
            one_stream=True,
            steps=None,
            guidance=None,
            structure=_params(settings.structure, structure),
            latent=_params(settings.latent, latent),
            formats=[FORMATS[name] for name in formats],
            max_voxels=MAX_VOXELS,
            run=Run(None),
            meta=[{}] * count,
        )
        return {name: [getattr(asset, FORMATS[name]) for asset in assets] for name in formats}


class TrellisImageTo3DPipeline(_Official):
    """Official image pipeline."""

    pipeline: ImageTo3D
    pipeline_class = ImageTo3D

    def preprocess_image(self, input: Any) -> Any:
        """Remove the background, crop, resize: a PIL image of 518 x 518."""
        from trellis.conditioning.imaging import load_image, prepare_image

        return prepare_image(load_image(input))[0]

    def run(
        self,
        image: Any,
        num_samples: int = 1,
        seed: int = 42,
        sparse_structure_sampler_params: Mapping[str, Any] | None = None,
        slat_sampler_params: Mapping[str, Any] | None = None,
        formats: Sequence[str] = ("mesh", "gaussian", "radiance_field"),
        preprocess_image: bool = True,
    ) -> dict[str, list[Any]]:
        """`num_samples` assets from one image; the noise is that of the official pipeline for the same seed."""
        condition = self._condition([image], preprocess_image)
        return self._run(condition, num_samples, seed, sparse_structure_sampler_params, slat_sampler_params, formats)

    def run_multi_image(
        self,
        images: Sequence[Any],
        num_samples: int = 1,
        seed: int = 42,
        sparse_structure_sampler_params: Mapping[str, Any] | None = None,
        slat_sampler_params: Mapping[str, Any] | None = None,
        formats: Sequence[str] = ("mesh", "gaussian", "radiance_field"),
        preprocess_image: bool = True,
        mode: ViewMode = "stochastic",
    ) -> dict[str, list[Any]]:
        """One asset from several images of one object."""
        condition = replace(self._condition(list(images), preprocess_image), view_mode=mode)
        return self._run(condition, num_samples, seed, sparse_structure_sampler_params, slat_sampler_params, formats)

    def _condition(self, images: list[Any], preprocess: bool) -> Condition:
        with torch.inference_mode():
            prepared = [self.preprocess_image(image) if preprocess else image for image in images]
            (tokens,) = self.pipeline.encode(prepared)
        return Condition(tokens, torch.zeros_like(tokens[:1]))


class TrellisTextTo3DPipeline(_Official):
    """Official text pipeline."""

    pipeline_class = TextTo3D

    def run(
        self,
        prompt: str,
        num_samples: int = 1,
        seed: int = 42,
        sparse_structure_sampler_params: Mapping[str, Any] | None = None,
        slat_sampler_params: Mapping[str, Any] | None = None,
        formats: Sequence[str] = ("mesh", "gaussian", "radiance_field"),
    ) -> dict[str, list[Any]]:
        """`num_samples` assets from one sentence."""
        with torch.inference_mode():
            tokens, negative = self.pipeline.encode([prompt], [""])
            condition = Condition(tokens, negative)
        return self._run(condition, num_samples, seed, sparse_structure_sampler_params, slat_sampler_params, formats)


def _params(defaults: SamplerParams, given: Mapping[str, Any] | None) -> SamplerParams:
    unknown = sorted(set(given or {}) - set(_PARAMETERS))
    if unknown:
        raise ValueError(f"sampler parameters must be among {', '.join(_PARAMETERS)}; got {unknown[0]!r}")
    return replace(defaults, **{_PARAMETERS[name]: value for name, value in (given or {}).items()})


def _render_video(sample: Any, num_frames: int = 300, resolution: int = 512, **options: Any) -> dict[str, list[Any]]:
    """The official camera path around any representation, as ``[H, W, 3]`` uint8 frames.

    ``{"color": frames}`` of Gaussians and radiance fields, ``{"normal": frames}`` of a mesh.
    """
    from trellis.renderers.turntable import turntable_frames
    from trellis.representations.mesh import Mesh

    if options:
        raise ValueError(f"render_video takes num_frames and resolution; got {sorted(options)[0]!r}")
    if isinstance(sample, Mesh):
        return {"normal": list(turntable_frames(sample, num_frames, resolution, what="normal"))}
    return {"color": list(turntable_frames(sample, num_frames, resolution))}


def _to_glb(app_rep: Any, mesh: Any, simplify: float = 0.95, texture_size: int = 1024, **_: Any) -> Any:
    raise NotImplementedError(
        "to_glb bakes a texture, which this version cannot do yet; "
        "mesh.save('x.glb') writes the same mesh with vertex colors"
    )


render_utils = SimpleNamespace(render_video=_render_video)
postprocessing_utils = SimpleNamespace(to_glb=_to_glb)
