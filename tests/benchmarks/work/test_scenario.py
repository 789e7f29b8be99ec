"""Scenarios and the COCO evaluation from end to end on the tiny model; arrivals on a clock of the test's own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from xfm_fast import flops
from xfm_fast.benchmarks import record, report
from xfm_fast.benchmarks.options import ModelOptions, ScenarioOptions
from xfm_fast.benchmarks.record import OFFICIAL, OURS, Document, Result, load
from xfm_fast.benchmarks.work import coco, registered
from xfm_fast.benchmarks.work.coco import Passes, Sizes, receipt
from xfm_fast.benchmarks.work.model import Scale
from xfm_fast.benchmarks.work.scenario import RateSearch, Trial, poisson_arrivals, serve
from xfm_fast.testing import preset_config

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
FEW: dict[str, Any] = {"random": "tiny", "quick": True, "dtype": ("fp32",), "device": "cpu"}
TINY = ScenarioOptions(**FEW, baselines=(OURS,))


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take two rounds of two requests, and trials of a tenth of a second."""
    resolve = Scale.of

    def less(work: str, options: ModelOptions, device: torch.device) -> Scale:
        return replace(
            resolve(work, options, device),
            requests=3,
            rounds=2,
            block=2,
            budget_s=0.1,
            trial_s=0.1,
            trials=3,
            texts=4,
            batch=2,
        )

    monkeypatch.setattr(Scale, "of", less)


def _by_backend(document: Document, mode: str) -> dict[str, Result]:
    return {row.backend: row for row in document.rows if row.mode == mode}


def test_every_mode_fills_its_rows(tmp_path: Path) -> None:
    document = registered()["rerank"](replace(TINY, baselines=("torch-eager",)))
    assert document.ok
    assert len(document.rows) == 9
    reasons = {baseline.backend: baseline.reason for baseline in document.baselines}
    assert (reasons[OFFICIAL], reasons["timm"]) == (None, "has no rerank")
    for row in document.rows:
        assert (row.status, row.work, row.dtype) == ("measured", "rerank", "fp32")
        assert row.parity is not None
        assert row.parity.passed
        assert row.number("first_call_s")
    single, offline, server = (
        _by_backend(document, mode) for mode in ("single-stream", "offline", "server")
    )
    ours, official = single[OURS], single[OFFICIAL]
    assert {c.backend for c in ours.against} == {OFFICIAL, "torch-eager"}
    tokens = [
        row.number(name) or 0 for row in (official, ours) for name in ("padded_tokens", "tokens")
    ]
    assert 4 * 40 == tokens[0] > tokens[1] == tokens[2] == tokens[3]
    counts = [
        row.number(name) or 0 for row in (official, ours) for name in ("flops", "needed_flops")
    ]
    assert counts[0] > counts[1] == counts[2] == counts[3]
    assert offline[OURS].items == 8
    for row in server.values():
        held = [
            float(rate)
            for rate, p99 in row.numbers("trials").items()
            if p99 <= (row.number("bound_s") or 0)
        ]
        assert 1 <= len(row.numbers("trials")) <= 3
        assert row.number("max_qps") == pytest.approx(max(held, default=0), rel=1e-4)
        assert OFFICIAL in row.text("bound_origin")
    assert load(record.save(document, tmp_path, report.html(document))) == document


class _Machine:
    """Answers a batch in a given time, on a clock that moves only when it works or sleeps."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.now, self.seconds, self.batches = 0.0, seconds, list[list[int]]()

    def answer(self, numbers: Sequence[int]) -> None:
        self.batches.append(list(numbers))
        self.now += self.seconds(len(numbers))

    def sleep(self, seconds: float) -> None:
        # A wait of no length would never end.
        self.now += max(seconds, 1e-6)

    def serve(self, rate: float, requests: int, largest: int = 1, bound_s: float = 1e9) -> Trial:
        return serve(
            self.answer,
            rate,
            requests,
            largest_batch=largest,
            bound_s=bound_s,
            seed=3,
            clock=lambda: self.now,
            sleep=self.sleep,
        )


def test_latency_is_that_of_a_queue_with_one_server_and_poisson_arrivals() -> None:
    arrivals = poisson_arrivals(50.0, 20_000, seed=1)
    gaps = [b - a for a, b in zip([0.0, *arrivals], arrivals, strict=False)]
    assert arrivals != poisson_arrivals(50.0, 20_000, seed=2)
    # Of an exponential distribution the standard deviation is the mean.
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.03) == statistics.stdev(gaps)
    machine = _Machine(lambda size: 0.01)
    served = machine.serve(60.0, 500)
    free, expected = 0.0, []
    for arrival in poisson_arrivals(60.0, 500, seed=3):
        free = max(free, arrival) + 0.01
        expected.append(free - arrival)
    assert served.latencies == pytest.approx(expected, abs=1e-4)
    assert [request for batch in machine.batches for request in batch] == list(range(500))
    assert served.held


def test_waiting_requests_are_answered_together_and_an_overload_ends_early() -> None:
    # Alone 10 ms each cannot bear 400 a second; eight in 12 ms can.
    machine = _Machine(lambda size: 0.01 + 0.0003 * size)
    served = machine.serve(400.0, 400, largest=8, bound_s=0.05)
    assert served.held
    assert len(machine.batches) < 200
    assert max(len(batch) for batch in machine.batches) == 8
    served = _Machine(lambda size: 0.01).serve(300.0, 1000, bound_s=0.05)
    assert not served.held
    # One percent of the requests may be late, and one more ends the trial.
    assert sum(latency > 0.05 for latency in served.latencies) == 11
    assert len(served.latencies) < 200


@pytest.mark.parametrize(("capacity", "start"), [(137.0, 1.0), (0.02, 5000.0)])
def test_the_search_closes_in_on_the_capacity(capacity: float, start: float) -> None:
    search = RateSearch(start, max_trials=60)
    while not search.done:
        rate = search.next_rate()
        search.trials.append(Trial(rate, [0.1], rate <= capacity))
    assert search.best <= capacity < search.worst
    assert search.worst / search.best <= 1.1


def test_the_receipt_ends_at_what_ours_spends() -> None:
    config = preset_config("tiny")
    sizes = Sizes(images=3, texts=4, k=2, lengths=[5, 9, 5, 9])
    steps = list(receipt(config, sizes).values())
    encoders = flops.image_encoder(config, 3) + flops.contrastive_features(config, 3, 4)
    official = (
        encoders + flops.text_encoder(config, [40] * 4) + flops.official_fusion(config, 14, 40)
    )
    assert steps[0] == official.total
    ours = (
        encoders
        + flops.text_encoder(config, sizes.lengths)
        + flops.first_self_attention(config, sizes.lengths)
    )
    ours += flops.image_memory(config, 3)
    fused = flops.fusion(config, [5, 9], first_token_only=True, self_attended=True).total * 14 / 2
    assert steps[-1] == pytest.approx(ours.total + fused + flops.matching_head(config, 14).total)
    assert steps == sorted(steps, reverse=True)


def test_the_evaluation_is_projected_from_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(photos=5, captions=20, texts=33, images=3, official_pairs=7)
    monkeypatch.setattr(coco.Passes, "of", staticmethod(lambda device, sizes: passes))
    document = coco.run(ModelOptions(**FEW))
    official, ours = document.rows
    assert document.ok
    assert (official.backend, ours.backend) == (OFFICIAL, OURS)
    assert official.number("pairs") == ours.number("pairs") == 5000 * 256 + 25010 * 256
    for row in document.rows:
        assert all(seconds > 0 for seconds in row.numbers("stages").values())
        assert row.median_s == pytest.approx(sum(row.numbers("stages").values()), rel=0.7)
    assert next(iter(ours.numbers("receipt").values())) == official.number("flops")
    assert (official.number("flops") or 0) > (ours.number("flops") or 0)
    assert ours.against[0].ratio == pytest.approx((official.median_s or 0) / (ours.median_s or 1))
