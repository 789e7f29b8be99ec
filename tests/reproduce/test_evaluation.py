"""The evaluation gives full marks to a model that knows, chance to one that does not, and uses held-out scenes only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xfm_fast.config import XFMConfig
from xfm_fast.data.shapes import HELD_OUT, captions
from xfm_fast.models.xfm import XFM
from xfm_fast.reproduce import evaluation
from xfm_fast.reproduce.evaluation import METRICS, HeldOut, evaluate
from xfm_fast.tokenizer import CaptionTokenizer

HELD = HeldOut(seed=0, resolution=64, scenes=12)


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train_on_texts([text for made in HELD.retrieval for text in captions(made)], 400)


@pytest.fixture
def model() -> XFM:
    torch.manual_seed(0)
    return XFM(XFMConfig.preset("tiny", image_size=64, patch_size=16, vision_depth=1, text_layers=1, fusion_layers=1))


def test_retrieval_scenes_are_held_out_and_distinguishable() -> None:
    scenes = HeldOut(0, 64).retrieval
    assert len(scenes) == 100
    assert len({captions(made)[0] for made in scenes}) == 100
    for made in scenes:
        assert {(thing.colour, thing.shape) for thing in made.things} & HELD_OUT["test"]


def test_a_random_model_scores_chance(model: XFM, tokenizer: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_PROBE_SCENES", {"train": 200, "val": 60, "test": 60})
    found = evaluate(model, tokenizer, HELD)
    assert set(METRICS) <= set(found)
    assert all(0 <= value <= 100 for value in found.values())
    # A chance of 1 in 12 for each of 12 queries.
    assert found["image_to_text_r1"] < 50
    assert found["grounding"] < 50
    assert model.training
    assert evaluate(model, tokenizer, HELD) == found
    assert all(parameter.grad is None for parameter in model.parameters())


def test_right_boxes_get_full_marks(model: XFM, tokenizer: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in reads the answer from the text that it is given, in the order in which texts come."""
    answers: list[list[float]] = []
    for made in HELD.retrieval:
        for element in evaluation.region_elements(made, 64):
            x, y, w, h = element["bb"]
            answers.append([(x + w / 2) / 64, (y + h / 2) / 64, w / 64, h / 64])
    given = iter(answers)
    monkeypatch.setattr(
        model, "predict_boxes", lambda fused: torch.tensor([next(given) for _ in range(len(fused))]), raising=True
    )
    found = evaluation._grounding(model, tokenizer, HELD)
    assert found["grounding"] == 100
    assert {"grounding/attributes", "grounding/relations"} <= set(found)


def test_texts_meet_their_own_image(model: XFM, tokenizer: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of texts and their images: the index that `fuse` gets must lead to the scene that the text is about."""
    seen: list[tuple[str, torch.Tensor]] = []
    embeds = torch.cat([model.encode_image(pixels) for pixels in evaluation._pixels(model, HELD.retrieval, 64)])
    memory_of, fuse = model.image_memory, model.fuse

    def remember(image_embeds: torch.Tensor) -> Any:
        return SimpleNamespace(embeds=image_embeds, memory=memory_of(image_embeds))

    def note(text: torch.Tensor, mask: torch.Tensor, memory: Any, index: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.extend(("", memory.embeds[i]) for i in index)
        return fuse(text, mask, memory.memory, index, **options)

    monkeypatch.setattr(evaluation, "_BATCH", 5)
    monkeypatch.setattr(model, "image_memory", remember)
    monkeypatch.setattr(model, "fuse", note)
    evaluation._grounding(model, tokenizer, HELD)
    expected = [index for index, made in enumerate(HELD.retrieval) for _ in evaluation.region_elements(made, 64)]
    assert len(seen) == len(expected)
    for (_, image), index in zip(seen, expected, strict=True):
        torch.testing.assert_close(image, embeds[index], atol=1e-4, rtol=1e-4)


def test_a_model_that_sees_and_reads_passes_the_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins whose embeddings hold the truth: the probes must find it, on combinations they were not fitted on."""
    monkeypatch.setattr(evaluation, "_PROBE_SCENES", {"train": 300, "val": 100, "test": 100})
    scenes = {split: evaluation._probe_scenes(HELD, split) for split in ("train", "val", "test")}

    def looks(made: Any) -> torch.Tensor:
        row = torch.zeros(1, 20)
        row[0, len(made.things)] = 1
        for thing in made.things:
            row[0, 4 + evaluation.COLOURS.index(thing.colour)] = 1
            row[0, 12 + evaluation.SHAPES.index(thing.shape)] = 1
        return row

    model = SimpleNamespace(encode_image=lambda pixels: torch.stack([looks(made) for made in pixels]))
    monkeypatch.setattr(evaluation, "_pixels", lambda _, made, resolution: iter([made]))
    found = evaluation._image_probe(model, HELD)  # type: ignore[arg-type]
    assert found["image_probe"] > 99
    assert not {id(made) for made in scenes["test"]} & {id(made) for made in scenes["train"]}
