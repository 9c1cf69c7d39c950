"""The stages every pipeline shares: structure, latent, decoding. What differs is only the conditioning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from trellis.models.structure_vae import occupied_coords
from trellis.nn.segments import Segments
from trellis.nn.sparse import SparseTensor, VoxelGrid
from trellis.pipelines.measure import StageMeter
from trellis.pipelines.settings import DECODER_ROLES, PipelineSettings, SamplerParams
from trellis.pipelines.store import ModelStore
from trellis.sampling import FlowStep, euler, multidiffusion, stochastic, with_guidance

State = TypeVar("State", Tensor, SparseTensor)
ViewMode = Literal["stochastic", "multidiffusion"]


class StructureError(ValueError):
    """The sampled structure cannot be gone on with: it is empty, or too large."""


class Cancelled(Exception):  # noqa: N818 - it is no error, the caller asked for it
    """A callback returned False. The pipeline can be used again at once."""


@dataclass(frozen=True)
class Progress:
    """What a callback receives after each sampling step, and at the end of every other stage.

    Args:
        stage: "preprocess", "image_encoder" or "text_encoder", "structure_flow", "structure_decoder", "latent_flow",
            then "gaussians_decoder", "radiance_field_decoder", "mesh_decoder" as far as they are asked for.
        step: number of the step, from 0.
        steps: how many the stage has; 1 for all but the two flows.
        estimate: in a flow, what the sample is heading to: structure latent ``[B, 8, r, r, r]`` or a SparseTensor.
    """

    stage: str
    step: int
    steps: int
    estimate: Tensor | SparseTensor | None = None


Callback = Callable[[Progress], bool | None]


@dataclass(frozen=True)
class Run:
    """One call of a pipeline: whom to tell, and what was measured."""

    callback: Callback | None
    meter: StageMeter = field(default_factory=StageMeter)

    def tell(self, progress: Progress) -> None:
        """Raise `Cancelled` if the callback says so."""
        if self.callback is not None and self.callback(progress) is False:
            raise Cancelled(f"cancelled in stage {progress.stage!r} after step {progress.step + 1} of {progress.steps}")

    @contextmanager
    def stage(self, name: str, device: torch.device) -> Iterator[None]:
        """A stage of one step."""
        with self.meter.stage(name, device):
            yield
        self.tell(Progress(name, 0, 1))


@dataclass(frozen=True)
class Condition:
    """Conditioning tokens of B objects.

    Args:
        tokens: ``[B, L, C]``; with `view_mode`, the V views ``[V, L, C]`` of one object.
        negative: ``[1 or B, L, C]`` what guidance moves away from.
        view_mode: how the views of one object are combined; None: each row is an object.
    """

    tokens: Tensor
    negative: Tensor
    view_mode: ViewMode | None = None

    @property
    def batch(self) -> int:
        return self.tokens.shape[0] if self.view_mode is None else 1

    def velocity(self, model: Any, params: SamplerParams) -> Callable[[Any, float], Any]:
        """The guided velocity of a flow model under this condition."""
        if self.view_mode is None:
            return with_guidance(model, self.tokens, self.negative, params.guidance, params.interval)
        negative = self.negative[:1]
        if self.view_mode == "multidiffusion":
            return multidiffusion(model, self.tokens, negative, params.guidance, params.interval)
        return stochastic(
            model, self.tokens, negative, params.guidance, params.interval, params.steps, params.rescale_t
        )


def run_sampler(
    velocity: Callable[[State, float], State],
    noise: State,
    params: SamplerParams,
    stage: str,
    run: Run,
) -> State:
    """Sample to the end, or until the callback cancels."""
    step: FlowStep[State] | None = None
    for step in euler(velocity, noise, params.steps, params.rescale_t, params.sigma_min):
        run.tell(Progress(stage, step.index, step.steps, step.estimate))
    assert step is not None
    return step.x


def sample_structure(
    store: ModelStore,
    condition: Condition,
    params: SamplerParams,
    generators: Sequence[torch.Generator],
    max_voxels: int,
    run: Run,
) -> VoxelGrid:
    """Which voxels each object occupies.

    Raises:
        StructureError: an object has no voxel, or more than `max_voxels`.
    """
    with run.meter.stage("structure_flow", store.device), store.use("sparse_structure_flow_model") as flow:
        shape = (flow.config.in_channels, *(flow.config.resolution,) * 3)
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]) * params.temperature
        latent = run_sampler(
            condition.velocity(flow, params), noise.to(store.device, non_blocking=True), params, "structure_flow", run
        )
    with run.stage("structure_decoder", store.device), store.use("sparse_structure_decoder") as decoder:
        logits = torch.cat([decoder(sample[None]) for sample in latent])
    counts = (logits > 0).flatten(1).sum(dim=1).tolist()
    for index, count in enumerate(counts):
        which = f"object {index}" if len(counts) > 1 else "the object"
        if count == 0:
            raise StructureError(f"{which} came out empty: no voxel is occupied; try another seed or more guidance")
        if count > max_voxels:
            raise StructureError(
                f"{which} has {count} occupied voxels, more than max_voxels={max_voxels}; "
                f"try another seed, or raise max_voxels if there is memory for it"
            )
    coords = occupied_coords(logits, sum(counts))
    return VoxelGrid(coords, Segments.of(counts, coords.device), logits.shape[-1])


def sample_latent(
    store: ModelStore,
    condition: Condition,
    params: SamplerParams,
    generators: Sequence[torch.Generator],
    grid: VoxelGrid,
    settings: PipelineSettings,
    run: Run,
) -> SparseTensor:
    """The structured latent on the voxels, denormalised, ready for the decoders."""
    with run.meter.stage("latent_flow", store.device), store.use("slat_flow_model") as flow:
        channels, lengths = flow.config.in_channels, grid.segments.lengths
        if all(generator is generators[0] for generator in generators):
            noise = torch.randn(sum(lengths), channels, generator=generators[0])  # one draw, as the official code
        else:
            draws = zip(lengths, generators, strict=True)
            noise = torch.cat([torch.randn(length, channels, generator=generator) for length, generator in draws])
        start = SparseTensor(grid, (noise * params.temperature).to(store.device, non_blocking=True))
        slat = run_sampler(condition.velocity(flow, params), start, params, "latent_flow", run)
    mean, std = (value.to(store.device, non_blocking=True) for value in (settings.mean, settings.std))
    return slat.with_feats(slat.feats * std + mean)


def decode(store: ModelStore, slat: SparseTensor, formats: Sequence[str], run: Run) -> dict[str, list[Any]]:
    """Representation name -> one per object."""
    decoded: dict[str, list[Any]] = {}
    # The mesh comes last, as its maps are large; the others share their windows through the samples' grids.
    samples = [slat.sample(index) for index in range(len(slat))]
    for name in [name for name in DECODER_ROLES if name in formats]:
        with run.stage(f"{name}_decoder", store.device), store.use(DECODER_ROLES[name]) as decoder:
            # One object at a time: peak memory is that of the largest, not of the batch.
            decoded[name] = [decoder(sample)[0] for sample in samples]
    return decoded


def as_normal(value: Any) -> Any:
    """Copies of inference tensors that autograd accepts, inside (nested) dataclasses too."""
    with torch.inference_mode(False):
        if isinstance(value, Tensor):
            return value.clone() if value.is_inference() else value
        if isinstance(value, VoxelGrid):
            segments = Segments(
                value.segments.lengths, as_normal(value.segments.offsets), as_normal(value.segments.index)
            )
            return VoxelGrid(as_normal(value.coords), segments, value.resolution)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changed = {f.name: as_normal(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
            return dataclasses.replace(value, **changed)
        return value
