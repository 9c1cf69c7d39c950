"""`DinoV2`: an image becomes the tokens that condition the flows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from trellis.atomic import atomic_path
from trellis.checkpoints import CheckpointError, read_state_dict, with_suffix
from trellis.conditioning.dinov2_keys import from_original, heads_of, to_original
from trellis.conditioning.pretrained import open_weights, transformers_model

# Names of facebookresearch/dinov2, which official pipelines give, and the same weights on the Hugging Face Hub.
HUB_IDS = {
    "dinov2_vits14_reg": "facebook/dinov2-with-registers-small",
    "dinov2_vitb14_reg": "facebook/dinov2-with-registers-base",
    "dinov2_vitl14_reg": "facebook/dinov2-with-registers-large",
    "dinov2_vitg14_reg": "facebook/dinov2-with-registers-giant",
}
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class DinoV2(nn.Module):
    """DINOv2 vision transformer with registers; its tokens before the final norm, then normalised without weights.

    The position embedding is added to the class and patch tokens before the registers are inserted, and is used as
    it is at `image_size`. At another size it would be interpolated (bicubic, antialiased, to exactly the new number of
    patches, which is ``interpolate_antialias=True, interpolate_offset=0.0`` of the original); `encode` always
    resizes to `image_size`.

    Args:
        hidden_size: C, width of the tokens.
        num_hidden_layers: blocks.
        num_attention_heads: heads per block.
        mlp_ratio: inner width of the MLPs over C.
        patch_size: side of a patch in pixels.
        image_size: side of the image in pixels, a multiple of `patch_size`.
        num_register_tokens: R.
        swiglu: gated MLPs, as in ViT-g.

    Raises:
        ValueError: the numbers do not fit together.

    Source:
        Oquab et al. 2023, DINOv2; Darcet et al. 2023, Vision transformers need registers;
        facebookresearch/dinov2 b8931f7 (`x_prenorm`).
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        mlp_ratio: int = 4,
        patch_size: int = 14,
        image_size: int = 518,
        num_register_tokens: int = 4,
        swiglu: bool = False,
    ) -> None:
        super().__init__()
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        numbers = {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "mlp_ratio": mlp_ratio,
            "patch_size": patch_size,
            "image_size": image_size,
            "num_register_tokens": num_register_tokens,
        }
        for name, value in numbers.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive int; got {value!r}")
        if hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size must be a multiple of {num_attention_heads} heads; got {hidden_size}")
        if image_size % patch_size or image_size < patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size {patch_size}; got {image_size}")
        self.args: dict[str, Any] = {**numbers, "swiglu": swiglu}
        config = Dinov2WithRegistersConfig(
            **numbers, use_swiglu_ffn=swiglu, layer_norm_eps=1e-6, attn_implementation="sdpa"
        )
        self.model = Dinov2WithRegistersModel(config)
        self.image_size, self.channels = image_size, hidden_size
        self.tokens = 1 + num_register_tokens + (image_size // patch_size) ** 2
        self.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embeddings.cls_token.dtype

    def forward(self, images: Tensor) -> Tensor:
        """Tokens of images.

        Args:
            images: ``[B, 3, H, W]`` float. sRGB in [0, 1], background black; H and W multiples of the patch size.

        Returns:
            ``[B, 1 + R + P, C]`` float32: class token, R registers, P patches row by row; at 518 x 518 and 4
            registers 1374. Each token has mean 0 and variance 1.

        Raises:
            ValueError: the shape is another.
        """
        return F.layer_norm(self._tokens(images), (self.channels,), eps=1e-5)

    def patch_features(self, images: Tensor) -> Tensor:
        """Tokens of the patches as they are before any norm: what the official features of voxels are made of.

        Args:
            images: as in `forward`.

        Returns:
            ``[B, h, w, C]`` float32, h and w in patches.
        """
        patch = self.args["patch_size"]
        tokens = self._tokens(images)[:, 1 + self.args["num_register_tokens"] :]
        return tokens.unflatten(1, (images.shape[2] // patch, images.shape[3] // patch))

    def _tokens(self, images: Tensor) -> Tensor:
        patch = self.args["patch_size"]
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % patch or images.shape[3] % patch:
            raise ValueError(f"images must be [B, 3, H, W] with H and W multiples of {patch}; got {list(images.shape)}")
        mean, std = (
            torch.tensor(values, dtype=images.dtype).view(1, 3, 1, 1).to(images.device, non_blocking=True)
            for values in (MEAN, STD)
        )
        hidden = self.model.embeddings(((images - mean) / std).to(self.dtype))
        for layer in self.model.encoder.layer:
            output = layer(hidden)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden.float()

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Tokens of PIL images, resized to `image_size` (Lanczos) where they have another size: see `forward`."""
        if not images:
            raise ValueError("images must be a non-empty list; got an empty one")
        size = (self.image_size, self.image_size)
        arrays = [
            np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), np.float32) / 255
            for image in images
        ]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        tokens: Tensor = self(pixels.to(self.model.embeddings.cls_token.device, non_blocking=True))
        return tokens

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dtype: torch.dtype | None = None, **hub: Any) -> DinoV2:
        """Load published weights, in evaluation mode.

        Args:
            name: official name (``dinov2_vitl14_reg``), Hub id, local folder in transformers format, or file
                (``.pth``, ``.safetensors``) with the keys of facebookresearch/dinov2.
            dtype: of the weights; None: float32.
            **hub: `revision`, `local_files_only`, `token`.

        Raises:
            CheckpointError: the weights are missing or do not fit; it is said how.
        """
        if Path(name).is_file():
            module = cls._from_original(Path(name))
        else:
            model = transformers_model("Dinov2WithRegistersModel", HUB_IDS.get(str(name), str(name)), **hub)
            config = model.config
            if config.model_type != "dinov2_with_registers" or config.layer_norm_eps != 1e-6:
                raise CheckpointError(f"{name} must be a DINOv2 with registers; got {config.model_type}")
            module = cls(**_arguments(config))
            module.model.load_state_dict(model.state_dict(), strict=True)
        return module.to(dtype=dtype or torch.float32).requires_grad_(False).eval()

    @classmethod
    def _from_original(cls, path: Path) -> DinoV2:
        original = open_weights(path)
        converted = from_original(original, str(path))
        projection = converted["embeddings.patch_embeddings.projection.weight"]
        positions = converted["embeddings.position_embeddings"]
        width, patch = projection.shape[0], projection.shape[-1]
        swiglu = "encoder.layer.0.mlp.weights_in.weight" in converted
        module = cls(
            hidden_size=width,
            num_hidden_layers=len([key for key in converted if key.endswith("norm1.weight")]),
            num_attention_heads=heads_of(width),
            mlp_ratio=4 if swiglu else converted["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
            patch_size=patch,
            image_size=patch * round((positions.shape[1] - 1) ** 0.5),
            num_register_tokens=converted["embeddings.register_tokens"].shape[1],
            swiglu=swiglu,
        )
        try:
            module.model.load_state_dict(converted, strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return module

    @classmethod
    def load(cls, args: Mapping[str, Any], stem: Path) -> DinoV2:
        """Build with `args` and read ``<stem>.safetensors``, as `save` wrote it, strictly.

        Raises:
            CheckpointError: an argument, key, shape or value does not fit; it is named.
        """
        try:
            with torch.device("meta"):  # no memory is taken before the file is seen to fit
                module = cls(**args)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"DinoV2: {error}") from error
        path = with_suffix(stem, ".safetensors")
        state = read_state_dict(path, to_original(module.model.state_dict()), "cpu")
        module.model.load_state_dict(from_original(state, str(path)), strict=True, assign=True)
        return module.requires_grad_(False)

    def save(self, stem: str | Path) -> None:
        """Write ``<stem>.safetensors`` with the keys of facebookresearch/dinov2; `args` go to ``pipeline.json``."""
        from safetensors.torch import save_file

        state = to_original(self.model.state_dict())
        with atomic_path(with_suffix(Path(stem), ".safetensors")) as temporary:
            save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, temporary)


def _arguments(config: Any) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "patch_size", "image_size")
    numbers = {name: getattr(config, name) for name in (*names, "num_register_tokens")}
    return numbers | {"swiglu": config.use_swiglu_ffn}
