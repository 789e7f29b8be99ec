"""Benchmarks of tests show that they run and what they write: their probes need not find what this machine can do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from xfm_fast.benchmarks import measure


@pytest.fixture(scope="module", autouse=True)
def _small_probes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measure.PROBE_SHAPE, "cpu", (128, 256, 256))
        patch.setitem(measure._COPY_BYTES, "cpu", 1 << 16)
        yield
