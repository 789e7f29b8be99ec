"""The projection of the whole evaluation: passes as large as the device is given, however large that is."""

from __future__ import annotations

import pytest
import torch

from xfm_fast.benchmarks.options import CocoOptions
from xfm_fast.benchmarks.work import coco
from xfm_fast.benchmarks.work.coco import CANDIDATES, IMAGES, TEXTS, Passes, Sizes

SIZES = Sizes(IMAGES, TEXTS, CANDIDATES, [11, 12, 13, 14])


def test_a_gpu_is_given_what_its_scheduler_would_give_it() -> None:
    passes = Passes.of(torch.device("cuda"), SIZES)
    assert passes.texts == 32768 // 12.5
    assert passes.images == round(passes.texts / (SIZES.pairs / IMAGES)) == 2
    assert passes.official_pairs == CANDIDATES
    assert Passes.of(torch.device("cpu"), SIZES) == Passes()


def test_few_texts_for_each_image_are_many_images_of_a_pass() -> None:
    passes = Passes.of(torch.device("cuda"), Sizes(1000, 1000, 5, [4]))
    assert passes.texts == 8192
    assert passes.images == 64


def test_the_projection_holds_for_passes_of_several_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same counts of work, whatever the size of a pass: pairs that are timed stand for all pairs."""
    seen: list[Passes] = []

    def chosen(device: torch.device, sizes: Sizes) -> Passes:
        seen.append(Passes(photos=5, captions=20, texts=33, images=3, official_pairs=7))
        return seen[-1]

    monkeypatch.setattr(coco.Passes, "of", staticmethod(chosen))
    document = coco.run(CocoOptions(preset="tiny", quick=True, dtype=("fp32",), device="cpu"))
    assert len(seen) == 1
    assert document.coco is not None
    ours = next(e for e in document.coco.evaluations if e.procedure == "xfm-fast")
    assert ours.pairs == SIZES.pairs
    assert set(ours.seconds) == {
        "embed images", "embed texts", "first self-attention", "image memory", "fusion and matching head",
    }  # fmt: skip
    assert all(seconds > 0 for seconds in ours.seconds.values())
