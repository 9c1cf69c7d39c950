"""`pipeline.json`: which models, which samplers, which conditioning. Read strictly; it may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trellis.checkpoints import CheckpointError

FLOW_ROLES = ("sparse_structure_flow_model", "sparse_structure_decoder", "slat_flow_model")
DECODER_ROLES = {
    "gaussians": "slat_decoder_gs",
    "radiance_field": "slat_decoder_rf",
    "mesh": "slat_decoder_mesh",
}
MAX_VOXELS = 32_768  # more than this the official models were not trained on
_SAMPLERS = {"FlowEulerSampler", "FlowEulerCfgSampler", "FlowEulerGuidanceIntervalSampler"}


@dataclass(frozen=True)
class SamplerParams:
    """How one flow is sampled.

    Args:
        steps: Euler steps.
        guidance: strength of classifier-free guidance; 0 is none.
        interval: times in [0, 1] at which guidance applies.
        rescale_t: above 1, more steps near the noise.
        temperature: standard deviation of the noise that sampling starts from (ours; officially 1). 0 suits flows that
            were trained with `decoded_noise` 0: they give the likely object, the same for every seed.
        sigma_min: of the flow's training.
    """

    steps: int = 50
    guidance: float = 3.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale_t: float = 1.0
    temperature: float = 1.0
    sigma_min: float = 1e-5

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 10_000:
            raise ValueError(f"steps must be in [1, 10000]; got {self.steps}")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"interval must be two rising times in [0, 1]; got {self.interval}")
        if not self.rescale_t > 0:
            raise ValueError(f"rescale_t must be positive; got {self.rescale_t}")
        if not 0 <= self.temperature <= 10:
            raise ValueError(f"temperature must be in [0, 10]; got {self.temperature}")

    @classmethod
    def from_json(cls, value: Any, where: str) -> SamplerParams:
        """From ``{"name", "args": {"sigma_min"}, "params": {...}}``."""
        entry = _object(value, where)
        if entry.get("name") not in _SAMPLERS:
            raise CheckpointError(
                f"{where}: name must be one of {', '.join(sorted(_SAMPLERS))}; got {entry.get('name')!r}"
            )
        args, params = _object(entry.get("args", {}), where), _object(entry.get("params", {}), where)
        same = ("steps", "rescale_t", "temperature")
        names = {"cfg_strength": "guidance", "cfg_interval": "interval"} | {name: name for name in same}
        unknown = sorted((set(params) - set(names)) | (set(args) - {"sigma_min"}))
        if unknown:
            raise CheckpointError(
                f"{where}: unknown parameter {unknown[0]!r}; known are {', '.join([*names, 'sigma_min'])}"
            )
        values: dict[str, Any] = {names[name]: _number(value, f"{where} {name}") for name, value in params.items()}
        if "sigma_min" in args:
            values["sigma_min"] = _number(args["sigma_min"], f"{where} sigma_min")
        if "steps" in values:
            values["steps"] = int(values["steps"])
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{where}: {error}") from None


@dataclass(frozen=True)
class PipelineSettings:
    """A checked `pipeline.json`.

    Args:
        models: role -> path string.
        structure: sampler of the structure flow.
        latent: sampler of the latent flow.
        mean: ``[8]`` added to normalised latents after scaling.
        std: ``[8]`` scale of the latents.
        conditioner: official name, or ``{"name", "args", "path"}`` of a class in `trellis.conditioning`; None: missing.
        notice: one line for whoever uses this model, None for none.
    """

    models: Mapping[str, str]
    structure: SamplerParams
    latent: SamplerParams
    mean: Tensor
    std: Tensor
    conditioner: str | Mapping[str, Any] | None
    notice: str | None

    @classmethod
    def from_json(cls, value: Mapping[str, Any], pipeline_class: str, conditioner_key: str) -> PipelineSettings:
        """Check and read.

        Raises:
            CheckpointError: naming the entry, what it must be and what it is.
        """
        if value.get("name") != pipeline_class:
            raise CheckpointError(f"pipeline.json: name must be {pipeline_class!r}; got {value.get('name')!r}")
        args = _object(value.get("args"), "pipeline.json args")
        models = _object(args.get("models"), "pipeline.json models")
        known = {*FLOW_ROLES, *DECODER_ROLES.values()}
        for role, path in models.items():
            if not isinstance(path, str):
                raise CheckpointError(f"pipeline.json models: {role} must be a string; got {path!r}")
        missing = [role for role in FLOW_ROLES if role not in models]
        if missing:
            raise CheckpointError(
                f"pipeline.json models: {missing[0]} is missing; the roles are {', '.join(sorted(known))}"
            )
        normalization = _object(args.get("slat_normalization"), "pipeline.json slat_normalization")
        mean, std = (_vector(normalization.get(key), f"slat_normalization {key}") for key in ("mean", "std"))
        if len(mean) != len(std):
            raise CheckpointError(f"pipeline.json: mean and std must be equally long; got {len(mean)} and {len(std)}")
        conditioner = args.get(conditioner_key)
        if conditioner is not None and not isinstance(conditioner, str | dict):
            raise CheckpointError(f"pipeline.json: {conditioner_key} must be a name or an object; got {conditioner!r}")
        notice = args.get("notice")
        return cls(
            models={role: path for role, path in models.items() if role in known},
            structure=SamplerParams.from_json(args.get("sparse_structure_sampler"), "sparse_structure_sampler"),
            latent=SamplerParams.from_json(args.get("slat_sampler"), "slat_sampler"),
            mean=mean,
            std=std,
            conditioner=conditioner,
            notice=notice if isinstance(notice, str) else None,
        )


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: must be an object; got {value!r}")
    return value


def _number(value: Any, where: str) -> Any:
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, int | float) and not isinstance(item, bool) for item in items):
        raise CheckpointError(f"{where}: must be a number; got {value!r}")
    return tuple(items) if isinstance(value, list) else value


def _vector(value: Any, where: str) -> Tensor:
    if not isinstance(value, list) or not 1 <= len(value) <= 1024:
        raise CheckpointError(f"pipeline.json: {where} must be a list of numbers; got {value!r}")
    vector = torch.tensor(_number(value, where), dtype=torch.float32)
    if not torch.isfinite(vector).all():
        raise CheckpointError(f"pipeline.json: {where} must be finite; got {value!r}")
    return vector
