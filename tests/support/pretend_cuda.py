"""A CUDA device that is not there: tensors that say they are on it, hold host memory and compute with the CPU kernels.

    with pretend_cuda() as device:
        pipe = ImageTo3D.from_pretrained(device="cuda")
        with device.counting() as events:
            pipe("chair.png")
    assert events == []

Whatever would make the host wait for a GPU is recorded: values read back, tensors whose size depends on data, copies
from the host that are not `non_blocking`. Mixing devices raises as it does on a GPU. Bytes are counted as torch's
allocator would hand them out. So the whole pipeline is run "on CUDA" on every machine.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
# Operators of ours whose outputs have sizes that depend on data.
DATA_SIZED = {"coarsen", "window_partition", "surface_topology"}
_READ_BACK = {aten._local_scalar_dense.default, aten.equal.default}
_SIZED_BY_DATA = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.unique_dim_consecutive.default,
}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_RUN_WHOLE = {"aten::scaled_dot_product_attention"}  # its parts ask the device's library which of them to use


# Methods whose C++ asks for the device's driver, and the operators behind them, which do not.
_GUARDED = {
    Tensor.contiguous: aten.contiguous.default,
    Tensor.copy_: aten.copy_.default,
    Tensor.nonzero: aten.nonzero.default,
    torch.nonzero: aten.nonzero.default,
    Tensor.__int__: lambda tensor: int(tensor.item()),
    Tensor.__index__: lambda tensor: int(tensor.item()),
    Tensor.__float__: lambda tensor: float(tensor.item()),
    Tensor.__bool__: lambda tensor: bool(tensor.item()),
}


class OnCuda(Tensor):
    """A tensor on the pretended device; `host` has its values."""

    host: Tensor

    @staticmethod
    def __new__(cls: type[OnCuda], host: Tensor) -> OnCuda:
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=CUDA,
        )
        wrapper.host = host
        return wrapper

    def __repr__(self, **_: Any) -> str:
        return f"OnCuda({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of a pretended device, outside `with pretend_cuda()`")


class PretendedDevice(TorchDispatchMode):
    """What happens on the device; see `pretend_cuda`."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = self.peak = 0
        self.uploaded: list[int] = []  # bytes of every copy from the host
        self._events: list[str] = []
        self._references: dict[int, int] = {}
        self._pinned: set[int] = set()

    @contextmanager
    def counting(self) -> Iterator[list[str]]:
        """The events inside: "kind operator, in file:line"."""
        outer, self._events = self._events, []
        try:
            yield self._events
        finally:
            self._events = outer

    def event(self, kind: str, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/trellis" in frame.filename]
        frames = [
            frame for frame in frames if "/site-packages/" not in frame.filename and "/tests/" not in frame.filename
        ]
        where = f"{frames[-1].filename.rpartition('/trellis')[2]}:{frames[-1].lineno}" if frames else "a test"
        self._events.append(f"{kind} {what}, in trellis{where}" if frames else f"{kind} {what}, in {where}")

    def wrap(self, host: Tensor) -> OnCuda:
        with torch.inference_mode(host.is_inference()):  # a view of a normal tensor is one, even in inference mode
            tensor = OnCuda(host)
        key, size = host.untyped_storage().data_ptr(), host.untyped_storage().nbytes()
        if key not in self._references:
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        self._references[key] = self._references.get(key, 0) + 1
        weakref.finalize(tensor, self._release, key, size)
        return tensor

    def _release(self, key: int, size: int) -> None:
        self._references[key] -= 1
        if not self._references[key]:
            del self._references[key]
            self.allocated -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.is_pinned.default:
            return args[0].untyped_storage().data_ptr() in self._pinned
        if func in (aten.pin_memory.default, aten._pin_memory.default):
            copy = args[0].clone()
            self._pinned.add(copy.untyped_storage().data_ptr())
            return copy
        if func.name() not in _RUN_WHOLE and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        on_cuda = [tensor for tensor in tensors if isinstance(tensor, OnCuda)]
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if target is not None:
            kwargs = kwargs | {"device": torch.device("cpu") if target.type == "cuda" else target}
        kwargs.pop("pin_memory", None)
        if not on_cuda and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        self._record(func, args, kwargs, tensors, on_cuda, target)
        wrappers = {id(tensor.host): tensor for tensor in on_cuda}
        args, kwargs = tree_map_only(OnCuda, lambda tensor: tensor.host, (args, kwargs))
        result = func(*args, **kwargs)
        if target is not None and target.type != "cuda":
            return result
        if func is aten.copy_.default and not isinstance(tensors[0], OnCuda):
            return result
        return tree_map_only(
            Tensor, lambda host: wrappers[id(host)] if id(host) in wrappers else self.wrap(host), result
        )

    def subscript(self, func: Callable[..., Any], args: Any) -> Any:
        """``x[index]`` or ``x[index] = value``."""
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        self._indexed("index", index)
        with _disable_current_modes():
            result = func(*tree_map_only(OnCuda, lambda tensor: tensor.host, args))
        return None if result is None else self.wrap(result)

    def _indexed(self, name: str, index: Any) -> None:
        for part in index:
            if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8):
                self.event("sized by data:", f"{name} with a mask")
            if isinstance(part, list) or (isinstance(part, Tensor) and not isinstance(part, OnCuda)):
                self.event("uploads", f"{name} with an index on the host")

    def _record(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], on_cuda: list[OnCuda], target: Any
    ) -> None:
        name = func.name().removeprefix("aten::")
        host = [tensor for tensor in tensors if not isinstance(tensor, OnCuda)]
        waits = not (kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))
        if func is aten._to_copy.default or func is aten.copy_.default:
            if host and (func is aten.copy_.default or not on_cuda):
                upward = isinstance(tensors[0], OnCuda) if func is aten.copy_.default else True
                self._copied(name, tensors[-1], upward, waits)
            elif target is not None and target.type == "cpu":
                self._copied(name, tensors[0], False, waits)
            return
        if func in _READ_BACK:
            self.event("reads back", name)
        elif (
            func in _SIZED_BY_DATA
            or name.removeprefix("trellis_kernels::") in DATA_SIZED
            or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None)
        ):
            self.event("sized by data:", name)
        elif func in _INDEXING:
            self._indexed(name, args[1])
            return
        strangers = [tensor for tensor in host if tensor.ndim > 0]
        if strangers and on_cuda:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")

    def _copied(self, name: str, source: Tensor, upward: bool, waits: bool) -> None:
        size = source.numel() * source.element_size()
        if upward:
            self.uploaded.append(size)
        if waits:
            self.event("uploads" if upward else "reads back", f"{name} of {size} bytes")


class _Functions(TorchFunctionMode):
    """What C++ does in one piece for the devices it knows, before any operator is called."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _GUARDED:
            return _GUARDED[func](*args, **kwargs)
        # Without a number, "cuda" asks the driver which device is current.
        if func is Tensor.to:
            args = tuple(CUDA if _is_cuda(value) else value for value in args)
        if _is_cuda(kwargs.get("device")):
            kwargs = kwargs | {"device": CUDA}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == CUDA:
            return func(*args, **(kwargs | {"device": "cpu"})).to(CUDA)
        if func is Tensor.new_tensor and isinstance(args[0], OnCuda):
            return torch.tensor(*args[1:], **({"dtype": args[0].dtype} | kwargs | {"device": "cpu"})).to(CUDA)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnCuda):
            return self._device.subscript(func, args)
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], OnCuda):
            if func is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


def _is_cuda(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


@contextmanager
def pretend_cuda(device: PretendedDevice | None = None, memory: int = 80 << 30) -> Iterator[PretendedDevice]:
    """A machine with a GPU of `memory` bytes; its tensors can be used again where the same `device` is given."""
    device = device or PretendedDevice()

    def reset(*_: Any) -> None:
        device.peak = device.allocated

    stand_ins: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: device.event("waits:", "synchronize"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (memory - device.allocated, memory),
        "reset_peak_memory_stats": reset,
        "max_memory_allocated": lambda *_: device.peak,
        "memory_allocated": lambda *_: device.allocated,
    }
    if torch.cuda.is_available():
        torch.cuda.init()  # C++ remembers that it has asked for this: it must not be left out on a machine with a GPU
    else:
        stand_ins["_lazy_init"] = lambda: None
    lifts_on_cpu = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        for name, function in stand_ins.items():
            stack.enter_context(patch.object(torch.cuda, name, function))
        stack.enter_context(_Functions(device))
        stack.enter_context(device)
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield device
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts_on_cpu)
            torch.__future__.set_overwrite_module_params_on_conversion(False)
