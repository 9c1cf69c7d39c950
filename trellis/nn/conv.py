"""Convolutions and residual blocks, on dense maps and on voxels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

import trellis_kernels
from trellis.nn.norm import ChannelLayerNorm, LayerNorm, SparseGroupNorm
from trellis.nn.sparse import SparseTensor, coarser, conv_plan, finer, neighbors


class ResBlock3d(nn.Module):
    """``[B, C, X, Y, Z] -> [B, C, X, Y, Z]``: two 3x3x3 convolutions, the second zero at initialisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelLayerNorm(channels)
        self.norm2 = ChannelLayerNorm(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        zero_(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(silu(self.norm1(x)))
        return x + self.conv2(silu(self.norm2(hidden)))


class Downsample3d(nn.Module):
    """Halves the resolution with a strided convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample3d(nn.Module):
    """Doubles the resolution: a convolution to 8 times the channels, then a pixel shuffle."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, 8 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle_3d(self.conv(x), 2)


def pixel_shuffle_3d(x: Tensor, factor: int) -> Tensor:
    """``[B, C f^3, X, Y, Z] -> [B, C, f X, f Y, f Z]``; channel ``((c f + i) f + j) f + k`` goes to (i, j, k)."""
    return unpatchify(x, factor)


def patchify(x: Tensor, size: int) -> Tensor:
    """``[B, C, X, Y, Z] -> [B, C p^3, X/p, Y/p, Z/p]``, channels ordered (C, i, j, k)."""
    for axis in (2, 4, 6):
        x = x.unflatten(axis, (-1, size))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def unpatchify(x: Tensor, size: int) -> Tensor:
    """The inverse of `patchify`."""
    x = x.unflatten(1, (-1, size, size, size)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class StoredConv(nn.Module):
    """Parameters of a sparse convolution as checkpoints hold them: ``weight [Co, k, k, k, Ci]``, ``bias [Co]``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, *(kernel_size,) * 3, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        bound = 1 / math.sqrt(in_channels * kernel_size**3)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)


class SubmanifoldConv3d(nn.Module):
    """Convolution whose outputs are the voxels of its input.

    A 1x1x1 kernel is applied as the official code does: its stored memory ``(out, in)`` is read as ``(in, out)``.

    Args:
        in_channels: Ci.
        out_channels: Co.
        kernel_size: 3 or 1.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.conv = StoredConv(in_channels, out_channels, kernel_size)

    def forward(self, x: SparseTensor) -> SparseTensor:
        if self.kernel_size == 1:
            return x.with_feats(trellis_kernels.pointwise_conv(x.feats, self.conv.weight, self.conv.bias))
        weight = self.conv.weight.flatten(1, 3)
        neighbor_map = x.grid.derive(neighbors, self.kernel_size)
        plan = x.grid.derive(conv_plan, self.kernel_size, torch.is_grad_enabled())
        return x.with_feats(trellis_kernels.submanifold_conv(x.feats, neighbor_map, weight, self.conv.bias, plan))

    def subdivided(self, x: SparseTensor) -> SparseTensor:
        """``self(subdivide(x))`` as one operator, on the coarse neighbor map."""
        neighbor_map = x.grid.derive(neighbors, 3)
        plan = x.grid.derive(conv_plan, 3, torch.is_grad_enabled())
        weight = self.conv.weight.flatten(1, 3)
        feats = trellis_kernels.subdivided_conv(x.feats, neighbor_map, weight, self.conv.bias, plan)
        return SparseTensor(x.grid.derive(finer), feats)


def zero_(module: nn.Module) -> None:
    """Zero all parameters: the last layer of a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


class SparseResBlock(nn.Module):
    """Residual block of the latent flow, modulated by the timestep, after an optional change of resolution.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        emb_channels: width of the timestep embedding.
        sampling: "down" pools to half the resolution first, "up" returns to the grid given to `forward`.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, sampling: str | None = None) -> None:
        super().__init__()
        self.sampling = sampling
        self.norm1 = LayerNorm(in_channels, eps=1e-6)
        self.norm2 = LayerNorm(out_channels, eps=1e-6, elementwise_affine=False)
        self.conv1 = SubmanifoldConv3d(in_channels, out_channels, 3)
        self.conv2 = SubmanifoldConv3d(out_channels, out_channels, 3)
        zero_(self.conv2)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels))
        self.has_skip = in_channels != out_channels
        if self.has_skip:
            self.skip_connection = nn.Linear(in_channels, out_channels)

    def forward(self, x: SparseTensor, timestep: Tensor, onto: SparseTensor | None = None) -> SparseTensor:
        """``[N, Ci] -> [N', Co]``.

        Args:
            x: input voxels.
            timestep: ``[B, emb_channels]``.
            onto: for "up", the finer tensor whose grid the output shall have.
        """
        if self.sampling == "down":
            x = pool_to_coarser(x)
        elif self.sampling == "up":
            if onto is None:
                raise ValueError("an upsampling block needs the finer tensor to upsample onto")
            inverse = onto.grid.derive(coarser, 2).inverse
            x = SparseTensor(onto.grid, trellis_kernels.upsample(x.feats, inverse))
        scale, shift = self.emb_layers(timestep).chunk(2, dim=-1)
        hidden = self.conv1(x.with_feats(silu(self.norm1(x.feats))))
        modulated = self.norm2.modulated(hidden.feats, scale, shift, x.segments)
        hidden = self.conv2(hidden.with_feats(silu(modulated)))
        skip = self.skip_connection(x.feats) if self.has_skip else x.feats
        return hidden.with_feats(hidden.feats + skip)


def pool_to_coarser(x: SparseTensor) -> SparseTensor:
    """Halve the resolution with the official pooling: the sum of a cell's voxels over their count plus one."""
    coarse = x.grid.derive(coarser, 2)
    feats = trellis_kernels.sparse_pool(x.feats, coarse.inverse, coarse.grid.coords.shape[0], "biased_mean")
    return SparseTensor(coarse.grid, feats)


class SubdivideBlock(nn.Module):
    """Doubles the resolution: every voxel becomes its 8 children (mesh decoder).

    Args:
        in_channels: Ci.
        out_channels: Co.
        num_groups: groups of the norms.
    """

    def __init__(self, in_channels: int, out_channels: int, num_groups: int = 32) -> None:
        super().__init__()
        self.act_layers = nn.Sequential(SparseGroupNorm(num_groups, in_channels), nn.SiLU())
        self.out_layers = nn.Sequential(
            SubmanifoldConv3d(in_channels, out_channels, 3),
            SparseGroupNorm(num_groups, out_channels),
            nn.SiLU(),
            SubmanifoldConv3d(out_channels, out_channels, 3),
        )
        zero_(self.out_layers[3])
        self.has_skip = in_channels != out_channels
        if self.has_skip:
            self.skip_connection = SubmanifoldConv3d(in_channels, out_channels, 1)

    def forward(self, x: SparseTensor) -> SparseTensor:
        norm1, _ = self.act_layers
        conv1, norm2, _, conv2 = self.out_layers
        assert isinstance(conv1, SubmanifoldConv3d)
        hidden = conv1.subdivided(x.with_feats(silu(norm1(x.feats, x.segments))))
        # The skip is pointwise, so it is computed on the parents and repeated, an eighth of the work.
        skip = trellis_kernels.subdivide(self.skip_connection(x).feats if self.has_skip else x.feats)
        hidden = hidden.with_feats(silu(norm2(hidden.feats, hidden.segments)))
        hidden = conv2(hidden)
        return hidden.with_feats(hidden.feats + skip)
