"""The attention modules against PyTorch's plain operations, with gradients, under autocast, compiled and copied."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.agreement import assert_same_gradients, assert_survives_copies, offsets, relative_error
from xfm_fast.errors import InputError
from xfm_fast.kernels import reference
from xfm_fast.nn import GroupedCrossAttention, PackedSelfAttention, RelPosAttention

LENGTHS = (3, 0, 5, 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    """q, k, v `[B, N, H, D]`; hidden `[B, N]` True for keys that count for nothing."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _split(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    return x.unflatten(-1, (parts, heads, -1)).unbind(-3)


def _relpos(module: RelPosAttention, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    bias = torch.cat([module.q_bias, torch.zeros_like(module.q_bias), module.v_bias])
    q, k, v = (t.transpose(1, 2) for t in _split(F.linear(x, module.qkv.weight, bias), 3, module.heads))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores + reference.position_bias(module.relative_position_bias_table, module.window)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    return module.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def _packed(module: PackedSelfAttention, x: Tensor, cu: Tensor, longest: int, key_mask: Tensor | None = None) -> Tensor:
    out = []
    for first, last in zip(cu[:-1], cu[1:], strict=True):
        one = x[None, first:last]
        hidden = None if key_mask is None else ~key_mask[None, first:last]
        out.append(_plain_attention(*_split(module.qkv(one), 3, module.heads), hidden=hidden)[0])
    return module.proj(torch.cat(out))


def _grouped(
    module: GroupedCrossAttention, x: Tensor, memory: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int, longest_k: int
) -> Tensor:
    out = []
    for group, (first, last) in enumerate(zip(cu_q[:-1], cu_q[1:], strict=True)):
        q = module.query(x[None, first:last]).unflatten(-1, (module.heads, -1))
        k, v = _split(module.key_value(memory[None, cu_k[group] : cu_k[group + 1]]), 2, module.heads)
        out.append(_plain_attention(q, k, v)[0])
    return module.proj(torch.cat(out))


class _FromTokens(GroupedCrossAttention):
    """Projects the memory on the way, so that it takes the same arguments as its twin."""

    def forward(self, x: Tensor, memory: Tensor, *layout: Any) -> Tensor:
        return super().forward(x, self.project_memory(memory), *layout)


def _cases() -> dict[str, tuple[nn.Module, Any, tuple[Any, ...]]]:
    cu_q, cu_k = offsets(LENGTHS), offsets((7, 2, 4, 3))
    tokens = sum(LENGTHS)
    relpos = RelPosAttention(16, 4, (2, 3))
    masked = torch.arange(7) < torch.tensor([7, 4])[:, None]
    cases: dict[str, tuple[nn.Module, Any, tuple[Any, ...]]] = {
        "relpos": (relpos, _relpos, (torch.randn(2, 7, 16),)),
        "relpos masked": (RelPosAttention(16, 4, (2, 3)), _relpos, (torch.randn(2, 7, 16), masked)),
        "packed": (PackedSelfAttention(16, 4), _packed, (torch.randn(tokens, 16), cu_q, 5)),
        "packed masked": (
            PackedSelfAttention(16, 4),
            _packed,
            (torch.randn(tokens, 16), cu_q, 5, torch.arange(tokens) % 3 != 1),
        ),
        "grouped": (
            _FromTokens(16, 4, memory_width=12),
            _grouped,
            (torch.randn(tokens, 16), torch.randn(16, 12), cu_q, cu_k, tokens, 7),
        ),
    }
    for module, _, _ in cases.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return cases


CASES = tuple(_cases())


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_plain_pytorch(name: str) -> None:
    module, plain, inputs = _cases()[name]
    assert_same_gradients(module, plain, inputs)


@pytest.mark.parametrize("name", CASES)
def test_autocast_and_compile(name: str) -> None:
    module, plain, inputs = _cases()[name]
    with torch.no_grad():
        wanted = plain(module, *inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = module(*inputs)
        assert 1e-6 < relative_error(found.float(), wanted) < 0.05
        assert relative_error(torch.compile(module, backend="aot_eager")(*inputs), wanted) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_copies_and_states(name: str) -> None:
    module, _, inputs = _cases()[name]
    assert_survives_copies(module, inputs)


def test_attention_drops_weights_in_training_only() -> None:
    module = PackedSelfAttention(16, 4, dropout=0.5)
    inputs = (torch.randn(9, 16), offsets(LENGTHS), 5)
    assert not torch.equal(module(*inputs), module(*inputs))
    module.eval()
    assert torch.equal(module(*inputs), module(*inputs))
    module = GroupedCrossAttention(16, 4, dropout=0.5)
    memory = module.project_memory(torch.randn(16, 16))
    inputs = (inputs[0], memory, inputs[1], offsets((7, 2, 4, 3)), 9, 7)
    assert not torch.equal(module(*inputs), module(*inputs))
    module.eval()
    assert torch.equal(module(*inputs), module(*inputs))


def test_a_new_attention_has_no_favourite_position() -> None:
    module = RelPosAttention(64, 4, (2, 2))
    assert not module.relative_position_bias_table.any()
    assert not module.q_bias.any()
    assert 0.015 < float(module.qkv.weight.std()) < 0.025
    assert 0.015 < float(copy.deepcopy(PackedSelfAttention(64, 4)).qkv.weight.std()) < 0.025


@pytest.mark.parametrize("make", [lambda: RelPosAttention(10, 4, (2, 2)), lambda: PackedSelfAttention(10, 4)])
def test_heads_must_divide_the_width(make: Any) -> None:
    with pytest.raises(InputError, match="heads=4 does not divide the width of 10"):
        make()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InputError, match="holds no patch"):
        RelPosAttention(16, 4, (0, 3))
    with pytest.raises(InputError, match=r"needs \[B, 7, width\]"):
        RelPosAttention(16, 4, (2, 3))(torch.randn(1, 6, 16))
    with pytest.raises(InputError, match="dropout=1"):
        GroupedCrossAttention(16, 4, dropout=1.0)
