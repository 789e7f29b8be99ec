"""Which loss trains which part of the model, and that losses without the stop-gradient are the official ones."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn

from tests.agreement import assert_gradient_norms, with_weights
from tests.conftest import CASES, config, load_json
from tests.objectives.steps import negatives_of, pair_batch
from tests.training.synthetic import synthetic_batch
from xfm_fast.config import XFMConfig
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.training.recipe_fields import LOSSES_OF_KIND

Norms = dict[tuple[str, str], dict[str, float]]
CONFIG = XFMConfig.preset("tiny")
KINDS = tuple(LOSSES_OF_KIND)
# The parts that each loss trains (arXiv 2301.05065).
TRAINED = {
    "mlm": {"language", "heads"},
    "itc": {"language", "vision", "heads", "temperature"},
    "itm": {"vision", "fusion", "heads"},
    "imlm": {"vision", "fusion", "heads"},
    "bbox_l1": {"vision", "fusion", "heads"},
    "bbox_giou": {"vision", "fusion", "heads"},
    "mim": {"vision"},
}


def part_of(name: str) -> str:
    """The part of a parameter; the word matrix of the fusion encoder is the output matrix of its head."""
    prefixes = {
        "vision_encoder.": "vision", "text_encoder.roberta.": "language", "fusion_encoder.roberta.encoder.": "fusion",
    }  # fmt: skip
    found = (part for prefix, part in prefixes.items() if name.startswith(prefix))
    return next(found, "temperature" if name == "temp" else "heads")


def gradient_norms(model: XFM, kinds: tuple[str, ...] = KINDS, **options: Any) -> Norms:
    """(kind of batch, loss) → part → norm of its gradient, without the parts that are not in the graph."""
    members: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        members[part_of(name)].append(parameter)
    norms: Norms = defaultdict(dict)
    for kind in kinds:
        for loss, value in pretraining_losses(
            model.eval(), synthetic_batch(kind, CONFIG), **options
        ).items():
            for part, parameters in members.items():
                found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
                if arrived := [gradient.norm() for gradient in found if gradient is not None]:
                    norms[kind, loss][part] = float(torch.stack(arrived).norm())
    return norms


def test_each_loss_trains_its_parts() -> None:
    norms = gradient_norms(XFM(CONFIG))
    assert {(kind, loss) for kind, losses in LOSSES_OF_KIND.items() for loss in losses} == set(
        norms
    )
    for (_, loss), of_loss in norms.items():
        assert set(of_loss) == TRAINED[loss], loss
        assert all(0 < norm < float("inf") for norm in of_loss.values()), of_loss


def test_without_the_stop_gradient_fusion_losses_reach_the_language_encoder() -> None:
    norms = gradient_norms(XFM(CONFIG), stop_gradient=False)
    reached = {
        row for row, of_loss in norms.items() if set(of_loss) - TRAINED[row[1]] == {"language"}
    }
    fusion = {"itm", "imlm", "bbox_l1", "bbox_giou"}
    assert reached == {
        (kind, loss)
        for kind, losses in LOSSES_OF_KIND.items()
        for loss in fusion.intersection(losses)
    }


@pytest.mark.parametrize(("loss", "official"), [("itm", "itm_finetune"), ("imlm", "imlm_nodetach")])
@pytest.mark.parametrize("case", CASES)
def test_undetached_losses_have_the_official_gradients(case: str, loss: str, official: str) -> None:
    batch = pair_batch(case)
    model = with_weights(XFM(config(case)), case, torch.float64)
    found = pretraining_losses(
        model, batch, hard_negatives=negatives_of(case, batch), losses=(loss,), stop_gradient=False
    )[loss]
    found.backward()
    golden = load_json(f"{case}/grads")[official]
    assert found.item() == pytest.approx(golden["value"], rel=1e-8)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_gradient_norms(gradients, golden["grad_norm"], loss, rel=1e-8, small=1e-12)
    reached = [name for name, norm in golden["grad_norm"].items() if norm is not None]
    assert sum(name.startswith("text_encoder.") for name in reached) > 20
