"""Other libraries' ways to do what our operators do, where the library is installed. Never a dependency.

Each maker prepares what can be prepared before timing, and skips its row where the library or the device is missing.
"""

from __future__ import annotations

from collections.abc import Callable
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
