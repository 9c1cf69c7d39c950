"""A structure flow as plain torch writes it, with the weights of one of ours: what a step of ours is measured against.

Dense batches, `scaled_dot_product_attention` (flash attention in half precision on a GPU), torch's norms in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize, scaled_dot_product_attention

from trellis.nn.conv import patchify, unpatchify


def plain_structure_flow(model: Any, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """The same as ``model(x, t, cond)`` up to rounding."""
    config, dtype = model.config, model.torso_dtype
    tokens = patchify(x, config.patch_size)
    hidden = (model.input_layer(tokens.flatten(2).mT) + model.pos_emb).to(dtype)
    timestep, context = model.t_embedder(t), cond.to(dtype)
    if config.share_mod:
        timestep = model.adaLN_modulation(timestep)
    timestep = timestep.to(dtype)
    for block in model.blocks:
        hidden = _block(block, hidden, timestep, context)
    out = model.out_layer(layer_norm(hidden.to(x.dtype), hidden.shape[-1:]))
    return unpatchify(out.unflatten(1, tokens.shape[2:]).movedim(-1, 1), config.patch_size)


def flow_gflop(tokens: int, config: Any, context: int) -> float:
    """Of one forward, in 1e9; without keys and values of the conditioning, which need computing once per image only.

    The projections, attention and MLP of the blocks; convolutions, embedders and output are below a hundredth of it in
    the released structure flow.
    """
    width, hidden = config.model_channels, int(config.model_channels * config.mlp_ratio)
    linear = 2 * tokens * width * (4 * width + 2 * width + 2 * hidden)  # self-attention, cross-attention, MLP
    attention = 4 * tokens * (tokens + context) * width
    return 1e-9 * config.num_blocks * (linear + attention)


def _block(block: Any, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    modulation = timestep if block.shared_modulation else block.adaLN_modulation(timestep)
    shift1, scale1, gate1, shift3, scale3, gate3 = modulation[:, None].chunk(6, dim=-1)
    attention = block.self_attn
    query, key, value = attention.to_qkv(_norm(block.norm1, x) * (1 + scale1) + shift1).chunk(3, dim=-1)
    x = x + gate1 * _attend(attention, query, key, value)
    attention = block.cross_attn
    key, value = attention.to_kv(context).chunk(2, dim=-1)
    x = x + _attend(attention, attention.to_q(_norm(block.norm2, x)), key, value)
    return x + gate3 * block.mlp(_norm(block.norm3, x) * (1 + scale3) + shift3)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.unflatten(-1, (attention.num_heads, -1)) for x in (query, key, value))
    if attention.qk_norm:
        norms = attention.q_rms_norm, attention.k_rms_norm
        query, key = (
            (normalize(x.float(), dim=-1) * norm.gamma * x.shape[-1] ** 0.5).to(x.dtype)
            for x, norm in zip((query, key), norms, strict=True)
        )
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    return attention.to_out(out.transpose(1, 2).flatten(2))


def graphed(run: Any) -> Any:
    """The call as a CUDA graph: what the GPU alone needs, however slow the host is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Any:
        graph.replay()
        return out

    return replay
