"""torch's own flash attention over packed sequences, in our terms."""

from __future__ import annotations

import torch
from torch import Tensor

# Where a run of benchmarks/bench_attention_gpu.py found it faster than ours in both directions: (major compute
# capability, head width), half precision. Empty: nothing has been measured.
FASTER: frozenset[tuple[int, int]] = frozenset()


def is_faster(dtype: torch.dtype, width: int, capability: tuple[int, int]) -> bool:
    """Whether full attention is left to torch. Its backward stays ours: both need only the log-sum-exp."""
    return dtype in (torch.float16, torch.bfloat16) and (capability[0], width) in FASTER


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """As the operator of this name.

    The longest lengths are only upper bounds, so that nothing waits for the GPU: they size the grid, whose programs
    past the end of a sequence return at once.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    rows, keys = query.shape[0], key.shape[0]
    if keys == 0 or query.numel() == 0:
        return torch.zeros_like(query), query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
    out, logsumexp = varlen_attn(
        query, key, value, query_offsets, key_offsets, rows, keys, return_aux=AuxRequest(lse=True)
    )
    logsumexp = logsumexp.T.contiguous()  # it gives [H, N]
    return out, logsumexp.where(logsumexp != torch.inf, -torch.inf)  # no keys: it gives +inf
