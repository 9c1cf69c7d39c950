"""`Settings` of a preparation, `Job`: one object to prepare, and the table of steps."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trellis.atomic import atomic_path

if TYPE_CHECKING:
    from trellis.preparation.scene import SceneParts

# Step -> the function that does it for one object, and the column of metadata.csv that says it is done. {} is filled
# with the setting of that name.
STEPS: dict[str, tuple[str, str]] = {
    "inspect": ("trellis.preparation.scene:inspect_step", "inspected"),
    "render": ("trellis.preparation.views:render_step", "rendered"),
    "render_cond": ("trellis.preparation.views:render_cond_step", "cond_rendered"),
    "voxelize": ("trellis.preparation.views:voxelize_step", "voxelized"),
    "features": ("trellis.preparation.features:feature_step", "feature_{feature_model}"),
    "conditions": ("trellis.preparation.conditions:condition_step", "condition_{image_encoder}"),
    "structure_latents": ("trellis.preparation.latents:structure_latent_step", "ss_latent_{structure_model}"),
    "latents": ("trellis.preparation.latents:latent_step", "latent_{latent_model}"),
}
GEOMETRY = ("render", "render_cond", "voxelize")

# What may change between two runs on one folder: it does not change what was already written.
_FREE = {"feature_model", "image_encoder", "text_encoder", "structure_encoder", "latent_encoder"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a folder is prepared; kept in its preparation.json.

    Args:
        views: renders of each object, on the official remapped sphere-Hammersley sequence; 0: none.
        resolution: pixels per side of a render.
        ssaa: samples per side of a pixel of renders and conditioning pictures.
        depth: also write depths.npz; the features of models other than the official one use it.
        cond_views: conditioning pictures of each object.
        cond_resolution: pixels per side of them.
        cond_azimuth: they are taken at most so many degrees from the front (-y); 180: from everywhere.
        cond_elevation: lowest and highest elevation of their cameras in degrees.
        voxel_resolution: voxels per side of the structure.
        feature_model: whose features are back-projected.
        image_encoder: whose tokens of the conditioning pictures are kept in conditions/.
        text_encoder: whose tokens of the captions are kept there; "": none.
        augmentations: additional tokens of each conditioning picture, from its randomly changed copies.
        structure_encoder: path of a trained SparseStructureEncoder without suffix.
        latent_encoder: path of a trained SLatEncoder without suffix.
        variants: randomly turned, mirrored, stretched, recolored copies of each object, objects of their own.
        seed: of everything random.

    Raises:
        ValueError: a number is out of range.
    """

    views: int = 150
    resolution: int = 512
    ssaa: int = 2
    depth: bool = False
    cond_views: int = 24
    cond_resolution: int = 1024
    cond_azimuth: float = 180.0
    cond_elevation: tuple[float, float] = (-90.0, 90.0)
    voxel_resolution: int = 64
    feature_model: str = "dinov2_vitl14_reg"
    image_encoder: str = "dinov2_vitl14_reg"
    text_encoder: str = ""
    augmentations: int = 0
    structure_encoder: str = ""
    latent_encoder: str = ""
    variants: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"views": 0, "resolution": 1, "ssaa": 1, "cond_views": 0, "cond_resolution": 1, "voxel_resolution": 1}
        lowest |= {"augmentations": 0, "variants": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if self.voxel_resolution > 256:
            raise ValueError(f"voxel_resolution must be at most 256 (a byte per index); got {self.voxel_resolution}")
        if not 0 < self.cond_azimuth <= 180:
            raise ValueError(f"cond_azimuth must be in (0, 180] degrees; got {self.cond_azimuth}")
        low, high = self.cond_elevation
        if not -90 <= low <= high <= 90:
            raise ValueError(f"cond_elevation must be two degrees in [-90, 90], low first; got {self.cond_elevation}")

    @property
    def structure_model(self) -> str:
        """Name of the structure encoder: the folder its latents are in."""
        return Path(self.structure_encoder).name

    @property
    def latent_model(self) -> str:
        """Name of the latents' folder, as officially: feature model, then encoder."""
        return f"{self.feature_model}_{Path(self.latent_encoder).name}" if self.latent_encoder else ""

    def column(self, step: str) -> str:
        """The column of metadata.csv that is true for objects whose `step` is done."""
        names = [f.name for f in dataclasses.fields(self)] + ["structure_model", "latent_model"]
        return STEPS[step][1].format(**{name: getattr(self, name) for name in names})

    def save(self, root: Path) -> None:
        """Write `root`/preparation.json.

        Raises:
            ValueError: the folder was prepared with other settings that matter.
        """
        path = root / "preparation.json"
        if path.exists():
            old = Settings.load(root)
            for field in dataclasses.fields(self):
                was, wanted = getattr(old, field.name), getattr(self, field.name)
                if field.name not in _FREE and was != wanted:
                    raise ValueError(f"{root} was prepared with {field.name}={was}; got {wanted}: use another folder")
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, root: Path) -> Settings:
        """Read `root`/preparation.json.

        Raises:
            ValueError: it is not a file of settings.
        """
        path = root / "preparation.json"
        try:
            entries = json.loads(path.read_text())
            if not isinstance(entries, dict):
                raise TypeError(f"got {type(entries).__name__}")
            entries["cond_elevation"] = tuple(entries.get("cond_elevation", (-90.0, 90.0)))
            return cls(**entries)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must hold the settings of a preparation: {error}") from error


@dataclass(frozen=True)
class Job:
    """One object and what is to be done with it.

    Args:
        root: the prepared folder.
        sha256: id of the object.
        row: its line of metadata.csv.
        settings: of the preparation.
    """

    root: Path
    sha256: str
    row: Mapping[str, Any]
    settings: Settings

    @cached_property
    def scene(self) -> SceneParts:
        """The object as this row wants it: loaded, rotated, varied, normalised."""
        from trellis.preparation.scene import Variant, load_scene, vary

        rotation = json.loads(self.row.get("rotation") or "null")
        variant = json.loads(self.row.get("variant_args") or "null")
        scene = load_scene(self.root / str(self.row["local_path"]), rotation)
        return vary(scene, Variant(**variant)) if variant else scene

    @property
    def seed(self) -> int:
        """A seed of this object alone."""
        return (int(self.sha256[:12], 16) + self.settings.seed) % 2**48


def step_function(step: str) -> Callable[[Job], dict[str, Any]]:
    """The function of a step: does it for one object, skips what is there, returns columns for metadata.csv.

    Raises:
        ValueError: there is no such step.
    """
    if step not in STEPS:
        raise ValueError(f"step must be one of {', '.join(STEPS)}; got {step!r}")
    module, name = STEPS[step][0].split(":")
    return getattr(importlib.import_module(module), name)
