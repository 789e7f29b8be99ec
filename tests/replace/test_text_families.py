"""Text families of transformers that are rows of names, fused and without padding, against the untouched models."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from tests.replace.test_unpadded import padded, real  # noqa: E402
from tests.replace.text_models import LENGTHS, TRANSFORMERS, assert_equal, batch, make, with_fused_copy  # noqa: E402
from tests.replace.vision_models import only_fused  # noqa: E402
from xfm_fast import accelerate, accelerated  # noqa: E402
from xfm_fast.errors import InputError  # noqa: E402
from xfm_fast.kernels import ops  # noqa: E402
from xfm_fast.replace.families import Family, Mlp, family_of, register  # noqa: E402
from xfm_fast.replace.masks import window_attention  # noqa: E402
from xfm_fast.replace.swap import original_class  # noqa: E402

if TRANSFORMERS < 5:
    pytest.skip("the rows name the parts as transformers 5 does", allow_module_level=True)

DROPOUT = 0.3
ROTARY: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "MPNet": ("MPNetModel", {}),
    "DistilBERT": ("DistilBertModel", {"dim": 48, "n_layers": 2, "n_heads": 3, "hidden_dim": 63}),
    "ELECTRA": ("ElectraModel", {"embedding_size": 24}),
    "ALBERT": ("AlbertModel", {"embedding_size": 24, "num_hidden_layers": 4, "num_hidden_groups": 2}),
    "XLM-R": ("XLMRobertaModel", {}),
    "ModernBERT": (
        "ModernBertModel",
        ROTARY | {"local_attention": 4, "num_hidden_layers": 4, "global_attn_every_n_layers": 2, "bos_token_id": 0},
    ),
    "NomicBERT": ("NomicBertModel", ROTARY),
    "LayoutLMv3": (
        "LayoutLMv3Model",
        {"coordinate_size": 8, "shape_size": 8, "visual_embed": False, "max_2d_position_embeddings": 64},
    ),
    "DeBERTa-v3": (
        "DebertaV2Model",
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4, "share_att_key": True},
    ),
    "DeBERTa-v2": ("DebertaV2Model", {"relative_attention": True, "pos_att_type": ["c2p"]}),
}
UNPADDED = [kind for kind in MODELS if kind not in ("LayoutLMv3", "DeBERTa-v3", "DeBERTa-v2")]
DROPOUTS = {
    "DistilBERT": ("dropout", "attention_dropout"),
    "ModernBERT": ("attention_dropout", "mlp_dropout", "embedding_dropout"),
}
# ModernBERT's rotary positions and DeBERTa's scales are computed in fp32 whatever the model is.
SINGLE = ("ModernBERT", "DeBERTa-v3", "DeBERTa-v2")
LAYERS = (
    "MPNetLayer",
    "TransformerBlock",
    "ElectraLayer",
    "AlbertLayer",
    "XLMRobertaLayer",
    "ModernBertEncoderLayer",
    "NomicBertLayer",
    "LayoutLMv3Layer",
    "DebertaV2Layer",
)


def made(
    kind: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", dropout: float = 0.0, **more: Any
) -> Any:
    name, own = MODELS[kind]
    dropouts = dict.fromkeys(DROPOUTS.get(kind, ("hidden_dropout_prob", "attention_probs_dropout_prob")), dropout)
    return make(name, torch.float32 if kind in SINGLE else dtype, attention, **own | dropouts | more)


def given(kind: str, padding: str = "right") -> dict[str, Any]:
    made = batch(padding)
    if kind == "LayoutLMv3":
        corners = torch.randint(0, 30, (*made["input_ids"].shape, 2), generator=torch.Generator().manual_seed(4))
        made["bbox"] = torch.cat((corners, corners + 5), -1)
    return made


def bound(kind: str) -> float:
    return 1e-5 if kind in SINGLE else 1e-12


@pytest.mark.parametrize("kind", MODELS)
def test_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = with_fused_copy(made(kind))
    for padding in ("right", "holes"):
        assert_equal(model, fast, given(kind, padding), bound(kind))
    only_fused(monkeypatch, fast, *LAYERS)
    fast(**given(kind))
    whole = given(kind)
    whole["attention_mask"] = torch.ones_like(whole["attention_mask"])
    fast(**whole)


@pytest.mark.parametrize("kind", UNPADDED)
def test_without_padding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = with_fused_copy(made(kind), unpad=True)
    for padding in ("right", "left", "holes"):
        assert_equal(model, fast, given(kind, padding), bound(kind), only_real=True)
    only_fused(monkeypatch, fast, MODELS[kind][0], *LAYERS)
    mask = given(kind)["attention_mask"]
    assert not fast(**given(kind)).last_hidden_state[mask == 0].any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_single_precision(kind: str, attention: str) -> None:
    model = made(kind, torch.float32, attention)
    model, fast = with_fused_copy(model, unpad=kind in UNPADDED, verify=given(kind))
    with torch.no_grad():
        fast(**given(kind))
    assert_equal(model, fast, given(kind), 1e-5, only_real=True)


@pytest.mark.parametrize("kind", MODELS)
def test_dropout_keeps_mean_and_spread(kind: str) -> None:
    model = made(kind, torch.float32, dropout=DROPOUT)
    fast, copies = copy.deepcopy(model), 600
    accelerate(fast, unpad=kind in UNPADDED)
    one = {name: value[:1].expand(copies, *value.shape[1:]) for name, value in given(kind).items()}
    moments = []
    with torch.no_grad():
        for each in (model, fast):
            torch.manual_seed(0)
            drawn = each(**one).last_hidden_state
            moments.append((drawn.mean(0), drawn.std(0)))
    (mean, spread), (other, width) = moments
    error = (other - mean) / (spread * (2 / copies) ** 0.5)
    assert float(spread.min()) > 1e-3
    assert float(error.square().mean()) < 1.5
    assert 0.95 < float((width / spread).mean()) < 1.05


@pytest.mark.parametrize("kind", [*UNPADDED, "LayoutLMv3"])
def test_dropout_of_attention_weights_alone(kind: str) -> None:
    model = made(kind, torch.float32)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    layer = next(part for part in model.modules() if type(part).__name__ in LAYERS)
    family = family_of(type(layer))
    holder, _, name = ("attention.self.dropout" if family is None else family.weights_p).rpartition(".")
    owner = layer.get_submodule(holder)
    if isinstance(getattr(owner, name), nn.Module):
        owner.get_submodule(name).p = 0.9
    else:
        setattr(owner, name, 0.9)
    accelerate(model, unpad=kind in UNPADDED)
    first, second = (model(**given(kind)).last_hidden_state for _ in range(2))
    assert not torch.allclose(first[0], second[0])


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in ("MPNet", "ALBERT", "LayoutLMv3")])
def test_gradient_checkpointing(kind: str) -> None:
    model, fast = with_fused_copy(made(kind), unpad=kind in UNPADDED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        fast.gradient_checkpointing_enable()
    layer, runs = next(part for part in fast.modules() if original_class(part).__name__ in LAYERS), []
    checkpoint = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = lambda *a, **k: runs.append(1) or checkpoint(*a, **k)
    assert_equal(model, fast, given(kind), bound(kind), only_real=True)
    assert runs


@pytest.mark.parametrize("kind", MODELS)
def test_autocast_and_half_precision(kind: str) -> None:
    model, fast = with_fused_copy(made(kind, torch.float32), unpad=kind in UNPADDED)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(model, fast, given(kind), 0.1, only_real=True)
    accelerate(fast, unpad=kind in UNPADDED, dtype=torch.bfloat16)
    mask = given(kind)["attention_mask"].bool()
    with torch.no_grad():
        wanted, found = (each(**given(kind)).last_hidden_state[mask] for each in (model, fast))
    assert float((wanted - found.float()).abs().max()) < 0.05 * float(wanted.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_compiled(kind: str) -> None:
    model, fast = with_fused_copy(made(kind, torch.float32))
    fast.compile(backend="aot_eager", fullgraph=True)
    assert_equal(model, fast, given(kind), 1e-5)


# Rows of names share their code: positions that are counted, and rotary ones in windows, stand for the others.
@pytest.mark.parametrize(
    "kind", [k if k in ("MPNet", "ModernBERT") else pytest.param(k, marks=pytest.mark.slow) for k in UNPADDED]
)
def test_one_graph_without_padding(kind: str) -> None:
    model, fast = with_fused_copy(made(kind, torch.float32).eval(), unpad=True)
    graphs: list[Any] = []

    def backend(graph: Any, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for asked in (padded(5, 11), padded(3, 9), padded(7, 17, left=True)):
            wanted = real(model, asked)
            assert float((real(compiled, asked) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", MODELS)
def test_saved_pickled_and_reverted(kind: str, tmp_path: Any) -> None:
    model = made(kind, torch.float32)
    keys, classes = list(model.state_dict()), [type(part) for part in model.modules()]
    before = model(**given(kind)).last_hidden_state
    with accelerated(model, unpad=kind in UNPADDED):
        assert list(model.state_dict()) == keys
        copied = pickle.loads(pickle.dumps(model))
        assert torch.equal(copied(**given(kind)).last_hidden_state, model(**given(kind)).last_hidden_state)
        model.save_pretrained(tmp_path)
    assert [type(part) for part in model.modules()] == classes
    assert torch.equal(model(**given(kind)).last_hidden_state, before)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation).train()
    assert torch.equal(loaded(**given(kind)).last_hidden_state, before)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_not_covered_runs_the_original(kind: str) -> None:
    model, fast = with_fused_copy(made(kind, attention="eager"), unpad=kind in UNPADDED)
    wanted, found = (each(**given(kind), output_attentions=True) for each in (model, fast))
    for one, other in zip(wanted.attentions, found.attentions, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=bound(kind))
    layer = next(part for part in fast.modules() if original_class(part).__name__ in LAYERS)
    linear, seen = next(part for part in layer.modules() if isinstance(part, nn.Linear)), []
    linear.register_forward_hook(lambda *_: seen.append(1))
    assert_equal(model, fast, given(kind), bound(kind), only_real=True)
    assert seen


def test_a_long_text_is_attended_to_in_bands() -> None:
    model = made("ModernBERT", local_attention=4, max_position_embeddings=64)
    model, fast = with_fused_copy(model, unpad=True)
    tokens = torch.randint(2, 111, (2, 37), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, 20:], mask[1, :3] = 0, 0
    assert_equal(model, fast, {"input_ids": tokens, "attention_mask": mask}, 1e-5, only_real=True)


@pytest.mark.parametrize(("tokens", "window"), [(37, 5), (16, 4), (3, 7)])
def test_bands_are_masked_attention(tokens: int, window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, tokens, 3, 8, generator=generator, dtype=torch.float64).requires_grad_().unbind(0)
    mask = torch.rand(2, tokens, generator=generator) < 0.7
    places = torch.arange(tokens)
    distance = (places[:, None] - places).abs()
    seen = (mask[:, None, None] & (distance <= window)) | (distance == 0)
    wanted = nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen
    ).transpose(1, 2)
    found = window_attention(q, k, v, window, mask)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True) for out in (wanted, found)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)


def test_given_embeddings_and_positions() -> None:
    for kind in ("MPNet", "NomicBERT"):
        model, fast = with_fused_copy(made(kind), unpad=True)
        asked = given(kind)
        tokens = asked.pop("input_ids")
        embedded = torch.randn(*tokens.shape, model.config.hidden_size, dtype=torch.float64)
        assert_equal(model, fast, asked | {"inputs_embeds": embedded}, only_real=True)
        positions = torch.arange(tokens.shape[1]).flip(0)[None].expand(tokens.shape) + 2
        assert_equal(model, fast, asked | {"input_ids": tokens, "position_ids": positions}, only_real=True)


def test_refusals_name_the_part_and_the_remedy() -> None:
    model = made("ALBERT", chunk_size_feed_forward=2)
    assert "chunks of 2" in str(accelerate(model))
    model = made("MPNet")
    for layer in model.encoder.layer:
        layer.attention.attn.o = nn.Sequential(layer.attention.attn.o)
    with pytest.raises(InputError, match=r"attention\.attn\.o is a Sequential"):
        accelerate(model, include="*layer*")
    for layer in model.encoder.layer:
        del layer.attention.attn.o
    with pytest.raises(InputError, match=r"attention\.attn\.o"):
        accelerate(model, include="*layer*")


class Block(nn.Module):
    """A layer of one's own: pre-norm, one projection to queries, keys and values, a gate without bias."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixer = Mixer(width)
        self.up, self.down = nn.Linear(width, 70, bias=False), nn.Linear(35, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.one(x))
        first, second = self.up(self.two(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(first) * second)


class Mixer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads, self.size, self.act = 3, width // 3, nn.SiLU()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_family_of_ones_own_is_a_row() -> None:
    model = nn.Sequential(Block(), Block()).double()
    fast, x = copy.deepcopy(model), torch.randn(2, 5, 24, dtype=torch.float64)
    row = Family(
        layer=Block,
        order="before",
        attention="mixer",
        own=(Mixer,),
        qkv=("mixer.qkv",),
        proj="mixer.out",
        norms=("one", "two"),
        mlps=(Mlp(("up",), "mixer.act", "down", halved=True),),
        head_size="mixer.size",
        weights_p="",
    )
    register(row)
    assert len(accelerate(fast).replaced) == 2
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-12)
    with pytest.raises(InputError, match=r"a layer's class or 'package\.Class'"):
        register(dataclasses.replace(row, layer="Block"))


def test_padding_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of an unpadded encoder take as many rows as there are tokens."""
    for kind in ("MPNet", "DistilBERT"):
        model, rows = made(kind).eval(), []
        accelerate(model, unpad=True)
        original = ops.linear

        def counted(x: Tensor, *rest: Any, original: Any, rows: list[int], **options: Any) -> Tensor:
            rows.append(x.numel() // x.shape[-1])
            return original(x, *rest, **options)

        with monkeypatch.context() as patched:
            patched.setattr(ops, "linear", partial(counted, original=original, rows=rows))
            model(**given(kind))
        assert set(rows) == {sum(LENGTHS)}
