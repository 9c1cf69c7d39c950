"""Image or text to 3D assets: models, pipelines and training on `trellis_kernels`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ImageTo3D", "SparseTensor", "TextTo3D", "__version__", "load_model", "save_model"]

if TYPE_CHECKING:
    from trellis.checkpoints import load_model, save_model
    from trellis.nn.sparse import SparseTensor
    from trellis.pipelines.image_to_3d import ImageTo3D
    from trellis.pipelines.text_to_3d import TextTo3D

# Imported when first used (PEP 562): `import trellis` costs next to nothing.
_MODULES = {
    "ImageTo3D": "trellis.pipelines.image_to_3d",
    "TextTo3D": "trellis.pipelines.text_to_3d",
    "SparseTensor": "trellis.nn.sparse",
    "load_model": "trellis.checkpoints",
    "save_model": "trellis.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'trellis' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
