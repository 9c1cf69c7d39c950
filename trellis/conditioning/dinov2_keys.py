"""Keys of facebookresearch/dinov2 checkpoints <-> keys of transformers' Dinov2WithRegistersModel."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from trellis.checkpoints import CheckpointError

_TOP = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
_LEAF = {f"{old}.{part}": f"{new}.{part}" for old, new in _BLOCK.items() for part in ("weight", "bias")}
_LEAF |= {f"ls{i}.gamma": f"layer_scale{i}.lambda1" for i in (1, 2)}
_QKV = ("query", "key", "value")


def from_original(state: Mapping[str, Tensor], name: str = "checkpoint") -> dict[str, Tensor]:
    """Rename, and split ``attn.qkv`` into query, key and value.

    Raises:
        CheckpointError: a key is unknown, or one of those outside the blocks is missing; it is named.
    """
    missing = [key for key in _TOP if key not in state]
    if missing:
        raise CheckpointError(f"{name}: {missing[0]} is missing (of a DINOv2 with registers)")
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        if key in _TOP:
            converted[_TOP[key]] = value
        elif block and block[2] in _LEAF:
            converted[f"encoder.layer.{block[1]}.{_LEAF[block[2]]}"] = value
        elif block and block[2] in ("attn.qkv.weight", "attn.qkv.bias") and value.shape[0] % 3 == 0:
            leaf = block[2].rpartition(".")[2]
            for part, chunk in zip(_QKV, value.chunk(3), strict=True):
                converted[f"encoder.layer.{block[1]}.attention.attention.{part}.{leaf}"] = chunk.clone()
        else:
            raise CheckpointError(f"{name}: {key} of shape {list(value.shape)} is not part of a DINOv2 with registers")
    first = "encoder.layer.0.mlp.fc1.weight", "encoder.layer.0.mlp.weights_in.weight"
    if not any(key in converted for key in first):
        raise CheckpointError(f"{name}: blocks.0.mlp.fc1.weight is missing")
    return converted


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_original`."""
    top, leaves = {new: old for old, new in _TOP.items()}, {new: old for old, new in _LEAF.items()}
    original: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in top:
            original[top[key]] = value
            continue
        _, _, index, leaf = key.split(".", 3)
        if leaf in leaves:
            original[f"blocks.{index}.{leaves[leaf]}"] = value
        elif leaf.startswith("attention.attention.query."):
            parts = [state[key.replace(".query.", f".{part}.")] for part in _QKV]
            original[f"blocks.{index}.attn.qkv.{leaf.rpartition('.')[2]}"] = torch.cat(parts)
    return original


def heads_of(width: int) -> int:
    """Attention heads of a DINOv2 of this width: 64 channels each in all released models."""
    if width % 64:
        raise CheckpointError(f"a DINOv2 checkpoint's width must be a multiple of 64; got {width}")
    return width // 64
