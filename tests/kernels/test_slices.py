"""Products in slices of rows: they are the product, and only a clock that says so makes them run."""

# Operands are one tuple, whose length no checker can know.
# pyright: reportCallIssue=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.agreement import deterministic_algorithms
from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.test_cpu import usable
from xfm_fast.kernels import reference
from xfm_fast.kernels.cpu import gemm


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No measurement before; slices of few rows, which win."""
    monkeypatch.setattr(gemm, "_slices_win", {})
    monkeypatch.setattr(gemm, "_SLICE_ROWS", 32)
    monkeypatch.setattr(gemm, "_best_seconds", lambda candidates, arguments: [1.0, 0.5])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def arguments(rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape).to(dtype) for shape in ((rows, 24), (8, 24), (8,), (rows, 8)))


def slices(*given: Tensor) -> tuple[Tensor, list[int]]:
    """A product with a residual, and the rows of the slices that it was computed in."""
    rows: list[int] = []

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor) -> Tensor:
        rows.append(x.shape[0])
        return F.linear(x, weight, bias) + others[0]

    return gemm.multiply(multiply, *given), rows


@pytest.mark.parametrize("count", [65, 128, 1000])
def test_slices_are_even_and_cover_every_row(count: int) -> None:
    given = arguments(count)
    found, rows = slices(*given)
    assert sum(rows) == count
    assert len(rows) == -(-count // 64)
    assert max(rows) <= 64
    assert len({*rows[:-1]}) <= 1
    assert not any(size % 16 for size in rows[:-1]), "slices are whole tiles"
    assert_as_accurate(found, lambda x, w, b, r: F.linear(x, w, b) + r, *given)


# The compiled kernel divides its work itself.
CANDIDATES = [(operation, name) for operation, found in gemm.CANDIDATES.items() for name in found if name != "llvm"]


@torch.no_grad()
@pytest.mark.parametrize(("operation", "name"), CANDIDATES)
def test_sliced_operations(operation: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not usable(operation, name, torch.bfloat16):
        pytest.skip(f"{name} is rejected here")
    monkeypatch.setattr(gemm, "_choose", lambda *_: name)
    x, weight, bias, residual = arguments(130)
    given: tuple[Any, ...] = (x.view(2, 65, 24), weight, bias)
    if operation == "linear_residual":
        for scale in (None, torch.rand(8).bfloat16()):
            more = (*given, residual.view(2, 65, 8), scale)
            assert_as_accurate(gemm.linear_residual(*more), reference.linear_residual, *more, None)
    else:
        assert_as_accurate(getattr(gemm, operation)(*given), getattr(reference, operation), *given)
    assert gemm._slices_win


def test_what_is_never_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wider types, few rows, a single thread, and whoever wants every run alike: nothing is even timed."""
    for given in (arguments(200, torch.float32), arguments(200, torch.float64), arguments(64)):
        assert slices(*given)[1] == [len(given[0])]
    with deterministic_algorithms():
        assert slices(*arguments(200))[1] == [200]
    torch.set_num_threads(1)
    assert slices(*arguments(200))[1] == [200]
    assert not gemm._slices_win
    torch.set_num_threads(2)
    monkeypatch.setattr(gemm, "_best_seconds", lambda candidates, arguments: [1.0, 0.9])
    assert slices(*arguments(200))[1] == [200], "slices have to win clearly"
