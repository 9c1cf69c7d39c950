"""The launches of backprojection that are compiled ahead of time: features of DINOv2."""

import torch

from trellis_kernels.operator import OPERATORS

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def launches() -> None:
    for dtype in (HALF, BRAIN, SINGLE):
        both_directions(dtype, 1024, depths=False, maximum=False)
    both_directions(HALF, 1024, depths=True, maximum=True)


def both_directions(dtype: torch.dtype, channels: int, depths: bool, maximum: bool) -> None:
    geometry = (
        torch.zeros(64, 3), torch.zeros(1, 4, 4), torch.zeros(1, 3, 3), torch.zeros(1, 8, 8) if depths else None, 0.1,
        maximum,
    )  # fmt: skip
    gradient, counts = torch.zeros(64, channels, dtype=dtype), torch.zeros(64, dtype=torch.int32)
    winners = torch.zeros((64, channels) if maximum else (0, 0), dtype=torch.int32)
    OPERATORS["trellis_kernels::backproject"](torch.zeros(1, 37, 37, channels, dtype=dtype), *geometry)
    OPERATORS["trellis_kernels::backproject_gradient"](gradient, counts, winners, *geometry, 37, 37)
