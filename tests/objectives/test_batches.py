"""Batches that know their layout: it is right, it travels with them, and a step with it is the step without."""

from __future__ import annotations

import pytest

from tests.objectives import steps
from tests.objectives.steps import model_of, negatives_of
from xfm_fast.batches import ImageBatch
from xfm_fast.objectives import pretraining_losses


@pytest.mark.parametrize("case", ["tiny_a", "tiny_b"])
@pytest.mark.parametrize("kind", ["pairs", "regions", "texts"])
def test_a_batch_that_was_never_on_the_host(
    monkeypatch: pytest.MonkeyPatch, case: str, kind: str
) -> None:
    """Without a layout from the host, empty slots are carried along: the same losses, only slower."""
    batch = steps.BATCHES[kind](case)
    assert not isinstance(batch, ImageBatch)
    negatives = None if kind == "texts" else negatives_of(case, batch)
    expected = pretraining_losses(model_of(case), batch, hard_negatives=negatives)
    with monkeypatch.context() as context:
        context.setattr("xfm_fast.batches.on_host", lambda _: False)
        unprepared = batch.prepare()
    assert unprepared.layout is not None
    assert len(unprepared.layout.labels) == batch.masked_labels.numel()
    found = pretraining_losses(model_of(case), unprepared, hard_negatives=negatives)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-12), name
