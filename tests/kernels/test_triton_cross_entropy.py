"""The vocabulary-loss kernels, interpreted: losses and gradients against fp64 over several blocks and slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, draws, widened
from tests.kernels.triton_testing import interpreted_kernels, mutant, poison

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
def test_without_bias_with_leading_dimensions_and_views() -> None:
    h, w, _, target = make(12, 48, 130, torch.float32, bias=False)
    arguments = (h.view(4, 3, 48).transpose(0, 1), w.t().contiguous().t(), None, target.view(3, 4))
    check_loss(arguments)
    check_rows(arguments)
    out, *_ = rows_by_kernel(arguments, torch.ones(3, 4))
    assert out.shape == (3, 4)


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


def test_no_rows() -> None:
    loss, dh, dw, db = loss_by_kernel(make(0, 16, 90, torch.float32), torch.tensor(1.0))
    assert float(loss) == 0
    assert dh.shape == (0, 16)
    assert not dw.any()
    assert not db.any()


@pytest.mark.usefixtures("small_blocks")
def test_a_target_outside_is_never_garbage() -> None:
    h, w, b, target = make(5, 16, 90, torch.float32)
    target[1], target[3] = 90, -1
    out, *_ = rows_by_kernel((h, w, b, target), torch.ones(5))
    assert out.isnan().tolist() == [False, True, False, True, False]
    assert loss_by_kernel((h, w, b, target), torch.tensor(1.0))[0].isnan()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_the_gradients_asked_for(needs: tuple[bool, bool, bool]) -> None:
    arguments = make(11, 16, 90, torch.float32)
    _, statistics = cross_entropy.linear_cross_entropy_forward(*arguments)
    everything = cross_entropy.linear_cross_entropy_backward(torch.tensor(1.0), *arguments, statistics)
    some = cross_entropy.linear_cross_entropy_backward(torch.tensor(1.0), *arguments, statistics, needs=needs)
    for wanted, value, full in zip(needs, some, everything, strict=True):
        assert full is not None
        assert value is None if not wanted else value is not None and torch.equal(value, full)


@pytest.mark.usefixtures("small_blocks")
def test_no_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, largest = make(24, 8, 400, torch.float32), 0
    original = torch.empty

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal largest
        out = original(*args, **kwargs)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch, "empty", counting)
    loss_by_kernel(arguments, torch.tensor(1.0))
    assert largest <= 400 * 8


@pytest.mark.usefixtures("small_blocks")
def test_same_bits_twice() -> None:
    arguments = make(37, 16, 150, torch.float16)
    first, second = (loss_by_kernel(arguments, torch.tensor(1.0), smoothing=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=12)
@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 40),
    vocabulary=st.integers(2, 200),
    half=st.booleans(),
    bias=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    ignored=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    rows: int, width: int, vocabulary: int, half: bool, bias: bool, smoothing: float, ignored: int, seed: int
) -> None:
    torch.manual_seed(seed)
    arguments = make(rows, width, vocabulary, torch.float16 if half else torch.float32, bias=bias)
    arguments[3][:ignored] = -100
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, cross_entropy)
        check_loss(arguments, smoothing=smoothing)


MUTATIONS = [
    ("- smoothing / vocabulary", ""),
    ("share - (1 - smoothing), share)", "share - 1, share)"),
    ("smoothing * (log_sum - (total / vocabulary - maximum))", "smoothing * log_sum"),
    ("tl.where(target == ignore_index, 0.0, tl.where(wrong", "tl.where(target == -1, 0.0, tl.where(False & wrong"),
    ("counted = target.reshape(-1) != ignore_index", "counted = target.reshape(-1) != -1"),
    ("tl.load(sum_ptr + row) * tl.exp(before - maximum)", "tl.load(sum_ptr + row)"),
    ("picked += tl.load(picked_ptr + row)", "picked += 0"),
    ("(target >= start)", "(target > start)"),
    ("logits - maximum - log_sum", "logits - maximum"),
    ("tl.where(offsets < columns, logits, float(\"-inf\"))", "logits"),
    ("dw_part += _wide_product", "dw_part = _wide_product"),
    ("range(0, vocabulary, self.width)]", "range(0, vocabulary - self.width + 1, self.width)]"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), MUTATIONS, ids=lambda s: s[:30])
def test_bugs_are_noticed(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make(21, 16, 201, torch.float32)
    target = arguments[3]
    target[::4] = -100
    # The last of a slice, the first of a slice, and the very last.
    target[1], target[2], target[3] = 63, 64, 200
    # Slices that differ in what is large, so that sums have to be rescaled.
    bias = arguments[2]
    assert bias is not None
    bias[128:] += 6
    broken = mutant(cross_entropy, old, new, tmp_path)
    for module in (cross_entropy, broken):
        shrink(monkeypatch, module)
    check_loss(arguments, smoothing=0.2)
    with pytest.raises((AssertionError, RuntimeError)):
        check_loss(arguments, smoothing=0.2, module=broken)
