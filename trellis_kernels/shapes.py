"""`expect`: the one way operators check their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

DTypes = torch.dtype | tuple[torch.dtype, ...]


def expect(**arguments: tuple[Tensor, str] | tuple[Tensor, str, DTypes]) -> dict[str, int]:
    """Check ranks, sizes and dtypes against symbolic shapes; return the value of each symbol.

    ``expect(feats=(feats, "N Ci", FLOATS), weight=(weight, "K Ci Co", feats.dtype))`` fails if the two `Ci` differ.
    A number stands for itself: ``coords=(coords, "N 3", torch.int32)``. All tensors must be on one device.

    Raises:
        ValueError: naming the argument, the shape it must have and the shape it has; or the two devices.
        TypeError: naming the argument, the dtypes it may have and the dtype it has.
    """
    sizes: dict[str, int] = {}
    first: tuple[str, torch.device] | None = None
    for name, (tensor, shape, *dtype) in arguments.items():
        symbols = shape.split()
        if tensor.ndim != len(symbols) or any(
            size != (int(symbol) if symbol.isdigit() else sizes.setdefault(symbol, size))
            for symbol, size in zip(symbols, tensor.shape, strict=True)
        ):
            known = ", ".join(f"{symbol}={sizes[symbol]}" for symbol in symbols if symbol in sizes)
            raise ValueError(
                f"{name} must be [{', '.join(symbols)}]{' with ' + known if known else ''}; got {list(tensor.shape)}"
            )
        if dtype:
            allowed = dtype[0] if isinstance(dtype[0], tuple) else (dtype[0],)
            if tensor.dtype not in allowed:
                raise TypeError(f"{name} must be {' or '.join(map(str, allowed))}; got {tensor.dtype}")
        first = first or (name, tensor.device)
        if tensor.device != first[1]:
            raise ValueError(f"{name} must be on {first[1]} like {first[0]}; got {tensor.device}")
    return sizes
