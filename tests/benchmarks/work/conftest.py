"""Benchmarks of tests show that they run and what they write: their probes need not find what this machine can do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from xfm_fast.benchmarks import machine


@pytest.fixture(scope="module", autouse=True)
def _small_probes_and_the_same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(machine.PROBE_SHAPE, "cpu", (128, 256, 256))
        patch.setitem(machine.COPY_BYTES, "cpu", 1 << 16)
        yield
    torch.set_num_threads(threads)
