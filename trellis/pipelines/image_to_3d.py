"""`ImageTo3D`: one photo, or several of one object, to a 3D asset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trellis.pipelines.asset import Asset
from trellis.pipelines.base import Pipeline, seeds_of
from trellis.pipelines.settings import MAX_VOXELS, SamplerParams
from trellis.pipelines.stages import Callback, Condition, Run, ViewMode

DEFAULT_SEED = 42


class ImageTo3D(Pipeline):
    """Image to 3D.

    Example:
        >>> pipe = ImageTo3D.from_pretrained()  # doctest: +SKIP
        >>> pipe("chair.png", seed=1).save("chair.glb")  # doctest: +SKIP
    """

    official_name = "TrellisImageTo3DPipeline"
    conditioner_key = "image_cond_model"
    conditioner_kind = "image"
    default_conditioner = "dinov2_vitl14_reg"

    def __call__(
        self,
        image: Any,
        *,
        seed: int | Sequence[int] = DEFAULT_SEED,
        steps: int | None = None,
        guidance: float | None = None,
        structure: SamplerParams | None = None,
        latent: SamplerParams | None = None,
        formats: Sequence[str] | None = None,
        max_voxels: int = MAX_VOXELS,
        max_pixels: int | None = None,
        batch_size: int = 1,
        callback: Callback | None = None,
    ) -> Any:
        """Generate an asset from an image, or a list of assets from a list of images of different objects.

        Args:
            image: path, bytes, PIL image, array ``[H, W, 3 or 4]`` uint8, tensor, or a list of them. An alpha channel
                separates the object from the background; without one the background is removed.
            seed: of the noise; one for all images or one each. The same seed gives the same asset.
            steps: sampling steps of both stages; default: the pipeline's.
            guidance: guidance strength of both stages; default: the pipeline's.
            structure: all sampling parameters of the structure stage.
            latent: all sampling parameters of the latent stage.
            formats: of "gaussians", "radiance_field", "mesh"; default: all the pipeline has.
            max_voxels: an object with more occupied voxels is an error before anything large is allocated.
            max_pixels: of an input image; default as `trellis.conditioning.imaging.load_image`.
            batch_size: images that go through the networks together.
            callback: called with a `Progress` after each step and stage; returning False cancels.

        Returns:
            `Asset`, or a list of them if `image` is a list.

        Raises:
            ValueError: an image cannot be used, or the object comes out empty or too large.
            Cancelled: the callback returned False.
        """
        several = isinstance(image, list | tuple)
        images = list(image) if several else [image]
        if not images:
            raise ValueError("image must be an image or a non-empty list of images; got an empty list")
        seeds = seeds_of(seed, len(images))
        assets: list[Asset] = []
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                group = slice(start, start + batch_size)
                run = Run(callback)
                condition, meta = self.condition(images[group], max_pixels, run)
                assets += self.generate(
                    condition,
                    seeds=seeds[group],
                    steps=steps,
                    guidance=guidance,
                    structure=structure,
                    latent=latent,
                    formats=formats,
                    max_voxels=max_voxels,
                    run=run,
                    meta=meta,
                )
        return assets if several else assets[0]

    def from_views(
        self,
        images: Sequence[Any],
        *,
        mode: ViewMode = "stochastic",
        seed: int = DEFAULT_SEED,
        steps: int | None = None,
        guidance: float | None = None,
        structure: SamplerParams | None = None,
        latent: SamplerParams | None = None,
        formats: Sequence[str] | None = None,
        max_voxels: int = MAX_VOXELS,
        max_pixels: int | None = None,
        callback: Callback | None = None,
    ) -> Asset:
        """Generate one asset from several photos of one object.

        Args:
            images: the photos, each as in `__call__`.
            mode: "stochastic": each step follows one of the photos in turn; "multidiffusion": each follows their mean.
            seed: of the noise.
            steps: as in `__call__`, like all that follow.
            guidance: see `__call__`.
            structure: see `__call__`.
            latent: see `__call__`.
            formats: see `__call__`.
            max_voxels: see `__call__`.
            max_pixels: see `__call__`.
            callback: see `__call__`.

        Raises:
            ValueError, Cancelled: as `__call__`.
        """
        if mode not in ("stochastic", "multidiffusion"):
            raise ValueError(f"mode must be 'stochastic' or 'multidiffusion'; got {mode!r}")
        if not images:
            raise ValueError("images must be a non-empty list; got an empty one")
        run = Run(callback)
        with torch.inference_mode():
            views, meta = self.condition(list(images), max_pixels, run)
            condition = Condition(views.tokens, views.negative, mode)
            background = [entry["background"] for entry in meta]
            return self.generate(
                condition,
                seeds=seeds_of(seed, 1),
                steps=steps,
                guidance=guidance,
                structure=structure,
                latent=latent,
                formats=formats,
                max_voxels=max_voxels,
                run=run,
                meta=[{"background": background, "views": len(images), "mode": mode}],
            )[0]

    def condition(self, images: list[Any], max_pixels: int | None, run: Run) -> tuple[Condition, list[dict[str, Any]]]:
        from trellis.conditioning.imaging import load_image, prepare_image

        prepared, meta = [], []
        with run.stage("preprocess", self.device):
            for image in images:
                loaded = load_image(image) if max_pixels is None else load_image(image, max_pixels=max_pixels)
                picture, method = prepare_image(loaded)
                prepared.append(picture)
                meta.append({"background": method})
        with run.stage("image_encoder", self.device):
            (tokens,) = self.encode(prepared)
        return Condition(tokens, torch.zeros_like(tokens[:1])), meta
