"""What the image and text pipelines share: loading, moving, generating from a condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from trellis.checkpoints import HubOptions
from trellis.pipelines.asset import Asset
from trellis.pipelines.memory import parse_memory
from trellis.pipelines.settings import DECODER_ROLES, PipelineSettings, SamplerParams
from trellis.pipelines.stages import Condition, Run, as_normal, decode, sample_latent, sample_structure
from trellis.pipelines.store import ModelStore, open_source

Self = TypeVar("Self", bound="Pipeline")
CONDITIONER = "conditioner"  # its role in the store


class Pipeline:
    """A conditioner, two flows and their decoders. Build with `from_pretrained`.

    Args:
        settings: the checked `pipeline.json`.
        store: the models.
        conditioner: turns inputs into tokens.
        name: where it came from, for `Asset.meta`.
    """

    official_name: str
    conditioner_key: str
    conditioner_kind: str
    default_conditioner: str

    def __init__(self, settings: PipelineSettings, store: ModelStore, conditioner: Any, name: str) -> None:
        self.settings, self.store, self.name = settings, store, name
        store.adopt(CONDITIONER, conditioner)

    @classmethod
    def from_pretrained(
        cls: type[Self],
        name: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        low_memory: bool = False,
        memory: str | int | None = None,
        cuda_graphs: bool = False,
    ) -> Self:
        """Load a pipeline in the official folder format.

        Args:
            name: local folder, Hub repository ``owner/repo``, or None for the bundled model.
            device: where to compute.
            dtype: of the models' torsos: float32, bfloat16 or float16; None keeps what the checkpoints say.
            revision: branch, tag or commit of the Hub repository.
            local_files_only: do not go to the network.
            token: for the Hub.
            low_memory: load each model when its stage begins and drop it when the stage ends.
            memory: what may be used of a GPU: ``"16GB"``, ``"8GB"``, ``"6GB"`` or a number of bytes. Models that do not
                fit beside the others wait in page-locked host memory and are copied to the GPU for their stage. The
                CUDA context (some 0.5 GB) comes on top. None: all are on the device. Without effect on a CPU.
            cuda_graphs: record the structure flow's step as a CUDA graph and replay it, so that slow Python cannot hold
                up the GPU. Costs a copy of its conditions and the recording at the first steps; not with `memory` or
                `low_memory`. Not tried on a GPU yet, hence off.

        Raises:
            CheckpointError: a file is missing or does not fit; it is named.
            ValueError: `cuda_graphs` without a CUDA device; or the budget is too small for the largest stage, which is
                named with what it needs.
        """
        from trellis.conditioning import load_conditioner

        budget, hub = parse_memory(memory), HubOptions(revision, local_files_only, token)
        source, description = open_source(name, hub, cls.official_name)
        settings = PipelineSettings.from_json(description, cls.official_name, cls.conditioner_key)
        target = torch.device(device)
        store = ModelStore(
            settings.models,
            source,
            device=target,
            dtype=dtype,
            hub=hub,
            low_memory=low_memory,
            memory=budget,
            cuda_graphs=cuda_graphs,
        )
        conditioner = load_conditioner(
            settings.conditioner if settings.conditioner is not None else cls.default_conditioner,
            root=source if isinstance(source, Path) else None,
            kind=cls.conditioner_kind,
            device=target if budget is None else "cpu",
            dtype=None,
            local_files_only=local_files_only,
            token=token,
        )
        return cls(settings, store, conditioner, "bundled nano" if name is None else str(name))

    @property
    def device(self) -> torch.device:
        return self.store.device

    @property
    def conditioner(self) -> Any:
        """What turns inputs into tokens; under a memory budget it may be on the host: see `encode`."""
        return self.store.adopted(CONDITIONER)

    def encode(self, *inputs: Any) -> list[Tensor]:
        """The conditioning tokens of each of `inputs`, themselves lists of images or sentences."""
        with self.store.use(CONDITIONER) as conditioner:
            return [conditioner.encode(each) for each in inputs]

    @property
    def notice(self) -> str | None:
        """One line the model's authors want its users to read, if any."""
        return self.settings.notice

    @property
    def formats(self) -> tuple[str, ...]:
        """Representations this pipeline can decode: "gaussians", "radiance_field", "mesh"."""
        return tuple(name for name, role in DECODER_ROLES.items() if role in self.store)

    def to(self: Self, device: torch.device | str) -> Self:
        """Move all models; returns the pipeline."""
        self.store.to(torch.device(device))
        return self

    def sampler(
        self, stage: str, steps: int | None, guidance: float | None, given: SamplerParams | None
    ) -> SamplerParams:
        """The stage's parameters: those given, else the pipeline's, with `steps` and `guidance` on top."""
        params = given or (self.settings.structure if stage == "structure" else self.settings.latent)
        if steps is not None:
            params = replace(params, steps=steps)
        return params if guidance is None else replace(params, guidance=guidance)

    @torch.inference_mode()
    def generate(
        self,
        condition: Condition,
        *,
        seeds: Sequence[int],
        one_stream: bool = False,
        steps: int | None,
        guidance: float | None,
        structure: SamplerParams | None,
        latent: SamplerParams | None,
        formats: Sequence[str] | None,
        max_voxels: int,
        run: Run,
        meta: Sequence[dict[str, Any]],
    ) -> list[Asset]:
        """From conditioning tokens to assets, one per object. Called by the subclasses."""
        wanted = self.formats if formats is None else tuple(dict.fromkeys(formats))
        unknown = [name for name in wanted if name not in self.formats]
        if unknown:
            raise ValueError(f"formats must be among {', '.join(self.formats)}; got {unknown[0]!r}")
        self.store.prepare(max_voxels, condition.batch)
        structure = self.sampler("structure", steps, guidance, structure)
        latent = self.sampler("latent", steps, guidance, latent)
        # Noise is drawn on the CPU, from generators of our own: the same seed starts the same on every device, and the
        # caller's random state is untouched. One generator per object: results do not depend on the batch; or one for
        # all (`one_stream`), from which the official pipeline draws several samples of one condition.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if one_stream:
            generators = generators[:1] * len(generators)
        grid = sample_structure(self.store, condition, structure, generators, max_voxels, run)
        slat = sample_latent(self.store, condition, latent, generators, grid, self.settings, run)
        decoded = decode(self.store, slat, wanted, run)
        return [
            Asset(
                slat=as_normal(slat.sample(index)),
                **{name: as_normal(decoded[name][index]) for name in wanted},
                timings=dict(run.meter.stages),
                meta={
                    "model": self.name,
                    "seed": seeds[index],
                    "structure": _plain(structure),
                    "latent": _plain(latent),
                    "device": str(self.device),
                    **meta[index],
                },
            )
            for index in range(condition.batch)
        ]


def _plain(params: SamplerParams) -> dict[str, Any]:
    return {
        "steps": params.steps,
        "guidance": params.guidance,
        "interval": list(params.interval),
        "rescale_t": params.rescale_t,
        "temperature": params.temperature,
    }


def seeds_of(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed per object: the same for all, or as given.

    Raises:
        ValueError: not `count` seeds, or one is not in ``[0, 2^63)``.
    """
    seeds = [seed] * count if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed must be one integer or {count} of them; got {len(seeds)}")
    for value in seeds:
        if not isinstance(value, int) or not 0 <= value < 2**63:
            raise ValueError(f"seed must be an integer in [0, 2^63); got {value!r}")
    return seeds
