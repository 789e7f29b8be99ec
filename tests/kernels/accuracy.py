"""When a fast operation is accurate enough: judged by fp64 and by what plain PyTorch reaches in the same precision.

How much rounding costs is chance: any library may sum in another order. So plain PyTorch runs several times, with GEMMs
summed by its library and then term by term in random orders. `found` passes when its root-mean-square error is at most
twice that of the worst draw, times the quantile of a mean of n squares (2 for many entries, 12 for a single one), and
its worst entry errs at most twice as much as the worst of the draws, or as the largest of n normal errors may. Both
allow a few roundings of the result itself, for results that plain PyTorch hits exactly.

What plain PyTorch reaches may be nothing: it adds some gradients of half precision in half precision. So there is a
ceiling beside it: the root-mean-square error is a small share of the root mean square of the truth, whoever shares it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, sqrt
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")

# Random orders of summation besides the library's own.
_ORDERS = 3
# Quantiles hold with probability 1 - e⁻¹⁴, one assertion in a million.
_CHANCE = 14.0
# Rounding errors of the result that are forgiven whatever the draws did, in units in the last place: of rounding once,
# whose root mean square is 0.29, in every entry; and two units of the largest entry in any single one.
_EACH, _ONE = 0.3, 2.0
# In fp64 the truth is the definition itself, which errs as much as what it judges; where it sums no product, the draws
# are all alike and only these roundings are left to judge by.
_EACH_FP64, _ONE_FP64 = 16.0, 64.0
# The largest share of the truth that may be wrong. An fp32 result may come of operands in bf16.
_CEILINGS = {
    torch.float64: 1e-9,
    torch.float32: 8 * 2.0**-7,
    torch.float16: 8 * 2.0**-10,
    torch.bfloat16: 8 * 2.0**-7,
}
# Truths that are nothing but rounding, as the gradient of a bias of keys is, have no share.
_NOTHING = 1e-12


def widened(arguments: Any) -> Any:
    """The same arguments in fp64."""
    if isinstance(arguments, Tensor):
        return arguments.double() if arguments.is_floating_point() else arguments
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(widened(a) for a in arguments)
    return arguments


class ShuffledSums(TorchDispatchMode):
    """Within the block, matrix products are summed one term after the other, in an order that follows from a seed.

    As in every library, half precision is summed in fp32 and rounded once. Without a seed terms keep their order, and
    are added by fused multiplications, as compiled kernels do.
    """

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.bmm.default):
            return self.product(*args)
        if func in (aten.addmm.default, aten.baddbmm.default):
            added, x, y = args
            return self.product(x, y, added, **kwargs)
        # In inference mode, operations arrive whole that are otherwise taken apart before.
        with self:
            taken_apart = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if taken_apart is NotImplemented else taken_apart

    def product(
        self,
        x: Tensor,
        y: Tensor,
        added: Tensor | None = None,
        *,
        beta: float = 1,
        alpha: float = 1,
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        found = torch.zeros(*x.shape[:-1], y.shape[-1], dtype=wide)
        columns, rows = x.to(wide).unbind(-1), y.to(wide).unbind(-2)
        if self.generator is None:
            for column, row in zip(columns, rows, strict=True):
                found = (found + column[..., None].double() * row[..., None, :].double()).to(wide)
        else:
            for k in torch.randperm(x.shape[-1], generator=self.generator).tolist():
                found.addcmul_(columns[k][..., None], rows[k][..., None, :])
        if added is not None:
            found = beta * added.to(wide) + alpha * found
        return found.to(x.dtype)


def draws(compute: Callable[[], T], *, fused: bool = False) -> list[T]:
    """What `compute` returns with the library's order of summation, random ones, and that of kernels (`fused`)."""
    found = [compute()]
    for seed in (*range(_ORDERS), *([None] if fused else [])):
        with ShuffledSums(seed):
            found.append(compute())
    return found


def assert_as_accurate(
    found: Tensor, definition: Callable[..., Tensor], *arguments: Any, ceiling: float | None = None
) -> None:
    """`found` is as accurate as `definition(*arguments)`, and of its type."""
    plain = draws(lambda: definition(*arguments))
    assert found.dtype == plain[0].dtype
    assert_accurate(found, plain, definition(*widened(arguments)), "result", ceiling=ceiling)


def assert_below_ceiling(
    found: Tensor, truth: Tensor, name: str, ceiling: float | None = None
) -> None:
    """The error of `found` is a small share of the truth, by root mean squares; by default that of its dtype."""
    error, size = (
        float(t.double().square().mean().sqrt()) for t in (found.double() - truth, truth)
    )
    format = torch.finfo(found.dtype)
    allowed = (
        _CEILINGS[found.dtype] if ceiling is None else ceiling
    ) * size + format.tiny * format.eps
    # Comparisons with NaN are false: NaN fails.
    fits = size < _NOTHING or error <= allowed
    assert fits, f"{name}: rms error {error:.2e} exceeds {allowed:.2e}, whoever shares it"


def assert_accurate(
    found: Tensor,
    plain: Sequence[Tensor],
    truth: Tensor,
    name: str,
    *,
    factor: float = 2.0,
    ceiling: float | None = None,
) -> None:
    """`found` is as accurate as `plain`, the `draws` of plain PyTorch in its precision, by `truth`, the same in fp64.

    It may err `factor` times as much, and by the share `ceiling` of the truth, which is for what magnifies rounding.

    Where the truth is not finite, `found` has to be the same infinity or NaN; `name` is for the message.
    """
    assert truth.dtype == torch.float64, f"{name}: the truth is {truth.dtype}"
    assert found.shape == truth.shape, f"{name}: shape {[*found.shape]} instead of {[*truth.shape]}"
    finite = truth.isfinite()
    torch.testing.assert_close(
        found.double()[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True
    )
    exact = truth[finite]
    n = exact.numel()
    if not n:
        return
    error = found.double()[finite] - exact
    others = torch.stack([p.double()[finite] - exact for p in plain])
    unit = max(torch.finfo(t.dtype).eps for t in (found, plain[0]))
    each, one = (_EACH_FP64, _ONE_FP64) if found.dtype == torch.float64 else (_EACH, _ONE)
    largest, spread = float(exact.abs().max()), float(others.square().mean(1).max().sqrt())
    # The quantile of a mean of n squares of normal errors (Laurent and Massart 2000, lemma 1), and the bound of the
    # largest of n by the sum of their probabilities.
    of_the_mean, of_the_worst = (
        sqrt(1 + 2 * sqrt(_CHANCE / n) + 2 * _CHANCE / n),
        sqrt(2 * (log(2 * n) + _CHANCE)),
    )
    typical = float(error.square().mean().sqrt())
    allowed = factor * of_the_mean * spread + unit * (
        each * float(exact.square().mean().sqrt()) + one * largest / sqrt(n)
    )
    # Comparisons with NaN are false: NaN fails.
    assert typical <= allowed, (
        f"{name}: rms error {typical:.2e} exceeds {allowed:.2e} (plain PyTorch {spread:.2e})"
    )
    worst, other = float(error.abs().max()), float(others.abs().max())
    allowed = factor * max(other, of_the_worst * spread) + one * unit * largest
    assert worst <= allowed, (
        f"{name}: largest error {worst:.2e} exceeds {allowed:.2e} (plain PyTorch {other:.2e})"
    )
    assert_below_ceiling(found[finite], exact, name, ceiling)
