"""The training benchmark from end to end on the tiny model, and the parts of its GPU form that need no GPU."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from xfm_fast.benchmarks import results, terminal, training_step
from xfm_fast.benchmarks.contenders.official_training import OfficialTrainingTwin
from xfm_fast.benchmarks.material import photographs
from xfm_fast.benchmarks.measuring import Measurement, Series, sample_on_cuda
from xfm_fast.benchmarks.page import render
from xfm_fast.benchmarks.suite import Document, Progress, preset_config
from xfm_fast.benchmarks.training_memory import MemoryUse, cuda_memory_use, memory_use
from xfm_fast.benchmarks.training_step import StepOptions
from xfm_fast.benchmarks.training_subject import (
    AUTOCAST,
    Outcome,
    Procedure,
    TrainingSubject,
    difference,
    pair_batch,
)
from xfm_fast.errors import UnavailableError
from xfm_fast.tokenizer import CaptionTokenizer

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
CPU = torch.device("cpu")
CONFIG = preset_config("tiny")
USES = {"fast": MemoryUse(60, 20, 5, 10, "high-water mark"), "twin": MemoryUse(120, 20, 5, 10, "high-water mark")}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def collection() -> photographs.Collection:
    return photographs.bundled()


@pytest.fixture(scope="module")
def tokenizer(collection: photographs.Collection) -> CaptionTokenizer:
    return CaptionTokenizer.train_on_texts(collection.captions, CONFIG.vocab_size)


@pytest.fixture(scope="module")
def subject(collection: photographs.Collection, tokenizer: CaptionTokenizer) -> TrainingSubject:
    return TrainingSubject(CONFIG, pair_batch(collection, tokenizer, CONFIG, 3, seed=0), seed=0, device=CPU)


def _run(progress: Progress | None = None, **changes: Any) -> Document:
    settings: dict[str, Any] = {"preset": "tiny", "quick": True, "threads": 1, "device": "cpu", **changes}
    with pytest.MonkeyPatch.context() as patch:
        # Its own test starts the processes.
        patch.setattr(training_step, "memory_use", lambda procedure, *_, **__: USES[procedure])
        return training_step.run(StepOptions(**settings), progress, command=["xfm-fast", "bench", "train-step"])


@pytest.fixture(scope="module")
def document() -> Document:
    return _run(dtypes=("fp32", "bf16"), quick=False, pairs=2)


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
    truth = subject.outcome("twin")
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    found = difference(subject.outcome("fast"), truth)
    assert found.error < training_step.FP32_GRADIENT_BAND, found
    own = difference(subject.outcome("twin", AUTOCAST["bf16"]), truth)
    half = difference(subject.outcome("fast", AUTOCAST["bf16"]), truth)
    assert found.error < own.error
    assert half.error < 2 * own.error + torch.finfo(torch.bfloat16).eps, half


def test_step_starts_without_gradients_and_draws_negatives(subject: TrainingSubject) -> None:
    losses = subject.step("twin")
    assert set(losses) == {"itc", "itm", "imlm", "mim"}
    first = subject.model.vision_proj.weight.grad
    assert first is not None
    subject.step("twin")
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


def test_rows_have_the_form_of_the_suite(document: Document) -> None:
    assert document.ok
    keys = [(row["key"], row["dtype"]) for row in document.rows]
    assert keys == [(key, dtype) for key in ("train-step", "train-step-dropout") for dtype in ("fp32", "bf16")]
    for row in document.rows:
        fast, twin = row["fast"], row["twin"]
        assert row["status"] == "measured"
        assert row["parity"]["error"] <= row["parity"]["band"]
        assert row["ratio"] == pytest.approx(twin["median_s"] / fast["median_s"])
        assert len(row["probe"]["flops_per_s"]) == len(fast["seconds"]) + 1 == len(row["shares_of_peak"]) + 1
        assert 0 < row["flops"] < row["official_flops"]
        assert row["tokens"]["padded"] == 2 * 30
        assert (row["twin_same_dtype"] is None) == (row["dtype"] == "fp32")
        assert (fast["peak_bytes"], fast["grown_bytes"]) == (60, 30)
        assert row["memory"]["peak_ratio"] == 0.5
        assert row["memory"]["activation_ratio"] == pytest.approx(30 / 90)


def test_report_shows_speed_and_memory(document: Document, tmp_path: Path) -> None:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    terminal.print_report(document.content, console)
    text = console.export_text()
    assert "training step, 2 pairs of 32 px" in text
    assert "peak memory, train-step bf16: 50%" in text
    assert "retrieval" not in text
    page = render(document.content)
    assert page.count("<svg") == 4
    assert "Peak memory" in page
    assert "retrieval" not in page
    saved = results.save(document.content, tmp_path)
    assert json.loads(saved.document.read_text())["benchmark"] == "train-step"


def test_no_speed_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OfficialTrainingTwin._matching
    monkeypatch.setattr(OfficialTrainingTwin, "_matching", lambda *arguments: right(*arguments) * 1.001)
    document = _run(dtypes=("fp32",))
    assert not document.ok
    assert not document.rows


def test_a_type_without_parity_does_not_silence_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TrainingSubject.outcome

    def wrong_in_bf16(subject: TrainingSubject, procedure: Procedure, autocast: torch.dtype | None = None) -> Outcome:
        found = right(subject, procedure, autocast)
        if procedure == "fast" and autocast is not None:
            found.losses["itc"] *= 2
        return found

    monkeypatch.setattr(TrainingSubject, "outcome", wrong_in_bf16)
    document = _run(dtypes=("fp32", "bf16"))
    assert not document.ok
    assert [(row["dtype"], row["status"]) for row in document.rows] == [("fp32", "measured"), ("bf16", "parity failed")]
    assert "exceeds" in render(document.content)


def test_interruption_keeps_what_was_checked() -> None:
    def stop(name: str) -> None:
        if name.startswith("training step"):
            raise KeyboardInterrupt

    document = _run(Progress(stage=stop), dtypes=("fp32",))
    assert document.interrupted
    assert len(document.content["parity"]) == 1
    assert not document.rows


def test_devices() -> None:
    assert training_step.choose_device("cpu") == CPU
    with pytest.raises(UnavailableError, match="choose cpu or cuda"):
        training_step.choose_device("tpu")
    if not torch.cuda.is_available():
        assert training_step.choose_device(None) == CPU
        with pytest.raises(UnavailableError, match="sees no GPU"):
            training_step.choose_device("cuda")


def test_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan, absent = training_step._plan(StepOptions())
    assert (plan.device.type, plan.dtypes, plan.pairs, plan.twin_dtype("bf16")) == ("cuda", ["bf16"], 96, "bf16")
    assert not absent
    plan, _ = training_step._plan(StepOptions(device="cpu", dtypes=("bf16",)))
    assert (plan.pairs, plan.dropout, plan.twin_dtype("bf16")) == (8, (False, True), "fp32")
    plan, _ = training_step._plan(StepOptions(device="cpu", quick=True))
    assert (plan.pairs, plan.dropout) == (2, (False,))
    with pytest.raises(UnavailableError, match="--pairs 2"):
        training_step._plan(StepOptions(pairs=1))


def test_model_flops_utilisation() -> None:
    assert training_step.model_flops_utilisation(10, [2.0, 5.0], 10.0) == [0.5, 0.2]


class _Event:
    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = _Event.clock

    def elapsed_time(self, other: _Event) -> float:
        return other.at - self.at


def test_sample_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name, value in {"memory_allocated": 100, "max_memory_allocated": 170}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "Event", _Event)

    def run() -> str:
        calls.append("run")
        _Event.clock += 250
        return "output"

    sample = sample_on_cuda(run)
    assert sample == ("output", 0.25, 170, 70, "CUDA allocator")
    assert calls == ["synchronize", "reset_peak_memory_stats", "run", "synchronize"]


def _gpu_run(subject: TrainingSubject, peak: dict[str, float]) -> dict[str, Any]:
    """The row that a GPU's samples would give."""
    plan = training_step._Plan(torch.device("cuda"), ["bf16"], 96, (False,), 2, 1, 0.0)
    content = {
        "device": "cuda",
        "parity": [{"dtype": "bf16", "error": 0.01, "band": 0.02, "passed": True, "parameter": "temp"}],
        "rows": [],
    }
    run = training_step._Run(StepOptions(preset="tiny"), plan, Progress(), Document(content))
    run.subject, run.needed, run.official_flops = subject, 400, 900
    run.tokens = {"useful": 10, "padded": 30}
    run.probes, run.peak = {}, peak
    series = {
        "fast bf16": Series([1.0, 2.0, 4.0], [70, 71, 70], [30, 31, 30]),
        "twin bf16": Series([6.0, 8.0, 9.0], [140, 141, 140], [90, 91, 90]),
    }
    (row,) = run._rows(Measurement(series, {}, "CUDA allocator"), dropout=False)
    return row


def test_row_of_a_gpu(subject: TrainingSubject) -> None:
    row = _gpu_run(subject, {"bf16": 1000.0})
    assert row["ratio"] == 4
    assert row["twin_dtype"] == "bf16"
    assert row["share_of_peak"] == 0.2
    assert row["memory_method"] == "CUDA allocator"
    assert row["memory"]["peak_ratio"] == pytest.approx(71 / 141)


def test_results_of_a_gpu_are_kept_under_its_name(document: Document, tmp_path: Path) -> None:
    machine = document.content["machine"] | {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}
    path = results.save_reference(document.content | {"machine": machine}, tmp_path)
    assert path.name == "train-step-nvidia-h100-80gb-hbm3.json"
    assert json.loads(path.read_text())["rows"] == document.rows
    folder = results.reference_folder()
    assert folder is None or folder.name == "results"


def test_a_gpu_without_data_sheet_has_no_utilisation(subject: TrainingSubject, document: Document) -> None:
    row = _gpu_run(subject, {})
    assert row["share_of_peak"] is None
    content = document.content | {"rows": [row], "device": "cuda", "probe": {}}
    page = render(content)
    assert "matrix rate</h2>" not in page
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    terminal.print_report(content, console)
    assert "MFU" in console.export_text()


def test_memory_of_a_gpu_counts_parameters_and_gradients() -> None:
    model = torch.nn.Linear(10, 10, bias=False)
    model.weight.grad = torch.zeros(10, 10)
    use = cuda_memory_use(1000, model)
    assert (use.parameter_bytes, use.gradient_bytes, use.activation_bytes) == (400, 400, 200)


def test_memory_of_a_process_of_its_own(subject: TrainingSubject) -> None:
    use = memory_use("fast", CONFIG, subject.batch, "fp32", training=True, seed=0, threads=1)
    assert use.peak_bytes > use.before_bytes > use.parameter_bytes > 0
    assert 0 < use.gradient_bytes <= use.parameter_bytes
    assert use.as_dict()["activation_bytes"] == use.activation_bytes > 0


def test_a_process_that_fails_says_why(subject: TrainingSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([(1, "Traceback\nMemoryError: no room\n", "no room"), (-9, "", "exit code -9")])
    for code, printed, reason in outcomes:
        done = SimpleNamespace(returncode=code, stdout="", stderr=printed)
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        with pytest.raises(UnavailableError, match=f"fast, fp32.*{reason}"):
            memory_use("fast", CONFIG, subject.batch, "fp32", training=False, seed=0, threads=1)
