"""Products in slices of rows: they are the product, and only a clock that says so makes them run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    """Nothing measured before; rows that a test can afford."""
    monkeypatch.setattr(gemm, "_slices_win", {})
    monkeypatch.setattr(gemm, "_SLICE_ROWS", 32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def clock(monkeypatch: pytest.MonkeyPatch, whole: float, sliced: float) -> list[Any]:
    """A clock that gives these seconds, and a list of what it was asked to time."""
    asked: list[Any] = []

    def best_seconds(candidates: Sequence[Callable[..., Tensor]], arguments: tuple[Any, ...]) -> list[float]:
        asked.append((candidates[0], arguments[0].shape[0]))
        return [whole, sliced]

    monkeypatch.setattr(gemm, "_best_seconds", best_seconds)
    return asked


class Counted:
    """A linear layer that remembers the rows of its calls."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor) -> Tensor:
        self.rows.append(x.shape[0])
        out = F.linear(x, weight, bias)
        return out + others[0] if others else out


def arguments(rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    x, weight, bias = torch.randn(rows, 24), torch.randn(8, 24), torch.randn(8)
    return tuple(t.to(dtype) for t in (x, weight, bias, torch.randn(rows, 8)))


@pytest.mark.parametrize("rows", [65, 128, 1000])
def test_slices_are_even_and_cover_every_row(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, whole=1.0, sliced=0.5)
    product = Counted()
    given = arguments(rows)
    found = gemm.multiply(product, *given)
    assert sum(product.rows) == rows
    assert len(product.rows) == -(-rows // 64)
    assert max(product.rows) <= 64
    assert {count % 16 for count in product.rows[:-1]} <= {0}, "slices are whole tiles"
    assert len(set(product.rows[:-1])) <= 1, "slices are of one size"
    assert_as_accurate(found, lambda x, w, b, r: F.linear(x, w, b) + r, *given)


# The compiled kernel divides its work itself.
CANDIDATES = [(operation, name) for operation, found in gemm.CANDIDATES.items() for name in found if name != "llvm"]


@pytest.mark.parametrize(("operation", "name"), CANDIDATES)
def test_sliced_operations(operation: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16
    if not usable(operation, name, dtype):
        pytest.skip(f"{name} is rejected here")
    asked = clock(monkeypatch, whole=1.0, sliced=0.5)
    monkeypatch.setattr(gemm, "_choose", lambda *_: name)
    with torch.no_grad():
        x, weight, bias, residual = arguments(130, dtype)
        x = x.view(2, 65, 24)
        residual = residual.view(2, 65, 8)
        gamma = torch.rand(8).to(dtype)
        if operation == "linear_residual":
            for scale in (None, gamma):
                found = gemm.linear_residual(x, weight, bias, residual, scale)
                assert_as_accurate(found, reference.linear_residual, x, weight, bias, residual, scale, None)
        else:
            found = getattr(gemm, operation)(x, weight, bias)
            assert_as_accurate(found, getattr(reference, operation), x, weight, bias)
    assert asked


def test_what_is_never_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wider types, few rows, a single thread, and whoever wants every run alike: nothing is even timed."""
    clock(monkeypatch, whole=1.0, sliced=0.9)
    narrow = Counted()
    gemm.multiply(narrow, *arguments(200))
    assert narrow.rows == [200], "slices have to win clearly"
    asked = clock(monkeypatch, whole=1.0, sliced=0.5)
    product = Counted()
    gemm.multiply(product, *arguments(200, torch.float32))
    gemm.multiply(product, *arguments(200, torch.float64))
    gemm.multiply(product, *arguments(64))
    with deterministic_algorithms():
        gemm.multiply(product, *arguments(200))
    torch.set_num_threads(1)
    gemm.multiply(product, *arguments(200))
    assert product.rows == [200, 200, 64, 200, 200]
    assert not asked
