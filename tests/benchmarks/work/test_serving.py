"""The load on the service: a whole measurement."""

from __future__ import annotations

import pytest

from xfm_fast.benchmarks.options import ScenarioOptions
from xfm_fast.benchmarks.record import OURS
from xfm_fast.benchmarks.work import serving


@pytest.mark.slow
def test_the_whole_measurement_of_a_tiny_model() -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    options = ScenarioOptions(
        random="tiny", quick=True, dtype=("fp32",), device="cpu", clients=(1, 4), requests=8
    )
    document = serving.run(options)
    assert document.ok
    assert {row.work for row in document.rows} == {"serve-known", "serve-new"}
    for row in document.rows:
        assert row.status == "measured", row.reason
        assert row.number("clients_p99_s")
        assert row.parity is not None
        assert row.parity.passed
        if row.backend == OURS:
            assert {other.backend for other in row.against} == {"one-at-a-time"}
