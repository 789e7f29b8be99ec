"""pytest-benchmark over the cases of `bench kernels`: `pytest benchmarks/ -k "base and add_layer_norm"` picks some."""

from __future__ import annotations

from typing import Literal, get_args

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from xfm_fast.benchmarks import machine
from xfm_fast.benchmarks.work.kernels import CASES, Direction, case_names, step


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("direction", get_args(Direction))
@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("name", CASES)
def test_op(
    name: str,
    size: str,
    direction: Direction,
    backend: Literal["auto", "reference"],
    benchmark: BenchmarkFixture,
) -> None:
    """Time one pass of our op or of its reference, which has finite results."""
    device = machine.choose_device(None)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_num_threads(machine.default_threads())
    if name not in case_names(device, dtype):
        pytest.skip("this machine lacks the case")
    case = CASES[name](device, dtype, size == "tiny")
    if direction not in case.work:
        pytest.skip("the case is not timed in this direction")
    call = step(case.ours if backend == "auto" else case.reference, case.inputs, direction)

    def finished() -> object:
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = f"{case.name}, {direction}"
    benchmark.extra_info.update(
        device=str(device), threads=torch.get_num_threads(), torch=torch.__version__
    )
    result = benchmark(finished)
    outputs = result if isinstance(result, tuple) else (result,)
    assert all(output.isfinite().all() for output in outputs if output is not None)
