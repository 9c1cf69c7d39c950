"""The convolutions' GPU launches, at shapes of the released models, for ahead-of-time compilation."""

from __future__ import annotations

import torch

from trellis_kernels import conv_plan

OPS = torch.ops.trellis_kernels
HALVES = (torch.float16, torch.bfloat16)


def launches() -> None:
    """The widest tiles, those with a second tile beside them, and full float32."""
    _plain(torch.float16, 153_248, 192, 256)
    _plain(torch.float32, 5_657, 64, 64)
    _subdivided(torch.bfloat16, 19_156, 192, 96)


def ones() -> None:
    """Triton compiles arguments that are 1 as constants, which are not tensors."""
    for taps in (1, 27):
        _plain(torch.float32, 1, 1, 1, taps)
    _subdivided(torch.float32, 1, 1, 1)
    _plain(torch.float16, 3, 2, 2, 125)
    index = torch.zeros(1, dtype=torch.int32)
    OPS.sparse_pool(torch.empty(1, 1), index, 1, "mean")
    OPS.upsample(torch.empty(1, 1), index)


def every_shape() -> None:
    """All configurations the released models and the training benchmarks use; takes minutes."""
    for dtype in HALVES:
        for rows, ci, co in (
            (15_192, 1024, 1024), (64_160, 512, 512), (252_392, 256, 256), (19_156, 128, 128), (5_657, 1024, 1024),
            (19_156, 2048, 128), (153_248, 192, 192), (1_225_984, 96, 96), (1_000_000, 64, 64), (20_000, 32, 32),
        ):  # fmt: skip
            _plain(dtype, rows, ci, co)
        for rows, ci, co in ((19_156, 768, 192), (153_248, 192, 96)):
            _subdivided(dtype, rows, ci, co)
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for rows, ci, co in ((15_192, 1024, 1024), (19_156, 128, 128), (153_248, 192, 96), (20_000, 16, 32)):
            _plain(torch.float32, rows, ci, co)
        _subdivided(torch.float32, 19_156, 192, 96)


def _plain(dtype: torch.dtype, rows: int, ci: int, co: int, taps: int = 27) -> None:
    neighbors = torch.empty(rows, taps, dtype=torch.int32)
    feats, gradient = torch.empty(rows, ci, dtype=dtype), torch.empty(rows, co, dtype=dtype)
    weight, bias = torch.empty(co, taps, ci, dtype=dtype), torch.empty(co, dtype=dtype)
    plan = conv_plan(neighbors, gradients=True)
    OPS.submanifold_conv(feats, neighbors, weight, bias, plan)
    OPS.submanifold_conv_input_gradient(gradient, neighbors, weight, plan)
    OPS.submanifold_conv_weight_gradient(feats, neighbors, gradient, plan)


def _subdivided(dtype: torch.dtype, rows: int, ci: int, co: int) -> None:
    neighbors = torch.empty(rows, 27, dtype=torch.int32)
    feats, gradient = torch.empty(rows, ci, dtype=dtype), torch.empty(8 * rows, co, dtype=dtype)
    weight, bias = torch.empty(co, 27, ci, dtype=dtype), torch.empty(co, dtype=dtype)
    plan = conv_plan(neighbors, gradients=True)
    OPS.subdivided_conv(feats, neighbors, weight, bias, plan)
    OPS.subdivided_conv_input_gradient(gradient, neighbors, weight, plan)
    OPS.subdivided_conv_weight_gradient(feats, neighbors, gradient, plan)
