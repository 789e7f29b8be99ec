"""Embeddings and vocabulary heads of the official encoders: fused where they compute what their parts suggest."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.agreement import relative_error
from tests.replace import official_replicas as replicas
from xfm_fast import accelerate
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.replace.swapping import is_fused

CONFIG = replicas.TextConfig()
IDS = torch.tensor([[5, 9, 12, 1, 1], [7, 7, 2, 30, 8], [3, 1, 4, 1, 1]])


def embeddings(pad: int | None, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    return randomised(replicas.WholeEmbeddings(CONFIG, pad, scale))


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module.double().eval()


def gradients(module: nn.Module, run: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    out = run(module)
    generator = torch.Generator().manual_seed(1)
    (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": out.detach()} | found


def assert_same(module: nn.Module, fast: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    wanted, found = gradients(module, run), gradients(fast, run)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert relative_error(found[name], value) < 1e-12, name
    with torch.no_grad():
        assert relative_error(run(fast), run(module)) < 1e-12


@pytest.mark.parametrize("pad", [1, None])
def test_embeddings(pad: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = embeddings(pad)
    fast, rows = copy.deepcopy(module), []
    accelerate(fast)
    original = ops.embed_layer_norm
    monkeypatch.setattr(ops, "embed_layer_norm", lambda *a, **k: rows.append(1) or original(*a, **k))
    first = torch.zeros_like(IDS)
    assert_same(module, fast, lambda m: m(IDS))
    assert_same(module, fast, lambda m: m(input_ids=IDS, token_type_ids=first, past_key_values_length=0))
    assert_same(module, fast, lambda m: m(IDS, position_ids=torch.tensor([[4, 3, 2, 9, 0]])))
    fused = len(rows)
    assert fused == 6
    assert_same(module, fast, lambda m: m(IDS, token_type_ids=first + 1))
    assert_same(module, fast, lambda m: m(inputs_embeds=torch.ones(2, 3, CONFIG.width, dtype=torch.float64)))
    assert_same(module, fast, lambda m: m(IDS, past_key_values_length=3))
    assert len(rows) == fused


@pytest.mark.parametrize("make", [replicas.LanguageHead, replicas.PredictionHead])
def test_heads(make: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = randomised(make(CONFIG))
    fast, calls = copy.deepcopy(module), []
    report = accelerate(fast)
    assert [entry.fused for entry in report.replaced] == ["OfficialVocabularyHead"]
    original = ops.linear_gelu
    monkeypatch.setattr(ops, "linear_gelu", lambda *a, **k: calls.append(1) or original(*a, **k))
    features = torch.randn(4, 7, CONFIG.width, dtype=torch.float64)
    assert_same(module, fast, lambda m: m(features))
    name = "features" if make is replicas.LanguageHead else "hidden_states"
    assert_same(module, fast, lambda m: m(**{name: features}))
    assert len(calls) == 4


def test_what_computes_something_else_is_left_alone() -> None:
    torch.manual_seed(0)
    for module in (embeddings(1, scale=2.0), randomised(replicas.LanguageHead(CONFIG, "tanh"))):
        module.train()
        with pytest.raises(InputError, match="computes something else than its parts suggest"):
            accelerate(module)
        assert all(part.training for part in module.modules())
        assert not is_fused(module)


def test_what_cannot_be_tried_is_left_alone() -> None:
    class Demanding(replicas.LanguageHead):
        def forward(self, features: Tensor, masked_pos: Tensor) -> Tensor:
            return super().forward(features[masked_pos])

    with pytest.raises(InputError, match=r"could not be tried out \(TypeError: .*masked_pos"):
        accelerate(Demanding(CONFIG))
    with torch.device("meta"):
        unmade = replicas.LanguageHead(CONFIG)
    with pytest.raises(InputError, match="have no values yet"):
        accelerate(unmade)


def test_no_draw_is_used_up_by_the_trial() -> None:
    module = embeddings(1).train()
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    accelerate(module)
    assert torch.equal(torch.rand(3), wanted)
