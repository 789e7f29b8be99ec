"""Vocabulary losses on CPU: against their definitions, over several blocks and slices, and what they keep in memory."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.conftest import each_library
from xfm_fast.kernels import reference
from xfm_fast.kernels.cpu import losses, workspace

pytestmark = [pytest.mark.usefixtures("library"), each_library("aten", "onednn")]
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor]
NAMES = ("out", "dh", "dw", "db")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 64 entries, blocks of few rows and tiles of fewer, so that small inputs are cut like large ones."""
    shrink(monkeypatch)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_SLICE", 64)
    monkeypatch.setattr(losses, "_TILE", 64)
    monkeypatch.setattr(losses, "_BLOCK_BYTES", 200 * 4 * 8)


def make(rows: int, width: int, vocabulary: int, dtype: torch.dtype, *, bias: bool = True) -> Arguments:
    h = torch.randn(rows, width).to(dtype)
    w = (torch.randn(vocabulary, width) / width**0.5 * 2).to(dtype)
    target = torch.randint(0, vocabulary, (rows,))
    return h, w, torch.randn(vocabulary).to(dtype) if bias else None, target


def check_loss(arguments: Arguments, ignore_index: int = -100, smoothing: float = 0.0) -> None:
    dloss = 0.75
    loss, gradients = losses.linear_cross_entropy_forward(
        *arguments, ignore_index=ignore_index, label_smoothing=smoothing
    )
    found = [loss, *losses.linear_cross_entropy_backward(torch.tensor(dloss), gradients)]
    compare(
        found,
        arguments,
        lambda *a: dloss * reference.linear_cross_entropy(*a, ignore_index=ignore_index, label_smoothing=smoothing),
        dloss,
    )


def check_rows(arguments: Arguments, ignore_index: int = -100) -> None:
    dout = torch.randn(arguments[3].shape)
    out, statistics = losses.token_log_likelihood_forward(*arguments, ignore_index=ignore_index)
    gradients = losses.token_log_likelihood_backward(dout, *arguments, statistics, ignore_index=ignore_index)
    assert_as_accurate(out, lambda *a: reference.token_log_likelihood(*a, ignore_index=ignore_index), *arguments)
    compare(
        [None, *gradients],
        arguments,
        lambda *a: (reference.token_log_likelihood(*a, ignore_index=ignore_index) * dout).sum(),
    )


def compare(found: list[Tensor | None], arguments: Arguments, scalar: Any, factor: float = 1.0) -> None:
    """Value and gradients of `scalar`, a function of the arguments."""
    wanted = [name for name, a in zip(NAMES, (found[0], *arguments[:3]), strict=True) if a is not None]

    def definition(name: str) -> Any:
        def compute(*leaves: Tensor) -> Tensor:
            traced = [t if t is None or not t.is_floating_point() else t.detach().requires_grad_() for t in leaves]
            value = scalar(*traced)
            if name == "out":
                return value.detach() / factor
            return torch.autograd.grad(value, traced[NAMES.index(name) - 1])[0]

        return compute

    for name, value in zip(NAMES, found, strict=True):
        assert (value is not None) == (name in wanted)
        if value is not None:
            assert_as_accurate(value, definition(name), *arguments)


@each_dtype
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 32, 211), (5, 63, 40), (37, 111, 300), (90, 24, 300)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.usefixtures("small_blocks")
def test_loss(rows: int, width: int, vocabulary: int, smoothing: float, dtype: torch.dtype) -> None:
    arguments = make(rows, width, vocabulary, dtype)
    arguments[3][2::5] = -100
    check_loss(arguments, -100, smoothing)


@each_dtype
@pytest.mark.usefixtures("small_blocks")
def test_rows(dtype: torch.dtype) -> None:
    arguments = make(60, 40, 211, dtype)
    arguments[3][4::6] = 7
    check_rows(arguments)
    check_rows(arguments, ignore_index=7)


def test_shipped_blocks() -> None:
    arguments = make(70, 96, 5000, torch.float32)
    check_loss(arguments)
    check_rows(arguments)


@pytest.mark.usefixtures("small_blocks")
def test_without_bias_with_leading_dimensions_and_views() -> None:
    h, w, _, target = make(12, 48, 130, torch.float32, bias=False)
    arguments = (h.view(4, 3, 48).transpose(0, 1), w.t().contiguous().t(), None, target.view(3, 4))
    check_loss(arguments)
    check_rows(arguments)


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.usefixtures("small_blocks")
def test_large_logits(sign: int, smoothing: float) -> None:
    h, w, b, target = make(9, 16, 150, torch.float32)
    assert b is not None
    check_loss((h, w, b + sign * 1e4 * (torch.arange(150) % 3 == 0), target), smoothing=smoothing)
    certain = (torch.zeros(3, 16), w, torch.where(torch.arange(150) == 100, 1e4, -1e4), torch.tensor([100, 100, 99]))
    assert losses.token_log_likelihood_forward(*certain)[0].tolist() == [0.0, 0.0, -2e4]


@pytest.mark.usefixtures("small_blocks")
def test_whole_slices_of_minus_infinity() -> None:
    h, w, _, _ = make(4, 16, 200, torch.float32)
    b = torch.zeros(200)
    b[:70] = b[150:] = -torch.inf
    arguments = (h, w, b, torch.tensor([70, 100, 149, 71]))
    check_loss(arguments)
    check_rows(arguments)


def test_all_ignored() -> None:
    h, w, b, target = make(9, 16, 90, torch.float32)
    # Not even by rows of NaN.
    h[3] = torch.nan
    loss, gradients = losses.linear_cross_entropy_forward(h, w, b, torch.full_like(target, -100))
    assert float(loss) == 0
    for gradient, like in zip(gradients, (h, w, b), strict=True):
        assert gradient is not None
        assert gradient.shape == (like.shape if like is not None else ())
        assert not gradient.any()


def test_no_rows() -> None:
    arguments = make(0, 16, 90, torch.float32)
    loss, (dh, dw, _) = losses.linear_cross_entropy_forward(*arguments)
    assert float(loss) == 0
    assert dh is not None
    assert dw is not None
    assert dh.shape == (0, 16)
    assert not dw.any()
    out, statistics = losses.token_log_likelihood_forward(*arguments)
    assert out.shape == (0,)
    _, dw, _ = losses.token_log_likelihood_backward(out, *arguments, statistics)
    assert dw is not None
    assert not dw.any()


@pytest.mark.parametrize("wrong", [90, -1, 10**9])
def test_a_target_outside_the_vocabulary(wrong: int) -> None:
    h, w, b, target = make(5, 16, 90, torch.float32)
    target[2] = wrong
    for function in (losses.linear_cross_entropy_forward, losses.token_log_likelihood_forward):
        with pytest.raises(IndexError, match=f"{wrong} .*90"):
            function(h, w, b, target)
    assert losses.linear_cross_entropy_forward(h, w, b, target, ignore_index=wrong)[0].isfinite()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
@pytest.mark.usefixtures("small_blocks")
def test_only_the_gradients_asked_for(needs: tuple[bool, bool, bool]) -> None:
    arguments = make(41, 16, 90, torch.float32)
    loss, everything = losses.linear_cross_entropy_forward(*arguments)
    same, some = losses.linear_cross_entropy_forward(*arguments, needs=needs)
    torch.testing.assert_close(same, loss)
    for wanted, value, full in zip(needs, some, everything, strict=True):
        assert full is not None
        assert value is None if not wanted else value is not None and torch.equal(value, full)


def test_a_gradient_of_one_is_not_multiplied() -> None:
    _, gradients = losses.linear_cross_entropy_forward(*make(5, 16, 90, torch.float32))
    assert losses.linear_cross_entropy_backward(torch.tensor(1.0), gradients) is gradients
    doubled = losses.linear_cross_entropy_backward(torch.tensor(2.0), gradients)
    for value, gradient in zip(doubled, gradients, strict=True):
        assert gradient is not None
        assert value is not None
        assert torch.equal(value, 2 * gradient)


@each_dtype
@pytest.mark.parametrize("ignored", [0, 4, 9])
def test_the_gradient_of_the_vocabulary_can_wait(
    ignored: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_SLICE", 64)
    h, w, b, target = make(9, 40, 211, dtype)
    target[:ignored] = -100
    loss, early = losses.linear_cross_entropy_forward(h, w, b, target)
    dlogits = losses.logits_gradient(h, w)
    assert dlogits is not None
    same, (dh, dw, db) = losses.linear_cross_entropy_forward(h, w, b, target, dlogits=dlogits)
    assert dw is None
    late = (dh, losses.vocabulary_gradient(h, target, dlogits), db)
    assert torch.equal(same, loss)
    for found, expected in zip(late, early, strict=True):
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype


@pytest.mark.parametrize(("rows", "block", "kept"), [(40, 40, True), (41, 41, False), (40, 39, False), (0, 40, False)])
def test_logits_are_kept_where_they_are_the_smaller(
    rows: int, block: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    h, w, _, _ = make(rows, 40, 211, torch.float32)
    monkeypatch.setattr(losses, "_BLOCK_BYTES", block * 211 * 4)
    dlogits = losses.logits_gradient(h, w)
    assert (dlogits is not None) == kept
    assert dlogits is None or dlogits.shape == (rows, 211)


@pytest.mark.usefixtures("small_blocks")
def test_same_bits_twice() -> None:
    arguments = make(37, 16, 150, torch.float32)
    (first, a), (second, b) = (losses.linear_cross_entropy_forward(*arguments) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None)


class Allocations(TorchDispatchMode):
    """Size of the largest storage that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("function", [losses.linear_cross_entropy_forward, losses.token_log_likelihood_forward])
def test_no_tensor_is_as_large_as_the_logits(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(losses, "_SLICE", 512)
    monkeypatch.setattr(losses, "_TILE", 1 << 13)
    # Of this test only, not the scratch memory that others left.
    monkeypatch.setattr(workspace, "_local", threading.local())
    arguments = make(400, 4, 4000, torch.float32)
    losses.linear_cross_entropy_forward(*arguments)  # the choice of a library allocates too
    with Allocations() as seen:
        function(*arguments)
    assert seen.largest <= 1.2 * losses._BLOCK_BYTES < 4 * 400 * 4000 / 8


@settings(max_examples=25)
@given(
    rows=st.integers(1, 70),
    width=st.integers(1, 40),
    vocabulary=st.integers(2, 300),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    ignored=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, bias: bool, smoothing: float, ignored: int, seed: int
) -> None:
    torch.manual_seed(seed)
    arguments = make(rows, width, vocabulary, dtype, bias=bias)
    arguments[3][:ignored] = -100
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        check_loss(arguments, smoothing=smoothing)
        check_rows(arguments)
