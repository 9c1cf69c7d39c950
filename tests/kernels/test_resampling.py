"""sparse_pool, upsample and subdivide (room sparse_conv)."""

from tests.support.golden import golden
from trellis_kernels import sparse_pool, subdivide, upsample


def test_golden_pooling() -> None:
    item = golden("sparse_ops")
    down = sparse_pool(item["in.feats"], item["out.down_idx"], 149, "biased_mean")
    item.check("out.down_feats", down)


def test_golden_upsampling() -> None:
    item = golden("sparse_ops")
    item.check("out.up_feats_of_2x_plus_1", upsample(2 * item["out.down_feats"] + 1, item["out.down_idx"]))


def test_golden_subdivision() -> None:
    item = golden("sparse_ops")
    item.check("out.subdiv_feats", subdivide(item["in.feats"]))
