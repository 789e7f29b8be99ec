"""How the tests compare with the official code: models on its weights, and how close is close enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import load_tensors
from tests.kernels.accuracy import assert_accurate

M = TypeVar("M", bound=nn.Module)

# fp64 against fp64: both sides accumulate in another order, no more.
EXACT = 1e-10


@cache
def tensors(name: str) -> dict[str, Tensor]:
    """`load_tensors`, once per process; not to be written to."""
    # The first call may come in inference mode; a later test may want gradients.
    with torch.inference_mode(False):
        return load_tensors(name)


def with_weights(model: M, case: str, dtype: torch.dtype, task: str | None = None) -> M:
    """`model` in evaluation mode with the weights of a golden case, and of one of its fine-tuning tasks."""
    weights = tensors(f"{case}/weights")
    if task is not None:
        extra = tensors(f"{case}/ft_extra_weights")
        weights = weights | {
            name.partition("/")[2]: t for name, t in extra.items() if name.startswith(f"{task}/")
        }
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model.to(dtype).eval()


def inputs_of(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs of a golden case, floating-point ones in `dtype`."""
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors(name).items()}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest entry of `truth`. NaN when either holds NaN."""
    if value.shape != truth.shape:
        raise AssertionError(f"shape {[*value.shape]}, expected {[*truth.shape]}")
    if not truth.numel():
        return 0.0
    truth = truth.double()
    largest = float(truth.abs().max())
    return float((value.detach().double() - truth).abs().max()) / (largest or 1.0)


def assert_agrees(
    name: str, value: Tensor, truth: Tensor, plain: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """fp64 values to 1e-10; fp32 values as accurately as plain PyTorch's, the official run's and other draws."""
    if dtype == torch.float64 or not truth.is_floating_point():
        error = relative_error(value, truth)
        assert error <= EXACT, f"{name}: relative error {error:.2e} exceeds {EXACT:.2e} ({dtype})"
    else:
        assert_accurate(value, plain, truth.double(), name)


def assert_rounded(name: str, value: Tensor, stored: Tensor) -> None:
    """An fp64 value against one that was rounded to fp32 when it was stored."""
    stored, value = stored.double(), value.detach().double()
    allowed = torch.finfo(torch.float32).eps * stored.abs() + EXACT * stored.abs().max()
    excess = ((value - stored).abs() - allowed).max()
    assert excess <= 0, f"{name}: {float(excess):.1e} beyond fp32 rounding"


def assert_gradient_norms(
    found: Mapping[str, Tensor | None],
    expected: Mapping[str, float | None],
    what: str,
    *,
    rel: float = 1e-9,
    small: float = 1e-13,
    zero_is_none: bool = False,
) -> None:
    """The norm of every parameter's gradient is the official one, and there is none where there was none.

    Args:
        small: share of the largest norm that rounding may leave of gradients that are zero but for it (key biases).
        zero_is_none: a gradient of zeros counts as none.
    """
    largest = max(norm for norm in expected.values() if norm is not None)
    for name, gradient in found.items():
        norm = expected[name]
        if norm is None:
            absent = gradient is None or (zero_is_none and not gradient.any())
            assert absent, f"{what} reaches {name}, which it must not"
        else:
            assert gradient is not None, f"{what} does not reach {name}"
            assert gradient.norm().item() == pytest.approx(norm, rel=rel, abs=small * largest), (
                f"{what}: {name}"
            )


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Otherwise every process times anew which library computes a product, and on a busy machine the answer varies."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
