import pytest
import torch

from tests.models.golden_models import golden_model, load_formula_weights
from tests.support.golden import golden
from trellis.checkpoints import build_model
from trellis.models.structure_vae import occupied_coords
from trellis.sampling import euler, with_guidance


def test_structure_encoder_is_the_official_one() -> None:
    item, model = golden_model("ss_encoder")
    with torch.inference_mode():
        mean, logvar = model(item["in.x"].float())
    item.check("out.mean", mean)
    item.check("out.logvar", logvar)


def test_structure_decoder_is_the_official_one() -> None:
    item, model = golden_model("ss_decoder")
    with torch.inference_mode():
        logits = model(item["in.z"])
    item.check("out.logits", logits)
    item.check("out.coords", occupied_coords(logits))


@pytest.mark.parametrize("name", ["ss_flow_img", "ss_flow_xl_flags", "ss_flow_patch2_share", "ss_flow_small"])
def test_structure_flow_is_the_official_one(name: str) -> None:
    item, model = golden_model(name)
    with torch.inference_mode():
        velocity = model(item["in.x"], item["in.t"], item["in.cond"])
    item.check("out.pos_emb", model.pos_emb)
    item.check("out.y", velocity)


def test_structure_chain_is_the_official_one() -> None:
    """Flow, guidance with interval, Euler, decoder: one after the other."""
    item = golden("ss_chain")
    flow = build_model("SparseStructureFlowModel", item.info["flow_args"])
    decoder = build_model("SparseStructureDecoder", item.info["dec_args"])
    load_formula_weights(flow, item, "flow.")
    load_formula_weights(decoder, item, "dec.")
    params, cond = item.info["sampler"], item["in.cond"]
    with torch.inference_mode():
        velocity = with_guidance(
            flow.eval(), cond, torch.zeros_like(cond), params["cfg_strength"], tuple(params["cfg_interval"])
        )
        *_, last = euler(velocity, item["in.noise"], params["steps"], params["rescale_t"], params["sigma_min"])
        logits = decoder.eval()(last.x)
    item.check("out.z_s", last.x)
    item.check("out.logits", logits)
    assert len(occupied_coords(logits)) == int(item["out.num_coords"])
