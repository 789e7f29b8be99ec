"""The error criterion accepts any order of summation and rejects what a wrong kernel gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, assert_as_accurate, draws, widened

each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


def product(x: Tensor, y: Tensor) -> Tensor:
    return x @ y


def operands(rows: int, terms: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One term of every sum outweighs the others, as the target's does in a cross-entropy."""
    x, y = torch.randn(rows, terms), torch.randn(terms, columns)
    x[torch.arange(rows), torch.randint(terms, (rows,))] *= terms**0.5
    return x.to(dtype), y.to(dtype)


def rejected(found: Tensor, x: Tensor, y: Tensor) -> None:
    with pytest.raises(AssertionError):
        assert_as_accurate(found, product, x, y)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 64, 1), (40, 96, 50)])
def test_any_order_of_summation_is_accurate(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x, y = operands(*shape, dtype)
    wide = [t.to(torch.promote_types(dtype, torch.float32)) for t in (x, y)]
    one_by_one = sum(wide[0][:, k, None] * wide[1][k] for k in torch.randperm(len(y)).tolist())
    blocks = sum(a @ b for a, b in zip(wide[0].split(16, 1), wide[1].split(16), strict=True))
    for found in (one_by_one, blocks, x.double() @ y.double()):
        assert isinstance(found, Tensor)
        assert_as_accurate(found.to(dtype), product, x, y)


@each_dtype
def test_wrong_results_are_rejected(dtype: torch.dtype) -> None:
    x, y = operands(13, 700, 20, dtype)
    right = product(x, y)
    rejected(product(x[:, :-1], y[:-1]), x, y)
    for value in (float(right[0, 0] + 0.2 * right.abs().max()), torch.nan, torch.inf):
        wrong = right.clone()
        wrong[0, 0] = value
        rejected(wrong, x, y)
    rejected(right[:, :2], x, y)
    rejected(right.to(torch.float16), x, y)


def test_small_but_systematic_errors_are_rejected() -> None:
    """All entries by three times the error of plain PyTorch, a single one by fifty times; sums in half precision."""
    x, y = operands(40, 96, 50, torch.float32)
    right, truth = product(x, y), product(*widened((x, y)))
    error = max(
        float((p.double() - truth).square().mean().sqrt()) for p in draws(lambda: product(x, y))
    )
    rejected((right.double() + 3 * error).float(), x, y)
    wrong = right.clone()
    wrong[1, 1] += 50 * error
    rejected(wrong, x, y)
    x, y = operands(40, 300, 50, torch.bfloat16)
    found = torch.zeros(40, 50, dtype=torch.bfloat16)
    for k in range(300):
        found += x[:, k, None] * y[k]
    rejected(found, x, y)
    rejected(found.float(), x.float(), y.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_an_error_that_plain_pytorch_shares_is_rejected(dtype: torch.dtype) -> None:
    truth = torch.randn(50, dtype=torch.float64)
    for factor, passes in ((1.0, True), (0.72, False)):
        shared = (factor * truth).to(dtype)
        if passes:
            assert_accurate(shared, [shared], truth, "right")
            continue
        with pytest.raises(AssertionError, match="whoever shares it"):
            assert_accurate(shared, [shared], truth, "wrong")


def test_infinities_have_to_agree() -> None:
    truth = torch.tensor([1.0, torch.inf, torch.nan], dtype=torch.float64)
    same = truth.float()
    assert_accurate(same, [same], truth, "same")
    for i, value in ((0, torch.inf), (1, 3e38), (1, -torch.inf), (2, 0.0)):
        other = same.clone()
        other[i] = value
        with pytest.raises(AssertionError):
            assert_accurate(other, [same], truth, "other")
