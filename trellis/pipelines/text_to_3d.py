"""`TextTo3D`: a sentence to a 3D asset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trellis.pipelines.base import Pipeline, seeds_of
from trellis.pipelines.image_to_3d import DEFAULT_SEED
from trellis.pipelines.settings import MAX_VOXELS, SamplerParams
from trellis.pipelines.stages import Callback, Condition, Run


class TextTo3D(Pipeline):
    """Text to 3D.

    Example:
        >>> pipe = TextTo3D.from_pretrained()  # doctest: +SKIP
        >>> pipe("a red chair", seed=1).save("chair.glb")  # doctest: +SKIP

    The bundled model needs the extra ``trellis[text]``; ``"microsoft/TRELLIS-text-large"`` brings its own encoder.
    """

    official_name = "TrellisTextTo3DPipeline"
    conditioner_key = "text_cond_model"
    conditioner_kind = "text"
    default_conditioner = "openai/clip-vit-large-patch14"

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = DEFAULT_SEED,
        steps: int | None = None,
        guidance: float | None = None,
        structure: SamplerParams | None = None,
        latent: SamplerParams | None = None,
        formats: Sequence[str] | None = None,
        max_voxels: int = MAX_VOXELS,
        callback: Callback | None = None,
    ) -> Any:
        """Generate an asset from a sentence, or a list of assets from a list of sentences.

        Args:
            prompt: the sentence; what exceeds the encoder's tokens (77, bundled model 49) is cut off.
            seed: of the noise; one for all prompts or one each.
            steps: sampling steps of both stages; default: the pipeline's.
            guidance: guidance strength of both stages; default: the pipeline's.
            structure: all sampling parameters of the structure stage.
            latent: all sampling parameters of the latent stage.
            formats: of "gaussians", "radiance_field", "mesh"; default: all the pipeline has.
            max_voxels: an object with more occupied voxels is an error before anything large is allocated.
            callback: called with a `Progress` after each step and stage; returning False cancels.

        Returns:
            `Asset`, or a list of them if `prompt` is a list.

        Raises:
            ValueError: a prompt is empty, or the object comes out empty or too large.
            Cancelled: the callback returned False.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or any(not isinstance(text, str) or not text.strip() for text in prompts):
            raise ValueError(f"prompt must be a sentence or a non-empty list of sentences; got {prompt!r}")
        seeds = seeds_of(seed, len(prompts))
        assets = []
        with torch.inference_mode():
            for text, one_seed in zip(prompts, seeds, strict=True):
                run = Run(callback)
                with run.stage("text_encoder", self.device):
                    tokens, negative = self.encode([text], [""])
                    condition = Condition(tokens, negative)
                assets += self.generate(
                    condition,
                    seeds=[one_seed],
                    steps=steps,
                    guidance=guidance,
                    structure=structure,
                    latent=latent,
                    formats=formats,
                    max_voxels=max_voxels,
                    run=run,
                    meta=[{"prompt": text}],
                )
        return assets[0] if isinstance(prompt, str) else assets
