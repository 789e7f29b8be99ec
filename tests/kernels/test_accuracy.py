"""The error criterion: it takes whatever another order of summation may give, and notices what a wrong kernel gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import ShuffledSums, assert_accurate, assert_as_accurate, draws, widened

each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
# Rows, terms of a sum, columns: a single result, a few, many; short and long sums.
SHAPES = [(1, 64, 1), (2, 700, 3), (40, 96, 50)]


def product(x: Tensor, y: Tensor) -> Tensor:
    return x @ y


def operands(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Among the terms of every sum is one that outweighs the others, as the target's is in a cross-entropy."""
    generator = torch.Generator().manual_seed(seed)
    rows, terms, columns = shape
    x, y = torch.randn(rows, terms, generator=generator), torch.randn(terms, columns, generator=generator)
    x[torch.arange(rows), torch.randint(terms, (rows,), generator=generator)] *= terms**0.5
    return x.to(dtype), y.to(dtype)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def one_by_one(x: Tensor, y: Tensor) -> Tensor:
    found = torch.zeros(len(x), y.shape[1], dtype=wide(x).dtype)
    for k in range(len(y)):
        found += wide(x)[:, k, None] * wide(y)[k]
    return found.to(x.dtype)


def shuffled(x: Tensor, y: Tensor) -> Tensor:
    order = torch.randperm(len(y))
    return one_by_one(x[:, order], y[order])


def blocked(x: Tensor, y: Tensor) -> Tensor:
    parts = [wide(a) @ wide(b) for a, b in zip(x.split(16, 1), y.split(16), strict=True)]
    return sum(parts[1:], parts[0]).to(x.dtype)


def exact(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() @ y.double()).to(x.dtype)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_any_order_of_summation_is_accurate(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, y = operands(shape, dtype, 0)
    for order in (one_by_one, shuffled, blocked, exact):
        assert_as_accurate(order(x, y), product, x, y)


def rejected(found: Tensor, x: Tensor, y: Tensor) -> None:
    with pytest.raises(AssertionError, match=r"exceeds|not close"):
        assert_as_accurate(found, product, x, y)


def spread(x: Tensor, y: Tensor) -> float:
    """The root-mean-square error of the worst order."""
    truth = product(*widened((x, y)))
    return max(float((p.double() - truth).square().mean().sqrt()) for p in draws(lambda: product(x, y)))


@each_dtype
def test_what_is_wrong_is_noticed(dtype: torch.dtype) -> None:
    x, y = operands((13, 700, 20), dtype, 0)
    right = product(x, y)
    rejected(product(x[:, :-1], y[:-1]), x, y)
    wrong = right.clone()
    wrong[-1, -1] += 0.2 * right.abs().max()
    rejected(wrong, x, y)
    wrong = right.clone()
    wrong[0, 0] = torch.nan
    rejected(wrong, x, y)
    wrong[0, 0] = torch.inf
    rejected(wrong, x, y)


@pytest.mark.parametrize("shape", [(40, 96, 50), (13, 700, 20)])
def test_small_but_systematic_errors_are_noticed(shape: tuple[int, int, int]) -> None:
    """All entries by three times the error that plain PyTorch makes; a single one by fifty times."""
    x, y = operands(shape, torch.float32, 1)
    right, error = product(x, y), spread(x, y)
    rejected((right.double() + 3 * error).float(), x, y)
    wrong = right.clone()
    wrong[1, 1] += 50 * error
    rejected(wrong, x, y)


def half_sums(x: Tensor, y: Tensor) -> Tensor:
    found = torch.zeros(len(x), y.shape[1], dtype=x.dtype)
    for k in range(len(y)):
        found += x[:, k, None] * y[k]
    return found


def test_sums_in_half_precision_are_noticed() -> None:
    x, y = operands((40, 300, 50), torch.bfloat16, 0)
    rejected(half_sums(x, y), x, y)
    narrow = x.float(), y.float()
    rejected(half_sums(x, y).float(), *narrow)


def test_a_result_of_another_type_or_shape_is_noticed() -> None:
    x, y = operands((4, 8, 3), torch.float32, 0)
    with pytest.raises(AssertionError):
        assert_as_accurate((x @ y).double(), product, x, y)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate((x @ y)[:, :2], product, x, y)


def test_infinities_have_to_agree() -> None:
    truth = torch.tensor([1.0, torch.inf, torch.nan], dtype=torch.float64)
    same = truth.float()
    assert_accurate(same, [same], truth, "same")
    for i, value in ((0, torch.inf), (1, 3e38), (1, -torch.inf), (2, 0.0)):
        other = same.clone()
        other[i] = value
        with pytest.raises(AssertionError):
            assert_accurate(other, [same], truth, "other")


@each_dtype
@pytest.mark.parametrize("inference", [False, True])
def test_every_product_is_shuffled(inference: bool, dtype: torch.dtype) -> None:
    """Whatever it is called, in inference mode too; in half precision the sum is rounded once."""
    x, y, b = torch.randn(3, 5, 90).to(dtype), torch.randn(90, 7).to(dtype), torch.randn(7).to(dtype)
    seen: list[torch.Size] = []

    class Seen(ShuffledSums):
        def product(self, x: Tensor, y: Tensor, *args: Tensor, **kwargs: float) -> Tensor:
            seen.append(x.shape)
            return super().product(x, y, *args, **kwargs)

    with torch.inference_mode(inference), Seen(0):
        found = [
            torch.nn.functional.linear(x, y.t(), b),
            torch.nn.functional.linear(x, y.t()) + b,
            x @ y + b,
            torch.baddbmm(b, x, y.expand(3, 90, 7)),
            torch.einsum("bnk,km->bnm", x, y) + b,
            b / 2 + torch.addmm(b, x.flatten(0, 1), y, beta=0.5, alpha=1.0).view(3, 5, 7),
        ]
    assert len(seen) == len(found)
    truth = x.double() @ y.double() + b.double()
    for value in found:
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=200 * float(torch.finfo(dtype).eps))
