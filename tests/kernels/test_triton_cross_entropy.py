"""The vocabulary-loss kernels, interpreted: losses and gradients against fp64 over several blocks and slices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, draws, widened
from tests.kernels.triton_testing import interpreted_kernels, poison

interpreted_kernels()

from tests.kernels.test_losses_cpu import Arguments, make  # noqa: E402
from xfm_fast.kernels import reference  # noqa: E402
from xfm_fast.kernels.triton import cross_entropy  # noqa: E402

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 64 columns and blocks of 8 (fp32) or 16 (fp16) rows, so that small inputs are cut like large ones."""
    shrink(monkeypatch, cross_entropy)


def shrink(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setattr(module, "_SLICE", 64)
    monkeypatch.setattr(module, "_BUFFER_BYTES", 64 * 4 * 8)


def by_definition(arguments: Arguments, dout: Tensor, function: Any, *options: Any) -> list[Tensor]:
    h, w, b, target = arguments
    leaves = [t.detach().clone().requires_grad_() for t in (h, w, b) if t is not None]
    out = function(leaves[0], leaves[1], leaves[2] if b is not None else None, target, *options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def loss_by_kernel(
    arguments: Arguments, dloss: Tensor, ignore_index: int = -100, smoothing: float = 0.0, module: Any = cross_entropy
) -> list[Tensor]:
    with poison():
        loss, statistics = module.linear_cross_entropy_forward(*arguments, ignore_index, smoothing)
        gradients = module.linear_cross_entropy_backward(dloss, *arguments, statistics, ignore_index, smoothing)
    return [t for t in (loss, *gradients) if t is not None]


def rows_by_kernel(arguments: Arguments, dout: Tensor, ignore_index: int = -100) -> list[Tensor]:
    with poison():
        out, statistics = cross_entropy.token_log_likelihood_forward(*arguments, ignore_index)
        gradients = cross_entropy.token_log_likelihood_backward(dout, *arguments, statistics, ignore_index)
    return [t for t in (out, *gradients) if t is not None]


def compare(found: list[Tensor], arguments: Arguments, dout: Tensor, *options: Any) -> None:
    plain = draws(lambda: by_definition(arguments, dout, *options))
    truth = by_definition(widened(arguments), dout, *options)
    assert len(found) == len(truth)
    for i, (value, true_value) in enumerate(zip(found, truth, strict=True)):
        name = ("out", "dh", "dw", "db")[i]
        assert value.dtype == plain[0][i].dtype, name
        assert_accurate(value, [p[i] for p in plain], true_value, name)


def check_loss(
    arguments: Arguments, ignore_index: int = -100, smoothing: float = 0.0, module: Any = cross_entropy
) -> None:
    dloss = torch.tensor(0.7)
    found = loss_by_kernel(arguments, dloss, ignore_index, smoothing, module)
    compare(found, arguments, dloss, reference.linear_cross_entropy, ignore_index, smoothing)


def check_rows(arguments: Arguments, ignore_index: int = -100) -> None:
    dout = torch.randn(arguments[3].shape)
    found = rows_by_kernel(arguments, dout, ignore_index)
    compare(found, arguments, dout, reference.token_log_likelihood, ignore_index)


@each_dtype
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 32, 211), (5, 63, 40), (37, 111, 300)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.usefixtures("small_blocks")
def test_loss(rows: int, width: int, vocabulary: int, smoothing: float, dtype: torch.dtype) -> None:
    arguments = make(rows, width, vocabulary, dtype)
    arguments[3][2::5] = -100
    check_loss(arguments, -100, smoothing)


@each_dtype
@pytest.mark.usefixtures("small_blocks")
def test_rows(dtype: torch.dtype) -> None:
    arguments = make(21, 40, 211, dtype)
    arguments[3][4::6] = 7
    check_rows(arguments)
    check_rows(arguments, ignore_index=7)


def test_a_sum_is_cut_into_as_many_parts_as_keep_the_processors_busy() -> None:
    assert cross_entropy.parts_of_sum(1440, 768, 132) == 3
    assert cross_entropy.parts_of_sum(128, 128, 4) == 4
    assert cross_entropy.parts_of_sum(16384, 768, 132) == cross_entropy.parts_of_sum(0, 768, 132) == 1


@pytest.mark.usefixtures("small_blocks")
def test_sums_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of four parts, the last slice of one, since it cannot be cut at aligned addresses."""
    monkeypatch.setattr(cross_entropy, "_processors", lambda device: 4)
    products: list[int] = []
    own = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, y, **given: (products.append(x.shape[0]), own(x, y, **given))[1])
    check_loss(make(37, 111, 600, torch.float32), smoothing=0.1)
    assert products
    assert set(products) == {4}


@each_dtype
def test_shipped_blocks(dtype: torch.dtype) -> None:
    """Two slices of the shipped width; and a vocabulary that fills a fraction of one."""
    check_loss(make(3, 48, 9000, dtype), smoothing=0.1)
    check_rows(make(5, 768, 31, dtype))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(sign: int) -> None:
    """±1e4: nothing overflows, and rows that are certain have a loss of exactly 0."""
    h, w, b, target = make(9, 16, 150, torch.float32)
    assert b is not None
    arguments = (h, w, b + sign * 1e4 * (torch.arange(150) % 3 == 0), target)
    check_loss(arguments)
    check_loss(arguments, smoothing=0.1)
    certain = (torch.zeros(3, 16), w, torch.where(torch.arange(150) == 100, 1e4, -1e4), torch.tensor([100, 100, 99]))
    out, *_ = rows_by_kernel(certain, torch.ones(3))
    assert out.tolist() == [0.0, 0.0, -2e4]


@pytest.mark.usefixtures("small_blocks")
def test_whole_slices_of_minus_infinity() -> None:
    h, w, _, _ = make(4, 16, 200, torch.float32)
    b = torch.zeros(200)
    b[:70] = b[150:] = -torch.inf
    check_rows((h, w, b, torch.tensor([70, 100, 149, 71])))


@pytest.mark.usefixtures("small_blocks")
def test_all_ignored() -> None:
    h, w, b, target = make(9, 16, 90, torch.float32)
    # Not even by logits that overflow.
    h[3] = 1e38
    for value in loss_by_kernel((h, w, b, torch.full_like(target, -100)), torch.tensor(1.0)):
        assert not value.any()


@pytest.mark.usefixtures("small_blocks")
def test_a_target_outside_is_never_garbage() -> None:
    h, w, b, target = make(5, 16, 90, torch.float32)
    target[1], target[3] = 90, -1
    out, *_ = rows_by_kernel((h, w, b, target), torch.ones(5))
    assert out.isnan().tolist() == [False, True, False, True, False]
    assert loss_by_kernel((h, w, b, target), torch.tensor(1.0))[0].isnan()
