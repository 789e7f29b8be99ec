"""Batches that know their layout: it is right, it travels with them, and a step with it is the step without."""

from __future__ import annotations

import pytest
import torch

from tests.objectives import steps
from tests.objectives.steps import image_batch, model_of, negatives_of, pair_batch, region_batch, text_batch
from xfm_fast.batches import IGNORED, ImageBatch, TextBatch
from xfm_fast.objectives import pretraining_losses

BATCHES = [pair_batch("tiny_a", ids=True), region_batch("tiny_b"), text_batch("tiny_a"), image_batch("tiny_a")]


@pytest.mark.parametrize("batch", BATCHES[:3], ids=lambda batch: type(batch).__name__)
def test_layout_is_where_things_are(batch: TextBatch) -> None:
    layout = batch.prepare().layout
    assert layout is not None
    packed = layout.packing.pack(batch.input_ids)
    texts = [row[mask.bool()] for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    assert torch.equal(packed, torch.cat(texts))
    assert layout.lengths.tolist() == [len(text) for text in texts]
    assert layout.packing.max_seqlen == max(len(text) for text in texts)
    assert layout.tokens == len(packed)
    ends = layout.cu_targets.tolist()
    for number, text in enumerate(texts):
        wanted = batch.masked_labels[number] != IGNORED
        targets = layout.targets[ends[number] : ends[number + 1]]
        real = batch.attention_mask[number].bool()
        real_places = batch.input_ids.new_tensor(range(len(real)))[real]
        assert torch.equal(real_places[targets], batch.masked_positions[number][wanted])
        assert torch.equal(layout.labels[ends[number] : ends[number + 1]], batch.masked_labels[number][wanted])
        assert len(text) == layout.lengths[number]
    assert layout.most_targets == int((batch.masked_labels != IGNORED).sum(1).max())


@pytest.mark.parametrize("case", ["tiny_a", "tiny_b"])
@pytest.mark.parametrize("kind", ["pairs", "regions", "texts"])
def test_a_batch_that_was_never_on_the_host(monkeypatch: pytest.MonkeyPatch, case: str, kind: str) -> None:
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
