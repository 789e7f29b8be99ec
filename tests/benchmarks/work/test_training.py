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

from xfm_fast.benchmarks import files, machine, report
from xfm_fast.benchmarks.contenders.official_algorithm import OfficialTrainingTwin
from xfm_fast.benchmarks.material import photographs
from xfm_fast.benchmarks.material.inputs import preset_config
from xfm_fast.benchmarks.measure import Progress, Readings, Samples, Watched, parity_band
from xfm_fast.benchmarks.options import StepOptions
from xfm_fast.benchmarks.record import OFFICIAL, OURS, Document, Memory, Parity, Row
from xfm_fast.benchmarks.work import training
from xfm_fast.benchmarks.work.training import (
    AUTOCAST,
    Outcome,
    Procedure,
    TrainingSubject,
    cuda_memory_use,
    difference,
    memory_use,
    pair_batch,
)
from xfm_fast.errors import UnavailableError
from xfm_fast.kernels.roofline import GPU
from xfm_fast.tokenizer import CaptionTokenizer

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
CPU = torch.device("cpu")
CONFIG = preset_config("tiny")
USES = {
    name: Memory(
        peak_bytes=peak, grown_bytes=peak - 30, method="high-water mark", before_bytes=20, parameter_bytes=5,
        gradient_bytes=10,
    )
    for name, peak in ((OURS, 60), (OFFICIAL, 120))
}  # fmt: skip


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


def _use(procedure: str, *_: Any, checkpointed: bool = False, **__: Any) -> Memory:
    return USES[procedure].model_copy(update={"peak_bytes": 40} if checkpointed else {})


def _run(progress: Progress | None = None, **changes: Any) -> Document:
    settings: dict[str, Any] = {"preset": "tiny", "quick": True, "threads": 1, "device": "cpu", **changes}
    with pytest.MonkeyPatch.context() as patch:
        # Its own test starts the processes.
        patch.setattr(training, "memory_use", _use)
        return training.run(StepOptions(**settings), progress, command=["xfm-fast", "bench", "train-step"])


@pytest.fixture(scope="module")
def document() -> Document:
    return _run(dtype=("fp32", "bf16"), quick=False, pairs=2)


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


def test_rows_have_the_form_of_the_suite(document: Document) -> None:
    assert document.ok
    contenders = [(OURS, "fp32"), (OURS, "bf16"), (OFFICIAL, "fp32"), (OFFICIAL, "bf16")]
    assert [(row.work, row.contender, row.dtype) for row in document.rows] == [
        (work, *contender) for work in ("train-step", "train-step-dropout") for contender in contenders
    ]
    for row in document.rows:
        assert row.status == "measured"
        assert row.conditions is not None
        assert len(row.conditions.gemm_flops_per_s) == len(row.seconds) + 1
        assert row.efficiency is not None
        assert row.efficiency.mfu is not None
        assert row.tokens is not None
    for row in document.rows:
        if not row.ours:
            continue
        official, against = document.reference_row(row), document.headline(row)
        assert official is not None
        assert against is not None
        assert row.parity is not None
        assert row.parity.passed
        assert (row.parity.error or 0) <= (row.parity.band or 0)
        assert against.ratio == pytest.approx((official.median_s or 0) / (row.median_s or 1))
        assert row.efficiency is not None
        assert official.efficiency is not None
        assert 0 < (row.efficiency.flops or 0) < (official.efficiency.flops or 0)
        assert official.tokens is not None
        assert official.tokens.padded == 2 * 30
        same = document.like_for_like(row)
        assert same is not None
        assert (same == against) == (row.dtype == "fp32")
        assert row.memory == USES[OURS].model_copy(update={"checkpointed_bytes": 40})
        assert official.memory == USES[OFFICIAL]


def test_report_shows_speed_and_memory(document: Document, tmp_path: Path) -> None:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    report.terminal(document, console)
    text = console.export_text()
    assert "training step, 2 pairs of 32 px" in text
    assert "peak memory, train-step bf16: 50%" in text
    assert "33% with activation checkpointing" in " ".join(text.split())
    assert "retrieval" not in text
    page = report.html(document)
    assert "<svg" in page
    assert "eak memory" in page
    assert "retrieval" not in page
    saved = files.save(document, tmp_path, page)
    assert json.loads(saved.document.read_text())["benchmark"] == "train-step"


def test_no_speed_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OfficialTrainingTwin._matching
    monkeypatch.setattr(OfficialTrainingTwin, "_matching", lambda *arguments: right(*arguments) * 1.001)
    document = _run(dtype=("fp32",))
    assert not document.ok
    assert not document.measured


def test_a_type_without_parity_does_not_silence_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TrainingSubject.outcome

    def wrong_in_bf16(subject: TrainingSubject, procedure: Procedure, autocast: torch.dtype | None = None) -> Outcome:
        found = right(subject, procedure, autocast)
        if procedure == OURS and autocast is not None:
            found.losses["itc"] *= 2
        return found

    monkeypatch.setattr(TrainingSubject, "outcome", wrong_in_bf16)
    document = _run(dtype=("fp32", "bf16"))
    assert not document.ok
    ours = {row.dtype: row.status for row in document.rows if row.ours}
    assert ours == {"fp32": "measured", "bf16": "parity failed"}
    assert "exceeds" in report.html(document)


def test_interruption_keeps_what_was_checked() -> None:
    def stop(name: str) -> None:
        if name.startswith("training step"):
            raise KeyboardInterrupt

    document = _run(Progress(stage=stop), dtype=("fp32",))
    assert document.interrupted
    assert not document.rows


def test_devices() -> None:
    assert machine.choose_device("cpu") == CPU
    with pytest.raises(UnavailableError, match="choose cpu or cuda"):
        machine.choose_device("tpu")
    if not torch.cuda.is_available():
        assert machine.choose_device(None) == CPU
        with pytest.raises(UnavailableError, match="sees no GPU"):
            machine.choose_device("cuda")


def test_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan, absent = training._plan(StepOptions())
    assert (plan.device.type, plan.dtypes, plan.pairs, plan.official_dtype("bf16")) == ("cuda", ["bf16"], 96, "bf16")
    assert not absent
    plan, _ = training._plan(StepOptions(device="cpu", dtype=("bf16",)))
    assert (plan.pairs, plan.dropout, plan.official_dtype("bf16")) == (8, (False, True), "fp32")
    plan, _ = training._plan(StepOptions(device="cpu", quick=True))
    assert (plan.pairs, plan.dropout) == (2, (False,))
    with pytest.raises(UnavailableError, match="--pairs 2"):
        training._plan(StepOptions(pairs=1))


def _gpu_rows(subject: TrainingSubject, gpu: GPU | None) -> list[Row]:
    """The rows that a GPU's samples would give."""
    plan = training.StepPlan(torch.device("cuda"), ["bf16"], 96, (False,), 2, 1, 0.0)
    document = Document.begun("train-step", {}, [], "cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "data_sheet", lambda device: gpu)
        run = training.StepRun(StepOptions(preset="tiny", quick=True), plan, Progress(), document)
    run.subject, run.flops = subject, {OURS: 400, OFFICIAL: 900}
    run.tokens = {OURS: 10, OFFICIAL: 30}
    run.parity = {"bf16": Parity(error=0.01, band=0.02, passed=True, against=f"{OFFICIAL} fp32", note="worst: temp")}
    watched = {f"{name} bf16": Watched(lambda: None, CPU) for name in (OURS, OFFICIAL)}
    for seen, peak in zip(watched.values(), (71, 141), strict=True):
        seen.memory = Memory(peak_bytes=peak, grown_bytes=peak - 40, method="CUDA allocator")
    rounds = {f"{OURS} bf16": [[1.0], [2.0], [4.0]], f"{OFFICIAL} bf16": [[6.0], [8.0], [9.0]]}
    return run._rows(Samples(rounds, Readings({})), watched, dropout=False)


def test_rows_of_a_gpu(subject: TrainingSubject) -> None:
    ours, official = _gpu_rows(subject, GPU("made up", 1000.0, 1.0))
    assert (ours.against[0].ratio, ours.against[0].like_for_like) == (4, True)
    assert official.dtype == "bf16"
    assert ours.efficiency is not None
    assert ours.efficiency.mfu_data_sheet == 0.2
    assert ours.memory is not None
    assert official.memory is not None
    assert ours.memory.method == "CUDA allocator"
    assert ours.memory.peak_bytes / official.memory.peak_bytes == pytest.approx(71 / 141)


def test_results_of_a_gpu_are_kept_under_its_name(document: Document, tmp_path: Path) -> None:
    facts = document.machine | {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}
    on_gpu = document.model_copy(update={"machine": facts})
    path = files.save_reference(on_gpu, tmp_path)
    assert path.name == "train-step-nvidia-h100-80gb-hbm3.json"
    assert files.load(path) == on_gpu
    folder = files.reference_folder()
    assert folder is None or folder.name == "results"


def test_a_gpu_without_data_sheet_has_no_utilisation(subject: TrainingSubject, document: Document) -> None:
    rows = _gpu_rows(subject, None)
    assert all(row.efficiency is not None and row.efficiency.mfu_data_sheet is None for row in rows)
    content = document.model_copy(update={"rows": rows, "device": "cuda", "probes": {}})
    assert "matrix rate</h2>" not in report.html(content)
    report.terminal(content, Console(quiet=True))


def test_memory_of_a_gpu_counts_parameters_and_gradients() -> None:
    model = torch.nn.Linear(10, 10, bias=False)
    model.weight.grad = torch.zeros(10, 10)
    use = cuda_memory_use(1000, model)
    assert (use.parameter_bytes, use.gradient_bytes, use.grown_bytes) == (400, 400, 200)


def test_memory_of_a_process_of_its_own(subject: TrainingSubject) -> None:
    use = memory_use(OURS, CONFIG, subject.batch, "fp32", training=True, seed=0, threads=1)
    before, parameters, gradients = use.before_bytes or 0, use.parameter_bytes or 0, use.gradient_bytes or 0
    assert use.peak_bytes > before > parameters > 0
    assert 0 < gradients <= parameters
    assert use.grown_bytes == use.peak_bytes - before - gradients > 0
    # At this size the interpreter is most of it, so no comparison would hold.
    checkpointed = {"training": True, "seed": 0, "threads": 1, "checkpointed": True}
    assert memory_use(OURS, CONFIG, subject.batch, "fp32", **checkpointed).peak_bytes > before


def test_a_process_that_fails_says_why(subject: TrainingSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([(1, "Traceback\nMemoryError: no room\n", "no room"), (-9, "", "exit code -9")])
    for code, printed, reason in outcomes:
        done = SimpleNamespace(returncode=code, stdout="", stderr=printed)
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        with pytest.raises(UnavailableError, match=f"xfm-fast, fp32.*{reason}"):
            memory_use(OURS, CONFIG, subject.batch, "fp32", training=False, seed=0, threads=1)
