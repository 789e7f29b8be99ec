"""Fine-tuned tasks as scenarios on the tiny model; what counts as agreement."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from xfm_fast.benchmarks.backends.official_finetuning import official_engine
from xfm_fast.benchmarks.backends.ours import our_engine
from xfm_fast.benchmarks.options import ScenarioOptions
from xfm_fast.benchmarks.record import OFFICIAL, OURS
from xfm_fast.benchmarks.tasks import BUILDERS
from xfm_fast.benchmarks.work import registered, requests
from xfm_fast.benchmarks.work.model import Scale
from xfm_fast.benchmarks.work.requests import Material
from xfm_fast.loading import Source
from xfm_fast.tasks.vqa_model import AnswerRanking
from xfm_fast.testing import Inputs, SharedWeights, Texts, bundled, make_tokenizer

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
ALL_ANSWERS = Inputs.answers


TINY = ScenarioOptions(
    random="tiny",
    quick=True,
    device="cpu",
    dtype=("fp32",),
    mode=("offline",),
    baselines=("torch-eager",),
    image_size=48,
    batch=2,
)


@pytest.fixture(scope="module", autouse=True)
def _little_work() -> Any:
    resolve = Scale.of

    def less(*args: Any) -> Scale:
        return replace(resolve(*args), requests=3, rounds=2, budget_s=0.0, texts=2, k=8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scale, "of", less)
        patch.setattr(
            Inputs, "answers", lambda self: Texts(*(tensor[:40] for tensor in ALL_ANSWERS(self)))
        )
        yield


@pytest.fixture(scope="module")
def material() -> Material:
    collection = bundled()
    subjects = SharedWeights.open(Source(random="tiny"), BUILDERS)
    return Material(subjects, collection, make_tokenizer(subjects.config, None, collection))


@pytest.mark.parametrize(
    "work",
    [
        "vqa",
        "grounding",
        *(pytest.param(work, marks=pytest.mark.slow) for work in ("vqa-all", "captioning")),
    ],
)
def test_a_task_is_a_scenario(work: str) -> None:
    document = registered()[work](TINY)
    assert document.ok
    assert [row.backend for row in document.rows] == [OURS, OFFICIAL, "torch-eager"]
    for row in document.rows:
        assert (row.status, row.work) == ("measured", work)
        assert row.parity is not None
        assert row.parity.passed
        assert row.items == (4 if row.unit in ("questions", "expressions") else 2)
    ours, official, eager = document.rows
    assert {compared.backend for compared in ours.against} == {OFFICIAL, "torch-eager"}
    assert ours.number("flops") == eager.number("flops") == ours.number("needed_flops")
    assert 0 < (ours.number("flops") or 0) < (official.number("flops") or 0)


@pytest.mark.parametrize("work", requests.TASK_WORK)
def test_a_task_agrees_with_the_official_procedure(work: str, material: Material) -> None:
    """In fp64, where nothing but a fault is left; requests of several lengths, together."""
    workload = requests.task_workload(work, material, 48, 2, 8, 3)
    model = material.weights.model(48, torch.float64, work)
    with torch.inference_mode():
        ours = workload.prepare(our_engine(model), torch.float64)([0, 2])
        official = workload.prepare(official_engine(model), torch.float64)([0, 2])
    difference = workload.compare([0, 2], ours, official)
    # Boxes are computed in fp32.
    assert difference.error < (1e-6 if work == "grounding" else 1e-9)
    assert difference.note == ""
    swapped = workload.prepare(our_engine(model), torch.float64)([1, 0])
    if isinstance(official, torch.Tensor) and official.is_floating_point():
        assert workload.compare([0, 2], swapped, official).error > 1e-3


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
def test_agreement(
    ours: AnswerRanking, truth: AnswerRanking, whole_list: bool, wrong: float
) -> None:
    error = requests.compare_rankings(ours, truth, whole_list=whole_list).error
    assert error == pytest.approx(wrong, abs=1e-6)
