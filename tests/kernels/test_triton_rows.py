"""Row-wise kernels by Triton: precision, dropout, extreme numbers, ids and targets outside their tables."""

# Operations take the arguments of their case by name, which no checker can know.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, assert_as_accurate
from tests.kernels.cases import Case, converted, embedding, leaves, norm, vocabulary
from tests.kernels.test_triton_contract import small_blocks
from tests.kernels.triton_testing import assert_triton_is_accurate, philox
from xfm_fast.kernels import ops
from xfm_fast.kernels.checks import AddNorm, Embedding, Vocabulary
from xfm_fast.kernels.triton import cross_entropy, layers, rows

__all__ = ["small_blocks"]
EPS = 1e-5


def test_rows_far_from_zero() -> None:
    """The variance is computed from differences to the mean: rows near 1e4 keep their digits."""
    case = Case(
        partial(ops.layer_norm, eps=EPS),
        lambda _: {"x": (5, 768), "weight": (768,), "bias": (768,)},
    )
    arguments = case.arguments()
    arguments["x"] += 1e4
    assert_triton_is_accurate(case, {k: t.requires_grad_() for k, t in arguments.items()})


def test_rows_too_wide() -> None:
    with pytest.raises(ValueError, match=r"\[2, 8193\].*8192"):
        layers.layer_norm_forward(torch.ones(2, 8193), torch.ones(8193), None, EPS)


def factors(count: int, width: int, dropout_p: float, seed: int) -> Tensor:
    """What dropout multiplies with, seen through a branch of ones without a residual."""
    x, weight = torch.ones(count, width), torch.ones(width)
    a = AddNorm(x, None, weight, None, EPS, dropout_p=dropout_p, seed=torch.tensor([seed]))
    return layers.add_layer_norm_forward(a).summed


@pytest.mark.parametrize(("count", "width"), [(3, 32), (2, 111)])
def test_dropout_is_philox_of_seed_row_and_column(count: int, width: int) -> None:
    seed, dropout_p = 0x1234567890, 0.25
    quads = -(-width // 4)
    zero = np.uint64(0)
    words = philox(seed, (np.arange(count * quads, dtype=np.uint64), zero, zero, zero), 10)
    numbers = np.stack(words, 1).reshape(count, quads * 4)[:, :width]
    expected = (
        torch.from_numpy(
            (numbers >> np.uint64(8)).astype(np.int64) >= round(dropout_p * 2**24)
        ).float()
        / 0.75
    )
    torch.testing.assert_close(factors(count, width, dropout_p, seed), expected)


def test_dropout_of_forward_and_backward_agree() -> None:
    kept, case = factors(6, 63, 0.4, 7), norm(6, 63, scaled=True)
    arguments = case.arguments(grad=True)

    def step(dtype: torch.dtype, backend: ops.Backend) -> list[Tensor]:
        values = converted(arguments, dtype)
        options: dict[str, Any] = {"dropout_p": 0.4, "seed": torch.tensor([7])}
        if backend == "reference":
            options = {"x": values["x"] * kept.to(dtype)}
        found = case.operation(**{**values, **options}, backend=backend)
        return [*found, *torch.autograd.grad([t.square().sum() for t in found], leaves(values))]

    found = step(torch.float32, "triton")
    plain, truth = (step(dtype, "reference") for dtype in (torch.float32, torch.float64))
    for i, (value, true) in enumerate(zip(found, truth, strict=True)):
        assert_accurate(value.detach(), [plain[i].detach()], true.detach(), f"result {i}")


def test_more_partial_sums_than_a_tile_holds() -> None:
    partials = torch.randn(2, 3 * 128 + 5, 40)
    for found, parts in zip(rows.ordered_sum(partials, partials, partials), partials, strict=True):
        assert_as_accurate(found, lambda part: part.sum(0), parts)


def test_an_id_outside_its_table_is_never_garbage() -> None:
    a = embedding(29, 63, None).arguments()
    a["tokens"][3], a["tokens"][5], a["positions"][7] = 12, -1, 6
    normed, *_ = layers.embedding_norm_forward(Embedding(**a, eps=EPS))
    bad = normed.isnan().all(1)
    assert bad.nonzero().flatten().tolist() == [3, 5, 7]
    assert not normed[~bad].isnan().any()


@settings(max_examples=5)
@given(st.integers(1, 9), st.integers(1, 140), st.booleans(), st.booleans(), st.booleans())
def test_norms_of_any_shape(
    count: int, width: int, half: bool, scaled: bool, transposed: bool
) -> None:
    case = norm(count, width, scaled=scaled)
    arguments = case.arguments(torch.float16 if half else torch.float32, grad=True)
    if transposed:
        x = arguments["x"].detach()
        arguments["x"] = x.t().contiguous().t().requires_grad_()
    assert_triton_is_accurate(case, arguments)


def test_extreme_pre_activations() -> None:
    """Far out the activation is 0 or the identity, and no exponential overflows on the way there."""
    y = torch.tensor([[-1e4, -200.0, -14.0, -5.0, 0.0, 5.0, 14.0, 1e4]])
    case = Case(ops.linear_gelu, lambda _: {})
    weight = torch.eye(8)
    assert_triton_is_accurate(
        case, {"x": y.requires_grad_(), "weight": weight, "bias": torch.zeros(8).requires_grad_()}
    )
    assert torch.equal(
        rows.bias_gelu_forward(y.detach(), None)[0, [0, 7]], torch.tensor([-0.0, 1e4])
    )


@pytest.mark.usefixtures("small_blocks")
def test_sums_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of four parts, the last slice of one, since it cannot be cut at aligned addresses."""
    monkeypatch.setattr(cross_entropy, "multiprocessors", lambda device: 4)
    case = vocabulary(ops.linear_cross_entropy, 37, 111, 600, label_smoothing=0.1)
    assert_triton_is_accurate(case, case.arguments(grad=True))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("sign", "smoothing"), [(1, 0.0), (-1, 0.1)])
def test_large_logits(sign: int, smoothing: float) -> None:
    """±1e4: nothing overflows, and rows that are certain have a loss of exactly 0."""
    case = vocabulary(ops.linear_cross_entropy, 9, 16, 150, label_smoothing=smoothing)
    arguments = case.arguments(grad=True)
    with torch.no_grad():
        arguments["b"] += sign * 1e4 * (torch.arange(150) % 3 == 0)
    assert_triton_is_accurate(case, arguments)
    b = torch.where(torch.arange(150) == 100, 1e4, -1e4)
    certain = (torch.zeros(3, 16), torch.randn(150, 16), b, torch.tensor([100, 100, 99]))
    assert ops.token_log_likelihood(*certain, backend="triton").tolist() == [0.0, 0.0, -2e4]


@pytest.mark.usefixtures("small_blocks")
def test_whole_slices_of_minus_infinity() -> None:
    case = vocabulary(ops.token_log_likelihood, 4, 16, 200)
    arguments = case.arguments(grad=True) | {"target": torch.tensor([70, 100, 149, 71])}
    with torch.no_grad():
        arguments["b"].zero_()
        arguments["b"][:70] = arguments["b"][150:] = -torch.inf
    assert_triton_is_accurate(case, arguments)


@pytest.mark.usefixtures("small_blocks")
def test_rows_that_do_not_count() -> None:
    case = vocabulary(ops.linear_cross_entropy, 9, 16, 90)
    arguments = case.arguments(grad=True)
    with torch.no_grad():
        arguments["h"][3] = 1e38  # not even by logits that overflow
    loss = case.operation(**arguments | {"target": torch.full((9,), -100)}, backend="triton")
    assert not any(value.any() for value in (loss, *torch.autograd.grad(loss, leaves(arguments))))


@pytest.mark.usefixtures("small_blocks")
def test_a_target_outside_is_never_garbage() -> None:
    h, w, b, target = vocabulary(ops.linear_cross_entropy, 5, 16, 90).arguments().values()
    target[1], target[3] = 90, -1
    a = Vocabulary(h, w, b, target)
    out, _ = cross_entropy.token_log_likelihood_forward(a)
    assert out.isnan().tolist() == [False, True, False, True, False]
    assert cross_entropy.linear_cross_entropy_forward(a)[0].isnan()
