"""Official JSON + safetensors <-> our configurations and modules, strict in both directions."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from trellis.atomic import atomic_path
from trellis.models.config import Model, ModelConfig

logger = logging.getLogger(__name__)

# Official class name -> module, model class, configuration class. "Elastic" variants differ only in how they train.
MODELS: dict[str, tuple[str, str, str]] = {
    "SparseStructureEncoder": ("structure_vae", "StructureEncoder", "StructureEncoderConfig"),
    "SparseStructureDecoder": ("structure_vae", "StructureDecoder", "StructureDecoderConfig"),
    "SparseStructureFlowModel": ("structure_flow", "StructureFlow", "FlowConfig"),
    "SLatEncoder": ("latent_encoder", "LatentEncoder", "LatentEncoderConfig"),
    "SLatGaussianDecoder": ("gaussian_decoder", "GaussianDecoder", "GaussianDecoderConfig"),
    "SLatRadianceFieldDecoder": ("radiance_decoder", "RadianceDecoder", "RadianceDecoderConfig"),
    "SLatMeshDecoder": ("mesh_decoder", "MeshDecoder", "MeshDecoderConfig"),
    "SLatFlowModel": ("latent_flow", "LatentFlow", "LatentFlowConfig"),
}
_ELASTIC = {
    f"Elastic{name}": name
    for name in ("SLatEncoder", "SLatGaussianDecoder", "SLatRadianceFieldDecoder", "SLatMeshDecoder", "SLatFlowModel")
}
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class CheckpointError(ValueError):
    """A checkpoint is missing, malformed, or does not fit its configuration."""


@dataclass(frozen=True)
class HubOptions:
    """How files are fetched from the Hugging Face Hub.

    Args:
        revision: branch, tag or commit.
        local_files_only: only use what is cached.
        token: access token.
    """

    revision: str | None = None
    local_files_only: bool = False
    token: str | None = None

    def fetch(self, repo: str, filename: str) -> Path:
        """Local path of one file of a Hub repository.

        Raises:
            CheckpointError: it is not there, or cannot be reached.
        """
        import huggingface_hub

        try:
            path = huggingface_hub.hf_hub_download(
                repo, filename, revision=self.revision, local_files_only=self.local_files_only, token=self.token
            )
        except Exception as error:  # the Hub client raises many unrelated types; all mean the same to our caller
            raise CheckpointError(f"cannot get {filename} of {repo} from the Hugging Face Hub: {error}") from error
        return Path(path)


def build_model(class_name: str, args: Mapping[str, Any]) -> Model:
    """A model by its official class name and arguments, freshly initialised, torso as `use_fp16` says.

    Raises:
        CheckpointError: the class or an argument is unknown; the known ones are listed.
    """
    name = canonical_name(class_name)
    if name not in MODELS:
        raise CheckpointError(f"unknown model class {class_name!r}; known are {', '.join([*MODELS, *_ELASTIC])}")
    module_name, model_name, config_name = MODELS[name]
    module = importlib.import_module(f"trellis.models.{module_name}")
    try:
        config: ModelConfig = getattr(module, config_name).from_args(args)
        model: Model = getattr(module, model_name)(config)
    except (ValueError, RuntimeError, ZeroDivisionError, TypeError, IndexError) as error:
        raise CheckpointError(f"{class_name}: {error}") from error
    model.official_name = class_name
    if config.use_fp16:
        model.set_torso_dtype(torch.float16)
    return model


def load_model(
    stem: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Model:
    """Load ``<stem>.json`` and ``<stem>.safetensors`` in the official format, in evaluation mode.

    Args:
        stem: local path without suffix, or ``owner/repo/path/to/stem`` on the Hugging Face Hub.
        device: where to.
        dtype: of the torso (float32, float16, bfloat16); None keeps what the checkpoint says. The rest is float32.
        revision: of the Hub repository.
        local_files_only: do not go to the network.
        token: for the Hub.

    Raises:
        CheckpointError: files missing, class unknown, or a key, shape, dtype or value that does not fit; it is named.
    """
    json_path, weights_path = _locate(str(stem), HubOptions(revision, local_files_only, token))
    description = read_json(json_path)
    name, args = description.get("name"), description.get("args")
    if not isinstance(name, str) or not isinstance(args, dict):
        raise CheckpointError(f"{json_path}: must have a string 'name' and an object 'args'")
    with torch.device("meta"):
        model = build_model(name, args)
        if dtype is not None:
            model.set_torso_dtype(dtype)
    state = read_state_dict(weights_path, model.state_dict(), device)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def save_model(model: Model, stem: str | Path) -> None:
    """Write ``<stem>.json`` and ``<stem>.safetensors`` in the official format; load -> save -> load is the identity.

    Both files are written whole before either gets its name, so an interruption leaves no half checkpoint.
    """
    from safetensors.torch import save_file

    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    if model.torso_dtype == torch.bfloat16:
        raise CheckpointError("the official format has no bfloat16 torso: set_torso_dtype(float16 or float32) first")
    description = {"name": official_name(model), "args": model.config.to_args()}
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with atomic_path(with_suffix(stem, ".safetensors")) as weights, atomic_path(with_suffix(stem, ".json")) as text:
        save_file(state, weights)
        text.write_text(json.dumps(description, indent=4) + "\n")


def canonical_name(class_name: str) -> str:
    """The plain class of an official name: "Elastic" variants differ only in how they train."""
    return _ELASTIC.get(class_name, class_name)


def official_name(model: Model) -> str:
    """The official class name of a model: the one it was loaded as, else the plain one."""
    if model.official_name is not None:
        return model.official_name
    return next(name for name, (_, cls, _) in MODELS.items() if cls == type(model).__name__)


def with_suffix(stem: Path, suffix: str) -> Path:
    """``stem + suffix``; unlike `Path.with_suffix` it keeps dots in the name."""
    return stem.with_name(stem.name + suffix)


def read_json(path: Path, limit: int = 1 << 20) -> dict[str, Any]:
    """Parse a JSON object of at most `limit` bytes.

    Raises:
        CheckpointError: missing, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > limit:
            raise CheckpointError(f"{path}: a configuration may have {limit} bytes; it has {path.stat().st_size}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object; got {type(value).__name__}")
    return value


def read_state_dict(path: Path, expected: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Read a safetensors file whose keys and shapes are exactly those of `expected`, converted to its dtypes.

    Keys and shapes are compared before any tensor is read, so a wrong file costs no memory.

    Raises:
        CheckpointError: naming the first key that is missing, unknown, mis-shaped, of a wrong type, or not finite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            problems = [(key, "missing") for key in expected if key not in stored]
            problems += [(key, "not part of the model") for key in sorted(stored - set(expected))]
            for key, tensor in expected.items():
                if key not in stored:
                    continue
                part = file.get_slice(key)
                if list(part.get_shape()) != list(tensor.shape):
                    problems.append((key, f"of shape {list(part.get_shape())}, must be {list(tensor.shape)}"))
                elif part.get_dtype() not in _DTYPES:
                    problems.append((key, f"of type {part.get_dtype()}, must be one of {', '.join(_DTYPES)}"))
            if problems:
                key, problem = problems[0]
                more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
                raise CheckpointError(f"{path}: {key} is {problem}{more}")
            state = {}
            for key, tensor in expected.items():
                value = file.get_tensor(key)
                if not torch.isfinite(value).all():
                    raise CheckpointError(f"{path}: {key} has values that are not finite")
                # A copy, not a view of the mapped file: the file may be replaced while the model lives.
                state[key] = value.to(device=device, dtype=tensor.dtype, copy=True)
            return state
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error


def confined(path: str) -> PurePosixPath:
    """A relative path from an untrusted file, refused if it could leave its folder.

    Raises:
        CheckpointError: it is absolute, or has ``..``, a backslash or a drive.
    """
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path:
        raise CheckpointError(f"path must be relative and stay inside its folder; got {path!r}")
    return pure


def _locate(stem: str, hub: HubOptions) -> tuple[Path, Path]:
    local = Path(stem)
    json_path, weights_path = with_suffix(local, ".json"), with_suffix(local, ".safetensors")
    if json_path.is_file() and weights_path.is_file():
        return json_path, weights_path
    if json_path.is_file() or weights_path.is_file():
        missing = weights_path if json_path.is_file() else json_path
        raise CheckpointError(f"{missing} is missing")
    parts = PurePosixPath(stem).parts
    if local.is_absolute() or len(parts) < 3 or ".." in parts or stem.startswith("."):
        raise CheckpointError(f"no model at {stem}: {json_path} and {weights_path} do not exist")
    repo, file_stem = "/".join(parts[:2]), "/".join(parts[2:])
    return hub.fetch(repo, f"{file_stem}.json"), hub.fetch(repo, f"{file_stem}.safetensors")
