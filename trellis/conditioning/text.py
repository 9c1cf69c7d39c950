"""`ClipText`: a sentence becomes the tokens that condition the flows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trellis.conditioning.pretrained import transformers_model


class ClipText(nn.Module):
    """Text tower of CLIP with its tokenizer; all tokens after the final norm.

    Args:
        model: `transformers.CLIPTextModel`.
        tokenizer: `transformers.CLIPTokenizer` or its fast form.

    Source:
        Radford et al. 2021; official `TrellisTextTo3DPipeline.encode_text` at 6b0d647.
    """

    image_size = None

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.channels: int = model.config.hidden_size
        self.tokens = min(77, model.config.max_position_embeddings)
        self.eval().requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, L]`` int64 token ids, padded, to ``[B, L, C]`` float32. No mask but the causal one, as officially."""
        hidden: Tensor = self.model(input_ids=ids).last_hidden_state
        return hidden.float()

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """``[B, 77, C]`` float32 of sentences; cut off after 77 tokens, padded up to 77.

        Raises:
            TypeError: a prompt is not a string.
            ValueError: there is none.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"prompts must be a list of strings; got {prompts!r}")
        if not prompts:
            raise ValueError("prompts must be a non-empty list; got an empty one")
        encoded = self.tokenizer(
            list(prompts), max_length=self.tokens, padding="max_length", truncation=True, return_tensors="pt"
        )
        tokens: Tensor = self(encoded["input_ids"].to(next(self.model.parameters()).device, non_blocking=True))
        return tokens

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dtype: torch.dtype | None = None, **hub: Any) -> ClipText:
        """Load a Hub id or a folder in transformers format, in evaluation mode.

        Args:
            name: for instance ``openai/clip-vit-large-patch14``.
            dtype: of the weights; None: float32.
            **hub: `revision`, `local_files_only`, `token`.

        Raises:
            CheckpointError: it is missing or does not fit.
        """
        model = transformers_model("CLIPTextModel", str(name), **hub)
        tokenizer = transformers_model("CLIPTokenizer", str(name), **hub)
        return cls(model.to(dtype or torch.float32), tokenizer)

    @classmethod
    def load(cls, args: Any, stem: Path) -> ClipText:
        """The text tower and tokenizer in the folder `stem`, in transformers format."""
        from trellis.checkpoints import CheckpointError

        if args:
            raise CheckpointError(f"ClipText takes no args, its folder has them; got {args!r}")
        if not stem.is_dir():
            raise CheckpointError(f"no folder at {stem}")
        return cls.from_pretrained(stem, local_files_only=True)
