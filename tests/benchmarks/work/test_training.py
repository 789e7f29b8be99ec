"""The training benchmark on the tiny model: procedures agree at every step, rows are filled in, gradients compared."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from xfm_fast.benchmarks import record, report
from xfm_fast.benchmarks.backends.official_finetuning import OfficialFineTuningTwin
from xfm_fast.benchmarks.options import StepOptions
from xfm_fast.benchmarks.record import OFFICIAL, OURS, Document, Extra
from xfm_fast.benchmarks.tasks import OFFICIAL_TASKS, PRETRAINING
from xfm_fast.benchmarks.timing import parity_band
from xfm_fast.benchmarks.work import training
from xfm_fast.benchmarks.work.training import (
    AUTOCAST,
    FP32_GRADIENT_BAND,
    Outcome,
    Step,
    difference,
    make_step,
    memory_use,
)
from xfm_fast.errors import UnavailableError
from xfm_fast.tasks.task import TASKS
from xfm_fast.testing import Inputs, Texts, bundled, make_tokenizer, preset_config

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
CPU = torch.device("cpu")
CONFIG = preset_config("tiny")


@pytest.fixture(scope="module", autouse=True)
def _few_answers() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        answers = Inputs.answers
        patch.setattr(Inputs, "answers", lambda self: Texts(*(part[:40] for part in answers(self))))
        yield


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    collection = bundled()
    return Inputs(collection, make_tokenizer(CONFIG, None, collection), CONFIG)


def _step(name: str, inputs: Inputs) -> Step:
    task = OFFICIAL_TASKS.get(name, PRETRAINING)
    return make_step(task, CONFIG, 0, task.batch(inputs, 3), CPU)


def _run(**changes: Any) -> Document:
    def use(procedure: str, *_: Any, checkpointed: bool = False) -> Extra:
        peak = 40 if checkpointed else {OURS: 60, OFFICIAL: 120}[procedure]
        return {"peak_bytes": peak, "grown_bytes": peak - 30, "gradient_bytes": 10}

    settings: dict[str, Any] = {
        "random": "tiny",
        "quick": True,
        "device": "cpu",
        "dtype": ("fp32",),
    }
    with pytest.MonkeyPatch.context() as patch:
        # Its own test starts the processes.
        patch.setattr(training, "memory_use", use)
        return training.run(StepOptions(**settings | changes))


def test_every_task_with_a_loss_of_its_own_has_a_step() -> None:
    # Weak grounding learns as retrieval does; tests enter tasks of their own.
    ours = {name for name in TASKS if find_spec(f"xfm_fast.tasks.{name}") is not None}
    assert {*OFFICIAL_TASKS} == ours - {"weak_grounding"}


# What the loss of a task reads of its model; in pretraining all of it.
READ = {
    "retrieval": {
        "vision_encoder",
        "text_encoder",
        "fusion_encoder",
        "vision_proj",
        "text_proj",
        "temp",
        "itm_head",
    },
    "vqa": {"vision_encoder", "text_encoder", "fusion_encoder", "text_decoder"},
    "nlvr2": {"vision_encoder", "text_encoder", "fusion_encoder", "cls_head"},
    "grounding": {"vision_encoder", "text_encoder", "fusion_encoder", "bbox_head"},
    "captioning": {"vision_encoder", "text_decoder"},
    "text": {"text_encoder", "cls_head"},
    "image": {"vision_encoder", "cls_head"},
}


@pytest.mark.parametrize("name", ["pretraining", *OFFICIAL_TASKS])
def test_both_procedures_leave_the_same_gradients(name: str, inputs: Inputs) -> None:
    step = _step(name, inputs)
    truth = step.outcome(OFFICIAL)
    assert all(parameter.grad is None for parameter in step.model.parameters())
    # A twin that forgot a part would agree with a model that forgot it too.
    reached = {
        module.split(".")[0] for module, gradient in truth.gradients.items() if gradient is not None
    }
    assert reached >= READ.get(
        name, {"vision_encoder", "text_encoder", "fusion_encoder", "itm_head"}
    )
    fp32 = difference(step.outcome(OURS), truth)
    assert fp32.error < FP32_GRADIENT_BAND, fp32
    official = difference(step.outcome(OFFICIAL, AUTOCAST["bf16"]), truth)
    half = difference(step.outcome(OURS, AUTOCAST["bf16"]), truth)
    assert half.error < parity_band(torch.bfloat16, official.error), half


def test_a_batch_is_padded_and_masked_as_the_official_loader_does(inputs: Inputs) -> None:
    pairs = len(inputs.collection.names) + 2
    batch = PRETRAINING.batch(inputs, pairs)["batch"]
    assert batch.image.shape == (pairs, 3, CONFIG.image_size, CONFIG.image_size)
    assert batch.input_ids.shape == (pairs, 30)
    assert batch.masked_labels.shape == (pairs, 15)
    lengths, masked = batch.attention_mask.sum(1), (batch.masked_labels != -100).sum(1)
    assert masked.tolist() == [min(15, max(1, round(length / 2))) for length in lengths.tolist()]
    assert batch.patch_mask is not None
    assert batch.patch_mask.sum(1).tolist() == [CONFIG.num_masking_patches] * pairs
    # A photograph that comes again brings another caption.
    assert torch.equal(batch.image[0], batch.image[-2])
    assert not torch.equal(batch.input_ids[0], batch.input_ids[-2])


def _outcome(loss: float, **gradients: Tensor | None) -> Outcome:
    return Outcome({"itc": torch.tensor(loss)}, gradients)


def test_difference_of_outcomes() -> None:
    truth = _outcome(2.0, big=torch.tensor([3.0, 4.0]), small=torch.tensor([0.1]), none=None)
    result = difference(
        _outcome(2.2, big=torch.tensor([3.0, 4.5]), small=torch.tensor([0.2]), none=None), truth
    )
    assert result.error == pytest.approx(1)
    assert result.note == "losses 1.0e-01, gradients 1.0e-01, worst: small"
    # A gradient that is zero but for rounding.
    truth = _outcome(1.0, big=torch.tensor([1.0]), tiny=torch.tensor([1e-12]))
    assert (
        difference(_outcome(1.0, big=torch.tensor([1.0]), tiny=torch.tensor([-1e-9])), truth).error
        < 2e-5
    )


def test_missing_surplus_and_undefined_gradients_are_infinitely_wrong() -> None:
    ones, nan = torch.ones(1), float("nan")
    truth = _outcome(1.0, big=ones, none=None)
    for wrong in (
        _outcome(1.0, big=None, none=None),
        _outcome(1.0, big=ones, none=ones),
        _outcome(1.0, big=torch.tensor([nan]), none=None),
        _outcome(nan, big=ones, none=None),
    ):
        assert difference(wrong, truth).error == float("inf")
    assert difference(_outcome(1.0, big=ones, none=torch.zeros(1)), truth).error == 0


def test_rows_of_pretraining(tmp_path: Path) -> None:
    document = _run(quick=False, pairs=2)
    assert document.ok
    works = [(row.work, row.backend) for row in document.rows]
    assert works == [
        (work, name) for work in ("train-step", "train-step-dropout") for name in (OURS, OFFICIAL)
    ]
    for row in document.rows:
        assert row.status == "measured"
        assert row.parity is not None
        assert row.parity.passed
        assert ("without dropout" in row.parity.note) == row.work.endswith("dropout")
        assert row.number("mfu")
        official, against = document.reference_row(row), document.headline(row)
        if row.ours and official is not None:
            assert against is not None
            assert 0 < (row.number("flops") or 0) < (official.number("flops") or 0)
            assert official.number("padded_tokens") == 2 * 30
            sizes = (
                row.number("peak_bytes"),
                row.number("checkpointed_bytes"),
                official.number("peak_bytes"),
            )
            assert sizes == (60, 40, 120)
    saved = record.save(document, tmp_path, report.html(document))
    assert record.load(saved) == document


@pytest.mark.slow
def test_every_task_has_a_row() -> None:
    document = _run(task="all")
    assert document.ok
    assert [row.work for row in document.rows if row.ours] == [
        f"finetune-{name}" for name in OFFICIAL_TASKS
    ]
    questions = next(row for row in document.rows if row.work == "finetune-vqa" and not row.ours)
    assert (questions.unit, questions.items, questions.number("tokens")) == ("questions", 2, 17)


def test_no_speed_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OfficialFineTuningTwin.texts
    monkeypatch.setattr(
        OfficialFineTuningTwin, "texts", lambda *given, **batch: right(*given, **batch) * 1.001
    )
    document = _run(task="text")
    assert not document.ok
    assert not document.measured
    outcome = Step.outcome

    def wrong_in_bf16(step: Step, procedure: str, autocast: torch.dtype | None = None) -> Outcome:
        result = outcome(step, procedure, autocast)
        if procedure == OURS and autocast is not None:
            result.losses["itc"] *= 2
        return result

    monkeypatch.setattr(Step, "outcome", wrong_in_bf16)
    document = _run(dtype=("fp32", "bf16"), pairs=2)
    assert {row.dtype: row.status for row in document.rows if row.ours} == {
        "fp32": "measured",
        "bf16": "parity failed",
    }


@pytest.mark.slow
def test_memory_of_a_process_of_its_own(inputs: Inputs) -> None:
    batch = PRETRAINING.batch(inputs, 3)["batch"]
    use = memory_use(OURS, CONFIG, batch, "fp32", True, 0)
    names = ("before_bytes", "parameter_bytes", "gradient_bytes", "peak_bytes", "grown_bytes")
    before, parameters, gradients, peak, grown = (int(use[name]) for name in names)  # pyright: ignore[reportArgumentType]
    assert peak > before > parameters > 0
    assert 0 < gradients <= parameters
    assert grown == peak - before - gradients > 0
    # At this size the interpreter is most of it, so no comparison would hold.
    assert memory_use(OURS, CONFIG, batch, "fp32", True, 0, checkpointed=True)["peak_bytes"]
    with pytest.raises(UnavailableError, match="xfm-fast, fp8"):
        memory_use(OURS, CONFIG, batch, "fp8", False, 0)
