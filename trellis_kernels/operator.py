"""`Operator` ties a schema to its reference and its kernels; `OPERATORS` lists them all.

torch's dispatcher does the rest: the device of the inputs selects the kernel, and autograd, torch.compile, export and
fake tensors see an ordinary operator. There is no other switch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_LIBRARY = torch.library.Library("trellis_kernels", "DEF")

OPERATORS: dict[str, Operator] = {}


class Operator:
    """One `torch.ops.trellis_kernels` operator.

    Args:
        schema: torch schema, e.g. ``"submanifold_conv(Tensor feats, Tensor neighbors, Tensor weight) -> Tensor"``.
        reference: plain-PyTorch definition. It is the specification: tests hold every kernel to it. It runs under
            `use_reference` and on devices other than CPU and CUDA; on those two a missing kernel is an error.
        kernels: device type -> module holding a function of the operator's name, imported at its first call.
    """

    def __init__(self, schema: str, reference: Callable[..., Any], kernels: Mapping[str, str]) -> None:
        self.name = schema.partition("(")[0]
        self.reference = reference
        self.kernels = dict(kernels)
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, reference, "CompositeExplicitAutograd")
        for device in ("cpu", "cuda"):
            module = self.kernels.get(device)
            implementation = _imported_at_first_call(module, self.name) if module else _missing(self.name, device)
            _LIBRARY.impl(self.name, implementation, device.upper())
        self._overload = getattr(torch.ops.trellis_kernels, self.name).default
        OPERATORS[self._overload.name()] = self

    def __call__(self, *args: Any) -> Any:
        return self._overload(*args)

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: shapes and dtypes of the outputs, without computing them."""
        return torch.library.register_fake(f"trellis_kernels::{self.name}", function, lib=_LIBRARY)

    def autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """The derivative, written with operators too, so that it compiles and differentiates like the rest."""
        torch.library.register_autograd(
            f"trellis_kernels::{self.name}", backward, setup_context=setup_context, lib=_LIBRARY
        )


class _ChosenImplementation(TorchDispatchMode):
    def __init__(self, choose: Callable[[Operator], Callable[..., Any]]) -> None:
        super().__init__()
        self._choose = choose

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operator = OPERATORS.get(func.name())
        if operator is None:
            return func(*args, **(kwargs or {}))
        with self:  # an implementation may itself call operators
            return self._choose(operator)(*args, **(kwargs or {}))


def use_reference() -> AbstractContextManager[Any]:
    """A context in which every operator runs its reference: the first step in bisecting a numerical surprise."""
    return _ChosenImplementation(lambda operator: operator.reference)


def use_kernels_of(device: str) -> AbstractContextManager[Any]:
    """A context in which every operator runs its kernel for `device`, wherever its tensors are.

    For tests: the GPU kernels run on host tensors under Triton's interpreter and the CUDA emulation. A real GPU kernel
    refuses them.
    """
    return _ChosenImplementation(
        lambda operator: (
            _imported_at_first_call(operator.kernels[device], operator.name)
            if device in operator.kernels
            else _missing(operator.name, device)
        )
    )


def _imported_at_first_call(module: str, name: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    return kernel


def _missing(name: str, device: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        raise NotImplementedError(
            f"trellis_kernels.{name} has no {device} kernel; move the tensors to another device, "
            f"or run its slow plain-PyTorch definition inside `with trellis_kernels.use_reference():`"
        )

    return kernel
