"""Other libraries' ways to do what our operators do, where the library is installed. Never a dependency.

Each maker prepares what can be prepared before timing, and skips its row where the library or the device is missing.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

Run = Callable[[], Tensor]


def convolution_matrix(neighbors: Tensor) -> tuple[Tensor, Tensor]:
    """A neighbor map ``[N, K]`` as a sparse 0-1 matrix ``[N, K N]`` in CSR: row offsets and columns, both int32.

    Times ``[K N, Co]``, the features' product with each tap's weight, it gives the convolution.
    """
    taps = neighbors.shape[1]
    present = neighbors >= 0
    offsets = torch.nn.functional.pad(present.sum(1).cumsum(0), (1, 0)).int()
    column = neighbors.long() * taps + torch.arange(taps, device=neighbors.device)
    return offsets, column[present].int()


def cusparse(feats: Tensor, neighbors: Tensor, weight: Tensor) -> Run:
    """One dense product with all taps' weights, then cuSPARSE's SpMM through CuPy, exchanged without copies."""
    cupy = pytest.importorskip("cupy")
    sparse = pytest.importorskip("cupyx.scipy.sparse")
    if not feats.is_cuda or feats.dtype not in (torch.float32, torch.float64):
        pytest.skip("cuSPARSE through cupyx: float32 and float64 on a GPU")
    offsets, columns = (cupy.from_dlpack(x) for x in convolution_matrix(neighbors))
    rows, taps = neighbors.shape
    ones = cupy.ones(len(columns), dtype=str(feats.dtype).removeprefix("torch."))
    matrix = sparse.csr_matrix((ones, columns, offsets), shape=(rows, taps * rows))
    stacked = weight.permute(2, 1, 0).flatten(1).contiguous()  # [Ci, K Co]

    def run() -> Tensor:
        products = cupy.from_dlpack((feats @ stacked).view(rows * taps, -1))
        return torch.from_dlpack(matrix @ products)

    return run


def flash_varlen() -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]:
    """``attend(query, key, value, query_offsets, key_offsets, longest_query, longest_key)``, half precision.

    The flash-attn package where it is installed, else the same algorithm in torch (2.10 or newer).
    """
    if not torch.cuda.is_available():
        pytest.skip("flash attention over packed sequences needs a GPU")
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    return flash_attn_varlen_func


def spconv_layer(coords: Tensor, feats: Tensor, weight: Tensor, resolution: int) -> tuple[Any, Any]:
    """spconv's submanifold layer with our weight, and its input: ``layer(input).features``."""
    spconv = pytest.importorskip("spconv.pytorch")
    co, _, ci = weight.shape
    layer = spconv.SubMConv3d(ci, co, 3, bias=False, indice_key="bench").to(feats)
    layer.weight.data.copy_(weight.view(co, 3, 3, 3, ci))
    return layer, spconv.SparseConvTensor(feats, coords, [resolution] * 3, int(coords[:, 0].max()) + 1)


def scalar_splatter(tight: bool) -> Callable[..., Tensor]:
    """`rasterize_gaussians` for one camera on a CPU, colors ``[H, W, C]`` only: one thread, no tiles, no vectors.

    `tight` boxes give the same picture; usual ones, of 3 standard deviations, leave out what is fainter than e^-4.5.
    """
    function = _splatter().splat

    def draw(
        means: Tensor,
        quats: Tensor,
        scales: Tensor,
        opacities: Tensor,
        colors: Tensor,
        extrinsics: Tensor,
        intrinsics: Tensor,
        width: int,
        height: int,
        background: Tensor,
        kernel_size: float,
    ) -> Tensor:
        gaussians = [tensor.float().contiguous() for tensor in (means, quats, scales, opacities, colors)]
        camera = [tensor.float().contiguous() for tensor in (extrinsics[0], intrinsics[0])]
        behind = background.reshape(-1)[: colors.shape[1]].float().contiguous()
        image = torch.empty(height, width, colors.shape[1])
        count, channels = ctypes.c_int64(len(means)), ctypes.c_int(colors.shape[1])
        size = ctypes.c_int(width), ctypes.c_int(height)
        function(
            *map(_address, gaussians),
            count,
            channels,
            *map(_address, camera),
            *size,
            _address(behind),
            ctypes.c_float(kernel_size),
            ctypes.c_int(tight),
            _address(image),
        )
        return image

    return draw


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@cache
def _splatter() -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler for benchmarks/peers_cpp/splatter.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "splatter.so")
        source = Path(__file__).with_name("peers_cpp") / "splatter.cpp"
        subprocess.run([compiler, "-std=c++17", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))
