"""Attention of packed sequences on CPU: padded groups of similar lengths, masked keys, dropout."""

# Attention takes the inputs of a case as one tuple, whose length no checker can know.
# pyright: reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, draws, widened
from tests.kernels.cases import offsets
from tests.kernels.conftest import each_library
from xfm_fast.kernels import ops, reference

MIXES = {
    "captions": [(n, n) for n in (12, 10, 13, 7, 1, 11, 13, 13, 9, 10)],
    "captions of one length": [(13, 13)] * 8,
    "first tokens": [(1, n) for n in (12, 10, 13, 7, 1, 11, 13, 13, 9)],
    "gaps": [(5, 5), (0, 7), (4, 0), (9, 9), (3, 40)],
}
each_attention = each_library("aten", "tiled", "exp2", "llvm")


def packed(
    lengths: list[tuple[int, int]], dtype: torch.dtype = torch.float32, width: int = 32
) -> tuple[Tensor, ...]:
    cu_q, cu_k = (offsets(*(pair[side] for pair in lengths)) for side in (0, 1))
    generator = torch.Generator().manual_seed(0)
    sizes = (int(cu_q[-1]), int(cu_k[-1]), int(cu_k[-1]))
    return *(torch.randn(n, 2, width, generator=generator).to(dtype) for n in sizes), cu_q, cu_k


def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, **options: Any) -> Tensor:
    return ops.varlen_attention(q, k, v, cu_q, cu_k, len(q), len(k), scale=0.4, **options)


def gradients_of(
    function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *rest: Tensor
) -> tuple[Tensor, ...]:
    """The result and the gradients of q, k and v."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = function(*leaves, *rest)
    dout = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(q.dtype)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MIXES)
@each_attention
@pytest.mark.usefixtures("library")
def test_attention_and_gradients(name: str, masked: bool) -> None:
    arguments = packed(MIXES[name])
    mask = (
        torch.rand(len(arguments[1]), generator=torch.Generator().manual_seed(2)) < 0.7
        if masked
        else None
    )

    def definition(*given: Tensor) -> Tensor:
        return reference.varlen_attention(*given, 0.4, 0.0, mask)

    plain = draws(lambda: gradients_of(definition, *arguments))
    truth = gradients_of(definition, *widened(arguments))
    for i, value in enumerate(
        gradients_of(lambda *given: attend(*given, key_mask=mask), *arguments)
    ):
        assert_accurate(value, [each[i] for each in plain], truth[i], f"result {i}")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), min_size=1, max_size=9))
@example([(40, 40)] * 10 + [(400, 400)] * 4)
def test_any_lengths(lengths: list[tuple[int, int]]) -> None:
    """In fp64; unlike lengths form groups of their own."""
    arguments = packed(lengths, torch.float64, width=8)
    expected = gradients_of(lambda *given: reference.varlen_attention(*given, 0.4), *arguments)
    for ours, right in zip(gradients_of(attend, *arguments), expected, strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize(("bad", "dropped"), [(torch.inf, False), (torch.nan, True)])
@each_attention
@pytest.mark.usefixtures("library")
def test_no_sequence_reads_another(bad: float, dropped: bool) -> None:
    """A NaN of one request stays out of the answers, and the gradients, of all others."""
    q, k, v, cu_q, cu_k = packed(MIXES["captions"])
    options = {"dropout_p": 0.4, "seed": torch.tensor([7])} if dropped else {}

    def results(bad: float) -> tuple[Tensor, ...]:
        given = [t.clone() for t in (q, k, v)]
        for tensor, bounds in zip(given, (cu_q, cu_k, cu_k), strict=True):
            tensor[bounds[3] : bounds[4]] = bad
        with torch.no_grad():
            out = attend(*given, cu_q, cu_k, **options)
        return (out, *gradients_of(lambda *t: attend(*t, **options), *given, cu_q, cu_k))

    for clean, spoilt in zip(results(0.5), results(bad), strict=True):
        bounds = cu_k if len(clean) == len(k) else cu_q
        others = [*range(bounds[3]), *range(bounds[4], len(clean))]
        torch.testing.assert_close(spoilt[others], clean[others])
