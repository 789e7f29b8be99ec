"""Text models of transformers, their fused layers, unpadded encoders and heads against the untouched models."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from tests.replace.text_models import (  # noqa: E402
    CAUSAL_BOUND,
    CAUSAL_DTYPE,
    LENGTHS,
    SIZES,
    TRANSFORMERS,
    assert_equal,
    batch,
    copies,
    make,
    real,
    with_fused_copy,
)
from tests.replace.vision_models import only_fused  # noqa: E402
from xfm_fast import accelerate, accelerated  # noqa: E402
from xfm_fast.kernels import ops  # noqa: E402
from xfm_fast.replace import huggingface_text, register_attention  # noqa: E402
from xfm_fast.replace.swap import original_class  # noqa: E402
from xfm_fast.training.distributed import end_groups  # noqa: E402

ENCODERS = ["BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel", "Data2VecTextModel"]
BLIP: dict[str, Any] = {"encoder_hidden_size": 27}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ENCODERS)
def test_layers(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = with_fused_copy(make(name, attention=attention))
    for given in (batch(), batch("left"), {"input_ids": batch()["input_ids"]}):
        assert_equal(model, fast, given)
    only_fused(monkeypatch, fast, name.replace("Model", "Layer"))
    fast(**batch())


@pytest.mark.parametrize("padding", ["right", "left", "holes"])
@pytest.mark.parametrize("name", ENCODERS)
def test_without_padding(name: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = with_fused_copy(make(name), unpad=True)
    given = batch(padding)
    assert_equal(model, fast, given, only_real=True)
    only_fused(monkeypatch, fast, name, name.replace("Model", "Layer"))
    padding_states = fast(**given).last_hidden_state[given["attention_mask"] == 0]
    first = given["attention_mask"][:, 0] == 0
    # The pooler reads the first token even where it is padding.
    assert int(padding_states.abs().sum(1).count_nonzero()) == int(first.sum())


def test_single_precision() -> None:
    model, fast = with_fused_copy(make("RobertaModel", torch.float32), unpad=True, verify=batch())
    assert_equal(model, fast, batch(), 1e-5, only_real=True)


def test_types_positions_and_given_embeddings() -> None:
    model, fast = with_fused_copy(make("BertModel"), unpad=True)
    given = batch()
    given["token_type_ids"] = (torch.arange(max(LENGTHS)) > 4).long().expand(len(LENGTHS), -1)
    assert_equal(model, fast, given, only_real=True)
    given["position_ids"] = torch.arange(max(LENGTHS)).flip(0)[None]
    assert_equal(model, fast, given, only_real=True)
    embedded = torch.randn(*given["input_ids"].shape, SIZES["hidden_size"], dtype=torch.float64)
    assert_equal(model, fast, {"inputs_embeds": embedded, "attention_mask": given["attention_mask"]}, only_real=True)
    roberta, quick = with_fused_copy(make("RobertaModel"), unpad=True)
    assert_equal(roberta, quick, {"inputs_embeds": embedded, "attention_mask": given["attention_mask"]}, only_real=True)


def test_a_text_without_tokens_is_left_to_the_original() -> None:
    model, fast = with_fused_copy(make("BertModel", attention="eager"), unpad=True)
    given = batch()
    given["attention_mask"][2] = 0
    assert_equal(model, fast, given)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_of_four_dimensions(attention: str) -> None:
    model, fast = with_fused_copy(make("BertModel", attention=attention), unpad=True)
    given = batch()
    allowed = (torch.rand(len(LENGTHS), 1, max(LENGTHS), max(LENGTHS)) < 0.7) | torch.eye(max(LENGTHS)).bool()
    if TRANSFORMERS == 4:
        # Which makes the fourth dimension itself.
        assert_equal(model, fast, given | {"attention_mask": allowed[:, 0].long()})
        return
    added = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    assert_equal(model, fast, given | {"attention_mask": added})
    # Eager attention adds ones and zeros, SDPA masks: whichever it is, it stays.
    assert_equal(model, fast, given | {"attention_mask": allowed})


@pytest.mark.parametrize("unpad", [False, True])
def test_recorded_outputs(unpad: bool) -> None:
    model, fast = with_fused_copy(make("BertModel", attention="eager"), unpad=unpad)
    for asked in ({"output_attentions": True}, {"output_hidden_states": True}):
        wanted, found = model(**batch(), **asked), fast(**batch(), **asked)
        for name in ("attentions", "hidden_states"):
            for one, other in zip(wanted.get(name) or (), found.get(name) or (), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    # transformers leaves its recording hooks behind; they must not keep the fused forms from running for ever.
    assert fast.encoder.layer[0].intact()
    assert_equal(model, fast, batch(), only_real=True)


def test_tuples_are_returned_where_asked_for() -> None:
    model, fast = with_fused_copy(make("BertModel"), unpad=True)
    wanted, found = model(**batch(), return_dict=False), fast(**batch(), return_dict=False)
    assert isinstance(found, tuple)
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["BertLMHeadModel", "RobertaForCausalLM"])
def test_decoders_with_cross_attention(name: str, attention: str) -> None:
    model, fast = copies(make(name, CAUSAL_DTYPE, attention, is_decoder=True, add_cross_attention=True))
    report = accelerate(fast, unpad=True)
    assert "causal" in str(report)
    states = torch.randn(len(LENGTHS), 7, SIZES["hidden_size"], dtype=CAUSAL_DTYPE)
    kept = torch.rand(len(LENGTHS), 7) < 0.6
    kept[:, 0] = True
    for memory in ({}, {"encoder_hidden_states": states}):
        assert_equal(model, fast, batch() | memory | {"use_cache": False}, CAUSAL_BOUND)
        assert_equal(model, fast, {"input_ids": batch()["input_ids"]} | memory | {"use_cache": False}, CAUSAL_BOUND)
    masked = {"encoder_hidden_states": states, "encoder_attention_mask": kept.long(), "use_cache": False}
    assert_equal(model, fast, batch() | masked, CAUSAL_BOUND)
    shared = {"encoder_hidden_states": states[:1].expand_as(states), "use_cache": False}
    assert_equal(model, fast, batch() | shared, CAUSAL_BOUND)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("unpad", [False, True])
def test_cross_attention_in_both_directions(unpad: bool, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("BertModel", attention=attention, is_decoder=True, add_cross_attention=True)
    model.config.is_decoder = False
    model, fast = copies(model)
    accelerate(fast, unpad=unpad)
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


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("unpad", [False, True])
def test_text_encoder_of_blip(unpad: bool, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = with_fused_copy(make("BlipTextModel", attention="eager", is_decoder=True, **BLIP), unpad=unpad)
    states = torch.randn(len(LENGTHS), 7, BLIP["encoder_hidden_size"], dtype=torch.float64)
    given: dict[str, Any] = batch() | {"encoder_hidden_states": states[:1].expand_as(states) if shared else states}
    assert_equal(model, fast, given, only_real=unpad)
    kept = torch.ones(len(LENGTHS), 7, dtype=torch.long)
    assert_equal(model, fast, given | {"encoder_attention_mask": kept}, only_real=unpad)
    kept[1, 3:] = 0
    assert_equal(model, fast, given | {"encoder_attention_mask": kept}, only_real=unpad)
    assert_equal(model, fast, batch(), only_real=unpad)
    assert_equal(model, fast, given | {"is_decoder": True})
    only_fused(monkeypatch, fast, "BlipTextLayer", *(["BlipTextModel"] if unpad else []))
    fast(**given)


@pytest.mark.parametrize("unpad", [False, True])
def test_wrong_calls_fail_as_they_did(unpad: bool) -> None:
    states = torch.randn(len(LENGTHS), 7, SIZES["hidden_size"], dtype=torch.float64)
    ids = batch()["input_ids"]
    embedded = torch.randn(*ids.shape, SIZES["hidden_size"], dtype=torch.float64)
    model = make("BertModel", CAUSAL_DTYPE, is_decoder=True)
    text = make("BlipTextModel", attention="eager", is_decoder=False)
    accelerate(model, unpad=unpad)
    accelerate(text, unpad=unpad)
    with pytest.raises(ValueError, match="cross-attention"):
        model(**batch(), encoder_hidden_states=states)
    with pytest.raises(AttributeError, match="crossattention"):
        text(**batch(), encoder_hidden_states=states)
    with pytest.raises(ValueError, match="both input_ids and inputs_embeds"):
        text(**batch(), inputs_embeds=embedded)
    assert text(ids[:0], attention_mask=ids[:0]).last_hidden_state.shape[0] == 0


@pytest.mark.parametrize("package", sorted(huggingface_text._LAYERS))
def test_every_layer_of_the_table(package: str) -> None:
    name = huggingface_text._LAYERS[package]
    file = {"blip": "blip_text", "data2vec": "data2vec_text"}.get(package, package)
    namespace = pytest.importorskip(f"transformers.models.{package}.modeling_{file}")
    kind = getattr(namespace, name)
    configs = {"BlipText": "BlipTextConfig", "AltRoberta": "AltCLIPTextConfig"}
    prefix = name.removesuffix("Layer")
    config = getattr(namespace, configs.get(prefix, f"{prefix}Config"))(**SIZES)
    try:
        config._attn_implementation = "eager" if package == "blip" else "sdpa"
        layer = kind(config, 0) if package == "blip" else kind(config)
    except KeyError:  # in transformers 4 some models have no choice of attention implementations
        config._attn_implementation = "eager"
        layer = kind(config)
    layer = layer.double().eval()
    fast = copy.deepcopy(layer)
    accelerate(fast)
    x = torch.randn(3, 7, SIZES["hidden_size"], dtype=torch.float64).requires_grad_()
    y = x.detach().clone().requires_grad_()
    wanted, found = (out[0] if isinstance(out, tuple) else out for out in (layer(x), fast(y)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    wanted.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=0, atol=1e-10)


def test_another_activation() -> None:
    model, fast = with_fused_copy(make("BertModel", hidden_act="gelu_new"), unpad=True)
    assert_equal(model, fast, batch(), only_real=True)


@pytest.mark.parametrize("unpad", [False, True])
def test_gradient_checkpointing(unpad: bool) -> None:
    model, fast = with_fused_copy(make("RobertaModel"), unpad=unpad)
    with warnings.catch_warnings():
        # transformers 5 has another name for it, and 4 not yet.
        warnings.simplefilter("ignore", FutureWarning)
        fast.gradient_checkpointing_enable()
    runs = []
    fast.encoder.layer[0].__dict__["gradient_checkpointing"] = True
    checkpoint = fast.encoder.layer[0]._gradient_checkpointing_func
    fast.encoder.layer[0]._gradient_checkpointing_func = lambda *a, **k: runs.append(1) or checkpoint(*a, **k)
    assert_equal(model, fast, batch(), only_real=unpad)
    assert runs


def test_dropout_follows_the_probabilities() -> None:
    """The mean over many passes is that of the original, and so is the spread."""
    model = make("BertModel", torch.float32, num_hidden_layers=1, hidden_dropout_prob=0.3)
    model.encoder.layer[0].attention.self.dropout.p = 0.2
    fast = copy.deepcopy(model)
    accelerate(fast, unpad=True)
    given = batch()
    moments = []
    with torch.no_grad():
        for one in (model, fast):
            states = torch.stack([one(**given).last_hidden_state[given["attention_mask"] == 1] for _ in range(400)])
            moments.append((states.mean(0), states.std(0)))
    (mean, spread), (fast_mean, fast_spread) = moments
    error = (fast_mean - mean) / (spread / 400**0.5 * 2**0.5)
    assert float(error.square().mean()) < 1.3
    assert 0.95 < float((fast_spread / spread).mean()) < 1.05
    assert float(spread.mean()) > 0.1


def test_attention_dropout_alone_reaches_the_attention() -> None:
    model = make("BertModel", torch.float32, num_hidden_layers=1, attention_probs_dropout_prob=0.9)
    accelerate(model, unpad=True)
    first, second = (model(**batch()).last_hidden_state for _ in range(2))
    assert not torch.allclose(first[0], second[0])
    model.eval()
    first, second = (model(**batch()).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("unpad", [False, True])
def test_hooks_and_exchanged_parts_are_respected(unpad: bool) -> None:
    model, fast = with_fused_copy(make("RobertaModel"), unpad=unpad)
    seen: list[Any] = []
    handle = fast.encoder.layer[1].intermediate.dense.register_forward_hook(lambda *_: seen.append("dense"))
    assert_equal(model, fast, batch(), only_real=True)
    assert seen == ["dense"]
    handle.remove()
    handle = fast.encoder.layer[0].register_forward_hook(lambda *_: seen.append("layer"))
    assert_equal(model, fast, batch(), only_real=True)
    assert seen == ["dense", "layer"]
    handle.remove()

    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    for one in (model, fast):
        one.encoder.layer[0].attention.self.query.__class__ = Doubled
    assert_equal(model, fast, batch(), only_real=True)


@pytest.mark.parametrize("unpad", [False, True])
def test_bf16_keeps_the_types_of_the_outputs(unpad: bool) -> None:
    model, fast = with_fused_copy(
        make("RobertaModel", torch.float32), unpad=unpad, dtype=torch.bfloat16, verify=batch()
    )
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = fast(**batch())
            assert out.last_hidden_state.dtype == torch.float32
    assert_equal(model, fast, batch(), 0.05, only_real=True)
    halved, quick = with_fused_copy(make("RobertaModel", torch.bfloat16), unpad=unpad)
    with torch.no_grad():
        wanted, found = (m(**batch()).last_hidden_state[batch()["attention_mask"] == 1] for m in (halved, quick))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_autocast() -> None:
    model, fast = with_fused_copy(make("RobertaModel", torch.float32), unpad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(model, fast, batch(), 0.05, only_real=True)


@pytest.mark.slow
@pytest.mark.parametrize("unpad", [False, True])
def test_compiled(unpad: bool) -> None:
    model, fast = with_fused_copy(make("RobertaModel", torch.float32), unpad=unpad)
    fast.compile(backend="aot_eager")
    assert_equal(model, fast, batch(), 1e-5, only_real=True)


def test_pickled_and_saved(tmp_path: Any) -> None:
    model, fast = copies(make("RobertaModel"))
    keys = list(model.state_dict())
    accelerate(fast, unpad=True)
    assert list(fast.state_dict()) == keys
    assert_equal(model, pickle.loads(pickle.dumps(fast)), batch(), only_real=True)
    assert_equal(model, copy.deepcopy(fast), batch(), only_real=True)
    fast.save_pretrained(tmp_path)
    assert_equal(model, type(model).from_pretrained(tmp_path, dtype=torch.float64).train(), batch())


def test_a_step_of_an_optimizer_is_seen() -> None:
    model, fast = copies(make("BertModel"))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, fast)]
    with torch.no_grad():
        accelerate(fast, unpad=True, verify=batch())
    for _ in range(2):
        assert_equal(model, fast, batch(), only_real=True)
        for optimizer in optimizers:
            optimizer.step()
    with accelerated(model, unpad=True), torch.no_grad():
        found = model(**batch()).pooler_output
    torch.testing.assert_close(model(**batch()).pooler_output, found, rtol=0, atol=1e-12)


def test_unsupported_layers_say_why() -> None:
    model = make("BertModel", chunk_size_feed_forward=2)
    report = accelerate(model)
    assert {entry.reason for entry in report.left if entry.class_name == "BertLayer"} == {
        "its feed-forward runs in chunks of 2"
    }
    assert "unpad=True" in str(report)
    model = make("BertModel")
    model.encoder.layer[0].attention.self.position_embedding_type = "relative_key"
    assert "relative_key" in str(accelerate(model))


def test_layers_that_return_keys_and_values_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(self: Any, hidden_states: Any, attention_mask: Any = None, past_key_value: Any = None) -> None: ...

    for decodes in (True, False):
        model = make("BertModel", is_decoder=decodes)
        with monkeypatch.context() as patched:
            patched.setattr(original_class(model.encoder.layer[0]), "forward", older)
            report = str(accelerate(model))
        assert ("returns keys and values" in report) is decodes


@pytest.mark.parametrize("name", ["BertModel", "BertLMHeadModel", "ViTModel"])
def test_attention_interface(name: str) -> None:
    register_attention()
    decodes, dtype, bound = "LMHead" in name, torch.float64, 1e-12
    if name == "ViTModel":
        sizes = {"image_size": 12, "patch_size": 4, "hidden_size": 24, "num_attention_heads": 2}
        config = transformers.ViTConfig(**sizes, num_hidden_layers=2, intermediate_size=30)
        model, given = transformers.ViTModel(config).double(), {"pixel_values": torch.randn(2, 3, 12, 12).double()}
    else:
        dtype, bound = (CAUSAL_DTYPE, CAUSAL_BOUND) if decodes else (dtype, bound)
        model, given = make(name, dtype, is_decoder=decodes, add_cross_attention=decodes), batch("holes")
        if decodes:
            # As long as the texts, so that only the attention itself can tell them apart.
            states = torch.randn(*given["input_ids"].shape, SIZES["hidden_size"], dtype=dtype)
            given |= {"encoder_hidden_states": states, "encoder_attention_mask": given["attention_mask"].flip(1)}
            given["use_cache"] = False
    fast = copy.deepcopy(model)
    fast.set_attn_implementation("xfm_fast")
    assert_equal(model, fast, given, bound, only_real=True)
    accelerate(fast)
    assert_equal(model, fast, given, bound, only_real=True)


def test_wrapped_for_distributed_training(tmp_path: Any) -> None:
    model, fast = with_fused_copy(make("RobertaForMaskedLM"), unpad=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(fast)
        wrapped(**batch(labels=True)).loss.backward()
        # A wrapped model is accelerated as well as one that is wrapped later.
        accelerate(wrapped, unpad=True, exclude="*.embeddings")
        model(**batch(labels=True)).loss.backward()
        for (name, wanted), found in zip(model.named_parameters(), wrapped.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=1e-12, msg=name)
    finally:
        end_groups()


@pytest.mark.parametrize("unpad", [False, True])
def test_the_plain_backend(unpad: bool) -> None:
    model, fast = with_fused_copy(make("RobertaModel"), unpad=unpad, kernels="reference")
    assert_equal(model, fast, batch(), only_real=True)


MODELS = [
    "BertForMaskedLM",
    "RobertaForMaskedLM",
    "XLMRobertaForMaskedLM",
    "CamembertForMaskedLM",
    "Data2VecTextForMaskedLM",
]


def only_loss(model: nn.Module, given: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model.zero_grad(set_to_none=True)
    loss = model(**given).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_logits(name: str, unpad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = with_fused_copy(make(name), unpad=unpad)
    assert_equal(model, fast, batch(labels=True), only_real=True)
    assert_equal(model, fast, batch(), only_real=True)
    only_fused(monkeypatch, fast, name)
    fast(**batch(labels=True))


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_without_logits(name: str, unpad: bool) -> None:
    model, fast = with_fused_copy(make(name), unpad=unpad, skip_logits=True)
    given = batch(labels=True)
    assert fast(**given).logits is None
    (wanted, gradients), (found, others) = only_loss(model, given), only_loss(fast, given)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for parameter, gradient in gradients.items():
        other = others[parameter]
        assert (gradient is None) == (other is None), parameter
        if gradient is not None and other is not None:
            torch.testing.assert_close(other, gradient, rtol=0, atol=1e-13, msg=parameter)
    assert fast(**batch()).logits is not None
    assert fast.eval()(**given).logits is not None


def test_only_labelled_rows_meet_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("RobertaForMaskedLM")
    accelerate(model, skip_logits=True)
    given, rows = batch(labels=True), []
    original = ops.linear_cross_entropy

    def counted(h: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        rows.append(h.shape[0])
        return original(h, *rest, **options)

    monkeypatch.setattr(ops, "linear_cross_entropy", counted)
    model(**given)
    assert rows == [int((given["labels"] != -100).sum())]


@pytest.mark.parametrize("unpad", [False, True])
def test_labels_that_the_original_must_judge(unpad: bool) -> None:
    model, fast = with_fused_copy(make("BertForMaskedLM"), unpad=unpad)
    given = batch(labels=True)
    none = given | {"labels": torch.full_like(given["labels"], -100)}
    assert torch.isnan(model(**none).loss)
    assert torch.isnan(fast(**none).loss)
    # Labels at padding count in the loss, whatever they are good for.
    everywhere = given | {"labels": given["input_ids"]}
    torch.testing.assert_close(fast(**everywhere).loss, model(**everywhere).loss, rtol=1e-12, atol=0)
    wrong = given["labels"].clone()
    wrong[0, 0] = 111
    with pytest.raises(IndexError):
        fast(**given | {"labels": wrong})


def test_recorded_outputs_and_tuples() -> None:
    model, fast = with_fused_copy(make("BertForMaskedLM"), unpad=True)
    given = batch(labels=True) | {"output_hidden_states": True}
    wanted, found = model(**given), fast(**given)
    for one, other in zip(wanted.hidden_states, found.hidden_states, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
    given = batch(labels=True) | {"return_dict": False}
    wanted, found = model(**given), fast(**given)
    assert len(wanted) == len(found) == 2
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("part", ["cls", "cls.predictions", "cls.predictions.transform", "cls.predictions.decoder"])
@pytest.mark.parametrize("labels", [False, True])
def test_hooks_on_the_head_fire(part: str, labels: bool) -> None:
    model, fast = with_fused_copy(make("BertForMaskedLM"), unpad=True)
    seen: list[int] = []
    fast.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    assert_equal(model, fast, batch(labels=labels), only_real=True)
    assert seen == [1]


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertLMHeadModel", "BlipTextLMHeadModel"])
def test_heads_of_other_models(name: str) -> None:
    blip = {"encoder_hidden_size": 27, "attention": "eager"} if name.startswith("Blip") else {}
    dtype, bound = (CAUSAL_DTYPE, CAUSAL_BOUND) if name == "BertLMHeadModel" else (torch.float64, 1e-12)
    model = make(name, dtype, is_decoder="LMHead" in name, **blip)
    fast = copy.deepcopy(model)
    report = accelerate(fast)
    assert any(entry.fused == "VocabularyHead" for entry in report.replaced)
    assert_equal(model, fast, batch(), bound)


def test_tied_weights_stay_tied() -> None:
    model = make("RobertaForMaskedLM")
    report = accelerate(model, unpad=True)
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
    model.resize_token_embeddings(120)
    assert model(**batch(labels=True)).logits.shape[-1] == 120
    report.revert()
    assert model(**batch(labels=True)).logits.shape[-1] == 120


@pytest.mark.parametrize("unpad", [False, True])
def test_bf16(unpad: bool) -> None:
    model, fast = with_fused_copy(
        make("RobertaForMaskedLM", torch.float32), unpad=unpad, dtype=torch.bfloat16, skip_logits=True
    )
    wanted, gradients = only_loss(model, batch(labels=True))
    found, others = only_loss(fast, batch(labels=True))
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)
    for name, gradient in gradients.items():
        other = others[name]
        if gradient is not None and other is not None and gradient.abs().max() > 1e-2:
            assert (other - gradient).norm() < 0.05 * gradient.norm(), name
    with torch.no_grad():
        logits = fast.eval()(**batch()).logits
    mask = batch()["attention_mask"]
    torch.testing.assert_close(real(logits.float(), mask), real(model(**batch()).logits, mask), rtol=0.05, atol=0.1)
