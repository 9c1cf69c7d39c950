"""A flow model whose forward is recorded once as a CUDA graph and replayed at every step.

A replay launches all kernels of the model with one call, so the host cannot fall behind the GPU. The graph reads
buffers of its own, into which the inputs are copied; it belongs to one combination of shapes, dtypes and conditions
attended to, of which sampling has two: with guidance and without.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
WARM_UP = 2  # calls before recording: kernels are compiled, libraries choose theirs, and neither may happen inside


class GraphedFlow:
    """Calls like `model`, with inputs on a CUDA device. Its weights must stay where they are; their values may change.

    Args:
        model: ``model(x, t, cond) -> velocity``, all shapes of whose inner tensors follow from those of its inputs.
            Reading its attributes reads the model's.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._recorded: dict[Any, tuple[Callable[[], None], Tensor]] = {}
        self._buffers: dict[Any, Tensor] = {}
        self._copied: dict[Any, weakref.ref[Tensor]] = {}
        self._pool: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """The velocity, a tensor of its own.

        Raises:
            ValueError: `x` is not on a CUDA device.
        """
        if not x.is_cuda:
            raise ValueError(f"x must be on a CUDA device to be used with CUDA graphs; got {x.device}")
        signature: list[Any] = [self._model.torso_dtype]
        inputs = (
            self._buffer(x, signature, always=True),
            self._buffer(t, signature, always=True),
            _map_tensors(cond, lambda tensor: self._buffer(tensor, signature, always=False), signature),
        )
        key = tuple(signature)
        if key not in self._recorded:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._recorded[key] = record(lambda: self._model(*inputs), self._pool)
        replay, output = self._recorded[key]
        replay()
        return output.clone()

    def _buffer(self, source: Tensor, signature: list[Any], *, always: bool) -> Tensor:
        """The buffer at this place of the signature, holding the values of `source`: copied if it is another tensor."""
        place = (len(signature), tuple(source.shape), source.dtype, source.device)
        signature.append(place[1:])
        if place not in self._buffers:
            with torch.inference_mode(False):
                self._buffers[place] = torch.empty(source.shape, dtype=source.dtype, device=source.device)
        held = self._copied.get(place)
        if always or held is None or held() is not source:  # what a condition became stays the same tensor
            self._buffers[place].copy_(source)
            self._copied[place] = weakref.ref(source)
        return self._buffers[place]


def record(function: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], None], Tensor]:
    """Record what `function` launches; returns what launches it again, and the tensor that then has the result."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = function()
    return graph.replay, output


def _map_tensors(value: T, function: Callable[[Tensor], Tensor], signature: list[Any]) -> T:
    """`value` with `function` of each tensor in it; everything else is noted in `signature`."""
    if isinstance(value, Tensor):
        return function(value)  # type: ignore[return-value]
    if isinstance(value, tuple):
        parts = [_map_tensors(part, function, signature) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{n: _map_tensors(getattr(value, n), function, signature) for n in fields})
    signature.append(repr(value))
    return value
