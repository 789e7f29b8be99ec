"""Questions answered, from end to end on the tiny model; the synthetic list of answers; what counts as agreement."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from xfm_fast import flops
from xfm_fast.benchmarks.material.inputs import preset_config
from xfm_fast.benchmarks.material.questions import ANSWERS, Texts, answer_list, questions
from xfm_fast.benchmarks.options import VqaOptions
from xfm_fast.benchmarks.record import OFFICIAL, OURS, Document
from xfm_fast.benchmarks.work import vqa
from xfm_fast.errors import InputError
from xfm_fast.tasks.answer_trie import AnswerTrie
from xfm_fast.tasks.vqa import AnswerRanking

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
CONFIG = preset_config("tiny")


@pytest.fixture(scope="module")
def document() -> Any:
    before, few = torch.get_num_threads(), slice(0, 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqa, "_DECODER_LAYERS", 2)
        patch.setattr(vqa, "answer_list", lambda config, seed: Texts(*(t[few] for t in answer_list(config, seed))))
        yield vqa.run(VqaOptions(preset="tiny", quick=True, threads=1, device="cpu", dtype=("fp32",), k=8))
    torch.set_num_threads(before)


def test_the_list_has_the_trie_of_vqa_v2() -> None:
    answers = answer_list(CONFIG, 0)
    trie = AnswerTrie.of(*answers, CONFIG)
    lengths = Counter(answers.mask.sum(1).tolist())
    assert lengths == {3: 823, 4: 1519, 5: 695, 6: 72, 7: 19, 8: 1}
    assert Counter(trie.depths.tolist()) == {0: 1, 1: 1276, 2: 1917, 3: 770, 4: 91, 5: 20, 6: 1}
    assert (trie.answers, len(answers.ids.unique(dim=0))) == (ANSWERS, ANSWERS)
    assert int(trie.edge_starts.diff()[1:].max()) in range(40, 80)


def test_questions_have_the_lengths_of_vqa_v2() -> None:
    asked = questions(CONFIG, 7, 0)
    assert asked.mask.sum(1).tolist() == [9, 8, 12, 9, 10, 9, 8]
    assert set(asked.ids[asked.mask == 0].tolist()) == {CONFIG.pad_token_id}


def test_rows(document: Document) -> None:
    assert document.ok
    works = ("vqa", "vqa-best", "vqa-all")
    assert [(row.work, row.contender) for row in document.rows] == [(w, c) for w in works for c in (OURS, OFFICIAL)]
    for row in document.rows:
        assert row.status == "measured"
        assert (row.items, row.unit, row.point.index) == (2, "questions", 40)
        if row.ours:
            official, against = document.reference_row(row), document.headline(row)
            assert official is not None
            assert against is not None
            assert against.ratio == pytest.approx((official.median_s or 0) / (row.median_s or 1))
            assert row.parity is not None
            assert row.parity.passed
    ours, official = (row.efficiency for row in document.rows[:2])
    assert ours is not None
    assert official is not None
    assert 0 < (ours.flops or 0) < (official.flops or 0)


def _ranking(*scores: float, first: int = 0) -> AnswerRanking:
    return AnswerRanking(torch.arange(first, first + len(scores))[None], torch.tensor([scores]))


@pytest.mark.parametrize(
    ("ours", "truth", "whole_list", "wrong"),
    [
        (_ranking(-1.0, -2.0), _ranking(-1.0, -2.0), False, 0.0),
        (_ranking(-1.0, -2.0), _ranking(-1.0, -4.0), False, 0.5),
        # The best of a few, at a near tie in another place.
        (_ranking(-1.0, first=5), _ranking(-1.0, -2.0), False, 0.0),
        (_ranking(-1.5, first=5), _ranking(-1.0, -2.0), False, 0.5),
        # All answers: a better one is no error, to miss one is.
        (_ranking(-0.5, -0.7, first=5), _ranking(-1.0, -2.0), True, 0.0),
        (_ranking(-1.0, -3.0, first=5), _ranking(-1.0, -2.0), True, 2.0),
    ],
)
def test_agreement(ours: AnswerRanking, truth: AnswerRanking, whole_list: bool, wrong: float) -> None:
    error = vqa.compare(ours, truth, whole_list=whole_list).error
    assert error == pytest.approx(wrong, abs=1e-6)


def test_operations_of_both_procedures() -> None:
    """Of two questions, the image is needed once; 128 candidates and their copies are most of the official cost."""
    config = preset_config("base").replace(image_size=480)
    one, two = (vqa.answering(config, [10] * n, [175] * n).total for n in (1, 2))
    image = (flops.image_encoder(config, 1) + flops.image_memory(config, 1)).total
    assert image < one < two < 2 * one - image + 1
    assert (
        vqa.official_answering(config, [10] * 2, 128, 8).total == 2 * vqa.official_answering(config, [10], 128, 8).total
    )


def test_more_candidates_than_answers() -> None:
    with pytest.raises(InputError, match="k=4000; with 3129 answers"):
        vqa.run(VqaOptions(preset="tiny", k=4000, device="cpu"))
