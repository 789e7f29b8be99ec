"""Encoders, decoders and masked-language models of transformers: calls, masks and labels beyond the plain ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.replace.families import (
    CAUSAL_BOUND,
    CAUSAL_DTYPE,
    FAMILIES,
    LENGTHS,
    SIZES,
    TRANSFORMERS,
    assert_close,
    assert_equal,
    batch,
    gradients,
    make,
    only_fused,
    with_fused_copy,
)
from xfm_fast.replace import transformers_rows

only_5 = pytest.mark.skipif(
    TRANSFORMERS < 5, reason="the rows name the parts as transformers 5 does"
)


def test_types_positions_and_given_embeddings() -> None:
    embedded = torch.randn(len(LENGTHS), max(LENGTHS), SIZES["hidden_size"], dtype=torch.float64)
    types = (torch.arange(max(LENGTHS)) > 4).long().expand(len(LENGTHS), -1)
    given = batch()
    only_states = {"inputs_embeds": embedded, "attention_mask": given["attention_mask"]}
    for name in ("BertModel", "RobertaModel"):
        model, fast = with_fused_copy(make(name), unpad=True)
        assert_equal(model, fast, only_states, only_real=True)
        if name == "BertModel":
            positions = {
                "token_type_ids": types,
                "position_ids": torch.arange(max(LENGTHS)).flip(0)[None],
            }
            assert_equal(model, fast, given | positions, only_real=True)


def test_a_text_without_tokens() -> None:
    model, fast = with_fused_copy(make("BertModel", attention="eager"), unpad=True)
    given = batch()
    given["attention_mask"][2] = 0
    assert_equal(model, fast, given)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_of_four_dimensions(attention: str) -> None:
    model, fast = with_fused_copy(make("BertModel", attention=attention), unpad=True)
    given = batch()
    allowed = (torch.rand(len(LENGTHS), 1, max(LENGTHS), max(LENGTHS)) < 0.7) | torch.eye(
        max(LENGTHS)
    ).bool()
    if TRANSFORMERS == 4:
        # It adds the fourth dimension.
        assert_equal(model, fast, given | {"attention_mask": allowed[:, 0].long()})
        return
    added = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(
        ~allowed, torch.finfo(torch.float64).min
    )
    assert_equal(model, fast, given | {"attention_mask": added})
    # Eager attention adds ones and zeros, SDPA masks.
    assert_equal(model, fast, given | {"attention_mask": allowed})


@pytest.mark.parametrize(
    ("name", "attention"), [("BertLMHeadModel", "eager"), ("RobertaForCausalLM", "sdpa")]
)
def test_decoders_with_cross_attention(name: str, attention: str) -> None:
    model = make(name, CAUSAL_DTYPE, attention, is_decoder=True, add_cross_attention=True)
    model, fast = with_fused_copy(model, unpad=True)
    states = torch.randn(len(LENGTHS), 7, SIZES["hidden_size"], dtype=CAUSAL_DTYPE)
    kept = torch.rand(len(LENGTHS), 7) < 0.6
    kept[:, 0] = True
    ids = {"input_ids": batch()["input_ids"]}
    masked = {"encoder_hidden_states": states, "encoder_attention_mask": kept.long()}
    shared = {"encoder_hidden_states": states[:1].expand_as(states)}
    for given in (ids, ids | {"encoder_hidden_states": states}, batch() | masked, batch() | shared):
        assert_equal(model, fast, given | {"use_cache": False}, CAUSAL_BOUND)


@pytest.mark.parametrize("unpad", [False, True])
def test_cross_attention_in_both_directions(unpad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("BertModel", is_decoder=True, add_cross_attention=True)
    model.config.is_decoder = False
    model, fast = with_fused_copy(model, unpad=unpad)
    states = torch.randn(len(LENGTHS), 7, SIZES["hidden_size"], dtype=torch.float64)
    kept = torch.ones(len(LENGTHS), 7, dtype=torch.long)
    kept[1, 3:] = 0
    given = batch() | {"encoder_hidden_states": states}
    for memory in (given, given | {"encoder_attention_mask": kept}):
        assert_equal(model, fast, memory, only_real=True)
    only_fused(monkeypatch, fast, "BertLayer", *(["BertModel"] if unpad else []))
    fast(**given)


def test_generation_with_a_cache() -> None:
    model, fast = with_fused_copy(make("BertLMHeadModel", is_decoder=True).eval())
    prompt = {"input_ids": torch.tensor([[5, 9], [7, 3]])}
    wanted, found = (m.generate(**prompt, max_new_tokens=6, do_sample=False) for m in (model, fast))
    assert torch.equal(wanted, found)


@pytest.mark.parametrize(("unpad", "shared"), [(False, False), (True, True)])
def test_text_encoder_of_blip(unpad: bool, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = with_fused_copy(
        make("BlipTextModel", attention="eager", is_decoder=True, encoder_hidden_size=27),
        unpad=unpad,
    )
    states = torch.randn(len(LENGTHS), 7, 27, dtype=torch.float64)
    given: dict[str, Any] = batch() | {
        "encoder_hidden_states": states[:1].expand_as(states) if shared else states
    }
    assert_equal(model, fast, given, only_real=unpad)
    kept = torch.ones(len(LENGTHS), 7, dtype=torch.long)
    assert_equal(model, fast, given | {"encoder_attention_mask": kept}, only_real=unpad)
    kept[1, 3:] = 0
    assert_equal(model, fast, given | {"encoder_attention_mask": kept}, only_real=unpad)
    assert_equal(model, fast, batch(), only_real=unpad)
    assert_equal(model, fast, given | {"is_decoder": True})
    only_fused(monkeypatch, fast, "BlipTextLayer", *(["BlipTextModel"] if unpad else []))
    fast(**given)


@pytest.mark.parametrize("layer_name", transformers_rows._BERT_LAYERS)
def test_every_layer_with_the_forward_of_bert(layer_name: str) -> None:
    package, name = layer_name.split(".")
    file = {"blip": "blip_text", "data2vec": "data2vec_text"}.get(package, package)
    library = pytest.importorskip(f"transformers.models.{package}.modeling_{file}")
    prefix = name.removesuffix("Layer")
    configs = {"BlipText": "BlipTextConfig", "AltRoberta": "AltCLIPTextConfig"}
    config = getattr(library, configs.get(prefix, f"{prefix}Config"))(**SIZES)
    # In transformers 4 some models have no choice of attention implementations.
    config._attn_implementation = "eager" if package == "blip" or TRANSFORMERS < 5 else "sdpa"
    layer = getattr(library, name)(config, *([0] if package == "blip" else [])).double().eval()
    x, sides = torch.randn(3, 7, SIZES["hidden_size"], dtype=torch.float64), []
    for each in with_fused_copy(layer):
        # Some layers return a tuple.
        sides.append(gradients(each, lambda each=each: pytree.tree_leaves(each(x))[0]))
    assert_close(sides[0], sides[1], 1e-10)


@only_5
def test_a_long_text_is_attended_to_in_bands() -> None:
    case = FAMILIES["ModernBERT"]
    model, fast = with_fused_copy(case.model(torch.float32, max_position_embeddings=64), unpad=True)
    tokens = torch.randint(2, 111, (2, 37), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, 20:], mask[1, :3] = 0, 0
    assert_equal(model, fast, {"input_ids": tokens, "attention_mask": mask}, 1e-5, only_real=True)


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_loss_and_logits(name: str, unpad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = with_fused_copy(make(name), unpad=unpad)
    assert_equal(model, fast, batch(labels=True), only_real=True)
    assert_equal(model, fast, batch(), only_real=True)
    only_fused(monkeypatch, fast, name)
    fast(**batch(labels=True))


@pytest.mark.parametrize("unpad", [False, True])
def test_without_logits(unpad: bool) -> None:
    model, fast = with_fused_copy(make("RobertaForMaskedLM"), unpad=unpad, skip_logits=True)
    given = batch(labels=True)
    assert fast(**given).logits is None
    wanted, found = (
        gradients(each, lambda each=each: each(**given).loss) for each in (model, fast)
    )
    assert_close(wanted, found, 1e-12)
    assert fast(**batch()).logits is not None
    assert fast.eval()(**given).logits is not None


def test_unusual_labels() -> None:
    model, fast = with_fused_copy(make("BertForMaskedLM"), unpad=True)
    given = batch(labels=True)
    # Without a label the mean is undefined; labels at padding count.
    assert torch.isnan(fast(**given | {"labels": torch.full_like(given["labels"], -100)}).loss)
    everywhere = given | {"labels": given["input_ids"]}
    torch.testing.assert_close(
        fast(**everywhere).loss, model(**everywhere).loss, rtol=1e-12, atol=0
    )
    given["labels"][0, 0] = 111
    with pytest.raises(IndexError):
        fast(**given)


def test_hooks_on_the_head_fire() -> None:
    model, fast = with_fused_copy(make("BertForMaskedLM"), unpad=True)
    seen: list[str] = []
    for part in ("cls", "cls.predictions.transform"):
        fast.get_submodule(part).register_forward_hook(lambda *_, part=part: seen.append(part))
    assert_equal(model, fast, batch(labels=True), only_real=True)
    assert sorted(seen) == ["cls", "cls.predictions.transform"]
