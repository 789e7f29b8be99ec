"""Vision transformers of transformers, and CLIP's text tower: fused layers against the untouched ones."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from tests.replace.vision_models import (  # noqa: E402
    IMAGE,
    WIDTH,
    assert_close,
    fused_copy,
    gradients,
    only_fused,
    pixels,
    randomised,
    without_chance,
)
from xfm_fast import accelerate, accelerated  # noqa: E402
from xfm_fast.errors import InputError  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 63,
}
TRANSFORMERS = int(transformers.__version__.split(".")[0])
LAYERS = {"ViTLayer", "DeiTLayer", "BeitLayer", "Data2VecVisionLayer", "CLIPEncoderLayer"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViT", {}),
    "ViT without biases": ("ViT", {"qkv_bias": False, "hidden_act": "gelu_new"}),
    "DeiT": ("DeiT", {}),
    "BEiT": ("Beit", {"use_relative_position_bias": True}),
    "BEiT with a shared bias": ("Beit", {"use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0}),
    "BEiT with both biases": ("Beit", {"use_shared_relative_position_bias": True, "use_relative_position_bias": True}),
    "Data2Vec": ("Data2VecVision", {"use_relative_position_bias": True}),
    "Data2Vec with a shared bias": ("Data2VecVision", {"use_shared_relative_position_bias": True}),
    "CLIP's images": ("CLIPVision", {}),
    "CLIP's images, GELU": ("CLIPVision", {"hidden_act": "gelu"}),
    "CLIP's texts": ("CLIPText", {"vocab_size": 99, "eos_token_id": 98, "bos_token_id": 1}),
}


def made(kind: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **options: Any) -> Any:
    name, own = MODELS[kind]
    sizes = SIZES if name == "CLIPText" else SIZES | {"image_size": IMAGE, "patch_size": 8}
    model = getattr(transformers, f"{name}Model")
    # In transformers 4 some models have no choice of attention implementations.
    attention = attention if model._supports_sdpa else "eager"
    return randomised(model(model.config_class(**sizes | own | options, attn_implementation=attention)), dtype)


def given(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    if kind != "CLIP's texts":
        return {"pixel_values": pixels(dtype)}
    return {"input_ids": torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(1))}


def precise(kind: str) -> tuple[torch.dtype, float]:
    """The type to compare in, and the bound: the causal masks of transformers 4 overflow in float64."""
    return (torch.float32, 1e-5) if kind == "CLIP's texts" and TRANSFORMERS == 4 else (torch.float64, 1e-12)


def first_layers(model: Any) -> Any:
    """Of a vision transformer: transformers 4 keeps its layers in an encoder."""
    return model.encoder.layer if TRANSFORMERS == 4 else model.layers


def states(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    return model(**batch, **options).last_hidden_state


def outcome(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return gradients(without_chance(model), partial(states, model, batch))


@pytest.mark.parametrize("kind", MODELS)
def test_forward_and_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, bound = precise(kind)
    model, batch = made(kind, dtype), given(kind, dtype)
    fast = copy.deepcopy(model)
    assert {entry.class_name for entry in accelerate(fast).replaced} & LAYERS
    assert_close(outcome(model, batch), outcome(fast, batch), bound)
    with torch.no_grad():
        wanted = states(model.eval(), batch)
        only_fused(monkeypatch, fast, *LAYERS)
        assert_close({"output": wanted}, {"output": states(fast.eval(), batch)}, bound)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_single_precision(kind: str, attention: str) -> None:
    model, batch = made(kind, torch.float32, attention), given(kind, torch.float32)
    fast = fused_copy(model, verify=batch)
    assert_close(outcome(model, batch), outcome(fast, batch), 1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [False, True])
def test_padded_texts(attention: str, training: bool) -> None:
    model = made("CLIP's texts", torch.float32, attention)
    fast = fused_copy(model)
    mask = torch.arange(9) < torch.tensor([[9], [4], [6]])
    batch = given("CLIP's texts") | {"attention_mask": mask.long()}
    with torch.set_grad_enabled(training):
        wanted, found = (states(each, batch)[mask] for each in (model, fast))
    assert_close({"output": wanted}, {"output": found}, 1e-5)


@pytest.mark.parametrize("kind", ["BEiT", "BEiT with a shared bias", "Data2Vec"])
def test_other_resolutions(kind: str) -> None:
    model = made(kind)
    fast = fused_copy(model)
    for height, width in ((48, 48), (32, 48)):
        batch = {"pixel_values": torch.randn(2, 3, height, width, dtype=torch.float64)}
        for options in ({}, {"interpolate_pos_encoding": True}):
            wanted, found = ({"output": states(each, batch, **options)} for each in (model, fast))
            assert_close(wanted, found, 1e-12)


@pytest.mark.parametrize("kind", ["ViT", "BEiT", "Data2Vec", "CLIP's images"])
def test_attention_weights_come_from_the_original(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made(kind, attention="eager"), given(kind)
    fast = fused_copy(model)
    for options in ({"output_attentions": True}, {"output_hidden_states": True}):
        wanted, found = (each(**batch, **options) for each in (model, fast))
        for name in ("attentions", "hidden_states"):
            pairs = zip(wanted.get(name) or (), found.get(name) or (), strict=True)
            # The eager function computes its softmax in fp32, whatever the model computes in.
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)
            assert len(found.get(name) or ()) == len(wanted.get(name) or ())
    only_fused(monkeypatch, fast, *LAYERS)
    states(fast, batch)


def test_stochastic_depth_is_drawn_alike() -> None:
    model, batch = made("BEiT", drop_path_rate=0.5), given("BEiT")
    fast, found = copy.deepcopy(model), []
    accelerate(fast)
    for each in (model.train(), fast.train()):
        torch.manual_seed(3)
        found.append(gradients(each, partial(states, each, batch)))
    assert_close(found[0], found[1], 1e-12)
    assert float((found[0]["output"] - states(model.eval(), batch)).abs().max()) > 1e-3


@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
@pytest.mark.parametrize("kind", ["ViT", "BEiT", "Data2Vec"])
def test_dropout(kind: str, where: str) -> None:
    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    options: dict[str, Any] = off | {where: 0.2, "num_hidden_layers": 1}
    model = made(kind, torch.float64, **options)
    # Dropout of the embeddings comes before the layers.
    model.embeddings.dropout.p = 0.0
    fast, means = copy.deepcopy(model), []
    accelerate(fast)
    batch = {"pixel_values": pixels(batch=1).expand(1024, -1, -1, -1)}
    with torch.no_grad():
        for each in (model.train(), fast.train()):
            torch.manual_seed(0)
            drawn = states(each, batch)[:, :2]
            means.append((drawn.mean(0), drawn.std(0)))
    (wanted, spread), (found, other) = means
    assert float(spread.min()) > 1e-4
    assert float(((found - wanted).abs() / spread).max()) < 5 * (2 / 1024) ** 0.5
    assert float((other / spread - 1).abs().max()) < 0.25


@pytest.mark.parametrize("kind", ["BEiT", "CLIP's images"])
def test_half_precision(kind: str) -> None:
    model, batch = made(kind, torch.float32), given(kind, torch.float32)
    fast = fused_copy(model, dtype=torch.bfloat16)
    with torch.no_grad():
        assert_close({"output": states(model, batch)}, {"output": states(fast, batch)}, 2.0**-5)
    assert_close(outcome(model, batch), outcome(fast, batch), 2.0**-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["BEiT", "Data2Vec", "CLIP's texts"])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    dtype, bound = precise(kind)
    model, batch = made(kind, dtype), given(kind, dtype)
    fast = fused_copy(model)
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(outcome(model, batch), outcome(fast, batch), bound)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ViT", "BEiT", "Data2Vec", "CLIP's images"])
def test_compiled(kind: str) -> None:
    model, batch = made(kind, torch.float32), given(kind, torch.float32)
    fast = fused_copy(model)
    without_chance(fast)
    compiled = torch.compile(fast, backend="aot_eager")
    assert_close(outcome(model, batch), gradients(fast, partial(states, compiled, batch)), 1e-5)


def test_same_objects_keys_and_way_back() -> None:
    model, batch = made("BEiT"), given("BEiT")
    parts, keys = [*model.modules()], [*model.state_dict()]
    kinds, wanted = [type(part) for part in parts], states(model, batch)
    with accelerated(model):
        assert [*model.state_dict()] == keys
        assert all(a is b for a, b in zip(model.modules(), parts, strict=True))
        copied = pickle.loads(pickle.dumps(model))
        assert_close({"output": wanted}, {"output": states(copied, batch)}, 1e-12)
    assert [type(part) for part in model.modules()] == kinds
    assert torch.equal(states(model, batch), wanted)


@pytest.mark.parametrize("name", ["attention", "query", "activation", "relative_position_bias"])
def test_a_hook_inside_is_called(name: str) -> None:
    model, batch, seen = made("BEiT"), given("BEiT"), []
    wanted = states(model, batch)
    accelerate(model)
    places = {"query": "attention.q_proj", "activation": "mlp.activation_fn"}
    if TRANSFORMERS == 4:
        places = {
            "query": "attention.attention.query",
            "activation": "intermediate.intermediate_act_fn",
            "relative_position_bias": "attention.attention.relative_position_bias",
        }
    part: nn.Module = first_layers(model)[1].get_submodule(places.get(name, name))
    part.register_forward_hook(lambda *_: seen.append(name))
    assert_close({"output": wanted}, {"output": states(model, batch)}, 1e-12)
    assert seen == [name]


def test_other_layers_are_left_alone() -> None:
    model = made("ViT")
    holder, name = ("attention.attention", "query") if TRANSFORMERS == 4 else ("attention", "q_proj")
    for layer in first_layers(model):
        attention = layer.get_submodule(holder)
        setattr(attention, name, nn.Sequential(getattr(attention, name)))
    with pytest.raises(InputError, match=rf"{holder}\.{name} is a Sequential"):
        accelerate(model, include="*layer*")


def test_masks_of_heads_are_left_to_the_original() -> None:
    if TRANSFORMERS > 4:
        pytest.skip("transformers 5 has no masks of heads")
    for kind in ("ViT", "BEiT"):
        model, batch = made(kind, attention="eager"), given(kind)
        fast = copy.deepcopy(model)
        accelerate(fast)
        kept = torch.ones(2, 3, dtype=torch.float64)
        kept[1, 0] = 0
        wanted, found, whole = (
            states(each, batch, **options)
            for each, options in ((model, {"head_mask": kept}), (fast, {"head_mask": kept}), (model, {}))
        )
        assert_close({"output": wanted}, {"output": found}, 1e-12)
        assert not torch.allclose(wanted, whole)
