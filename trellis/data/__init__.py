"""Prepared folders as datasets for training, under their official names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trellis.data.conditions import ImageCondition, TextCondition, TokenCondition
from trellis.data.dataset import Part, PreparedDataset
from trellis.data.objects import Choice, find
from trellis.data.packing import unpack_shards, write_shards
from trellis.data.renders import GroundTruthMesh, Renders
from trellis.data.voxels import Features, Latents, Occupancy, StructureLatents

__all__ = ["DATASETS", "PreparedDataset", "build_dataset", "unpack_shards", "write_shards"]

# Official class -> what a sample consists of.
DATASETS: dict[str, tuple[type[Part], ...]] = {
    "SparseStructure": (Occupancy,),
    "SparseFeat2Render": (Features, Renders),
    "SLat2Render": (Latents, Renders),
    "Slat2RenderGeo": (Latents, Renders, GroundTruthMesh),
    "SparseStructureLatent": (StructureLatents,),
    "SLat": (Latents,),
    "TextConditionedSparseStructureLatent": (StructureLatents, TextCondition),
    "ImageConditionedSparseStructureLatent": (StructureLatents, ImageCondition),
    "TextConditionedSLat": (Latents, TextCondition),
    "ImageConditionedSLat": (Latents, ImageCondition),
}


def build_dataset(name: str, args: Mapping[str, Any], roots: Sequence[Path | str]) -> PreparedDataset:
    """A dataset of an official training configuration, on folders of the official layout.

    Args:
        name: of `DATASETS`.
        args: the official arguments, and ours: `split` (train, test, all), `variants` (false: only objects as they
            are), `cache` (keep what was read, up to 4 GiB of each kind of data), `crop` and `augment` of occupancy,
            `views` per sample of renders, `cond_model` (tokens that `trellis prepare` kept instead of pictures or
            captions; a list: one of them, drawn for each sample), `occupancy` (of structure latents: also ``ss``, the
            voxels at `resolution`).
        roots: prepared folders, or folders of tar shards of such (`write_shards`).

    Raises:
        ValueError: there is no such dataset, an argument is unknown or does not fit, or no object has what is needed.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got {name!r}")
    kinds = DATASETS[name]
    if args.get("cond_model"):
        kinds = tuple(TokenCondition if kind in (TextCondition, ImageCondition) else kind for kind in kinds)
    if "occupancy" in args and StructureLatents in kinds:
        kinds += (Occupancy,) if args["occupancy"] else ()
        args = {key: value for key, value in args.items() if key != "occupancy"}
    known = set(Choice.arguments).union(*(kind.arguments for kind in kinds))
    known |= {"pretrained_slat_dec", "pretrained_ss_dec"}  # for showing samples; the loop's concern
    unknown = sorted(set(args) - known)
    if unknown:
        raise ValueError(f"dataset {name} has no argument {unknown[0]!r}; known are {', '.join(sorted(known))}")
    # The flows call what they learn x_0, the decoders call it latents.
    flow = name.endswith("SLat")
    given = dict(args) | ({"key": "x_0"} if flow else {})
    parts = tuple(kind.build(given) for kind in kinds)
    columns = [column for part in parts for column in part.columns]
    sparse = any(kind in (Features, Latents) for kind in kinds)
    return PreparedDataset(find([Path(root) for root in roots], Choice.build(args), columns), parts, sparse)
