"""The suite from end to end on the tiny model: its rows, and what happens when it is stopped or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from xfm_fast.benchmarks import machine, record, report
from xfm_fast.benchmarks.contenders.official_algorithm import OfficialTwin
from xfm_fast.benchmarks.material.inputs import preset_config
from xfm_fast.benchmarks.measure import Progress
from xfm_fast.benchmarks.options import SuiteOptions
from xfm_fast.benchmarks.record import OFFICIAL, OFFICIAL_CODE, OURS, Document
from xfm_fast.benchmarks.work import suite
from xfm_fast.errors import CheckpointError, UnavailableError
from xfm_fast.models.xfm import XFM

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
WORKS = ["embed-image", "embed-image", "embed-text", "rerank", "retrieval"]


def _run(progress: Progress | None = None, **changes: Any) -> Document:
    settings: dict[str, Any] = {"random": "tiny", "quick": True, "dtype": ("fp32",), **changes}
    return suite.run(SuiteOptions(**settings), progress, ["xfm-fast", "bench"])


@pytest.fixture(scope="module")
def document() -> Document:
    return _run(dtype=("fp32", "bf16"))


def test_every_row_is_measured(document: Document, tmp_path: Path) -> None:
    assert document.ok
    assert [(row.work, row.backend, row.dtype) for row in document.rows] == [
        (work, *backend) for work in WORKS for backend in ((OURS, "fp32"), (OURS, "bf16"), (OFFICIAL, "fp32"))
    ]
    for row in document.rows:
        assert row.status == "measured"
        assert row.parity is not None
        assert row.parity.passed
        assert row.rate == pytest.approx(row.items / (row.median_s or 0))
        for name in ("mfu", "peak_bytes", "needed_flops", "bytes", "roof"):
            assert row.number(name), name
        assert bool(row.parts("recall")) == (row.work == "retrieval")
        if row.ours:
            official, against = document.reference_row(row), document.headline(row)
            assert official is not None
            assert against is not None
            assert len(row.seconds) == len(official.seconds)
            assert against.ratio == pytest.approx((official.median_s or 0) / (row.median_s or 1))
            assert 0 < (row.number("flops") or 0) <= (official.number("flops") or 0)
    text = next(row for row in document.rows if row.work == "embed-text" and row.backend == OFFICIAL)
    assert text.number("padded_tokens") == 8 * 40
    assert 80 <= (text.number("tokens") or 0) <= 8 * 16
    assert record.load(record.save(document, tmp_path, report.html(document)).document) == document


@pytest.mark.slow
def test_whole_runs_have_rows_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = suite.SuiteScale.of
    monkeypatch.setattr(
        suite.SuiteScale, "of", lambda preset, quick: replace(whole(preset, quick=quick), rounds=1, budget_s=0.0)
    )
    document = _run(quick=False)
    assert document.ok
    tasks = ("vqa", "nlvr2", "grounding", "captioning")
    assert [(row.work, row.backend, row.items) for row in document.rows[2 * len(WORKS) :]] == [
        (task, backend, 3) for task in tasks for backend in (OURS, OFFICIAL)
    ]


def test_a_dtype_without_hardware_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_native_bf16", lambda: True)
    assert machine.choose_dtypes(()) == (["fp32", "bf16"], {})
    with pytest.raises(UnavailableError, match="fp8"):
        machine.choose_dtypes(("fp8",))
    monkeypatch.setattr(machine, "has_native_bf16", lambda: False)

    def stop(name: str) -> None:
        if "48 px" in name:
            raise KeyboardInterrupt

    document = _run(Progress(stage=stop), dtype=("auto",))
    assert document.ok
    assert document.interrupted
    assert [(row.backend, row.dtype, row.status) for row in document.rows] == [
        (OURS, "fp32", "measured"), (OURS, "bf16", "not offered"), (OFFICIAL, "fp32", "measured")
    ]  # fmt: skip


def test_no_speed_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    right, logits = OfficialTwin.encode_text, XFM.match_logits
    monkeypatch.setattr(OfficialTwin, "encode_text", lambda *arguments: right(*arguments) * 1.001)
    monkeypatch.setattr(XFM, "match_logits", lambda self, fused: logits(self, fused) * float("nan"))
    document = _run()
    assert not document.ok
    status = {row.work: row.status for row in document.rows if row.ours}
    assert status == dict(zip(WORKS, ["measured"] * 2 + ["parity failed"] * 3, strict=True))
    assert {row.work for row in document.measured} == {"embed-image"}
    rerank = next(row for row in document.rows if row.work == "rerank")
    assert rerank.parity is not None
    assert rerank.parity.error is None


def test_checkpoints(tmp_path: Path) -> None:
    def stop(name: str) -> None:
        if name.startswith("embed"):
            raise KeyboardInterrupt

    XFM(preset_config("tiny")).save_pretrained(tmp_path / "model")
    document = _run(Progress(stage=stop), random=None, model=str(tmp_path / "model"))
    assert document.model is not None
    assert (document.model.trained, document.model.meaningful_recall) == (True, False)
    torch.save({"a": torch.ones(1)}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError):
        _run(random=None, config="tiny", model=str(tmp_path / "foreign.pth"))


def test_an_official_clone_that_does_not_import(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="official repository"):
        _run(official=tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "models" / "xfm.py").write_text("")
    (tmp_path / "models" / "beit2.py").write_text("print('noise')\nimport a_module_that_does_not_exist\n")
    document = _run(official=tmp_path)
    row = next(row for row in document.rows if row.backend == OFFICIAL_CODE)
    assert row.status == "failed"
    assert "\n" not in (row.reason or "")
    assert "Error" in (row.reason or "")
