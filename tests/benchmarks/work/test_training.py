"""The training benchmark from end to end on the tiny model, and its comparison of gradients."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from xfm_fast.benchmarks import record, report
from xfm_fast.benchmarks.contenders.official_algorithm import OfficialTrainingTwin
from xfm_fast.benchmarks.material import photographs
from xfm_fast.benchmarks.material.inputs import preset_config
from xfm_fast.benchmarks.measure import Progress
from xfm_fast.benchmarks.options import StepOptions
from xfm_fast.benchmarks.record import OFFICIAL, OURS, Document, Extra
from xfm_fast.benchmarks.timing import parity_band
from xfm_fast.benchmarks.work import finetuning, training
from xfm_fast.benchmarks.work.training import (
    AUTOCAST,
    Outcome,
    Procedure,
    TrainingSubject,
    difference,
    memory_use,
    pair_batch,
)
from xfm_fast.errors import UnavailableError
from xfm_fast.tokenizer import CaptionTokenizer

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
CPU = torch.device("cpu")
CONFIG = preset_config("tiny")


@pytest.fixture(scope="module")
def collection() -> photographs.Collection:
    return photographs.bundled()


@pytest.fixture(scope="module")
def tokenizer(collection: photographs.Collection) -> CaptionTokenizer:
    return CaptionTokenizer.train_on_texts(collection.captions, CONFIG.vocab_size)


@pytest.fixture(scope="module")
def subject(collection: photographs.Collection, tokenizer: CaptionTokenizer) -> TrainingSubject:
    return TrainingSubject(CONFIG, pair_batch(collection, tokenizer, CONFIG, 3, seed=0), seed=0, device=CPU)


def _use(procedure: str, *_: Any, checkpointed: bool = False, **__: Any) -> Extra:
    peak = 40 if checkpointed else {OURS: 60, OFFICIAL: 120}[procedure]
    return {"peak_bytes": peak, "grown_bytes": peak - 30, "gradient_bytes": 10}


def _run(progress: Progress | None = None, **changes: Any) -> Document:
    settings: dict[str, Any] = {"random": "tiny", "quick": True, "device": "cpu", **changes}
    with pytest.MonkeyPatch.context() as patch:
        # Its own test starts the processes.
        patch.setattr(training, "memory_use", _use)
        return finetuning.run(StepOptions(**settings), progress)


def test_batch_is_padded_and_masked_as_the_official_loader_does(
    collection: photographs.Collection, tokenizer: CaptionTokenizer
) -> None:
    pairs = len(collection.names) + 2
    batch = pair_batch(collection, tokenizer, CONFIG, pairs, seed=1)
    assert batch.image.shape == (pairs, 3, CONFIG.image_size, CONFIG.image_size)
    assert batch.input_ids.shape == (pairs, 30)
    assert batch.masked_labels.shape == (pairs, 15)
    lengths, masked = batch.attention_mask.sum(1), (batch.masked_labels != -100).sum(1)
    assert masked.tolist() == [min(15, max(1, round(length / 2))) for length in lengths.tolist()]
    assert batch.patch_mask is not None
    assert batch.patch_mask.sum(1).tolist() == [CONFIG.num_masking_patches] * pairs
    # The third captions in turn: a photograph that comes again brings another caption.
    assert torch.equal(batch.image[0], batch.image[-2])
    assert not torch.equal(batch.input_ids[0], batch.input_ids[-2])


def test_both_procedures_leave_the_same_gradients(subject: TrainingSubject) -> None:
    truth = subject.outcome(OFFICIAL)
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    found = difference(subject.outcome(OURS), truth)
    assert found.error < training.FP32_GRADIENT_BAND, found
    own = difference(subject.outcome(OFFICIAL, AUTOCAST["bf16"]), truth)
    half = difference(subject.outcome(OURS, AUTOCAST["bf16"]), truth)
    assert found.error < own.error
    assert half.error < parity_band(torch.bfloat16, own.error), half


def test_step_starts_without_gradients_and_draws_negatives(subject: TrainingSubject) -> None:
    losses = subject.step(OFFICIAL)
    assert set(losses) == {"itc", "itm", "imlm", "mim"}
    first = subject.model.vision_proj.weight.grad
    assert first is not None
    subject.step(OFFICIAL)
    second = subject.model.vision_proj.weight.grad
    assert second is not None
    # Not accumulated: negatives do not matter to this one.
    assert torch.allclose(first, second, rtol=1e-4)
    subject.model.zero_grad(set_to_none=True)


def _outcome(loss: float, **gradients: Tensor | None) -> Outcome:
    return Outcome({"itc": torch.tensor(loss)}, gradients)


def test_difference_of_outcomes() -> None:
    truth = _outcome(2.0, big=torch.tensor([3.0, 4.0]), small=torch.tensor([0.1]), none=None)
    found = difference(_outcome(2.2, big=torch.tensor([3.0, 4.5]), small=torch.tensor([0.2]), none=None), truth)
    assert found.losses == pytest.approx(0.1)
    assert found.worst == pytest.approx(1)
    assert found.parameter == "small"
    assert found.gradients == pytest.approx((0.25 + 0.01) ** 0.5 / (25 + 0.01) ** 0.5)
    assert found.error == found.worst


def test_rounding_of_gradients_that_are_zero_is_no_error() -> None:
    truth = _outcome(1.0, big=torch.tensor([1.0]), key_bias=torch.tensor([1e-12]))
    ours = _outcome(1.0, big=torch.tensor([1.0]), key_bias=torch.tensor([-1e-9]))
    assert difference(ours, truth).worst < 2e-5


def test_biases_of_keys_are_compared_on_the_scale_of_their_weights() -> None:
    def outcome(bias: float, name: str) -> Outcome:
        layer = {f"{name}.weight": torch.tensor([3.0, 4.0]), f"{name}.bias": torch.tensor([bias])}
        return _outcome(1.0, **layer, big=torch.tensor([1e4]))

    key = difference(outcome(0.6, "self.key"), outcome(0.1, "self.key"))
    assert key.parameter == "self.key.bias"
    assert key.worst == pytest.approx(0.5 / 5)
    assert difference(outcome(0.6, "self.query"), outcome(0.1, "self.query")).worst == pytest.approx(0.5)
    alone = {"self.key.bias": torch.tensor([0.2])}
    assert difference(_outcome(1.0, **alone), _outcome(1.0, **{"self.key.bias": torch.tensor([0.1])})).worst == (
        pytest.approx(1)
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"big": None, "none": None},
        {"big": torch.ones(1), "none": torch.ones(1)},
        {"big": torch.tensor([float("nan")]), "none": None},
    ],
)
def test_missing_surplus_and_undefined_gradients_are_infinitely_wrong(wrong: dict[str, Tensor | None]) -> None:
    truth = _outcome(1.0, big=torch.ones(1), none=None)
    assert difference(_outcome(1.0, **wrong), truth).error == float("inf")
    assert difference(_outcome(float("nan"), big=torch.ones(1), none=None), truth).error == float("inf")
    assert difference(_outcome(1.0, big=torch.ones(1), none=torch.zeros(1)), truth).error == 0


def test_rows_of_a_step(tmp_path: Path) -> None:
    document = _run(dtype=("fp32", "bf16"), quick=False, pairs=2)
    assert document.ok
    backends = [(OURS, "fp32"), (OURS, "bf16"), (OFFICIAL, "fp32"), (OFFICIAL, "bf16")]
    assert [(row.work, row.backend, row.dtype) for row in document.rows] == [
        (work, *backend) for work in ("train-step", "train-step-dropout") for backend in backends
    ]
    for row in document.rows:
        assert row.status == "measured"
        assert row.parity is not None
        assert row.parity.passed
        assert ("without dropout" in row.parity.note) == row.work.endswith("dropout")
        assert row.number("mfu")
        official, against = document.reference_row(row), document.headline(row)
        if not row.ours or official is None or against is None:
            continue
        assert against.ratio == pytest.approx((official.median_s or 0) / (row.median_s or 1))
        assert 0 < (row.number("flops") or 0) < (official.number("flops") or 0)
        assert official.number("padded_tokens") == 2 * 30
        assert (document.like_for_like(row) == against) == (row.dtype == "fp32")
        sizes = (row.number("peak_bytes"), row.number("checkpointed_bytes"), official.number("peak_bytes"))
        assert sizes == (60, 40, 120)
    saved = record.save(document, tmp_path, report.html(document))
    assert record.load(saved.document) == document


def test_a_dtype_without_parity_does_not_silence_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TrainingSubject.outcome

    def wrong_in_bf16(subject: TrainingSubject, procedure: Procedure, autocast: torch.dtype | None = None) -> Outcome:
        found = right(subject, procedure, autocast)
        if procedure == OURS and autocast is not None:
            found.losses["itc"] *= 2
        return found

    monkeypatch.setattr(TrainingSubject, "outcome", wrong_in_bf16)
    document = _run(dtype=("fp32", "bf16"))
    assert not document.ok
    assert {row.dtype: row.status for row in document.rows if row.ours} == {"fp32": "measured", "bf16": "parity failed"}
    matching = OfficialTrainingTwin._matching
    monkeypatch.setattr(OfficialTrainingTwin, "_matching", lambda *arguments: matching(*arguments) * 1.001)
    document = _run(dtype=("fp32",))
    assert not document.ok
    assert not document.measured


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match="--pairs 2"):
        _run(pairs=1)

    def stop(name: str) -> None:
        if name.startswith("training step"):
            raise KeyboardInterrupt

    document = _run(Progress(stage=stop), dtype=("fp32",))
    assert document.interrupted
    assert not document.rows
    for device in ("tpu", *(["cuda"] if not torch.cuda.is_available() else [])):
        with pytest.raises(UnavailableError):
            _run(device=device)


def test_memory_of_a_process_of_its_own(subject: TrainingSubject) -> None:
    use = memory_use(OURS, CONFIG, subject.batch, "fp32", training=True, seed=0, threads=1)
    names = ("before_bytes", "parameter_bytes", "gradient_bytes", "peak_bytes", "grown_bytes")
    before, parameters, gradients, peak, grown = (int(use[name]) for name in names)  # pyright: ignore[reportArgumentType]
    assert peak > before > parameters > 0
    assert 0 < gradients <= parameters
    assert grown == peak - before - gradients > 0
    # At this size the interpreter is most of it, so no comparison would hold.
    checkpointed = {"training": True, "seed": 0, "threads": 1, "checkpointed": True}
    assert memory_use(OURS, CONFIG, subject.batch, "fp32", **checkpointed)["peak_bytes"]


def test_a_process_that_fails_says_why(subject: TrainingSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([(1, "Traceback\nMemoryError: no room\n", "no room"), (-9, "", "exit code -9")])
    for code, printed, reason in outcomes:
        done = SimpleNamespace(returncode=code, stdout="", stderr=printed)
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        with pytest.raises(UnavailableError, match=f"xfm-fast, fp32.*{reason}"):
            memory_use(OURS, CONFIG, subject.batch, "fp32", training=False, seed=0, threads=1)
