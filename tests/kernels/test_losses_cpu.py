"""Vocabulary losses on CPU: against their references, over several blocks and slices, and their memory."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.accuracy import assert_accurate, assert_as_accurate, draws, widened
from tests.kernels.conftest import each_library
from xfm_fast.kernels import reference
from xfm_fast.kernels.checks import Vocabulary
from xfm_fast.kernels.cpu import losses, workspace

pytestmark = [pytest.mark.usefixtures("library"), each_library("aten", "onednn")]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 64 entries, blocks of few rows and tiles of fewer, so that small inputs are cut like large ones."""
    monkeypatch.setattr(losses, "_SLICE", 64)
    monkeypatch.setattr(losses, "_TILE", 64)
    monkeypatch.setattr(losses, "_BLOCK_BYTES", 200 * 4 * 8)


def make(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, *, bias: bool = True
) -> Arguments:
    h = torch.randn(rows, width).to(dtype)
    w = (torch.randn(vocabulary, width) / width**0.5 * 2).to(dtype)
    target = torch.randint(0, vocabulary, (rows,))
    return h, w, torch.randn(vocabulary).to(dtype) if bias else None, target


def check_loss(arguments: Arguments, smoothing: float = 0.0) -> None:
    loss, gradients = losses.linear_cross_entropy_forward(
        Vocabulary(*arguments, label_smoothing=smoothing)
    )

    def definition(*given: Any) -> Tensor:
        return reference.linear_cross_entropy(*given, label_smoothing=smoothing)

    assert_as_accurate(loss, definition, *arguments)
    check_gradients(gradients, definition, arguments)


def check_rows(arguments: Arguments, ignore_index: int = -100) -> None:
    dout, given = torch.randn(arguments[3].shape), Vocabulary(*arguments, ignore_index)
    out, statistics = losses.token_log_likelihood_forward(given)
    gradients = losses.token_log_likelihood_backward(dout, given, statistics, given.needs)

    def definition(*given: Any) -> Tensor:
        return reference.token_log_likelihood(*given, ignore_index=ignore_index)

    assert_as_accurate(out, definition, *arguments)
    check_gradients(gradients, lambda *given: (definition(*given) * dout).sum(), arguments)


def check_gradients(found: Any, scalar: Any, arguments: Arguments) -> None:
    """Gradients (dh, dw, db) of `scalar`, a function of the arguments."""

    def gradients(h: Tensor, w: Tensor, b: Tensor | None, target: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (h, w, b) if t is not None]
        return [*torch.autograd.grad(scalar(*leaves, *[None] * (3 - len(leaves)), target), leaves)]

    plain, truth = draws(lambda: gradients(*arguments)), gradients(*widened(arguments))
    present = [gradient for gradient in found if gradient is not None]
    for i, (gradient, true) in enumerate(zip(present, truth, strict=True)):
        assert_accurate(gradient, [each[i] for each in plain], true, "hwb"[i])


@each_dtype
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "smoothing"), [(1, 32, 211, 0.0), (37, 111, 300, 0.1)]
)
def test_loss(rows: int, width: int, vocabulary: int, smoothing: float, dtype: torch.dtype) -> None:
    arguments = make(rows, width, vocabulary, dtype)
    arguments[3][2::5] = -100
    check_loss(arguments, smoothing)


@each_dtype
def test_rows(dtype: torch.dtype) -> None:
    arguments = make(60, 40, 211, dtype)
    arguments[3][4::6] = 7
    check_rows(arguments, ignore_index=7)


def test_large_logits_and_slices_of_minus_infinity() -> None:
    h, w, b, target = make(9, 16, 200, torch.float32)
    assert b is not None
    for factor, smoothing in ((1e4, 0.0), (-1e4, 0.25)):
        check_loss((h, w, b + factor * (torch.arange(200) % 3 == 0), target), smoothing)
    b = torch.zeros(200)
    b[:70] = b[150:] = -torch.inf
    for check in (check_loss, check_rows):
        check((h[:4], w, b, torch.tensor([70, 100, 149, 71])))


def test_ignored_rows_of_nan() -> None:
    h, w, b, target = make(9, 16, 90, torch.float32)
    h[3] = torch.nan
    loss, gradients = losses.linear_cross_entropy_forward(
        Vocabulary(h, w, b, torch.full_like(target, -100))
    )
    assert float(loss) == 0
    assert not any(g is None or g.any() for g in gradients)


@each_dtype
def test_the_gradient_of_the_vocabulary_can_wait(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_BLOCK_BYTES", 1 << 20)
    h, w, b, target = make(9, 40, 211, dtype)
    target[:4] = -100
    given = Vocabulary(h, w, b, target)
    loss, early = losses.linear_cross_entropy_forward(given)
    dlogits = losses.logits_gradient(h, w)
    assert dlogits is not None
    same, (dh, dw, db) = losses.linear_cross_entropy_forward(given, dlogits)
    assert dw is None
    late = (dh, losses.vocabulary_gradient(h, target, dlogits), db)
    assert torch.equal(same, loss)
    torch.testing.assert_close(late, early, rtol=0, atol=0)


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


@pytest.mark.parametrize(
    "function", [losses.linear_cross_entropy_forward, losses.token_log_likelihood_forward]
)
def test_no_tensor_is_as_large_as_the_logits(
    function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(losses, "_SLICE", 512)
    monkeypatch.setattr(losses, "_TILE", 1 << 13)
    # Of this test only, not the scratch memory that others left.
    monkeypatch.setattr(workspace, "_local", threading.local())
    given = Vocabulary(*make(400, 4, 4000, torch.float32))
    losses.linear_cross_entropy_forward(given)  # the choice of a library allocates too
    with Allocations() as seen:
        function(given)
    assert seen.largest <= 1.2 * losses._BLOCK_BYTES < 4 * 400 * 4000 / 8


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    rows: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype,
    bias: bool,
    smoothing: float,
    ignored: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    arguments = make(rows, width, vocabulary, dtype, bias=bias)
    arguments[3][:ignored] = -100
    check_loss(arguments, smoothing)
    check_rows(arguments)
