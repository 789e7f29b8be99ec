"""Fixtures of every micro-benchmark: device, a dtype that suits it, fixed seeds, a clock that waits for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from xfm_fast.benchmarks.machine import default_threads

Measure = Callable[[Callable[[], Any]], Any]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    """The type that the device is used with: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(default_threads())


@pytest.fixture
def measure(benchmark: BenchmarkFixture, device: torch.device) -> Measure:
    """Times a function and returns what it returned; on a GPU until the device is done."""
    benchmark.extra_info.update(device=str(device), threads=torch.get_num_threads(), torch=torch.__version__)

    def timed(run: Callable[[], Any]) -> Any:
        if device.type != "cuda":
            return benchmark(run)

        def finished() -> Any:
            result = run()
            torch.cuda.synchronize()
            return result

        return benchmark(finished)

    return timed
