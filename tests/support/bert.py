"""A BERT small enough for tests."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "chair", "table", "x", "##s"]


def tiny_bert(path: Path) -> Path:
    """Write a BERT of two layers and width 384 with a tokenizer that knows `WORDS`, in transformers format."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    path.mkdir(exist_ok=True, parents=True)
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=384,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(path)
    return path
