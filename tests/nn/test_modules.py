"""Every module against PyTorch's plain operations, with gradients, under autocast, compiled and copied."""

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
from xfm_fast.nn import (
    AddLayerNorm,
    GeluMLP,
    GroupedCrossAttention,
    PackedSelfAttention,
    RelPosAttention,
    VocabularyLoss,
)

Cases = dict[str, tuple[nn.Module, Any, tuple[Any, ...]]]
LENGTHS = (3, 0, 5, 1)
WIDTH = 12


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


def _attention_cases() -> Cases:
    cu_q, cu_k = offsets(LENGTHS), offsets((7, 2, 4, 3))
    tokens = sum(LENGTHS)
    relpos = RelPosAttention(16, 4, (2, 3))
    masked = torch.arange(7) < torch.tensor([7, 4])[:, None]
    return {
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


def _branch(out: Tensor, gamma: Tensor | None, rows: Tensor | None) -> Tensor:
    out = out if gamma is None else gamma * out
    return out if rows is None else rows.view(-1, *[1] * (out.ndim - 1)) * out


def _add_norm(module: AddLayerNorm, x: Tensor, residual: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    summed = residual + _branch(x, module.gamma, rows)
    return F.layer_norm(summed, (WIDTH,), module.weight, module.bias, module.eps), summed


def _mlp(module: GeluMLP, x: Tensor, residual: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    out = _branch(module.fc2(F.gelu(module.fc1(x))), module.gamma, rows)
    return out if residual is None else residual + out


def _loss(module: VocabularyLoss, hidden: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, module.weight, module.bias).flatten(0, -2)
    smoothing = module.label_smoothing
    return F.cross_entropy(logits, target.flatten(), ignore_index=module.ignore_index, label_smoothing=smoothing)


def _pointwise_cases() -> Cases:
    x, residual, rows = torch.randn(3, 5, WIDTH), torch.randn(3, 5, WIDTH), torch.tensor([2.0, 0.0, 1.0])
    target = torch.randint(31, (3, 5)).index_fill(1, torch.tensor([2]), -1)
    return {
        "norm": (AddLayerNorm(WIDTH), _add_norm, (x, residual)),
        "norm, scaled": (AddLayerNorm(WIDTH, 1e-6, layer_scale=0.1), _add_norm, (x, residual, rows)),
        "mlp": (GeluMLP(WIDTH, 20), _mlp, (x,)),
        "mlp, scaled": (GeluMLP(WIDTH, 20, layer_scale=0.1), _mlp, (x,)),
        "mlp, residual": (GeluMLP(WIDTH, 20), _mlp, (x, residual)),
        "mlp, residual, scaled": (GeluMLP(WIDTH, 20, layer_scale=0.1), _mlp, (x, residual, rows)),
        "loss": (VocabularyLoss(WIDTH, 31, ignore_index=-1), _loss, (x, target)),
        "loss, smoothed": (
            VocabularyLoss(WIDTH, 31, bias=False, label_smoothing=0.1, ignore_index=-1),
            _loss,
            (x, target),
        ),
    }


def _made(name: str) -> tuple[nn.Module, Any, tuple[Any, ...]]:
    torch.manual_seed(0)
    module, plain, inputs = (_attention_cases() | _pointwise_cases())[name]
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module, plain, inputs


ATTENTION = tuple(_attention_cases())
each_module = pytest.mark.parametrize("name", [*ATTENTION, *_pointwise_cases()])


def _first(made: Any) -> Tensor:
    return made[0] if isinstance(made, tuple) else made


@each_module
def test_agrees_with_plain_pytorch(name: str) -> None:
    module, plain, inputs = _made(name)
    assert_same_gradients(module, plain, inputs)
    module.eval()
    with torch.no_grad():
        found, wanted = module(*inputs), plain(module, *inputs)
    for out, truth in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, wanted)), strict=True):
        assert relative_error(out, truth) < 1e-5


@each_module
def test_autocast_and_compile(name: str) -> None:
    module, plain, inputs = _made(name)
    with torch.no_grad():
        wanted = _first(plain(module, *inputs))
        with torch.autocast("cpu", torch.bfloat16):
            error = relative_error(_first(module(*inputs)).float(), wanted)
        assert error < 0.05
        assert error > 1e-6 or name not in ATTENTION
        assert relative_error(_first(torch.compile(module, backend="aot_eager")(*inputs)), wanted) < 1e-5


@each_module
def test_copies_and_states(name: str) -> None:
    module, _, inputs = _made(name)
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


@pytest.mark.parametrize("make", [lambda: AddLayerNorm(WIDTH, dropout=0.5), lambda: GeluMLP(WIDTH, 20, dropout=0.5)])
def test_dropout_in_training_only(make: Any) -> None:
    module = make()
    x = torch.randn(64, WIDTH)

    def branch() -> Tensor:
        made = module(x, torch.zeros_like(x))
        return made[1] if isinstance(made, tuple) else made

    dropped = float((branch() == 0).double().mean())
    assert 0.4 < dropped < 0.6
    module.eval()
    assert branch().all()


def test_an_mlp_by_itself_drops_out_too() -> None:
    module = GeluMLP(WIDTH, 20, dropout=0.5)
    assert 0.4 < float((module(torch.randn(64, WIDTH)) == 0).double().mean()) < 0.6


def test_a_wide_residual_stays_wide() -> None:
    module = AddLayerNorm(WIDTH)
    normed, summed = module(torch.randn(3, WIDTH).bfloat16(), torch.randn(3, WIDTH))
    assert normed.dtype == summed.dtype == torch.float32


def test_the_vocabulary_may_be_tied() -> None:
    words = nn.Embedding(31, WIDTH)
    assert isinstance(words.weight, nn.Parameter)
    loss = VocabularyLoss(WIDTH, 31, weight=words.weight)
    assert loss.weight is words.weight
    loss(torch.randn(4, WIDTH), torch.tensor([1, 2, 3, -100])).backward()
    assert words.weight.grad is not None
    with pytest.raises(InputError, match=r"it must be \[32, 12\]"):
        VocabularyLoss(WIDTH, 32, weight=words.weight)


def test_likelihoods_are_those_of_the_logits() -> None:
    loss = VocabularyLoss(WIDTH, 31)
    hidden, target = torch.randn(4, WIDTH), torch.tensor([1, 2, 30, -100])
    found = loss.log_likelihood(hidden, target)
    wanted = loss.logits(hidden).log_softmax(-1).gather(1, target.clamp_min(0)[:, None])[:, 0]
    assert relative_error(found[:3], wanted[:3]) < 1e-5
    assert found[3] == 0
    assert float(loss(hidden, target.new_full((4,), -100))) == 0


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InputError, match="holds no patch"):
        RelPosAttention(16, 4, (0, 3))
    with pytest.raises(InputError, match=r"needs \[B, 7, width\]"):
        RelPosAttention(16, 4, (2, 3))(torch.randn(1, 6, 16))
    with pytest.raises(InputError, match="dropout=1"):
        GroupedCrossAttention(16, 4, dropout=1.0)
    with pytest.raises(InputError, match="give the residual too"):
        GeluMLP(WIDTH, 20)(torch.randn(2, WIDTH), row_scale=torch.ones(2))
    with pytest.raises(InputError, match=r"dropout=-0\.1"):
        AddLayerNorm(WIDTH, dropout=-0.1)
    with pytest.raises(InputError, match="label_smoothing=2"):
        VocabularyLoss(WIDTH, 31, label_smoothing=2.0)
