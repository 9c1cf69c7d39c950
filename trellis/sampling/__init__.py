"""Sampling a flow: plain functions over a velocity."""

from trellis.sampling.flow_euler import FlowStep, euler, timesteps
from trellis.sampling.guidance import multidiffusion, stochastic, with_guidance

__all__ = ["FlowStep", "euler", "multidiffusion", "stochastic", "timesteps", "with_guidance"]
