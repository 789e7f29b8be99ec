"""The suite from end to end on the tiny model: its rows, and what happens when it is stopped or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xfm_fast.benchmarks import record, report
from xfm_fast.benchmarks.measure import Progress
from xfm_fast.benchmarks.options import ModelOptions
from xfm_fast.benchmarks.record import OFFICIAL, OURS, Document
from xfm_fast.benchmarks.work.model import suite
from xfm_fast.errors import UnavailableError
from xfm_fast.models.xfm import XFM
from xfm_fast.testing import preset_config

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
WORKS = ["embed-image", "embed-image", "embed-text", "rerank", "retrieval"]


def _run(progress: Progress | None = None, **changes: Any) -> Document:
    settings: dict[str, Any] = {"random": "tiny", "quick": True, "dtype": ("fp32",), **changes}
    return suite(ModelOptions(device="cpu", **settings), progress, ["xfm-fast", "bench"])


@pytest.fixture(scope="module")
def document() -> Document:
    return _run()


def test_every_row_is_measured(document: Document, tmp_path: Path) -> None:
    assert document.ok
    assert [(row.work, row.backend, row.dtype) for row in document.rows] == [
        (work, backend, "fp32") for work in WORKS for backend in (OURS, OFFICIAL)
    ]
    for row in document.rows:
        assert row.status == "measured"
        assert row.parity is not None
        assert row.parity.passed
        assert row.rate == pytest.approx(row.items / (row.median_s or 0))
        for name in ("mfu", "peak_bytes", "needed_flops"):
            assert row.number(name), name
        assert bool(row.numbers("recall")) == (row.work == "retrieval")
        if row.ours:
            official, against = document.reference_row(row), document.headline(row)
            assert official is not None
            assert against is not None
            assert len(row.seconds) == len(official.seconds)
            assert against.ratio == pytest.approx((official.median_s or 0) / (row.median_s or 1))
            assert 0 < (row.number("flops") or 0) <= (official.number("flops") or 0)
    text = next(
        row for row in document.rows if row.work == "embed-text" and row.backend == OFFICIAL
    )
    assert text.number("padded_tokens") == 8 * 40
    assert 80 <= (text.number("tokens") or 0) <= 8 * 16
    assert record.load(record.save(document, tmp_path, report.html(document))) == document


@pytest.mark.slow
def test_whole_runs_have_rows_of_tasks() -> None:
    document = _run(quick=False)
    assert document.ok
    tasks = ("vqa", "nlvr2", "grounding", "captioning")
    assert [(row.work, row.backend, row.items) for row in document.rows[2 * len(WORKS) :]] == [
        (task, backend, 3) for task in tasks for backend in (OURS, OFFICIAL)
    ]


def test_checkpoints(tmp_path: Path) -> None:
    def stop(name: str) -> None:
        if name.startswith("embed"):
            raise KeyboardInterrupt

    XFM(preset_config("tiny")).save_pretrained(tmp_path / "model")
    document = _run(Progress(stage=stop), random=None, model=str(tmp_path / "model"))
    assert document.model is not None
    assert (document.model.trained, document.model.meaningful_recall) == (True, False)
    XFM(preset_config("tiny"), heads=("matching",)).save_pretrained(tmp_path / "headless")
    with pytest.raises(UnavailableError, match="contrastive"):
        _run(random=None, model=str(tmp_path / "headless"))
