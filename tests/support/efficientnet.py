"""An EfficientNet-Lite0 with random weights, and its forward pass in plain torch, from the published layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# kernel, stride, input channels, inner channels, output channels: each of the 15 blocks up to 192 channels
BLOCKS = [(3, 1, 32, 32, 16), (3, 2, 16, 96, 24), (3, 1, 24, 144, 24), (5, 2, 24, 144, 40), (5, 1, 40, 240, 40)]
BLOCKS += [(3, 2, 40, 240, 80), (3, 1, 80, 480, 80), (3, 1, 80, 480, 80)]
BLOCKS += [(5, 1, 80, 480, 112), (5, 1, 112, 672, 112), (5, 1, 112, 672, 112)]
BLOCKS += [(5, 2, 112, 672, 192)] + [(5, 1, 192, 1152, 192)] * 3
ENDS = [0, 2, 4, 7, 10, 14]  # last block of each stage


def original_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the keys of lukemelas/EfficientNet-PyTorch, with a block that is not needed."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def convolution(key: str, *shape: int) -> None:
        fan = shape[1] * shape[2] * shape[3]
        state[f"{key}.weight"] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5

    def norm(key: str, channels: int) -> None:
        state[f"{key}.weight"] = torch.rand(channels, generator=generator) + 0.5
        state[f"{key}.bias"] = torch.randn(channels, generator=generator) * 0.3
        state[f"{key}.running_mean"] = torch.randn(channels, generator=generator) * 0.3
        state[f"{key}.running_var"] = torch.rand(channels, generator=generator) + 0.5
        state[f"{key}.num_batches_tracked"] = torch.tensor(7)

    convolution("_conv_stem", 32, 3, 3, 3)
    norm("_bn0", 32)
    for index, (kernel, _, inputs, inner, outputs) in enumerate([*BLOCKS, (3, 1, 192, 1152, 320)]):
        block = f"_blocks.{index}"
        if inner != inputs:
            convolution(f"{block}._expand_conv", inner, inputs, 1, 1)
            norm(f"{block}._bn0", inner)
        convolution(f"{block}._depthwise_conv", inner, 1, kernel, kernel)
        norm(f"{block}._bn1", inner)
        convolution(f"{block}._project_conv", outputs, inner, 1, 1)
        norm(f"{block}._bn2", outputs)
    state["_fc.weight"] = torch.zeros(10, 1280)
    return state


def plain_stages(state: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """Features after each stage, of images ``[B, 3, H, W]`` in [0, 1]; float64."""
    state = {key: value.double() for key, value in state.items()}

    def convolved(x: Tensor, key: str, norm: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = state[f"{key}.weight"]
        kernel = weight.shape[-1]
        sides: list[int] = []
        for size in (x.shape[3], x.shape[2]):  # TensorFlow's "SAME"
            needed = (-(-size // stride) - 1) * stride + kernel - size
            sides += [needed // 2, needed - needed // 2]
        x = F.conv2d(F.pad(x, sides), weight, stride=stride, groups=groups)
        mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{norm}.weight"], state[f"{norm}.bias"], eps=1e-3)

    def clipped(x: Tensor) -> Tensor:
        return x.clamp(0, 6)

    x = clipped(convolved((images.double() * 255 - 127) / 128, "_conv_stem", "_bn0", 2))
    features = []
    for index, (_, stride, inputs, inner, outputs) in enumerate(BLOCKS):
        block, y = f"_blocks.{index}", x
        if inner != inputs:
            y = clipped(convolved(y, f"{block}._expand_conv", f"{block}._bn0"))
        y = clipped(convolved(y, f"{block}._depthwise_conv", f"{block}._bn1", stride, inner))
        y = convolved(y, f"{block}._project_conv", f"{block}._bn2")
        x = x + y if stride == 1 and inputs == outputs else y
        if index in ENDS:
            features.append(x)
    return features
