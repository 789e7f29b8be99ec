"""What a fused form must not pass over: patched classes, rows that name the wrong parts, numbers set later."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from transformers.models.bert import modeling_bert  # noqa: E402

from tests.replace import official_replicas as replicas  # noqa: E402
from xfm_fast import accelerate  # noqa: E402
from xfm_fast.errors import InputError  # noqa: E402
from xfm_fast.kernels.backend import resolve  # noqa: E402
from xfm_fast.plans import plan  # noqa: E402
from xfm_fast.replace import LayerSpec, Mlp, layer, register  # noqa: E402
from xfm_fast.replace.swap import forward_patched, original_class  # noqa: E402
from xfm_fast.replace.transformers_rows import BERT, build_spec  # noqa: E402

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 64,
}
IDS = torch.arange(5, 12)[None]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows registered in a test are forgotten after it."""
    monkeypatch.setattr(layer, "_specs", dict(layer._specs))
    yield
    layer.spec_of.cache_clear()


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=40)).eval()


def mine(self: Any, hidden_states: Tensor, *rest: Any, **named: Any) -> Any:
    return hidden_states.flip(-1)


def wrapped(original: Any) -> Any:
    @functools.wraps(original)
    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * original(self, *args, **kwargs)

    return doubled


@pytest.mark.parametrize(
    "kind", [modeling_bert.BertLayer, modeling_bert.BertOutput, nn.LayerNorm, nn.Linear]
)
@pytest.mark.parametrize("how", ["assigned", "wrapped", "another class's"])
def test_a_patched_class_is_not_replaced(
    kind: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = {
        "assigned": mine,
        "wrapped": wrapped(kind.forward),
        "another class's": nn.Identity.forward,
    }
    model = bert().encoder
    assert len(accelerate(model).replaced) == 2
    if how == "another class's" and kind is modeling_bert.BertOutput:
        forwards[how] = modeling_bert.BertIntermediate.forward
    assert not forward_patched(kind)
    monkeypatch.setattr(kind, "forward", forwards[how])
    with pytest.raises(
        InputError, match=rf"{kind.__name__}\.forward.* was replaced or wrapped by other code"
    ):
        accelerate(model)
    monkeypatch.undo()
    assert len(accelerate(model).replaced) == 2


def test_an_inherited_or_decorated_forward_is_no_patch() -> None:
    class Derived(modeling_bert.BertLayer):
        pass

    class Chosen(nn.Module):
        def forward_eager(self, x: Tensor) -> Tensor:
            return x

        forward = forward_eager

    class Decorated(nn.Module):
        @wrapped
        def forward(self, x: Tensor) -> Tensor:
            return x

    kinds = (Derived, Chosen, Decorated, nn.ModuleList, nn.Module)
    assert [kind for kind in kinds if forward_patched(kind)] == []
    assert not any(forward_patched(original_class(part)) for part in bert().modules())


@pytest.mark.parametrize(
    ("package", "patched"), [("huggingface_hub", False), ("yaml", False), ("peft", True)]
)
def test_a_wrapper_of_a_required_distribution_is_no_patch(
    package: str, patched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may decorate its classes with functions of what it requires: transformers does with `kernels`."""
    names = {"functools": functools, "__name__": f"{package}.inner"}
    exec(inspect.getsource(wrapped).replace(": Any", "").replace("-> Any", ""), names)
    layer_class = modeling_bert.BertLayer
    monkeypatch.setattr(layer_class, "forward", names["wrapped"](layer_class.forward))
    assert forward_patched(layer_class) is patched


def test_a_wrapper_of_another_package_is_no_patch_in_the_source() -> None:
    class Frozen(nn.Module):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert not forward_patched(Frozen)
    assert not forward_patched(modeling_bert.BertOutput)
    with pytest.MonkeyPatch.context() as patch:
        forward = modeling_bert.BertOutput.forward
        patch.setattr(modeling_bert.BertOutput, "forward", torch.no_grad()(forward))
        assert forward_patched(modeling_bert.BertOutput)


def test_an_encoder_without_a_fused_layer_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer_class = modeling_bert.BertLayer
    monkeypatch.setattr(layer_class, "forward", wrapped(layer_class.forward))
    report = accelerate(bert(), unpad=True)
    assert report.share == 0
    assert str(report).startswith("0% of the linear weights run in fused modules")
    assert "the original runs" in report.declining[""]


def changes() -> dict[str, Any]:
    def norms(block: Any) -> None:
        block.layernorm_before.eps = 0.5
        block.layernorm_after.eps = 0.25

    def bias(block: Any) -> None:
        block.attention.q_proj.bias = nn.Parameter(torch.randn(48))

    def activation(block: Any) -> None:
        block.mlp.activation_fn.approximate = "tanh"

    return {"norms": norms, "bias": bias, "activation": activation}


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="its parts have other names"
)
@pytest.mark.parametrize("change", changes())
def test_a_plan_sees_numbers_and_biases_set_later(change: str) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=16, qkv_bias=False)
    model, other = (transformers.ViTModel(config).eval() for _ in range(2))
    for each in (model, other):
        for block in each.layers if hasattr(each, "layers") else each.encoder.layer:
            # Large enough to tell the two formulas of GELU apart.
            block.mlp.activation_fn = nn.GELU().eval()
            block.mlp.fc1.weight.data.mul_(20)
    other.load_state_dict(model.state_dict())
    accelerate(model)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(pixels).last_hidden_state
        if resolve(None, pixels) == "cpu":
            assert any(layer in plan._plans for layer in model.modules())
        for each in (model, other):
            torch.manual_seed(1)
            for block in each.layers if hasattr(each, "layers") else each.encoder.layer:
                changes()[change](block)
        wanted, found = other(pixels).last_hidden_state, model(pixels).last_hidden_state
    assert not torch.allclose(wanted, before, atol=1e-4)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.qkv, self.out, self.drop = (
            16,
            nn.Linear(32, 96),
            nn.Linear(32, 32),
            nn.Dropout(0.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).transpose(1, 3).unbind(2)
        return self.drop(
            self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        )


class DropPath(nn.Module):
    drop_prob = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x


class ToyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.mixer = nn.LayerNorm(32), nn.LayerNorm(32), Mixer()
        self.up, self.act, self.down, self.path = (
            nn.Linear(32, 64),
            nn.GELU(),
            nn.Linear(64, 32),
            DropPath(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.path(self.mixer(self.one(x)))
        return x + self.path(self.down(self.act(self.up(self.two(x)))))


TOY = LayerSpec(
    layer=ToyLayer,
    order="before",
    attention="mixer",
    own=(Mixer, DropPath),
    qkv=("mixer.qkv",),
    proj="mixer.out",
    norms=("one", "two"),
    mlps=(Mlp(("up",), "act", "down"),),
    head_size="mixer.head_dim",
    branch_p=("mixer.drop", ""),
    drop_paths=("path", "path"),
)
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"attention": "mixin"}, "mixin"),
    ({"qkv": ("mixer.qvk",)}, r"mixer\.qvk"),
    ({"proj": "mixer.output"}, r"mixer\.output"),
    ({"norms": ("one", "three")}, "three"),
    ({"mlps": (Mlp(("upp",), "act", "down"),)}, "upp"),
    ({"mlps": (Mlp(("up",), "activation", "down"),)}, "activation"),
    ({"mlps": (Mlp(("up",), "act", "down", dropout="drop"),)}, "drop"),
    ({"head_size": "mixer.head_size"}, r"mixer\.head_size"),
    ({"head_size": "", "heads": "mixer.heads"}, r"mixer\.heads"),
    ({"weights_p": "mixer.attn_drop"}, r"mixer\.attn_drop"),
    ({"branch_p": ("mixer.dropp", "")}, r"mixer\.dropp"),
    ({"chunks": "mixer.chunk"}, r"mixer\.chunk"),
    ({"drop_paths": ("pathh", "pathh")}, "path"),
    ({"bias": "position_bias"}, "position_bias"),
    ({"rotary": "positions"}, "positions"),
    ({"own": (DropPath,)}, "mixer is a Mixer"),
    ({"own": "nowhere.at.all.Mixer"}, "mixer is a Mixer"),
]


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("mistake", "named"), MISTAKES, ids=[str(mistake) for mistake, _ in MISTAKES]
)
def test_a_wrong_name_in_a_row_is_a_refusal(mistake: dict[str, Any], named: str) -> None:
    model = nn.Sequential(ToyLayer(), ToyLayer())
    register(TOY)
    assert len(accelerate(model, verify=torch.randn(2, 5, 32)).replaced) == 2
    layer._specs.pop(TOY.name)  # another `own` would be a row for another version
    register(replace(TOY, **mistake))
    with pytest.raises(InputError, match=named):
        accelerate(model)
    assert (
        accelerate(nn.ModuleList([model, nn.MultiheadAttention(8, 2)])).left[0].class_name
        == "ToyLayer"
    )


@pytest.mark.usefixtures("rows")
def test_an_unknown_order_is_not_registered() -> None:
    with pytest.raises(InputError, match=r"'befor'.*before, behind sums, behind branches"):
        register(replace(TOY, order="befor"))


@pytest.mark.usefixtures("rows")
def test_a_layer_with_an_argument_that_no_row_takes_is_not_replaced() -> None:
    """BROS passes boxes to every layer: with a row of BERT every call would run the original."""
    sizes = {"vocab_size": 40, "dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_projection": 16}
    model = transformers.BrosModel(transformers.BrosConfig(**SMALL, **sizes)).eval()
    register(build_spec("bros.BrosLayer", BERT))
    with pytest.raises(
        InputError, match="requires bbox_pos_emb, which its LayerSpec does not take"
    ):
        accelerate(model)


def test_what_is_around_a_replaced_part_is_named() -> None:
    vision = pytest.importorskip("torchvision").models.vision_transformer
    model = vision.VisionTransformer(
        32, 16, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=128, num_classes=200
    )
    report = accelerate(model)
    (blocks,) = report.unknown
    assert (blocks.class_name, len(blocks.paths)) == ("EncoderBlock", 3)
    products = sum(
        p.numel() for block in model.encoder.layers for p in block.mlp.parameters() if p.ndim > 1
    )
    assert blocks.share == pytest.approx(
        products / sum(p.numel() for p in model.parameters() if p.ndim > 1)
    )
    assert "EncoderBlock (encoder.layers.encoder_layer_0 and 2 more)" in str(report)


def test_a_form_that_does_not_compute_its_example_is_not_used() -> None:
    """With `max_norm` a table rewrites itself when it is read, which the fused form leaves to the original."""
    model = replicas.TextModel(replicas.TextConfig()).eval()
    model.embeddings.word_embeddings.max_norm = 1.0
    (left,) = (entry for entry in accelerate(model).left if entry.path == "embeddings")
    assert left.reason == "its fused form does not cover its submodules"
    model.embeddings.word_embeddings.max_norm = None
    assert "embeddings" in [entry.path for entry in accelerate(model).replaced]
