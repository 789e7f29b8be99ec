"""The harness: rounds, intervals, probes, parity bands, and what becomes of a backend that differs or fails."""

from __future__ import annotations

import random
import statistics
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from xfm_fast.benchmarks.measure import (
    Backend,
    Case,
    Comparator,
    benchmark,
)
from xfm_fast.benchmarks.record import Document, groups
from xfm_fast.benchmarks.rounds import Watched, interleave
from xfm_fast.benchmarks.timing import (
    FP32_BAND,
    bootstrap,
    parity_band,
    percentile,
    ratio_interval,
    relative_error,
)
from xfm_fast.benchmarks.work import kernels
from xfm_fast.kernels import ladder
from xfm_fast.kernels.prepared import NotPreparedError

CPU = torch.device("cpu")
X = torch.linspace(-1, 1, 64)


def test_every_backend_runs_once_a_round_in_changing_order() -> None:
    ran: list[str] = []
    works = {name: Watched(lambda name=name: ran.append(name), CPU) for name in "abc"}
    measured = interleave(works, warmups=1, rounds=4, max_rounds=9)
    assert ran[:3] == ["a", "b", "c"]
    rounds = [ran[3 + 3 * i : 6 + 3 * i] for i in range(4)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert all(len(measured.seconds(name)) == 4 for name in works)
    assert all(block.extra["peak_bytes"] for block in works.values())


def _case(*backends: Backend, **more: Any) -> Case:
    return Case(
        "toy", "a toy", backends, judge="plain", reference=lambda dtype: X.sin(), rounds=3, **more
    )


def _measure(*cases: Case) -> Document:
    @benchmark("toy", title="A toy", reference="plain")
    def toy(run: Any) -> Any:
        yield from cases

    return toy(SimpleNamespace())


def _plain(name: str = "plain", change: float = 0.0) -> Backend:
    return Backend(name, "fp32", lambda: lambda: X.sin() + change)


def test_what_agrees_is_timed_and_what_differs_fails_or_lacks_something_is_a_row() -> None:
    def broken() -> Any:
        raise RuntimeError("out of\nluck")

    later = iter([X.sin()])
    document = _measure(
        _case(
            _plain("xfm-fast"),
            _plain(),
            _plain("wrong", 1e-3),
            Backend("broken", "fp32", broken),
            Backend("later", "fp32", lambda: lambda: next(later)),
            Backend("absent", "fp32", broken, lacking=("absent", "is not installed")),
        )
    )
    rows = {row.backend: row for row in document.rows}
    assert {name: row.status for name, row in rows.items()} == {
        "xfm-fast": "measured",
        "plain": "measured",
        "wrong": "parity failed",
        "broken": "failed",
        "later": "failed",
        "absent": "absent",
    }
    assert rows["broken"].reason == "RuntimeError: out of luck"
    assert rows["wrong"].parity is not None
    assert not rows["wrong"].seconds
    assert {other.backend for other in rows["xfm-fast"].against} == {"plain"}
    assert all(len(rows[name].seconds) == 3 for name in ("xfm-fast", "plain"))
    assert document.ok
    assert [[row.place for row in group] for group in groups(document.rows)] == [
        [rows["plain"].place] * 6
    ]


def test_without_an_xfm_fast_that_agrees_nothing_is_timed() -> None:
    document = _measure(_case(_plain("xfm-fast", 1e-3), _plain()))
    assert not document.ok
    assert not document.measured
    nothing = _measure(
        _case(Backend("xfm-fast", "fp32", lambda: lambda: X.sin() * float("nan")), _plain())
    )
    assert nothing.rows[0].parity is not None
    assert nothing.rows[0].parity.error is None


def test_an_interruption_keeps_whole_samples() -> None:
    calls = 0

    def call() -> Any:
        nonlocal calls
        calls += 1
        # Parity, warm-up and a round came before.
        if calls == 4:
            raise KeyboardInterrupt
        return X.sin()

    document = _measure(
        _case(_plain("xfm-fast"), Backend("plain", "fp32", lambda: call)), _case(_plain("late"))
    )
    assert document.interrupted
    assert {row.status for row in document.rows} == {"partial"}
    assert {row.backend for row in document.rows} == {"xfm-fast", "plain"}
    assert [len(row.seconds) for row in document.rows if row.backend == "plain"] == [1]


def test_the_band_follows_from_the_reference_itself() -> None:
    half = X.sin().bfloat16().float()
    case = Case(
        "toy",
        "a toy",
        [],
        judge="plain",
        reference=lambda dtype: half if dtype == "bf16" else X.sin(),
    )
    parity = Comparator(case).parity(Backend("other", "bf16", dict), half)
    assert parity.band == pytest.approx(parity_band(torch.bfloat16, relative_error(half, X.sin())))
    assert parity.passed
    wide = Case(
        "toy",
        "a toy",
        [],
        judge="plain",
        wide=True,
        reference=lambda d: X.sin() + 2e-5 * (d == "fp64"),
    )
    assert Comparator(wide).parity(Backend("other", "fp32", dict), X.sin() + 5e-5).passed
    assert not Comparator(case).parity(Backend("other", "fp32", dict), X.sin() + 5e-5).passed
    int8 = Comparator(case).parity(Backend("other", "int8", dict, band=0.1), half)
    assert int8.cosine == pytest.approx(1, abs=1e-3)


def test_intervals_hold_their_value_and_drift_cancels() -> None:
    fast = [1.0, 2.0, 4.0, 1.5]
    assert ratio_interval([3 * s for s in fast], fast) == pytest.approx((3, 3), rel=0.75)
    draw = random.Random(1)
    values = [draw.gauss(10, 1) for _ in range(200)]
    bounds = bootstrap(partial(np.median, axis=-1), values)
    assert bounds is not None
    assert bounds[0] < statistics.median(values) < bounds[1]
    # The standard error of a median is 1.25 σ / √n.
    assert bounds[1] - bounds[0] == pytest.approx(2 * 1.96 * 1.25 / 200**0.5, rel=0.35)
    assert bootstrap(partial(np.median, axis=-1), values[:2]) is None
    assert [percentile([float(v) for v in range(1, 101)], share) for share in (0.5, 0.99)] == [
        50,
        99,
    ]


def test_errors_and_what_rounding_allows() -> None:
    tensor = torch.tensor([1.0, -4.0])
    assert relative_error(tensor, tensor * 1.5) == pytest.approx(1 / 3)
    assert (
        relative_error(tensor * float("nan"), tensor)
        == relative_error(tensor[:1], tensor)
        == float("inf")
    )
    assert parity_band(torch.float32) == FP32_BAND == 1e-5
    assert parity_band(torch.float32, 1e-5) == pytest.approx(3e-5)
    assert parity_band(torch.bfloat16, 0.01) == pytest.approx(0.02 + 2**-7)


def test_a_fallback_to_pytorch_has_no_time_under_our_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose compilers make attention wrong; other operations keep their rows, which say what ran them."""
    resolve = ladder.resolve

    def faulty(name: Any, *tensors: Any, has_flash: bool = False) -> Any:
        return (
            "reference"
            if has_flash and name is None
            else resolve(name, *tensors, has_flash=has_flash)
        )

    names = ("varlen_attention of captions", "bias_attention", "add_layer_norm", "layer_norm")
    options = SimpleNamespace(device="cpu", dtype="fp32", quick=True)

    def ours() -> dict[tuple[str, str], Any]:
        document = kernels.run(options, cases={name: kernels.CASES[name] for name in names})
        assert all(row.measured for row in document.rows if row.backend == "eager" and row.seconds)
        return {(row.work, row.mode): row for row in document.rows if row.ours}

    before = ours()
    assert before["varlen_attention", "forward"].text("ran") == "varlen_attention: cpu"
    assert before["varlen_attention", "backward"].measured
    monkeypatch.setattr(ladder, "resolve", faulty)
    after = ours()
    for work in ("varlen_attention", "bias_attention"):
        row = after[work, "forward"]
        assert (row.status, row.seconds, row.against) == ("absent", [], [])
        assert f"{work} would be PyTorch's under this name" in (row.reason or "")
        assert (work, "backward") not in after or not after[work, "backward"].seconds
    assert after["add_layer_norm", "backward"].text("ran") == "add_layer_norm: cpu"
    assert after["add_layer_norm", "backward"].measured
    # PyTorch's own is what the operation is on a CPU.
    assert after["layer_norm", "forward"].status == "absent"
    assert "is PyTorch's own kernel on this device" in (after["layer_norm", "forward"].reason or "")


def test_a_kernel_that_is_not_prepared_is_absent_and_no_failure() -> None:
    def refused() -> Any:
        raise NotPreparedError("dq_kernel is not among the prepared kernels")

    document = _measure(_case(_plain(), Backend("xfm-fast", "fp32", refused)))
    (row,) = (row for row in document.rows if row.ours)
    assert (row.status, row.reason) == ("absent", "dq_kernel is not among the prepared kernels")
    assert document.ok
