"""The mesh decoder: stored latents to surfaces, compared with the object's own in pictures and in space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, smooth_l1_loss

import trellis_kernels
from trellis.models.mesh_decoder import MeshDecoder
from trellis.nn.sparse import SparseTensor
from trellis.renderers.camera import Cameras
from trellis.representations.mesh import Mesh
from trellis.training.objectives.pictures import PictureLoss, Pictures
from trellis.training.objectives.surfaces import (
    FAR,
    NEAR,
    Truth,
    chamfer_distance,
    draw,
    sample_points,
    truncated_distance_error,
)
from trellis_kernels import ExtractedMesh

DEPTH_BETA = 1 / (2 * 256)  # world units at which the depth's error becomes linear


class MeshDecoding:
    """Mask, depth, normals and colors of the decoded surface, its distances and its regularity.

    A latent from which no surface could be extracted counts with its regularisation and, unlike officially, with its
    distances: without these it would never get a surface again.

    Args:
        lambda_ssim: weight of ``1 - SSIM`` in the comparisons of pictures.
        lambda_lpips: weight of the perceptual distance there.
        lambda_tsdf: weight of the truncated distances along the lines of sight.
        lambda_depth: weight of the depth.
        lambda_color: weight of colors, and of normal maps where the batch has ``normal_map``.
        depth_loss_type: `l1` or `smooth_l1`.
        perceptual: `lpips` (officially), `efficientnet_lite0` or `none` (ours).
        lambda_chamfer: weight of the Chamfer distance to the object's surface (ours; 0 as officially).
        chamfer_points: points on each surface.
        ssaa: samples per side of a pixel (ours).

    Source:
        Official SLatVaeMeshDecoderTrainer; section 15 of the facts.
    """

    def __init__(
        self,
        lambda_ssim: float = 0.2,
        lambda_lpips: float = 0.2,
        lambda_tsdf: float = 0.01,
        lambda_depth: float = 10.0,
        lambda_color: float = 0.1,
        depth_loss_type: str = "smooth_l1",
        perceptual: str = "lpips",
        lambda_chamfer: float = 0.0,
        chamfer_points: int = 4096,
        ssaa: int = 1,
    ) -> None:
        if depth_loss_type not in ("l1", "smooth_l1"):
            raise ValueError(f"depth_loss_type must be l1 or smooth_l1; got {depth_loss_type!r}")
        if ssaa < 1 or chamfer_points < 1:
            raise ValueError(f"ssaa and chamfer_points must be at least 1; got {ssaa} and {chamfer_points}")
        self.lambda_tsdf, self.lambda_depth, self.lambda_color = lambda_tsdf, lambda_depth, lambda_color
        self.lambda_chamfer, self.chamfer_points = lambda_chamfer, chamfer_points
        self.depth_loss_type, self.ssaa = depth_loss_type, ssaa
        self.compare = PictureLoss("l1", lambda_ssim, lambda_lpips, perceptual)

    def __call__(
        self, models: Mapping[str, nn.Module], batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, Tensor]:
        decoder = models["decoder"]
        assert isinstance(decoder, MeshDecoder)
        pictures = Pictures.of(batch)
        features: SparseTensor = decoder.features(batch["latents"])
        names = ["mask", "depth", "normal", "color", "normal_map", "tsdf", "chamfer", "regularity", "extracted"]
        compared = [name for name in ("normal", "color", "normal_map") if self.compare.perceptual.term]
        names += [self._perceptual(name) for name in compared]
        sums = {name: features.feats.new_zeros(()) for name in names}
        for index in range(len(features)):
            rows = features.segments.slice(index)
            coords, feats = features.coords[rows, 1:].contiguous(), features.feats[rows].float()
            extracted = trellis_kernels.extract_mesh(coords, feats, decoder.mesh_resolution, training=True)
            cameras = pictures.cameras(index, NEAR, FAR)
            vertices, faces = batch["mesh"][index][:2]
            truth = Truth.of(Mesh(vertices.float(), faces.long()), cameras, pictures.resolution, self.ssaa)
            distances = truncated_distance_error(extracted, truth.depths, cameras, decoder.mesh_resolution)
            terms = {"regularity": _regularity(extracted), "tsdf": distances}
            if extracted.success:
                terms |= self._surface(extracted, truth, cameras, pictures, index, batch, decoder, generator)
                terms["extracted"] = torch.ones_like(sums["mask"])
            for name, term in terms.items():
                sums[name] = sums[name] + term
        means = {name: value / len(features) for name, value in sums.items()}
        loss = means["mask"] + means["normal"] + means["regularity"]
        loss = loss + self.lambda_depth * means["depth"] + self.lambda_tsdf * means["tsdf"]
        loss = loss + self.lambda_color * (means["color"] + means["normal_map"])
        loss = loss + self.lambda_chamfer * means["chamfer"]
        unused = {"chamfer"} if not self.lambda_chamfer else set()
        unused |= {"normal_map", self._perceptual("normal_map")} if "normal_map" not in batch else set()
        return {"loss": loss, **{name: value for name, value in means.items() if name not in unused}}

    def _surface(
        self,
        extracted: ExtractedMesh,
        truth: Truth,
        cameras: Cameras,
        pictures: Pictures,
        index: int,
        batch: dict[str, Any],
        decoder: MeshDecoder,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        attributes = extracted.attributes if decoder.use_color else None
        colors, normals = (None, None) if attributes is None else (attributes[:, :3], attributes[:, 3:])
        mesh = Mesh(extracted.vertices, extracted.faces, colors, normals)
        seen = draw(mesh, cameras, pictures.resolution, self.ssaa)
        assert seen.mask is not None
        assert seen.depths is not None
        assert seen.normals is not None
        inside = truth.mask[:, None]
        depths, wanted = seen.depths * truth.mask, truth.depths * truth.mask
        smooth = self.depth_loss_type == "smooth_l1"
        terms = {
            "mask": l1_loss(seen.mask, truth.mask),
            "depth": smooth_l1_loss(depths, wanted, beta=DEPTH_BETA) if smooth else l1_loss(depths, wanted),
            **self._compared("normal", seen.normals * inside, truth.normals * inside),
        }
        if seen.colors is not None:
            painted = pictures.images[index] * pictures.alphas[index][:, None]
            terms |= self._compared("color", seen.colors, painted)
        if seen.normal_maps is not None and "normal_map" in batch:
            given = batch["normal_map"].float()
            given = (given if given.ndim == 5 else given[:, None])[index]
            terms |= self._compared("normal_map", seen.normal_maps * inside, given * inside)
        if self.lambda_chamfer:
            ours = sample_points(mesh, self.chamfer_points, generator)
            theirs = sample_points(truth.mesh, self.chamfer_points, generator)
            terms["chamfer"] = chamfer_distance(ours, theirs)
        return terms

    def _compared(self, name: str, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The comparison of two pictures, and for the log the perceptual distance in it by the name of what it is."""
        total, parts = self.compare(images, targets)
        term = self.compare.perceptual.term
        return {name: total} | ({self._perceptual(name): parts[term].detach()} if term else {})

    def _perceptual(self, name: str) -> str:
        return f"{name}_{self.compare.perceptual.term}"


def _regularity(extracted: ExtractedMesh) -> Tensor:
    assert extracted.terms is not None
    total = extracted.terms.consistency + 0.2 * extracted.terms.weight_magnitude
    return total + 0.5 * extracted.terms.deviation if extracted.success else total
