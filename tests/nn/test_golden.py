import torch

from tests.support.golden import golden
from trellis.nn.conv import SubmanifoldConv3d, patchify, pixel_shuffle_3d, pool_to_coarser, unpatchify
from trellis.nn.embedding import position_embedding, timestep_frequencies
from trellis.nn.norm import SparseGroupNorm
from trellis.nn.sparse import SparseTensor, coarser, finer


def test_embeddings_are_the_official_ones() -> None:
    item = golden("embedders_spatial")
    for channels in (96, 128, 1024):
        item.check(f"out.ape_{channels}", position_embedding(item[f"in.ape_{channels}.coords"], channels))
    # The last bit of exp() differs between CPU vendors' math libraries; at t = 1000 one bit of a frequency below 1 is
    # up to 6e-5 of an angle, so the largest difference gets that much here. The rms gate is the usual one.
    item.check("out.timestep_256", timestep_frequencies(item["in.timesteps"], 256), max_abs=7e-5)


def test_spatial_rearrangements_are_the_official_ones() -> None:
    item = golden("embedders_spatial")
    patches = patchify(item["in.patch_x"], 2)
    item.check("out.patchify2", patches)
    item.check("out.unpatchify2", unpatchify(patches, 2))
    item.check("out.pixel_shuffle_3d", pixel_shuffle_3d(item["in.ps_x"], 2))


def test_sparse_layers_are_the_official_ones() -> None:
    item = golden("sparse_ops")
    parameters = item.parameters()
    x = SparseTensor.from_coords(item["in.coords"], item["in.feats"])
    norm = SparseGroupNorm(3, 6)
    norm.load_state_dict({"weight": parameters["gn.weight"], "bias": parameters["gn.bias"]})
    item.check("out.sparse_group_norm_g3", norm(x.feats, x.segments).detach())
    for name, channels, kernel_size, expected in (("conv", 5, 3, "subm_conv3"), ("conv1", 4, 1, "subm_conv1x1")):
        conv = SubmanifoldConv3d(6, channels, kernel_size)
        own = {key.removeprefix(f"{name}."): v for key, v in parameters.items() if key.startswith(f"{name}.")}
        conv.load_state_dict(own)
        item.check(f"out.{expected}", conv(x).feats.detach())
    item.check("out.mul_batch_vec", x.feats * item["in.batch_vec"][x.segments.index])


def test_changes_of_resolution_are_the_official_ones() -> None:
    item = golden("sparse_ops")
    x = SparseTensor.from_coords(item["in.coords"], item["in.feats"])
    coarse = pool_to_coarser(x)
    item.check("out.down_coords", coarse.coords)
    item.check("out.down_feats", coarse.feats)
    item.check("out.down_idx", x.grid.derive(coarser, 2).inverse)
    item.check("out.subdiv_coords", x.grid.derive(finer).coords)


def test_subdivided_convolution_is_the_plain_pair() -> None:
    item = golden("sparse_ops")
    x = SparseTensor.from_coords(item["in.coords"], item["in.feats"])
    conv = SubmanifoldConv3d(6, 5, 3).requires_grad_(False)
    fine = x.grid.derive(finer)
    plain = conv(SparseTensor(fine, x.feats.repeat_interleave(8, dim=0)))
    fused = conv.subdivided(x)
    assert fused.grid is fine
    torch.testing.assert_close(fused.feats, plain.feats, rtol=1e-5, atol=1e-5)
