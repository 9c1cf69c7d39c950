from pathlib import Path

import pytest
import torch

from tests.support.golden import golden
from tests.training.tiny import Balls, vae_config
from trellis.checkpoints import build_model
from trellis.training.batches import seeded
from trellis.training.config import ConfigError
from trellis.training.log import read_log
from trellis.training.loop import train
from trellis.training.objectives import OBJECTIVES, build_objective, objective_arguments
from trellis.training.objectives.latents import kl_divergence
from trellis.training.objectives.structure_vae import StructureVae, dice_loss


def test_losses_give_the_official_values() -> None:
    values = golden("train_utils")
    values.check("out.dice", dice_loss(values["in.logits"], values["in.ss"].float()))
    values.check("out.kl", kl_divergence(values["in.mean"], values["in.logvar"]))


@pytest.mark.parametrize("loss_type", ["dice", "bce", "l1"])
def test_every_loss_has_gradients_and_terms(loss_type: str) -> None:
    config = vae_config()
    models = {role: build_model(named.name, named.args) for role, named in config.models.items()}
    objective = StructureVae(loss_type, lambda_kl=0.5, lambda_bce=0.25)
    data = Balls()
    batch = data.collate([data.load(index, seeded(index)) for index in range(2)])
    terms = objective(models, batch, seeded(0))
    expected = terms[loss_type] + 0.5 * terms["kl"] + (0.25 * terms["bce"] if loss_type != "bce" else 0)
    torch.testing.assert_close(terms["loss"], expected)
    terms["loss"].backward()
    assert all(p.grad is not None for model in models.values() for p in model.parameters())
    assert objective(models, batch, seeded(0))["loss"] == terms["loss"]
    assert objective(models, batch, seeded(1))["loss"] != terms["loss"]


def test_a_structure_vae_overfits_one_object(tmp_path: Path) -> None:
    args = {"loss_type": "dice", "lambda_kl": 1e-4, "max_steps": 60, "batch_size": 1, "i_save": 100}
    train(vae_config(**args), [], tmp_path, dataset=Balls(1))
    assert read_log(tmp_path)[-1]["iou"] > 0.97


def test_trainers_and_arguments_are_known_by_name() -> None:
    assert list(objective_arguments("SparseStructureVaeTrainer")) == ["loss_type", "lambda_kl", "lambda_bce"]
    assert "p_uncond" in objective_arguments("ImageConditionedFlowMatchingCFGTrainer")
    assert "p_uncond" not in objective_arguments("FlowMatchingTrainer")
    assert len(OBJECTIVES) == 12
    with pytest.raises(ConfigError, match="unknown trainer 'Trainer'; known are SparseStructureVaeTrainer"):
        objective_arguments("Trainer")
    with pytest.raises(ConfigError, match="has no argument 'lambda'; known are loss_type, lambda_kl"):
        build_objective("SparseStructureVaeTrainer", {"lambda": 1})
    with pytest.raises(ConfigError, match="loss_type must be dice, bce or l1; got 'l3'"):
        build_objective("SparseStructureVaeTrainer", {"loss_type": "l3"})
