"""Scenarios and the COCO evaluation from end to end on the tiny model; what breaks, and what is interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from xfm_fast import flops
from xfm_fast.benchmarks import files, report
from xfm_fast.benchmarks.contenders import registry
from xfm_fast.benchmarks.contenders.engine import Built
from xfm_fast.benchmarks.contenders.official_algorithm import OfficialTwin
from xfm_fast.benchmarks.contenders.ours import OurEngine
from xfm_fast.benchmarks.contenders.registry import Contender
from xfm_fast.benchmarks.files import load
from xfm_fast.benchmarks.material.inputs import preset_config
from xfm_fast.benchmarks.measure import Progress
from xfm_fast.benchmarks.options import CocoOptions, ModelOptions, ScenarioOptions
from xfm_fast.benchmarks.record import OFFICIAL, OURS, Document, Row
from xfm_fast.benchmarks.work import coco, scenario, setting
from xfm_fast.benchmarks.work.coco import Sizes, receipt
from xfm_fast.benchmarks.work.setting import Scale
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels.cpu import gemm

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
FEW: dict[str, Any] = {"preset": "tiny", "quick": True, "threads": 1, "dtype": ("fp32",)}
TINY = ScenarioOptions(**FEW, baselines=(OURS,))


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two rounds of two requests, and trials of a tenth of a second."""
    threads, whole = torch.get_num_threads(), Scale.of

    def less(work: str, options: ModelOptions, device: torch.device) -> Scale:
        found = whole(work, options, device)
        return replace(found, requests=3, rounds=2, block=2, budget_s=0.1, trial_s=0.1, trials=3, texts=4, batch=2)

    monkeypatch.setattr(Scale, "of", less)
    yield
    torch.set_num_threads(threads)


def _by_contender(document: Document, mode: str) -> dict[str, Row]:
    return {row.contender: row for row in document.rows if row.mode == mode}


def test_every_mode_fills_its_rows(tmp_path: Path) -> None:
    document = scenario.run("rerank", replace(TINY, baselines=("torch-eager",)), command=["xfm-fast", "bench"])
    assert document.ok
    assert {each.operation: each.chosen for each in document.selections}.get("linear") in gemm.CANDIDATES["linear"]
    assert not document.interrupted
    assert len(document.rows) == 9
    assert {b.contender: b.present for b in document.baselines}[OFFICIAL]
    assert next(b for b in document.baselines if b.contender == "timm").reason == "has no rerank"
    for row in document.rows:
        assert (row.status, row.work, row.dtype) == ("measured", "rerank", "fp32")
        assert row.parity is not None
        assert row.parity.passed
        assert row.conditions is not None
        assert len(row.conditions.gemm_flops_per_s) == len(row.conditions.copy_bytes_per_s) >= 2
        assert row.cost is not None
        assert row.cost.first_call_s > 0
        if row.mode == "server":
            continue
        assert row.efficiency is not None
        assert row.efficiency.needed_flops > 0
        assert row.tokens is not None
        assert row.memory is not None
        assert sum(share.share for share in row.stages) == pytest.approx(1)
        assert sum(share.share for share in row.operations) == pytest.approx(1)
        assert (row.energy is None) == (row.energy_note is not None)
    single, offline, server = (_by_contender(document, mode) for mode in ("single-stream", "offline", "server"))
    ours, official = single[OURS], single[OFFICIAL]
    assert ours.latency is not None
    assert len(ours.latency.samples) % 2 == 0
    assert ours.latency.p50.value <= ours.latency.p90.value <= ours.latency.p99.value
    assert {c.contender for c in ours.against} == {OFFICIAL, "torch-eager"}
    assert official.against == []
    assert official.tokens is not None
    assert ours.tokens is not None
    assert official.tokens.padded == 4 * 40 > ours.tokens.padded == ours.tokens.useful
    assert official.efficiency is not None
    assert ours.efficiency is not None
    assert official.efficiency.flops is not None
    assert ours.efficiency.flops == ours.efficiency.needed_flops < official.efficiency.flops
    batch = offline[OURS]
    assert batch.items == 8
    assert batch.throughput is not None
    assert batch.throughput.value == pytest.approx(8 / np.median(batch.seconds))
    for row in server.values():
        assert row.server is not None
        assert 1 <= len(row.server.trials) <= 3
        assert row.server.max_qps == max((t.rate for t in row.server.trials if t.held), default=0)
        assert "official-algorithm" in row.server.bound_origin
    saved = files.save(document, tmp_path, report.html(document))
    assert load(saved.document) == document


def _with(monkeypatch: pytest.MonkeyPatch, contender: Contender) -> None:
    known = (*registry.ALL, contender)
    for module in (registry, setting):
        monkeypatch.setattr(module, "ALL", known)


class _BreaksLater(OurEngine):
    calls = 0

    def rerank(self, pairs: Any, clock: Any) -> Any:
        type(self).calls += 1
        if type(self).calls > 7:
            raise RuntimeError("out of\nluck")
        return super().rerank(pairs, clock)


def test_a_baseline_that_breaks_is_a_failed_row_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(setup: Any) -> Built:
        raise MemoryError("no room")

    _with(monkeypatch, Contender("never", "never", never))
    _with(monkeypatch, Contender("later", "later", lambda setup: Built(_BreaksLater(setup.model)), schedule="ours"))
    options = replace(TINY, baselines=("never", "later"), mode=("offline", "single-stream"))
    document = scenario.run("rerank", options)
    assert document.ok
    single, offline = (_by_contender(document, mode) for mode in ("single-stream", "offline"))
    assert single["never"].status == offline["never"].status == "failed"
    assert offline["never"].reason == "MemoryError: no room"
    assert single["later"].reason == "RuntimeError: out of luck"
    assert offline["later"].latency is None
    assert {single[name].status for name in (OURS, OFFICIAL)} == {"measured"}
    assert {offline[name].status for name in (OURS, OFFICIAL)} == {"measured"}


def test_what_differs_from_the_official_algorithm_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(OurEngine):
        def rerank(self, pairs: Any, clock: Any) -> Any:
            return super().rerank(pairs, clock) * 1.001

    _with(monkeypatch, Contender("wrong", "wrong", lambda setup: Built(Wrong(setup.model)), schedule="ours"))
    document = scenario.run("rerank", replace(TINY, baselines=("wrong",), mode=("offline",)))
    row = _by_contender(document, "offline")["wrong"]
    assert (row.status, row.throughput) == ("parity failed", None)
    assert "exceeds" in str(row.reason)
    assert document.ok
    right = OfficialTwin.match_logits
    monkeypatch.setattr(OfficialTwin, "match_logits", lambda self, fused: right(self, fused) * 1.001)
    document = scenario.run("rerank", replace(TINY, mode=("offline",)))
    assert not document.ok
    assert _by_contender(document, "offline")[OURS].status == "parity failed"


@pytest.mark.parametrize(("step", "samples"), [("official-algorithm fp32, 1 of 2", 1), ("xfm-fast fp32, 1 of 2", 0)])
def test_interruption_keeps_what_was_measured_and_marks_it(step: str, samples: int, tmp_path: Path) -> None:
    seen: list[str] = []

    def stop(what: str) -> None:
        seen.append(what)
        if what == step and sum(name == step for name in seen) == 2:
            raise KeyboardInterrupt

    document = scenario.run("rerank", replace(TINY, mode=("single-stream", "offline")), Progress(step=stop))
    assert document.interrupted
    single, offline = (_by_contender(document, mode) for mode in ("single-stream", "offline"))
    assert {row.status for row in single.values()} == {"measured"}
    assert {row.status for row in offline.values()} == {"partial"}
    assert "interrupted" in str(offline[OURS].reason)
    assert len(offline[OURS].seconds) == samples
    assert (offline[OURS].throughput is not None) == bool(samples)
    assert load(files.save(document, tmp_path, report.html(document)).document).interrupted


def test_an_interrupted_server_keeps_its_trials() -> None:
    trials = 0

    def stop(what: str) -> None:
        nonlocal trials
        trials += "requests/s" in what
        if trials == 3:
            raise KeyboardInterrupt

    document = scenario.run("rerank", replace(TINY, mode=("server",)), Progress(step=stop))
    assert document.interrupted
    server = [row.server for row in document.rows if row.server is not None]
    assert sum(len(found.trials) for found in server) == 2
    assert {row.status for row in document.rows} == {"partial"}


def test_options_that_cannot_be() -> None:
    with pytest.raises(UnavailableError, match="choose from single-stream, offline, server"):
        scenario.run("rerank", replace(TINY, mode=("batch",)))
    with pytest.raises(InputError, match="above zero"):
        scenario.run("rerank", replace(TINY, mode=("server",), p99_ms=0.0))
    with pytest.raises(UnavailableError, match="choose from xfm-fast"):
        scenario.run("rerank", replace(TINY, baselines=("keras",)))


def test_the_receipt_ends_at_what_ours_spends() -> None:
    config = preset_config("tiny")
    sizes = Sizes(images=3, texts=4, k=2, lengths=[5, 9, 5, 9])
    steps = receipt(config, sizes, scored=9)
    assert sizes.pairs == 3 * 2 + 4 * 2
    encoders = flops.image_encoder(config, 3) + flops.contrastive_features(config, 3, 4)
    official = encoders + flops.text_encoder(config, [40] * 4) + flops.official_fusion(config, 14, 40)
    assert steps[0].flops == official.total
    ours = encoders + flops.text_encoder(config, sizes.lengths) + flops.first_self_attention(config, sizes.lengths)
    ours += flops.image_memory(config, 3)
    fused = flops.fusion(config, [5, 9], first_token_only=True, self_attended=True).total * 9 / 2
    assert steps[-1].flops == pytest.approx(ours.total + fused + flops.matching_head(config, 9).total)
    assert np.prod([step.factor for step in steps]) == pytest.approx(steps[0].flops / steps[-1].flops)
    # The work of a text grows with the square of its length, so one saving may cost a little elsewhere, never here.
    assert all(step.factor >= 1 for step in steps)


def test_the_evaluation_is_projected_from_its_parts() -> None:
    document = coco.run(CocoOptions(**FEW))
    found = document.coco
    assert found is not None
    assert (found.images, found.texts, found.k) == (5000, 25010, 256)
    official, ours = found.evaluations
    assert (official.procedure, ours.procedure) == ("official-algorithm", "xfm-fast")
    assert official.pairs == ours.pairs == 5000 * 256 + 25010 * 256
    for evaluation in found.evaluations:
        assert evaluation.kind == "projected"
        assert evaluation.total_s.value == pytest.approx(sum(evaluation.seconds.values()), rel=0.7)
    assert found.receipt[0].flops == official.flops > found.receipt[-1].flops == ours.flops


def test_the_evaluation_of_own_images_is_run(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(noise.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / f"{number}.jpg")
        (tmp_path / f"{number}.txt").write_text(f"picture {number} of noise\nanother caption with number {number}\n")
    document = coco.run(CocoOptions(**FEW, data=tmp_path, k=3))
    found = document.coco
    assert document.ok
    assert found is not None
    assert (found.images, found.texts, found.k) == (5, 10, 3)
    assert found.parity is not None
    assert found.parity.passed
    official, ours = found.evaluations
    assert (ours.kind, ours.measured_share) == ("measured", 1.0)
    assert ours.pairs <= official.pairs == 5 * 3 + 10 * 3
    assert 0 < official.measured_share <= 1
    assert found.receipt[-1].saving == "pairs of both directions once"
    assert found.recall is not None
    assert set(found.recall) >= {"txt_r1", "img_r10"}
