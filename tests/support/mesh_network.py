"""The network of the official mesh decoder, once more and in plain PyTorch, for the golden item `slat_dec_mesh`.

The item stores only some rows of the network's output; mesh extraction needs all of them. This is independent of
`trellis.models`, and checked against the stored rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.golden import Golden

Weights = dict[str, Tensor]


def mesh_features(item: Golden) -> tuple[Tensor, Tensor]:
    """``[N, 4]`` coordinates and ``[N, 101]`` features of `item`, a golden mesh decoder."""
    p, args = item.parameters(), item.info["args"]
    coords, x = item["in.coords"].long(), item["in.feats"]
    x = _linear(x, p, "input_layer") + _position_embedding(coords[:, 1:], args["model_channels"])
    for i in range(args["num_blocks"]):
        shift = args["window_size"] // 2 * (i % 2)
        window = torch.cat([coords[:, :1], (coords[:, 1:] + shift) // args["window_size"]], 1)
        x = x + _attention(_norm(x), window, p, f"blocks.{i}.attn", args["num_heads"])
        hidden = F.gelu(_linear(_norm(x), p, f"blocks.{i}.mlp.mlp.0"), approximate="tanh")
        x = x + _linear(hidden, p, f"blocks.{i}.mlp.mlp.2")
    for i in range(2):
        coords, x = _subdivide_block(coords, x, p, f"upsample.{i}")
    return coords.int(), _linear(x, p, "out_layer")


def _linear(x: Tensor, p: Weights, key: str) -> Tensor:
    return F.linear(x, p[f"{key}.weight"], p[f"{key}.bias"])


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:], eps=1e-6)


def _position_embedding(coords: Tensor, channels: int) -> Tensor:
    count = channels // 6
    angle = coords[..., None] / 10000 ** (torch.arange(count) / count)
    embedding = torch.cat([angle.sin(), angle.cos()], 2).flatten(1)
    return F.pad(embedding, (0, channels - embedding.shape[1]))


def _attention(x: Tensor, window: Tensor, p: Weights, key: str, heads: int) -> Tensor:
    q, k, v = _linear(x, p, f"{key}.to_qkv").unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    together = (window[:, None] == window).all(-1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=together)
    return _linear(y.transpose(0, 1).flatten(1), p, f"{key}.to_out")


def _subdivide_block(coords: Tensor, x: Tensor, p: Weights, key: str) -> tuple[Tensor, Tensor]:
    h = F.silu(_group_norm(coords, x, p, f"{key}.act_layers.0"))
    bits = torch.arange(8)
    children = torch.stack([bits * 0, bits >> 2, bits >> 1 & 1, bits & 1], 1)
    fine = (coords[:, None] * torch.tensor([1, 2, 2, 2]) + children).flatten(0, 1)
    h, x = h.repeat_interleave(8, 0), x.repeat_interleave(8, 0)
    h = F.silu(_group_norm(fine, _conv(fine, h, p, f"{key}.out_layers.0.conv"), p, f"{key}.out_layers.1"))
    h = _conv(fine, h, p, f"{key}.out_layers.3.conv")
    weight = p[f"{key}.skip_connection.conv.weight"]  # its memory is read as (in, out)
    return fine, h + x @ weight.reshape(x.shape[1], -1) + p[f"{key}.skip_connection.conv.bias"]


def _group_norm(coords: Tensor, x: Tensor, p: Weights, key: str) -> Tensor:
    out = torch.empty_like(x)
    for sample in coords[:, 0].unique():
        rows = coords[:, 0] == sample
        out[rows] = F.group_norm(x[rows].T[None], 32, p[f"{key}.weight"], p[f"{key}.bias"])[0].T
    return out


def _conv(coords: Tensor, x: Tensor, p: Weights, key: str) -> Tensor:
    row = {tuple(c): i for i, c in enumerate(coords.tolist())}
    weight = p[f"{key}.weight"]  # (out, kx, ky, kz, in)
    out = p[f"{key}.bias"].expand(len(x), -1).clone()
    for tap in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
        offset = [0, *(t - 1 for t in tap)]
        source = torch.tensor([row.get(tuple(c), -1) for c in (coords + torch.tensor(offset)).tolist()])
        found = source >= 0
        out[found] += x[source[found]] @ weight[:, tap[0], tap[1], tap[2]].T
    return out
