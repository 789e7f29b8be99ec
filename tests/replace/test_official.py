"""The official modules, recognised by structure: calls beyond the contract, and modules that compute otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.agreement import relative_error
from tests.replace import official_replicas as replicas
from tests.replace.families import FAMILIES, assert_close, gradients
from xfm_fast import accelerate
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.replace import heads
from xfm_fast.replace.swap import is_fused

CLOSE = 1e-5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _texts() -> dict[str, Tensor]:
    return FAMILIES["official texts"].inputs(torch.float32)


def test_generation_keeps_its_keys_and_values() -> None:
    model = replicas.TextModel(replicas.TextConfig()).eval()
    texts = _texts()
    with torch.no_grad():
        wanted = model(**texts, use_cache=True)
        accelerate(model, unpad=True)
        found = model(**texts, use_cache=True)
        for pair, other in zip(found.past_key_values, wanted.past_key_values, strict=True):
            assert all(relative_error(a, b) < CLOSE for a, b in zip(pair, other, strict=True))
        # One token more, behind the cache.
        step = {"encoder_embeds": torch.randn(5, 1, 32), "attention_mask": torch.ones(5, 12)}
        image = {"encoder_hidden_states": texts["encoder_hidden_states"]}
        past = wanted.past_key_values
        after = model(**step, **image, past_key_values=past).last_hidden_state
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if is_fused(module):
            module.__class__ = type(module).__bases__[1]
    assert torch.equal(after, plain(**step, **image, past_key_values=past).last_hidden_state)


def test_calls_that_are_not_covered_run_the_original() -> None:
    model = replicas.TextModel(replicas.TextConfig()).eval()
    texts = _texts()
    layer, mask = model.encoder.layer[2], replicas.additive(texts["attention_mask"])
    memory = (texts["encoder_hidden_states"], replicas.additive(texts["encoder_attention_mask"]))
    x, block, image = (
        texts["encoder_embeds"],
        replicas.VisionBlock(32, 4, (3, 4)).eval(),
        torch.randn(2, 13, 32),
    )

    def calls() -> list[Tensor]:
        return [
            layer(x, mask, None, *memory, None, True)[1],
            layer(
                x, mask, torch.rand(1, 4, 1, 1, generator=torch.Generator().manual_seed(0)), *memory
            )[0],
            layer(x, mask)[0],
            block(image, return_attention=True),
        ]

    with torch.no_grad():
        wanted = calls()
        for each in (model, block):
            accelerate(each, unpad=True)
        assert all(torch.equal(a, b) for a, b in zip(calls(), wanted, strict=True))
        layer.crossattention.self.save_attention = True
        model(**texts)
    assert layer.crossattention.self.attention_map is not None


def test_a_causal_mask_is_honoured() -> None:
    model = replicas.TextModel(replicas.TextConfig(fusion_layer=3)).eval()
    x = torch.randn(2, 5, 32)
    mask = (1 - torch.ones(5, 5).tril())[None, None].expand(2, -1, -1, -1) * -10000.0
    wanted = model.encoder(x, attention_mask=mask).last_hidden_state
    accelerate(model, unpad=True)
    assert relative_error(model.encoder(x, attention_mask=mask).last_hidden_state, wanted) < CLOSE


def test_stochastic_depth_of_texts_is_the_originals_own() -> None:
    model = replicas.TextModel(replicas.TextConfig(drop_path=0.5), replicas.TextLayerWithoutMode)
    texts = _texts()
    torch.manual_seed(3)
    wanted = model(**texts).last_hidden_state
    accelerate(model, unpad=True)
    torch.manual_seed(3)
    assert torch.equal(model(**texts).last_hidden_state, wanted)


@pytest.mark.parametrize("asked", ["shared", "region"])
@pytest.mark.parametrize("scaled", [True, False])
def test_vision_blocks_with_biases(asked: str, scaled: bool) -> None:
    block, x = (
        replicas.VisionBlock(32, 4, (3, 4) if scaled else None, scaled=scaled),
        torch.randn(2, 13, 32),
    )
    given: dict[str, Any] = {"rel_pos_bias": torch.randn(4, 13, 13)}
    if asked == "region":
        visible = (torch.rand(2, 13) < 0.6).index_fill(1, torch.tensor([0]), True)
        given = {"image_atts": replicas.additive(visible.long()).expand(-1, -1, 13, -1)}
    wanted = gradients(block, lambda: block(x, **given))
    accelerate(block)
    assert_close(wanted, gradients(block, lambda: block(x, **given)), CLOSE)
    with torch.no_grad():
        assert relative_error(block.eval()(x, **given), wanted["output"]) < CLOSE


def noisy(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module.double().eval()


def assert_same(module: nn.Module, fast: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    assert_close(
        gradients(module, partial(run, module)), gradients(fast, partial(run, fast)), 1e-12
    )
    with torch.no_grad():
        assert relative_error(run(fast), run(module)) < 1e-12


CONFIG = replicas.TextConfig()
IDS = torch.tensor([[5, 9, 12, 1, 1], [7, 7, 2, 30, 8], [3, 1, 4, 1, 1]])


def embeddings(pad: int | None, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    return noisy(replicas.Embeddings(CONFIG, pad, scale))


@pytest.mark.parametrize("pad", [1, None])
def test_embeddings(pad: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = embeddings(pad)
    fast, rows = copy.deepcopy(module), []
    accelerate(fast)
    # Inference on a CPU takes the operation's implementation there, without its checks.
    for holder, name in ((ops, "embed_layer_norm"), (heads, "embedding_norm_forward")):
        original = getattr(holder, name)
        monkeypatch.setattr(
            holder, name, lambda *a, run=original, **k: rows.append(1) or run(*a, **k)
        )
    first = torch.zeros_like(IDS)
    assert_same(module, fast, lambda m: m(IDS))
    assert_same(
        module, fast, lambda m: m(input_ids=IDS, token_type_ids=first, past_key_values_length=0)
    )
    assert_same(module, fast, lambda m: m(IDS, position_ids=torch.tensor([[4, 3, 2, 9, 0]])))
    fused = len(rows)
    assert fused == 6
    assert_same(module, fast, lambda m: m(IDS, token_type_ids=first + 1))
    assert_same(
        module, fast, lambda m: m(inputs_embeds=torch.ones(2, 3, CONFIG.width, dtype=torch.float64))
    )
    assert_same(module, fast, lambda m: m(IDS, past_key_values_length=3))
    assert len(rows) == fused


@pytest.mark.parametrize("make", [replicas.LanguageHead, replicas.PredictionHead])
def test_heads(make: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = noisy(make(CONFIG))
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


def test_modules_that_compute_otherwise_are_refused() -> None:
    torch.manual_seed(0)
    block = replicas.VisionBlock(32, 4, (3, 4))
    block.attn.relative_position_index.zero_()
    with pytest.raises(InputError, match="relative positions"):
        accelerate(block, exclude="norm*")
    for module in (embeddings(1, scale=2.0), noisy(replicas.LanguageHead(CONFIG, "tanh"))):
        module.train()
        with pytest.raises(InputError, match="output on an example differs"):
            accelerate(module)
        assert all(part.training for part in module.modules())
        assert not is_fused(module)
