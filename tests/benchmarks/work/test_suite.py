"""The suite from end to end on the tiny model: results, page, table, and what happens when it is stopped or refused."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from xfm_fast.benchmarks import files, machine, report
from xfm_fast.benchmarks.contenders.official_algorithm import OfficialTwin
from xfm_fast.benchmarks.material.inputs import preset_config
from xfm_fast.benchmarks.measure import Progress
from xfm_fast.benchmarks.options import SuiteOptions
from xfm_fast.benchmarks.record import OFFICIAL, OFFICIAL_CODE, OURS, Document, Row, Skip
from xfm_fast.benchmarks.work import suite
from xfm_fast.errors import CheckpointError, StorageError, UnavailableError
from xfm_fast.models.xfm import XFM

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
WORKS = [("embed-image", 32), ("embed-image", 48), ("embed-text", None), ("rerank", 48), ("retrieval", 48)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _run(progress: Progress | None = None, **changes: Any) -> Document:
    settings: dict[str, Any] = {"preset": "tiny", "quick": True, "threads": 1, **changes}
    return suite.run(SuiteOptions(**settings), progress, command=["xfm-fast", "bench"])


def _save(document: Document, folder: Path) -> files.Saved:
    return files.save(document, folder, report.html(document))


@pytest.fixture(scope="module")
def document() -> Document:
    return _run(dtype=("fp32", "bf16"))


def _ours(document: Document) -> list[Row]:
    return [row for row in document.rows if row.ours]


def test_every_row_is_measured_and_says_its_work(document: Document) -> None:
    assert document.ok
    assert not document.interrupted
    assert document.benchmark == "suite"
    assert [(row.work, row.point.image_size, row.contender, row.dtype) for row in document.rows] == [
        (*work, *who) for work in WORKS for who in ((OURS, "fp32"), (OURS, "bf16"), (OFFICIAL, "fp32"))
    ]
    for row in document.rows:
        assert row.status == "measured"
        assert row.parity is not None
        assert row.parity.error is not None
        assert row.parity.band is not None
        assert row.parity.error <= row.parity.band
        assert row.throughput is not None
        assert row.throughput.value == pytest.approx(row.items / (row.median_s or 0))
        assert row.conditions is not None
        assert len(row.conditions.gemm_flops_per_s) == len(row.seconds) + 1 >= 2
        assert row.efficiency is not None
        assert row.efficiency.mfu is not None
        assert row.memory is not None
    for row in _ours(document):
        official, against = document.reference_row(row), document.headline(row)
        assert official is not None
        assert official.efficiency is not None
        assert against is not None
        assert len(row.seconds) == len(official.seconds)
        assert against.ratio == pytest.approx((official.median_s or 0) / (row.median_s or 1))
        assert against.low is None or against.low <= (against.high or 0)
        assert row.efficiency is not None
        assert 0 < (row.efficiency.flops or 0) <= (official.efficiency.flops or 0)
    names = " / ".join(row.name for row in document.rows)
    assert "embed 2 images of 32 px" in names
    assert "16 captions" in names
    text = next(row for row in document.rows if row.work == "embed-text" and row.contender == OFFICIAL)
    assert text.tokens is not None
    assert text.tokens.padded == 8 * 40
    assert 80 <= text.tokens.useful <= 8 * 16
    assert all((row.recall is not None) == (row.work == "retrieval") for row in document.rows)


@pytest.mark.slow
def test_whole_runs_have_rows_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = suite.SuiteScale.of
    monkeypatch.setattr(
        suite.SuiteScale, "of", lambda preset, quick: replace(whole(preset, quick=quick), rounds=1, budget_s=0.0)
    )
    document = _run(quick=False, dtype=("fp32",))
    assert document.ok
    tasks = [(row.work, row.contender, row.items) for row in document.rows[2 * len(WORKS) :]]
    assert tasks == [
        (task, who, 3) for task in ("vqa", "nlvr2", "grounding", "captioning") for who in (OURS, OFFICIAL)
    ]  # fmt: skip
    assert {row.status for row in document.rows} == {"measured"}


def test_dtypes_without_hardware_are_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_native_bf16", lambda: False)
    names, absent = machine.choose_dtypes(("auto",))
    assert names == ["fp32"]
    assert "not offered by this CPU" in absent["bf16"]
    monkeypatch.setattr(machine, "has_native_bf16", lambda: True)
    assert machine.choose_dtypes(()) == (["fp32", "bf16"], {})
    with pytest.raises(UnavailableError, match="fp8"):
        machine.choose_dtypes(("fp8",))


def test_a_type_without_hardware_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_native_bf16", lambda: False)
    document = _run()
    assert document.ok
    missing = [row for row in document.rows if row.status == "not offered"]
    assert [(row.contender, row.dtype) for row in missing] == [(OURS, "bf16")] * len(WORKS)
    assert all("not offered by this CPU" in (row.reason or "") for row in missing)


def test_results_are_saved_under_two_names(document: Document, tmp_path: Path) -> None:
    saved = _save(document, tmp_path / "deep" / "out")
    read = json.loads(saved.document.read_text())
    assert read["schema_version"] == 3
    assert [row["work"] for row in read["rows"]] == [row.work for row in document.rows]
    assert {"cpu", "torch", "python", "commit", "threads", "memory_gb", "system"} <= read["machine"].keys()
    folder = saved.document.parent
    assert (folder / "latest.json").read_bytes() == saved.document.read_bytes()
    assert (folder / "latest.html").read_bytes() == saved.page.read_bytes()
    again = _save(document, folder)
    assert again.document != saved.document
    assert len(list(folder.iterdir())) == 6


def test_page_shows_every_row_and_needs_nothing_from_elsewhere(document: Document) -> None:
    page = report.html(document)
    assert all(word not in page for word in ("url(", "@import", "src="))
    assert "<svg role=" in page
    assert "prefers-color-scheme: dark" in page
    assert all(row.name in page for row in document.rows)


def test_page_escapes_what_users_name(document: Document) -> None:
    content = document.model_copy(deep=True)
    assert content.data is not None
    content.data.skipped = [Skip(what="<script>x</script>", reason="a & b")]
    page = report.html(content)
    assert "<script>" not in page
    assert "a &amp; b" in page


def test_table_shows_every_row(document: Document) -> None:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    report.terminal(document, console)
    text = console.export_text()
    assert "re-rank 1 image" in text
    assert all(head in text for head in ("algorithm", "over", "fp32", "like", "error"))
    assert "retrieval quality means nothing" in text
    assert "18 photographs, 90 captions" in text


@pytest.mark.parametrize("moment", [1, 4, 5])
def test_interruption_keeps_finished_rows(moment: int, tmp_path: Path) -> None:
    stages = 0

    def stop(name: str) -> None:
        nonlocal stages
        stages += 1
        if stages == moment + 1:
            raise KeyboardInterrupt

    document = _run(Progress(stage=stop), dtype=("fp32",))
    assert document.interrupted
    assert len([row for row in _ours(document) if row.status == "measured"]) == max(0, moment - 3)
    saved = _save(document, tmp_path)
    assert json.loads(saved.document.read_text())["interrupted"] is True
    assert "interrupted" in saved.page.read_text()
    report.terminal(document, Console(quiet=True))


def test_full_disk_leaves_nothing_behind(document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(document, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        _save(document, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folder_that_cannot_be_made(document: Document, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--out"):
        _save(document, tmp_path / "file" / "out")


def test_no_speed_without_parity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = OfficialTwin.encode_text

    def wrong(self: OfficialTwin, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return right(self, input_ids, attention_mask) * 1.001

    monkeypatch.setattr(OfficialTwin, "encode_text", wrong)
    document = _run(dtype=("fp32",))
    assert not document.ok
    assert not document.measured
    assert [(row.work, row.status) for row in document.rows] == [("embed-text", "parity failed")]
    assert "exceeds" in report.html(document)


def test_not_a_number_is_no_parity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = XFM.match_logits
    monkeypatch.setattr(XFM, "match_logits", lambda self, fused: right(self, fused) * float("nan"))
    document = _run(dtype=("fp32",))
    assert not document.ok
    saved = _save(document, tmp_path)
    assert json.loads(saved.document.read_text())["rows"][-1]["parity"]["error"] is None


def test_own_checkpoint(tmp_path: Path) -> None:
    model = XFM(preset_config("tiny"))
    model.save_pretrained(tmp_path / "model")
    document = _run(checkpoint=tmp_path / "model", dtype=("fp32",))
    assert document.ok
    assert document.model is not None
    assert document.model.trained
    assert not document.model.meaningful_recall


def test_foreign_checkpoint(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError):
        _run(checkpoint=tmp_path / "foreign.pth")


def _clone(document: Document) -> Row:
    return next(row for row in document.rows if row.contender == OFFICIAL_CODE)


def test_official_clone_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"has no models/xfm\.py; name a clone of the official repository"):
        _run(official=tmp_path, dtype=("fp32",))


def test_official_clone_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "models" / "xfm.py").write_text("")
    (tmp_path / "models" / "beit2.py").write_text("print('noise')\nimport a_module_that_does_not_exist\n")
    row = _clone(_run(official=tmp_path, dtype=("fp32",)))
    assert row.status == "failed"
    assert "\n" not in (row.reason or "")
    assert "Error" in (row.reason or "")
