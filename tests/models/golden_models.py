"""Builds the models of the golden items with their formula weights."""

from __future__ import annotations

from tests.support.golden import Golden, golden
from trellis.checkpoints import build_model
from trellis.models.config import Model
from trellis.nn.sparse import SparseTensor


def golden_model(name: str) -> tuple[Golden, Model]:
    """The item and its model, strictly loaded."""
    item = golden(name)
    model = build_model(item.info["cls"], item.info["args"])
    load_formula_weights(model, item)
    return item, model.eval()


def load_formula_weights(model: Model, item: Golden, prefix: str = "") -> None:
    """Strict: the item's parameters and buffers are the complete state dict."""
    buffers = {key.removeprefix(prefix) for key, _ in item.info["buffers"] if key.startswith(prefix)}
    state = {key.removeprefix(prefix): value for key, value in item.parameters().items() if key.startswith(prefix)}
    own = model.state_dict()
    state.update({key: own[key] for key in buffers})
    model.load_state_dict(state, strict=True)


def sparse_input(item: Golden, resolution: int | None = None) -> SparseTensor:
    return SparseTensor.from_coords(item["in.coords"], item["in.feats"], resolution)
