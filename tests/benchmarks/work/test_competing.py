"""Processes that compete for the cores: their rows, what is said where they cannot be, and real ones."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from xfm_fast.benchmarks.options import SweepOptions
from xfm_fast.benchmarks.record import OFFICIAL, OURS, Document
from xfm_fast.benchmarks.work import competing, sweep
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels.cpu import waiting

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
TINY = SweepOptions(
    preset="tiny", quick=True, threads=1, device="cpu", dtype=("fp32",), batch=2, over=("processes",),
    baselines=("torch-eager",),
)  # fmt: skip


class _Begun(NamedTuple):
    spec: competing.Spec
    count: int
    environment: dict[str, str]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[_Begun]:
    """Crowds that take as many seconds for an answer as there are processes, and those that began."""
    seen: list[_Begun] = []

    class Crowd:
        def __init__(self, spec: competing.Spec, count: int, environment: Any, seconds: float, stack: Any) -> None:
            seen.append(_Begun(spec, count, environment))
            if environment.get("FAIL") == str(count):
                raise UnavailableError("a process ended")

        def __call__(self) -> list[float]:
            return [float(seen[-1].count)]

    monkeypatch.setattr(competing, "Crowd", Crowd)
    return seen


def _run(**changes: Any) -> Document:
    before = torch.get_num_threads()
    try:
        return sweep.run("embed-text", replace(TINY, **changes))
    finally:
        torch.set_num_threads(before)


def test_each_takes_longer_as_there_are_more(begun: list[_Begun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(waiting.SPINS, "77")
    document = _run()
    assert document.ok
    contenders = [OURS, competing.SPINNING, OFFICIAL]
    assert [(row.x, row.contender) for row in document.rows] == [(n, c) for n in (1, 2, 4, 8) for c in contenders]
    for row in document.rows:
        assert (row.over, row.items, row.median_s) == ("processes", 2 * (row.x or 0), row.x)
        assert row.throughput is not None
        assert row.throughput.value == pytest.approx(2)
    assert [fit.exponent for fit in document.fits] == pytest.approx([1, 1, 1])
    spins = {(one.spec.contender, one.environment.get(waiting.SPINS)) for one in begun}
    assert spins == {(OURS, "1000"), (OURS, None), (OFFICIAL, None)}
    # What the work does not pass through is not in the way of the memory.
    config = begun[0].spec.config
    assert (config["vision_depth"], config["fusion_layers"]) == (1, 1)
    assert config["text_layers"] > 1


def test_what_cannot_be_measured_says_why(begun: list[_Begun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "4")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5 << 29, "total": 1})())
    rows = _run().rows
    assert {row.x: row.status for row in rows} == {1: "measured", 2: "measured", 4: "failed", 8: "absent"}
    assert {row.reason for row in rows if row.x == 4} == {"UnavailableError: a process ended"}
    assert all("8 processes need 3 GiB of memory, more than is available" in str(r.reason) for r in rows if r.x == 8)


def test_several_axes_have_one_document() -> None:
    document = _run(over=("threads", "batch"), threads=2, baselines=(OURS,))
    ours = [(row.over, row.x) for row in document.rows if row.ours]
    assert ours == [("threads", 1), ("threads", 2), ("batch", 1), ("batch", 4), ("batch", 16), ("batch", 64)]
    assert {(fit.over, fit.contender) for fit in document.fits} == {("batch", OURS), ("batch", OFFICIAL)}
    places = [row.key for row in document.rows]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("work", "changes", "message"),
    [
        ("rerank", {}, "rerank cannot be swept over 'processes'; choose from batch, resolution, texts, lengths, thr"),
        ("embed-text", {"over": ("batch", "threads"), "values": ("1", "2")}, "values 1,2 belong to one axis"),
    ],
)
def test_sweeps_that_cannot_be(work: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sweep.run(work, replace(TINY, **changes))


@pytest.mark.slow
def test_real_processes_answer_at_the_same_time() -> None:
    document = _run(values=("1", "2"))
    assert document.ok
    assert [(row.x, row.status) for row in document.rows] == [(n, "measured") for n in (1, 2) for _ in range(3)]
    assert all(row.throughput is not None and len(row.seconds) == 3 for row in document.rows)


@pytest.mark.slow
def test_a_process_that_ends_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    spec = competing.Spec("embed-text", "no contender", "fp32", "unknown", {}, {}, 1, 1, 0)
    with ExitStack() as stack, pytest.raises(UnavailableError, match="a process of 1 ended with 1"):
        competing.Crowd(spec, 1, os.environ, 0.1, stack)
    assert "unknown" in capfd.readouterr().err


def test_how_threads_wait() -> None:
    told: dict[str, str] = {}
    waiting.wait_briefly(told)
    assert told == {waiting.SPINS: "1000"}
    assert waiting.told(told).startswith("briefly (GOMP_SPINCOUNT=1000)")
    assert waiting.told({}).startswith("spinning: best alone")
    assert waiting.told({waiting.POLICY: "PASSIVE"}).startswith("briefly (OMP_WAIT_POLICY=passive)")
    for said in ({waiting.POLICY: "active"}, {waiting.SPINS: "infinite"}):
        kept = dict(said)
        waiting.wait_briefly(kept)
        assert kept == said
        assert waiting.told(kept).startswith("spinning")
    assert waiting.as_libgomp_waits({waiting.SPINS: "5", waiting.POLICY: "passive", "HOME": "/"}) == {"HOME": "/"}
