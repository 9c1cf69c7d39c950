"""Pictures of what a model makes of a few fixed objects, beside what it should."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trellis.atomic import atomic_path
from trellis.checkpoints import CheckpointError, load_model
from trellis.nn.sparse import SparseTensor
from trellis.renderers.camera import Cameras
from trellis.renderers.radiance_field import render_voxels
from trellis.renderers.show import show
from trellis.sampling.flow_euler import euler
from trellis.sampling.guidance import conditioned, with_guidance
from trellis.training.batches import Dataset, read_sample, seeded, to_device
from trellis.training.conditions import Conditions
from trellis.training.state import Run

logger = logging.getLogger(__name__)
OBJECTS = 4
STEPS, GUIDANCE = 50, 3.0  # of the flows, as in the official snapshots
SIZE = 256


class Samples:
    """Draws the same objects, from the same noise, each time it is asked.

    Args:
        dataset: the objects are spread evenly over it.
        args: its arguments: `normalization`, and `pretrained_ss_dec` or `pretrained_slat_dec`, which show latents.
        conditions: makes tokens of the flows' conditions.
        device: where the models are.
    """

    def __init__(self, dataset: Dataset, args: Mapping[str, Any], conditions: Conditions, device: torch.device) -> None:
        self.dataset, self.args, self.conditions, self.device = dataset, args, conditions, device
        self._decoder: Any = None
        self._failed = False

    @torch.no_grad()
    def draw(self, run: Run) -> Tensor | None:
        """A sheet ``[3, H, W]`` in [0, 1]: what should be above what is, object by object; None if it cannot be shown.

        Models are asked in evaluation mode and are in training mode afterwards.
        """
        count = min(OBJECTS, len(self.dataset))
        indices = [len(self.dataset) * i // count for i in range(count)]
        items = [read_sample(self.dataset, run.loop.seed, -1, index, index) for index in indices]
        batch = self.conditions(to_device(self.dataset.collate(items), self.device))
        for model in run.models.values():
            model.eval()
        try:
            rows = self._rows(run, batch)
        finally:
            for model in run.models.values():
                model.train()
        if rows is None:
            return None
        return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).float().clamp(0, 1).cpu()

    def _rows(self, run: Run, batch: dict[str, Any]) -> list[Tensor] | None:
        models = run.models
        if "ss" in batch:
            logits = models["decoder"](models["encoder"](batch["ss"])[0])
            return [_voxels(batch["ss"] > 0.5), _voxels(logits > 0)]
        if "x_0" in batch:
            decoder = self._latent_decoder(isinstance(batch["x_0"], SparseTensor))
            if decoder is None:
                return None
            sampled = self._sample(run, batch)
            return [_decoded(decoder, self._denormalised(latent)) for latent in (batch["x_0"], sampled)]
        latent = models["encoder"](batch["feats"])[0] if "feats" in batch else batch["latents"]
        image, alpha = batch["image"], batch["alpha"]
        extrinsics, intrinsics = batch["extrinsics"], batch["intrinsics"]
        if image.ndim == 5:  # the first of several views
            image, alpha, extrinsics, intrinsics = (x[:, 0] for x in (image, alpha, extrinsics, intrinsics))
        shown = [
            show(thing, Cameras(extrinsics[i : i + 1], intrinsics[i : i + 1]), image.shape[-1])[0]
            for i, thing in enumerate(models["decoder"](latent))
        ]
        return [image * alpha[:, None], torch.stack(shown)]

    def _sample(self, run: Run, batch: dict[str, Any]) -> Any:
        x0, model = batch["x_0"], run.models["denoiser"]
        values = x0.feats if isinstance(x0, SparseTensor) else x0
        noise = torch.randn(values.shape, generator=seeded(run.loop.seed, 5)).to(values)
        start: Any = x0.with_feats(noise) if isinstance(x0, SparseTensor) else noise
        guided = "CFG" in run.config.trainer.name and run.config.trainer.args.get("p_uncond", 0.1) > 0
        velocity: Any = conditioned(model, batch["cond"])
        if guided:
            velocity = with_guidance(model, batch["cond"], batch["neg_cond"], GUIDANCE)
        last: Any = None
        for step in euler(velocity, start, STEPS):
            last = step.x
        return last

    def _denormalised(self, latent: Any) -> Any:
        scale = self.args.get("normalization")
        if scale is None:
            return latent
        values = latent.feats if isinstance(latent, SparseTensor) else latent
        shape = (1, -1) if isinstance(latent, SparseTensor) else (1, -1, 1, 1, 1)
        mean, std = (torch.tensor(scale[name]).to(values).view(shape) for name in ("mean", "std"))
        return latent.with_feats(values * std + mean) if isinstance(latent, SparseTensor) else values * std + mean

    def _latent_decoder(self, sparse: bool) -> Any:
        name = "pretrained_slat_dec" if sparse else "pretrained_ss_dec"
        if self._decoder is None and not self._failed:
            stem = self.args.get(name)
            try:
                if stem is None:
                    raise CheckpointError(f"dataset.args has no {name}")
                self._decoder = load_model(stem, device=self.device, dtype=torch.float32)
            except CheckpointError as error:
                self._failed = True
                logger.warning("samples are not shown: %s", error)
        return self._decoder


def save_sheet(sheet: Tensor, path: Path) -> None:
    """Write a sheet ``[3, H, W]`` as PNG."""
    pixels = (sheet.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary)


def _decoded(decoder: Any, latent: Any) -> Tensor:
    if not isinstance(latent, SparseTensor):
        return _voxels(decoder(latent) > 0)
    camera = _camera(latent.feats.device)
    return torch.cat([show(thing, camera, SIZE) for thing in decoder(latent)])


def _voxels(occupied: Tensor) -> Tensor:
    camera = _camera(occupied.device)
    return torch.cat([render_voxels(sample[0], camera, SIZE, ssaa=1).colors for sample in occupied])


def _camera(device: torch.device) -> Cameras:
    camera = Cameras.orbit(0.6, 0.4)
    return Cameras(camera.extrinsics.to(device), camera.intrinsics.to(device))
