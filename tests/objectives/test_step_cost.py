"""The work of a step, counted: nothing is computed twice, and nothing that is not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import CASES
from tests.objectives.steps import model_of, negatives_of, pair_batch, region_batch, text_batch, total
from xfm_fast import flops
from xfm_fast.batches import IGNORED, TextBatch
from xfm_fast.benchmarks.contenders.official_algorithm import OfficialTrainingTwin
from xfm_fast.kernels import ops
from xfm_fast.models.fusion import FusionEncoder
from xfm_fast.models.text import TextEncoder
from xfm_fast.models.vision import VisionEncoder
from xfm_fast.objectives import pretraining_losses


def counted(step: Callable[[], dict[str, Tensor]]) -> int:
    """Forward and backward, on the definitions of the operations, which are all matrix products."""
    with ops.use_backend("reference"), FlopCounterMode(display=False) as counter:
        total(step()).backward()
    return counter.get_total_flops()


def sizes(batch: TextBatch) -> tuple[list[int], list[int]]:
    return batch.attention_mask.sum(1).tolist(), (batch.masked_labels != IGNORED).sum(1).tolist()


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_pairs_costs_what_it_needs(case: str) -> None:
    """To the last operation. Every caption is drawn once, as the count assumes."""
    model, batch = model_of(case), pair_batch(case)
    lengths, masked = sizes(batch)
    others = torch.arange(len(lengths)).roll(1)
    found = counted(lambda: pretraining_losses(model, batch, hard_negatives=(others, others)))
    model.zero_grad(set_to_none=True)
    assert found == flops.pretraining_step(model.config, lengths, masked).total


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_regions_costs_half_of_the_official_one(case: str) -> None:
    model, batch = model_of(case), region_batch(case)
    negatives = negatives_of(case, batch)
    found = counted(lambda: pretraining_losses(model, batch, hard_negatives=negatives))
    official = counted(lambda: OfficialTrainingTwin(model).losses(batch, hard_negatives=negatives))
    model.zero_grad(set_to_none=True)
    assert found < 0.55 * official


@pytest.mark.parametrize("case", CASES)
def test_a_last_layer_computes_targets_only(case: str) -> None:
    model, batch = model_of(case), text_batch(case)
    config = model.config
    lengths, masked = sizes(batch)
    found = counted(lambda: pretraining_losses(model, batch))
    model.zero_grad(set_to_none=True)
    whole = flops.text_encoder(config, lengths) + flops.lm_head(config, sum(masked))
    unread = sum(lengths) - sum(masked)
    # Query and output projection and both halves of the MLP, forward and twice backward.
    saved = 3 * flops.linear(unread, config.text_width, 2 * config.text_width + 2 * config.text_intermediate).total
    scores = sum((length - read) * length for length, read in zip(lengths, masked, strict=True))
    assert found == 3 * whole.total - saved - 3 * 4 * scores * config.text_width


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    seen: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def called(self: object, *args: object, **kwargs: object) -> object:
            graph = " with a graph" if torch.is_grad_enabled() else ""
            seen[f"{owner.__name__}.{name}{graph}"] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    for encoder in (VisionEncoder, TextEncoder, FusionEncoder):
        count(encoder, "forward")
    count(FusionEncoder, "project")
    return seen


def test_passes_of_a_step_of_pairs(calls: Counter[str]) -> None:
    pretraining_losses(model_of("tiny_a"), pair_batch("tiny_a"))
    assert calls == {
        "VisionEncoder.forward with a graph": 2,
        "TextEncoder.forward with a graph": 1,
        "TextEncoder.forward": 1,
        "FusionEncoder.project with a graph": 1,
        "FusionEncoder.forward with a graph": 1,
    }


def test_passes_of_a_step_of_regions(calls: Counter[str]) -> None:
    pretraining_losses(model_of("tiny_a"), region_batch("tiny_a"))
    assert calls == {
        "VisionEncoder.forward with a graph": 1,
        "TextEncoder.forward with a graph": 1,
        "TextEncoder.forward": 1,
        "FusionEncoder.project with a graph": 1,
        "FusionEncoder.forward with a graph": 1,
    }


def test_losses_that_are_not_asked_for_cost_nothing(calls: Counter[str]) -> None:
    pretraining_losses(model_of("tiny_a"), pair_batch("tiny_a"), losses={"itc"})
    assert calls == {"VisionEncoder.forward with a graph": 1, "TextEncoder.forward with a graph": 1}
    calls.clear()
    pretraining_losses(model_of("tiny_a"), pair_batch("tiny_a"), losses={"mim"})
    assert calls == {"VisionEncoder.forward": 1, "VisionEncoder.forward with a graph": 1}
    calls.clear()
    pretraining_losses(model_of("tiny_a"), pair_batch("tiny_a"), losses={"itm"})
    # Negatives need features, but ITM does not train the text encoder.
    assert calls["TextEncoder.forward"] == 1
    assert not calls["TextEncoder.forward with a graph"]


def test_vocabulary_logits_never_exist_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def logits(*_: object) -> None:
        raise AssertionError("a step multiplies every slot with the vocabulary")

    model = model_of("tiny_a")
    monkeypatch.setattr(type(model), "mlm_logits", logits)
    monkeypatch.setattr(type(model), "imlm_logits", logits)
    monkeypatch.setattr(type(model.fusion_encoder.lm_head), "forward", logits)
    for batch in (pair_batch("tiny_a"), region_batch("tiny_a"), text_batch("tiny_a")):
        pretraining_losses(model, batch)
