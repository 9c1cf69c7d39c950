"""Pictures and sentences of a batch become the tokens that the flows are conditioned on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trellis.conditioning import PRETRAINED, load_conditioner
from trellis.training.config import LoopConfig


class Conditions:
    """Gives batches with ``cond`` their tokens ``[B, L, C]`` and the null condition ``neg_cond [1, L, C]``.

    Tokens that a dataset has cached are taken as they are; pictures and sentences go through the frozen conditioner of
    the configuration, which is loaded when it is first needed. The null condition is the dataset's own if it has one
    (attribute `neg_cond`), else zeros for pictures and what the encoder makes of "" for text.

    Args:
        loop: names the conditioners.
        device: where they run.
        dataset_null: the null condition of the dataset, if it has one.
    """

    def __init__(self, loop: LoopConfig, device: torch.device, dataset_null: Tensor | None = None) -> None:
        self.names = {"image": loop.image_cond_model, "text": loop.text_cond_model}
        self.device, self.null = device, dataset_null
        self._loaded: dict[str, Any] = {}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with tokens.

        Raises:
            ValueError: the condition is none of the known kinds, or the configuration names no conditioner for it.
        """
        cond = batch.get("cond")
        if cond is None:
            return batch
        with torch.no_grad():
            if isinstance(cond, Tensor) and cond.ndim == 3:
                tokens = cond.float()
            elif isinstance(cond, Tensor) and cond.ndim == 4:
                tokens = self._conditioner("image")(cond)
            elif isinstance(cond, list) and all(isinstance(text, str) for text in cond):
                tokens = self._conditioner("text").encode(cond)
            else:
                shape = list(cond.shape) if isinstance(cond, Tensor) else type(cond).__name__
                raise ValueError(f"cond must be tokens [B, L, C], pictures [B, 3, S, S] or sentences; got {shape}")
            null = batch.get("neg_cond")
            if null is None:
                null = self._null(tokens)
        return {**batch, "cond": tokens, "neg_cond": null.to(tokens)}

    def _null(self, tokens: Tensor) -> Tensor:
        if self.null is None:
            name = self.names["text"]
            # MiniLM's null condition is zeros by definition, so a mixture of pictures and text has one for both.
            if name is None or PRETRAINED.get(name) == "MiniLM":
                self.null = torch.zeros_like(tokens[:1])
            else:
                self.null = self._conditioner("text").encode([""])
        return self.null

    def _conditioner(self, kind: str) -> Any:
        if kind not in self._loaded:
            name = self.names[kind]
            if name is None:
                raise ValueError(f"the dataset gives {kind}s, so trainer.args must have {kind}_cond_model; it has none")
            self._loaded[kind] = load_conditioner(name, root=None, kind=kind, device=self.device)
        return self._loaded[kind]
