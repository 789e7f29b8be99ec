"""The suite from end to end on the tiny model: results, page, table, and what happens when it is stopped or refused."""

import copy
import errno
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from xfm_fast.benchmarks import machine, results, suite, terminal
from xfm_fast.benchmarks.contenders.official_algorithm import OfficialTwin
from xfm_fast.benchmarks.page import render
from xfm_fast.benchmarks.suite import Document, Options, Progress
from xfm_fast.errors import CheckpointError, StorageError, UnavailableError
from xfm_fast.models.xfm import XFM

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
KEYS = ["image-32", "image-48", "text", "rerank", "retrieval"]
VOID = ("meta", "line", "rect", "circle", "br", "link")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _run(progress: Progress | None = None, **changes: Any) -> Document:
    settings: dict[str, Any] = {"preset": "tiny", "quick": True, "threads": 1, **changes}
    return suite.run(Options(**settings), progress, command=["xfm-fast", "bench"])


@pytest.fixture(scope="module")
def document() -> Document:
    return _run(dtypes=("fp32", "bf16"))


def test_every_row_is_measured_and_says_its_work(document: Document) -> None:
    assert document.ok
    assert not document.interrupted
    assert [(row["key"], row["dtype"]) for row in document.rows] == [(k, d) for k in KEYS for d in ("fp32", "bf16")]
    for row in document.rows:
        fast, twin = row["fast"], row["twin"]
        assert row["status"] == "measured"
        assert row["parity"]["error"] <= row["parity"]["band"]
        assert len(fast["seconds"]) == len(twin["seconds"]) == len(row["shares_of_peak"]) >= 1
        assert row["ratio"] == pytest.approx(twin["median_s"] / fast["median_s"])
        assert row["ratio_interval"][0] <= row["ratio_interval"][1]
        assert fast["throughput"] == pytest.approx(row["items"] / fast["median_s"])
        assert len(row["probe"]["flops_per_s"]) == len(fast["seconds"]) + 1
        assert 0 < row["flops"] <= row["official_flops"]
    names = " / ".join(row["name"] for row in document.rows)
    assert "embed 2 images of 32 px" in names
    assert "16 captions" in names
    text = next(row for row in document.rows if row["key"] == "text")
    assert text["tokens"]["padded"] == 8 * 40
    assert 80 <= text["tokens"]["useful"] <= 8 * 16


def test_dtypes_without_hardware_are_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_native_bf16", lambda: False)
    names, absent = suite.choose_dtypes(None)
    assert names == ["fp32"]
    assert "not offered by this CPU" in absent["bf16"]
    monkeypatch.setattr(machine, "has_native_bf16", lambda: True)
    assert suite.choose_dtypes(None) == (["fp32", "bf16"], {})
    with pytest.raises(UnavailableError, match="fp8"):
        suite.choose_dtypes(("fp8",))


def test_results_are_saved_under_two_names(document: Document, tmp_path: Path) -> None:
    saved = results.save(document.content, tmp_path / "deep" / "out")
    read = json.loads(saved.document.read_text())
    assert read["schema_version"] == 1
    assert [row["key"] for row in read["rows"]] == [row["key"] for row in document.rows]
    assert {"cpu", "torch", "python", "commit", "threads", "memory_gb", "system"} <= read["machine"].keys()
    folder = saved.document.parent
    assert (folder / "latest.json").read_bytes() == saved.document.read_bytes()
    assert (folder / "latest.html").read_bytes() == saved.page.read_bytes()
    again = results.save(document.content, folder)
    assert again.document != saved.document
    assert len(list(folder.iterdir())) == 6


class _Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_and_needs_nothing_from_elsewhere(document: Document) -> None:
    page = render(document.content)
    parser = _Balance()
    parser.feed(page)
    assert not parser.open
    assert not parser.links
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page
    assert page.count("<svg") == 3
    assert "prefers-color-scheme: dark" in page
    assert "nan" not in page.lower().replace("finance", "")


def test_page_escapes_what_users_name(document: Document) -> None:
    content = copy.deepcopy(document.content)
    content["data"]["skipped"] = [{"what": "<script>x</script>", "reason": "a & b"}]
    page = render(content)
    assert "<script>" not in page
    assert "a &amp; b" in page


def test_table_shows_every_row(document: Document) -> None:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    terminal.print_report(document.content, console)
    text = console.export_text()
    assert "re-rank 1 image" in text
    assert "speed-up" in text
    assert "means nothing: the weights are random" in text
    assert "18 photographs, 90 captions" in text


@pytest.mark.parametrize("moment", [1, 4, 5])
def test_interruption_keeps_finished_rows(moment: int, tmp_path: Path) -> None:
    stages = 0

    def stop(name: str) -> None:
        nonlocal stages
        stages += 1
        if stages == moment + 1:
            raise KeyboardInterrupt

    document = _run(Progress(stage=stop), dtypes=("fp32",))
    assert document.interrupted
    measured = [row for row in document.rows if row["status"] == "measured"]
    assert len(measured) == max(0, moment - 3)
    saved = results.save(document.content, tmp_path)
    assert json.loads(saved.document.read_text())["interrupted"] is True
    assert "interrupted" in saved.page.read_text()
    terminal.print_report(document.content, Console(quiet=True))


def test_full_disk_leaves_nothing_behind(document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.save(document.content, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        results.save(document.content, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folder_that_cannot_be_made(document: Document, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--out"):
        results.save(document.content, tmp_path / "file" / "out")


def test_no_speed_without_parity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = OfficialTwin.encode_text

    def wrong(self: OfficialTwin, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return right(self, input_ids, attention_mask) * 1.001

    monkeypatch.setattr(OfficialTwin, "encode_text", wrong)
    document = _run(dtypes=("fp32",))
    assert not document.ok
    assert not document.rows
    failed = [check["key"] for check in document.content["parity"] if not check["passed"]]
    assert failed == ["text"]
    assert "exceeds" in render(document.content)


def test_not_a_number_is_no_parity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = XFM.match_logits
    monkeypatch.setattr(XFM, "match_logits", lambda self, fused: right(self, fused) * float("nan"))
    document = _run(dtypes=("fp32",))
    assert not document.ok
    saved = results.save(document.content, tmp_path)
    assert json.loads(saved.document.read_text())["parity"][-1]["error"] is None


def test_own_checkpoint(tmp_path: Path) -> None:
    model = XFM(suite.preset_config("tiny"))
    model.save_pretrained(tmp_path / "model")
    document = _run(checkpoint=tmp_path / "model", dtypes=("fp32",))
    assert document.ok
    assert document.content["model"]["trained"]
    assert not document.content["model"]["meaningful_recall"]


def test_foreign_checkpoint(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError):
        _run(checkpoint=tmp_path / "foreign.pth")


def test_official_clone_that_is_none(tmp_path: Path) -> None:
    document = _run(official=tmp_path, dtypes=("fp32",))
    assert document.content["official"]["status"] == "absent"
    assert "no models/xfm.py" in document.content["official"]["reason"]
    assert "Absent" in render(document.content)


def test_official_clone_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "models" / "xfm.py").write_text("")
    (tmp_path / "models" / "beit2.py").write_text("print('noise')\nimport a_module_that_does_not_exist\n")
    official = _run(official=tmp_path, dtypes=("fp32",)).content["official"]
    assert official["status"] == "absent"
    assert "\n" not in official["reason"]
    assert "Error" in official["reason"]
