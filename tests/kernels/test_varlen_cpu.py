"""How packed sequences are grouped on CPU, and attention over the groups: padding, dropout, masked keys."""

# Attention takes the inputs of a case as one tuple, whose length no checker can know.
# pyright: reportCallIssue=false

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.conftest import each_library
from xfm_fast.kernels import ops, reference
from xfm_fast.kernels.cpu.varlen import Group, Plan, plan_of

Bounds = tuple[int, ...]


def bounds(lengths: list[int]) -> Bounds:
    return tuple(torch.tensor([0, *lengths]).cumsum(0).tolist())


def visible(group: Group, bounds_q: Bounds, bounds_k: Bounds) -> Tensor:
    """`[Tq, Tk]`: which packed keys each packed query of the group sees."""
    tokens_q, tokens_k = torch.arange(bounds_q[-1])[:, None, None], torch.arange(bounds_k[-1])[:, None, None]
    q, k = group.queries.padded(tokens_q)[..., 0, 0], group.keys.padded(tokens_k)[..., 0, 0]
    shape = (group.queries.sequences, 1, group.queries.longest, group.keys.longest)
    mask = torch.zeros(shape) if group.mask is None else group.mask.expand(shape)
    assert (mask == 0).any(-1).all(), "a query that sees nothing has no softmax"
    real = torch.ones(q.numel(), dtype=torch.bool)
    if group.queries.slots is not None:
        real = torch.zeros_like(real).index_fill_(0, group.queries.slots, True)
    found = torch.zeros(bounds_q[-1], bounds_k[-1], dtype=torch.long)
    for b in range(shape[0]):
        for i in range(shape[2]):
            if real.view(q.shape)[b, i]:
                for j in (mask[b, 0, i] == 0).nonzero().flatten().tolist():
                    found[q[b, i], k[b, j]] += 1
    return found


def check(plan: Plan, lengths_q: list[int], lengths_k: list[int]) -> None:
    bounds_q, bounds_k = bounds(lengths_q), bounds(lengths_k)
    found = torch.zeros(bounds_q[-1], bounds_k[-1], dtype=torch.long)
    for group in plan.groups:
        found += visible(group, bounds_q, bounds_k)
    expected = torch.zeros_like(found)
    for (a, b), (c, d) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
        expected[a:b, c:d] = 1
    assert torch.equal(found, expected)
    assert plan.empty == any(n and not m for n, m in zip(lengths_q, lengths_k, strict=True))
    assert plan.unread == any(m and not n for n, m in zip(lengths_q, lengths_k, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), max_size=9))
def test_every_query_sees_the_keys_of_its_sequence_once(lengths: list[tuple[int, int]]) -> None:
    lengths_q, lengths_k = [n for n, _ in lengths], [m for _, m in lengths]
    check(plan_of(bounds(lengths_q), bounds(lengths_k)), lengths_q, lengths_k)


def test_sequences_of_one_length_are_views() -> None:
    plan = plan_of(bounds([13] * 12), bounds([13] * 12))
    assert [type(side.rows) for g in plan.groups for side in (g.queries, g.keys)] == [slice, slice]
    assert plan.groups[0].queries.sequences == 12
    assert plan.whole


def test_unlike_lengths_are_not_padded_to_each_other() -> None:
    lengths = [40] * 10 + [400] * 4
    plan = plan_of(bounds(lengths), bounds(lengths))
    assert sorted((g.queries.sequences, g.queries.longest) for g in plan.groups) == [(4, 400), (10, 40)]
    cross = plan_of(bounds([30, 44, 39, 36]), bounds([197] * 4))
    assert len(cross.groups) == 1
    assert isinstance(cross.groups[0].keys.rows, slice)
    assert cross.groups[0].mask is None


MIXES = {
    "captions": ([12, 10, 13, 7, 1, 11, 13, 13, 9, 10], None),
    "captions of one length": ([13] * 8, None),
    "first tokens": ([1] * 9, [12, 10, 13, 7, 1, 11, 13, 13, 9]),
    "images": ([39, 44, 20, 31], [50] * 4),
    "gaps": ([5, 0, 4, 9, 3], [5, 7, 0, 9, 40]),
}


def packed(name: str, dtype: torch.dtype, *, heads: int = 2, width: int = 8) -> tuple[Tensor, ...]:
    lengths_q, lengths_k = MIXES[name]
    lengths_k = lengths_q if lengths_k is None else lengths_k
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(lengths_q), heads, width, generator=generator, dtype=torch.float64).to(dtype)
    kv = torch.randn(sum(lengths_k), 2, heads, width, generator=generator, dtype=torch.float64).to(dtype)
    return q, *kv.unbind(1), torch.tensor(bounds(lengths_q)), torch.tensor(bounds(lengths_k))


def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, **options) -> Tensor:
    return ops.varlen_attention(q, k, v, cu_q, cu_k, len(q), len(k), scale=0.4, **options)


def gradients_of(function, q: Tensor, k: Tensor, v: Tensor, *rest) -> tuple[Tensor, ...]:
    given = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = function(*given, *rest)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(q.dtype)
    return (out.detach(), *torch.autograd.grad(out, given, dout.to(out.dtype)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MIXES)
@each_library("aten", "tiled", "exp2", "onednn", "llvm")
@pytest.mark.usefixtures("library")
def test_attention_and_gradients(name: str, masked: bool) -> None:
    arguments = packed(name, torch.float32, width=32)
    mask = torch.rand(len(arguments[1]), generator=torch.Generator().manual_seed(2)) < 0.7 if masked else None

    def definition(*given: Tensor) -> Tensor:
        return reference.varlen_attention(*given, 0.4, 0.0, mask)

    found = gradients_of(lambda *given: attend(*given, key_mask=mask), *arguments)
    for i, value in enumerate(found):
        assert_as_accurate(value, lambda *given, i=i: gradients_of(definition, *given)[i], *arguments)


@pytest.mark.parametrize(("bad", "dropped"), [(torch.nan, False), (torch.inf, False), (torch.nan, True)])
@pytest.mark.parametrize("name", MIXES)
@each_library("aten", "tiled", "exp2", "onednn", "llvm")
def test_no_sequence_reads_another(name: str, bad: float, dropped: bool, library: str) -> None:
    """A NaN of one request stays out of the answers, and the gradients, of all others."""
    q, k, v, cu_q, cu_k = packed(name, torch.float32, width=32)
    options = {"dropout_p": 0.4, "seed": torch.tensor([7])} if dropped else {}

    def results(bad: float) -> tuple[Tensor, ...]:
        given = [t.clone() for t in (q, k, v)]
        for tensor, offsets in zip(given, (cu_q, cu_k, cu_k), strict=True):
            tensor[offsets[3] : offsets[4]] = bad
        with torch.no_grad():
            out = attend(*given, cu_q, cu_k, **options)
        return (out, *gradients_of(lambda *t: attend(*t, **options), *given, cu_q, cu_k))

    for clean, spoilt in zip(results(0.5), results(bad), strict=True):
        offsets = cu_k if len(clean) == len(k) else cu_q
        others = [*range(offsets[3]), *range(offsets[4], len(clean))]
        torch.testing.assert_close(spoilt[others], clean[others])
