"""The official modules, known by structure: the same outputs and gradients fused, and everything else left to them."""

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
from tests.replace.families import assert_close, gradients
from xfm_fast import accelerate
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.replace import heads
from xfm_fast.replace.swap import is_fused

CLOSE = 1e-5
LENGTHS = (9, 1, 4, 7)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _texts(width: int = 32, image_width: int = 24) -> dict[str, Tensor]:
    real = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    return {
        "encoder_embeds": torch.randn(4, 9, width),
        "attention_mask": real.long(),
        "encoder_hidden_states": torch.randn(4, 6, image_width),
        "encoder_attention_mask": (torch.rand(4, 6) < 0.7).long().index_fill(1, torch.tensor([0]), 1),
    }


def _run(model: nn.Module, *args: Any, keep: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """Output, where `keep` is True, and the gradients that a random direction of it gives."""

    def run() -> Tensor:
        out = model(*args, **kwargs)
        out = getattr(out, "last_hidden_state", out)
        return out if keep is None else out[keep]

    return gradients(model, run)


def _counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Grows with every call of an op: what ran was the fused form."""
    calls: list[int] = []
    original = getattr(ops, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].shape[-2] if args[0].ndim > 1 else 0)
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, name, counting)
    return calls


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
        step = {"encoder_embeds": torch.randn(4, 1, 32), "attention_mask": torch.ones(4, 10)}
        image = {"encoder_hidden_states": texts["encoder_hidden_states"]}
        past = wanted.past_key_values
        after = model(**step, **image, past_key_values=past).last_hidden_state
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if is_fused(module):
            module.__class__ = type(module).__bases__[1]
    assert torch.equal(after, plain(**step, **image, past_key_values=past).last_hidden_state)


@pytest.mark.parametrize("unpad", [False, True])
def test_calls_that_are_not_covered_run_the_original(unpad: bool) -> None:
    model = replicas.TextModel(replicas.TextConfig()).eval()
    texts = _texts()
    layer, mask = model.encoder.layer[2], replicas.additive(texts["attention_mask"])
    memory = (texts["encoder_hidden_states"], replicas.additive(texts["encoder_attention_mask"]))
    x = texts["encoder_embeds"]
    heads = torch.rand(1, 4, 1, 1)
    with torch.no_grad():
        wanted = [
            layer(x, mask, None, *memory, None, True)[1],
            layer(x, mask, heads, *memory)[0],
            layer(x, mask)[0],
            model(**texts, output_hidden_states=True).hidden_states[1],
        ]
        accelerate(model, unpad=unpad)
        found = [
            layer(x, mask, None, *memory, None, True)[1],
            layer(x, mask, heads, *memory)[0],
            layer(x, mask)[0],
            model(**texts, output_hidden_states=True).hidden_states[1],
        ]
        assert all(torch.equal(a, b) for a, b in zip(found[:3], wanted[:3], strict=True))
        assert relative_error(found[3], wanted[3]) < CLOSE
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


@pytest.mark.parametrize("asked", ["plain", "shared", "region"])
@pytest.mark.parametrize("scaled", [True, False])
def test_vision_blocks_agree(asked: str, scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block = replicas.VisionBlock(32, 4, (3, 4) if scaled else None, scaled=scaled)
    x = torch.randn(2, 13, 32)
    given: dict[str, Any] = {}
    if asked == "shared":
        given["rel_pos_bias"] = torch.randn(4, 13, 13)
    if asked == "region":
        visible = (torch.rand(2, 13) < 0.6).index_fill(1, torch.tensor([0]), True)
        given["image_atts"] = replicas.additive(visible.long()).expand(-1, -1, 13, -1)
    wanted = _run(block, x, **given)
    accelerate(block)
    calls = _counted(monkeypatch, "linear_add_layer_norm")
    assert_close(wanted, _run(block, x, **given), CLOSE)
    assert calls
    with torch.no_grad():
        assert relative_error(block.eval()(x, **given), wanted["output"]) < CLOSE


def test_vision_blocks_fall_back_for_attention_maps() -> None:
    block = replicas.VisionBlock(32, 4, (3, 4)).eval()
    x = torch.randn(2, 13, 32)
    wanted = block(x, return_attention=True), *block(x, return_qkv=True)
    accelerate(block)
    found = block(x, return_attention=True), *block(x, return_qkv=True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_positions_numbered_otherwise_are_left_alone() -> None:
    block = replicas.VisionBlock(32, 4, (3, 4))
    block.attn.relative_position_index.zero_()
    with pytest.raises(InputError, match="not numbered like BEiT"):
        accelerate(block, exclude="norm*")


def noisy(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module.double().eval()


def assert_same(module: nn.Module, fast: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    assert_close(gradients(module, partial(run, module)), gradients(fast, partial(run, fast)), 1e-12)
    with torch.no_grad():
        assert relative_error(run(fast), run(module)) < 1e-12


CONFIG = replicas.TextConfig()
IDS = torch.tensor([[5, 9, 12, 1, 1], [7, 7, 2, 30, 8], [3, 1, 4, 1, 1]])


def embeddings(pad: int | None, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    return noisy(replicas.WholeEmbeddings(CONFIG, pad, scale))


@pytest.mark.parametrize("pad", [1, None])
def test_embeddings(pad: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = embeddings(pad)
    fast, rows = copy.deepcopy(module), []
    accelerate(fast)
    # Inference on a CPU takes the operation's implementation there, without its checks.
    for holder, name in ((ops, "embed_layer_norm"), (heads, "embed_layer_norm_forward")):
        original = getattr(holder, name)
        monkeypatch.setattr(holder, name, lambda *a, run=original, **k: rows.append(1) or run(*a, **k))
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


def test_what_computes_something_else_is_left_alone() -> None:
    torch.manual_seed(0)
    for module in (embeddings(1, scale=2.0), noisy(replicas.LanguageHead(CONFIG, "tanh"))):
        module.train()
        with pytest.raises(InputError, match="does not match its parts"):
            accelerate(module)
        assert all(part.training for part in module.modules())
        assert not is_fused(module)


def test_what_cannot_be_tried_is_left_alone() -> None:
    class Demanding(replicas.LanguageHead):
        def forward(self, features: Tensor, masked_pos: Tensor) -> Tensor:
            return super().forward(features[masked_pos])

    with pytest.raises(InputError, match=r"TypeError: .*masked_pos"):
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
