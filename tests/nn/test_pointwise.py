"""Norm, MLP and vocabulary loss against PyTorch's plain operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.agreement import assert_same_gradients, assert_survives_copies, relative_error
from xfm_fast.errors import InputError
from xfm_fast.nn import AddLayerNorm, GeluMLP, VocabularyLoss

WIDTH = 12


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


def _cases() -> dict[str, tuple[nn.Module, Any, tuple[Any, ...]]]:
    x, residual, rows = torch.randn(3, 5, WIDTH), torch.randn(3, 5, WIDTH), torch.tensor([2.0, 0.0, 1.0])
    target = torch.randint(31, (3, 5)).index_fill(1, torch.tensor([2]), -1)
    cases: dict[str, tuple[nn.Module, Any, tuple[Any, ...]]] = {
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
    for module, _, _ in cases.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return cases


CASES = tuple(_cases())


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_plain_pytorch(name: str) -> None:
    module, plain, inputs = _cases()[name]
    assert_same_gradients(module, plain, inputs)
    module.eval()
    with torch.no_grad():
        found, wanted = module(*inputs), plain(module, *inputs)
    for out, truth in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, wanted)), strict=True):
        assert relative_error(out, truth) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_autocast_and_compile(name: str) -> None:
    module, plain, inputs = _cases()[name]
    first = (lambda made: made[0]) if name.startswith("norm") else (lambda made: made)
    with torch.no_grad():
        wanted = first(plain(module, *inputs))
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(first(module(*inputs)).float(), wanted) < 0.05
        assert relative_error(first(torch.compile(module, backend="aot_eager")(*inputs)), wanted) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_copies_and_states(name: str) -> None:
    module, _, inputs = _cases()[name]
    assert_survives_copies(module, inputs)


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
    with pytest.raises(InputError, match="give the residual too"):
        GeluMLP(WIDTH, 20)(torch.randn(2, WIDTH), row_scale=torch.ones(2))
    with pytest.raises(InputError, match=r"dropout=-0\.1"):
        AddLayerNorm(WIDTH, dropout=-0.1)
    with pytest.raises(InputError, match="label_smoothing=2"):
        VocabularyLoss(WIDTH, 31, label_smoothing=2.0)
