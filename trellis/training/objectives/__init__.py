"""Objectives: what each kind of training minimises, by the official trainer's name.

An objective is called once per pass with the models by role, a batch and a generator, from which all that is random in
it is drawn, and returns scalars: ``loss`` is minimised, the others are its terms for the log.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trellis.training.config import ConfigError

# Official trainer -> our module and class, and the arguments it fixes.
OBJECTIVES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SparseStructureVaeTrainer": ("structure_vae", "StructureVae", {}),
    "SLatVaeGaussianTrainer": ("gaussians", "GaussianVae", {}),
    "SLatVaeRadianceFieldDecoderTrainer": ("radiance_field", "RadianceFieldDecoding", {}),
    "SLatVaeMeshDecoderTrainer": ("mesh", "MeshDecoding", {}),
    "FlowMatchingTrainer": ("flow", "FlowMatching", {"p_uncond": 0.0}),
    "SparseFlowMatchingTrainer": ("flow", "FlowMatching", {"p_uncond": 0.0}),
    **{
        f"{condition}{sparse}FlowMatchingCFGTrainer": ("flow", "FlowMatching", {})
        for condition in ("", "TextConditioned", "ImageConditioned")
        for sparse in ("", "Sparse")
    },
}


class Objective(Protocol):
    """What is minimised."""

    def __call__(
        self, models: Mapping[str, nn.Module], batch: dict[str, Any], generator: torch.Generator
    ) -> dict[str, Tensor]: ...


def objective_arguments(trainer: str) -> Collection[str]:
    """Names of the trainer arguments that the objective of `trainer` understands.

    Raises:
        ConfigError: there is no such trainer; the known ones are listed.
    """
    fixed = _entry(trainer)[2]
    return [name for name in inspect.signature(_class(trainer)).parameters if name not in fixed]


def build_objective(trainer: str, args: Mapping[str, Any]) -> Objective:
    """The objective of an official trainer.

    Raises:
        ConfigError: the trainer or an argument is unknown, or a value impossible.
    """
    known = objective_arguments(trainer)
    unknown = sorted(set(args) - set(known))
    if unknown:
        raise ConfigError(f"{trainer} has no argument {unknown[0]!r}; known are {', '.join(known)}")
    try:
        objective: Objective = _class(trainer)(**args, **_entry(trainer)[2])
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{trainer}: {error}") from error
    return objective


def _entry(trainer: str) -> tuple[str, str, dict[str, Any]]:
    if trainer not in OBJECTIVES:
        raise ConfigError(f"unknown trainer {trainer!r}; known are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[trainer]


def _class(trainer: str) -> Any:
    module, name, _ = _entry(trainer)
    return getattr(importlib.import_module(f"trellis.training.objectives.{module}"), name)
