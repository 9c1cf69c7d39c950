"""A text encoder small enough for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def tiny_clip(path: Path) -> Path:
    """Write a tiny CLIP text tower with a tokenizer that knows single letters and "ch"; its width is 32."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    path.mkdir(exist_ok=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ch", "ch</w>", "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\nc h\nc h</w>\n")
    tokenizer = CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"))
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        eos_token_id=len(words) - 1,
        bos_token_id=len(words) - 2,
    )
    CLIPTextModel(config).save_pretrained(path)
    return path
