"""The step that keeps what the frozen encoders make of pictures and captions, so that training does not run them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trellis.conditioning import load_conditioner
from trellis.preparation.arrays import is_whole, read_arrays, read_picture, write_arrays
from trellis.preparation.pictures import disturbed, framed

if TYPE_CHECKING:
    from trellis.preparation.job import Job

BATCH = 8  # pictures in memory at a time


def condition_step(job: Job) -> dict[str, Any]:
    """Write ``conditions/<encoder>/<sha>.npz`` with ``tokens [K, L, C]`` float16.

    Of pictures, K is the number of pictures times ``1 + augmentations``: each picture as it is, framed as officially,
    followed by its disturbed copies. Of captions, K is their number; without any there is no file. The copies depend on
    the object, the picture and `Settings.seed` alone.

    Raises:
        ValueError: there is no conditioning picture, or one cannot be used.
        CheckpointError: the encoder's weights are not there.
    """
    settings, columns = job.settings, {}
    pictures = sorted((job.root / "renders_cond" / job.sha256).glob("[0-9]*.png"))
    if not pictures:
        raise ValueError(f"{job.sha256} has no conditioning pictures: run the step render_cond first")
    path = tokens_path(job.root, settings.image_encoder, job.sha256)
    _write(path, len(pictures) * (1 + settings.augmentations), lambda: _of_pictures(job, pictures))
    columns[f"condition_{settings.image_encoder}"] = True
    if settings.text_encoder:
        captions = captions_of(job.row)
        path = tokens_path(job.root, settings.text_encoder, job.sha256)
        if captions:
            _write(path, len(captions), lambda: encoder(settings.text_encoder, "text").encode(captions))
        columns[f"condition_{settings.text_encoder}"] = bool(captions)
    return columns


def tokens_path(root: Path, name: str, sha256: str) -> Path:
    """Where the tokens of an object are that the encoder `name` made."""
    return root / "conditions" / name.replace("/", "_") / f"{sha256}.npz"


def captions_of(row: Any) -> list[str]:
    """The captions of a line of metadata.csv: a JSON list in its column ``captions``.

    Raises:
        ValueError: the column holds something else.
    """
    text = row.get("captions")
    if not isinstance(text, str) or not text.strip():  # pandas gives nan for an empty cell
        return []
    captions = json.loads(text)
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"captions must be a JSON list of strings; got {text[:100]!r}")
    return [caption for caption in captions if caption.strip()]


@lru_cache(maxsize=2)
def encoder(name: str, kind: str) -> Any:
    """The frozen encoder, loaded once per process."""
    return load_conditioner(name, root=None, kind=kind)


def _of_pictures(job: Job, paths: list[Path]) -> torch.Tensor:
    network = encoder(job.settings.image_encoder, "image")
    copies = _copies(job, paths, network.image_size)
    tokens = []
    while batch := list(islice(copies, BATCH)):
        tokens.append(network(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)).half())
    return torch.cat(tokens)


def _copies(job: Job, paths: list[Path], size: int) -> Iterator[np.ndarray]:
    """``[S, S, 3]``: each picture on black, then its disturbed copies."""
    for index, path in enumerate(paths):
        try:
            picture = framed(read_picture(path), size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        yield picture[..., :3]
        random = np.random.default_rng([job.seed, index])
        for _ in range(job.settings.augmentations):
            yield disturbed(picture, random)


def _write(path: Path, count: int, make: Callable[[], torch.Tensor]) -> None:
    """Unless `path` has tokens of `count` pictures or sentences already, write what `make` returns."""
    if not (is_whole(path, "tokens") and len(read_arrays(path, "tokens")[0]) == count):
        with torch.inference_mode():
            tokens = make().half().numpy()
        assert len(tokens) == count
        write_arrays(path, tokens=tokens)
