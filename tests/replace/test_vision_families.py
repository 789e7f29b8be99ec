"""Vision families that are rows of names, layers with windows and open_clip's towers, against the untouched models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

from tests.replace.vision_models import (  # noqa: E402
    IMAGE,
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
from xfm_fast.replace.swap import is_fused  # noqa: E402

if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("the rows name the parts as transformers 5 does", allow_module_level=True)

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 63,
    "image_size": IMAGE,
    "patch_size": 8,
}
SWIN: dict[str, Any] = {
    "image_size": IMAGE,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 3],
    "window_size": 3,
    "mlp_ratio": 2.0,
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SigLIP's images": ("SiglipVisionModel", {}),
    "SigLIP's texts": (
        "SiglipTextModel",
        {"vocab_size": 99, "max_position_embeddings": 16, "projection_size": 48, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "SigLIP 2": ("Siglip2VisionModel", {"num_patches": 16}),
    "DINOv2": ("Dinov2Model", {"mlp_ratio": 2, "drop_path_rate": 0.2}),
    "DINOv2, SwiGLU": ("Dinov2Model", {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", {"mlp_ratio": 2}),
    "DINOv3": ("DINOv3ViTModel", {"num_register_tokens": 2}),
    "DINOv3, gated": ("DINOv3ViTModel", {"num_register_tokens": 2, "use_gated_mlp": True}),
    "ViT-MAE": ("ViTMAEModel", {"mask_ratio": 0.5}),
    "Swin": ("SwinModel", SWIN | {"drop_path_rate": 0.2}),
    "Swin, whole windows": ("SwinModel", SWIN | {"window_size": 4}),
    "Swin V2": ("Swinv2Model", SWIN),
}
TIMM_SWIN: dict[str, Any] = {"img_size": IMAGE, "patch_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 3)}
TIMM_SMALL: dict[str, Any] = {"img_size": IMAGE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "timm's vit_relpos": ("vit_relpos_base_patch16_224", TIMM_SMALL),
    "timm's vit_relpos, swin's table": ("vit_relpos_base_patch16_224", TIMM_SMALL | {"rel_pos_type": "bias"}),
    "timm's vit_relpos, shared": ("vit_relpos_base_patch16_rpn_224", TIMM_SMALL | {"shared_rel_pos": True}),
    "timm's vit_srelpos": ("vit_srelpos_small_patch16_224", TIMM_SMALL),
    "timm's Swin": ("swin_tiny_patch4_window7_224", TIMM_SWIN | {"window_size": 3}),
    "timm's Swin, moving mask": (
        "swin_tiny_patch4_window7_224",
        TIMM_SWIN | {"window_size": 4, "strict_img_size": False},
    ),
    "timm's Swin V2": ("swinv2_tiny_window8_256", TIMM_SWIN | {"window_size": 3}),
    "timm's ViT-SO400M": ("vit_so400m_patch14_siglip_224", TIMM_SMALL),
    "timm's EVA-02": ("eva02_base_patch14_224", TIMM_SMALL),
}
MODELS = TRANSFORMERS | TIMM
LAYERS = (
    "SiglipEncoderLayer",
    "Siglip2EncoderLayer",
    "Dinov2Layer",
    "Dinov2WithRegistersLayer",
    "DINOv3ViTLayer",
    "ViTMAELayer",
    "SwinLayer",
    "Swinv2Layer",
    "RelPosBlock",
    "ResPostRelPosBlock",
    "SwinTransformerBlock",
    "SwinTransformerV2Block",
    "Block",
    "EvaBlock",
)
# What a fused block computes around; a call of one means that the original forward ran.
PARTS = (
    "SiglipMLP",
    "Dinov2Attention",
    "WindowAttention",
    "RelPosAttention",
    "SwinAttention",
    "Swinv2Attention",
)


def quick(kinds: Iterable[str], *chosen: str) -> list[Any]:
    """All kinds, of which the chosen ones run in the quick suite."""
    return [kind if kind in chosen else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def made(kind: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **options: Any) -> Any:
    torch.manual_seed(0)
    name, own = MODELS[kind]
    if kind in TIMM:
        return randomised(timm.create_model(name, num_classes=7, **own | options), dtype)
    model = getattr(transformers, name)
    attention = attention if model._supports_sdpa else "eager"
    sizes = own if "Swin" in name else SIZES | own
    return randomised(model(model.config_class(**sizes | options, attn_implementation=attention)), dtype)


def given(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    if kind in TIMM:
        return {"x": pixels(dtype, batch=2)}
    if kind == "SigLIP's texts":
        mask = torch.arange(9) < torch.tensor([[9], [4], [7]])
        return {"input_ids": torch.randint(3, 99, (3, 9), generator=generator), "attention_mask": mask.long()}
    if kind == "SigLIP 2":
        real = torch.arange(16) < torch.tensor([[16], [12]])
        patches = torch.randn(2, 16, 3 * 64, generator=generator, dtype=dtype)
        shapes = torch.tensor([[4, 4], [3, 4]])
        return {"pixel_values": patches, "pixel_attention_mask": real.long(), "spatial_shapes": shapes}
    noise = {"noise": torch.rand(2, 16, generator=generator)} if kind == "ViT-MAE" else {}
    return {"pixel_values": pixels(dtype, batch=2), **noise}


def states(model: Any, batch: dict[str, Any]) -> Tensor:
    out = model(**batch)
    return out if isinstance(out, Tensor) else out.last_hidden_state


def outcome(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    # DINOv3 moves the places of its patches in training.
    torch.manual_seed(5)
    return gradients(without_chance(model), partial(states, model, batch))


@pytest.mark.parametrize("kind", MODELS)
def test_forward_and_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made(kind), given(kind)
    fast = copy.deepcopy(model)
    report = accelerate(fast)
    assert {entry.class_name for entry in report.replaced} & set(LAYERS)
    assert not {entry.class_name for entry in report.left} & set(LAYERS)
    assert_close(outcome(model, batch), outcome(fast, batch), 1e-12)
    with torch.no_grad():
        wanted = states(model.eval(), batch)
        only_fused(monkeypatch, fast, *(LAYERS if kind in TRANSFORMERS else PARTS))
        for _ in range(2):
            assert_close({"output": wanted}, {"output": states(fast.eval(), batch)}, 1e-12)


@pytest.mark.parametrize("kind", MODELS)
def test_single_precision(kind: str) -> None:
    model, batch = made(kind, torch.float32, "eager"), given(kind, torch.float32)
    fast = fused_copy(model, verify=batch)
    assert_close(outcome(model, batch), outcome(fast, batch), 1e-5)


DROPOUTS: dict[str, dict[str, Any]] = {
    "DINOv2": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "SigLIP's images": {"attention_dropout": 0.3},
    "DINOv2 with registers": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "SigLIP's texts": {"attention_dropout": 0.3},
    "SigLIP 2": {"attention_dropout": 0.3},
    "ViT-MAE": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "Swin": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "Swin V2": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "DINOv3": {"attention_dropout": 0.3},
    "timm's vit_relpos": {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2},
    "timm's vit_srelpos": {"proj_drop_rate": 0.2},
    "timm's Swin": {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2},
    "timm's Swin V2": {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2},
    "timm's ViT-SO400M": {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2},
    "timm's EVA-02": {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2},
}


@pytest.mark.parametrize("kind", quick(DROPOUTS, "DINOv2", "Swin V2", "timm's vit_relpos", "timm's Swin"))
def test_dropout_keeps_mean_and_spread(kind: str) -> None:
    model = made(kind, torch.float32, **DROPOUTS[kind])
    fast, copies, moments = fused_copy(model), 256, []
    batch = {name: value[:1].expand(copies, *value.shape[1:]) for name, value in given(kind, torch.float32).items()}
    with torch.no_grad():
        for each in (model.train(), fast.train()):
            torch.manual_seed(0)
            drawn = states(each, batch)
            moments.append((drawn.mean(0), drawn.std(0)))
    (mean, spread), (other, width) = moments
    error = (other - mean) / (spread * (2 / copies) ** 0.5)
    assert float(spread.min()) > 1e-4
    assert float(error.square().mean()) < 2
    assert 0.9 < float((width / spread).mean()) < 1.1


@pytest.mark.parametrize("kind", ["DINOv2", "Swin", "timm's vit_relpos", "timm's vit_srelpos", "timm's Swin"])
def test_stochastic_depth_is_drawn_alike(kind: str) -> None:
    model, found = made(kind, drop_path_rate=0.4), []
    batch = {name: value.repeat(4, 1, 1, 1) for name, value in given(kind).items()}
    for each in (model, fused_copy(model)):
        torch.manual_seed(3)
        found.append(gradients(each.train(), partial(states, each, batch)))
    assert_close(found[0], found[1], 1e-12)
    assert float((found[0]["output"] - states(model.eval(), batch)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "kind", quick(MODELS, "SigLIP's images", "DINOv3", "Swin", "Swin V2", "timm's vit_relpos", "timm's Swin V2")
)
def test_gradient_checkpointing(kind: str) -> None:
    model, batch = made(kind), given(kind)
    fast = fused_copy(model)
    if kind in TIMM:
        fast.set_grad_checkpointing()
    else:
        fast.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(outcome(model, batch), outcome(fast, batch), 1e-12)


@pytest.mark.parametrize("kind", quick(MODELS, "SigLIP 2", "DINOv3", "Swin V2", "timm's vit_srelpos", "timm's Swin"))
def test_autocast_and_half_precision(kind: str) -> None:
    model, batch = made(kind, torch.float32), given(kind, torch.float32)
    fast = fused_copy(model)
    with torch.no_grad():
        wanted = states(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close({"output": wanted}, {"output": states(fast, batch)}, 2.0**-4)
        accelerate(fast, dtype=torch.bfloat16)
        assert_close({"output": wanted}, {"output": states(fast, batch)}, 2.0**-4)
    grown = outcome(fast, batch)
    assert all(grown[name].dtype == p.dtype for name, p in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_compiled(kind: str) -> None:
    model, batch = made(kind, torch.float32), given(kind, torch.float32)
    fast = without_chance(fused_copy(model))
    compiled, wanted = torch.compile(fast, backend="aot_eager"), outcome(model, batch)
    # The places of patches once more.
    torch.manual_seed(5)
    assert_close(wanted, gradients(fast, partial(states, compiled, batch)), 1e-5)


@pytest.mark.parametrize(
    "kind", quick(MODELS, "SigLIP 2", "DINOv3", "Swin", "Swin V2", "timm's vit_srelpos", "timm's Swin V2")
)
def test_same_objects_keys_and_way_back(kind: str, tmp_path: Path) -> None:
    model, batch = made(kind), given(kind)
    parts, keys = [*model.modules()], [*model.state_dict()]
    kinds, wanted = [type(part) for part in parts], states(model, batch)
    with accelerated(model):
        assert [*model.state_dict()] == keys
        assert all(a is b for a, b in zip(model.modules(), parts, strict=True))
        copied = pickle.loads(pickle.dumps(model))
        assert_close({"output": wanted}, {"output": states(copied, batch)}, 1e-12)
        torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert [type(part) for part in model.modules()] == kinds
    assert torch.equal(states(model, batch), wanted)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(states(model, batch), wanted)


@pytest.mark.parametrize(
    "kind", quick(MODELS, "SigLIP's images", "DINOv2", "Swin", "Swin V2", "timm's vit_relpos", "timm's Swin")
)
def test_a_hook_inside_is_called(kind: str) -> None:
    model, batch, seen = made(kind), given(kind), []
    wanted = states(model, batch)
    accelerate(model)
    layer = next(part for part in model.modules() if is_fused(part) and type(part).__name__ in LAYERS)
    part = next(part for part in layer.modules() if isinstance(part, nn.Linear))
    part.register_forward_hook(lambda *_: seen.append(kind))
    assert_close({"output": wanted}, {"output": states(model, batch)}, 1e-12)
    assert seen


@pytest.mark.parametrize("kind", ["Swin", "Swin V2", "timm's vit_relpos", "timm's Swin", "timm's Swin V2"])
def test_kept_biases_follow_their_parameters(kind: str) -> None:
    model, batch = made(kind, torch.float32), given(kind, torch.float32)
    fast = fused_copy(model)
    with torch.no_grad():
        states(fast, batch)
        for each in (model, fast):
            for name, parameter in each.named_parameters():
                if any(part in name for part in ("table", "cpb", "continuous", "rel_pos")):
                    parameter.add_(0.5)
        assert_close({"output": states(model, batch)}, {"output": states(fast, batch)}, 1e-5)


def test_images_of_other_sizes_have_other_windows() -> None:
    model = made("Swin", image_size=IMAGE)
    fast = fused_copy(model)
    with torch.no_grad():
        for size in (IMAGE, 40, IMAGE):
            x = pixels(size=size, batch=2)
            wanted, found = (
                each(pixel_values=x, interpolate_pos_encoding=True).last_hidden_state for each in (model, fast)
            )
            assert_close({"output": wanted}, {"output": found}, 1e-12)


def test_attention_weights_run_the_original() -> None:
    for kind in ("DINOv2", "Swin"):
        model, batch = made(kind, attention="eager"), given(kind)
        fast = fused_copy(model)
        wanted, found = (each(**batch, output_attentions=True).attentions for each in (model, fast))
        for one, other in zip(wanted, found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_part_that_is_another_is_named() -> None:
    model = made("DINOv2")
    for layer in model.encoder.layer:
        layer.mlp.fc1 = nn.Sequential(layer.mlp.fc1)
    with pytest.raises(InputError, match=r"mlp\.fc1 is a Sequential"):
        accelerate(model, include="*layer*")


@pytest.fixture
def open_clip() -> Any:
    return pytest.importorskip("open_clip")


def tower(open_clip: Any, dtype: torch.dtype) -> Any:
    vision = {"image_size": IMAGE, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16, "ls_init_value": 0.1}
    text = {"context_length": 9, "vocab_size": 99, "width": 48, "heads": 3, "layers": 2}
    return randomised(open_clip.model.CLIP(32, vision, text), dtype)


def test_towers_of_open_clip(open_clip: Any) -> None:
    model = tower(open_clip, torch.float64)
    fast, tokens = copy.deepcopy(model), torch.randint(1, 99, (3, 9), generator=torch.Generator().manual_seed(1))
    report = accelerate(fast)
    assert len([entry for entry in report.replaced if entry.fused == "OpenClipBlock"]) == 4
    for run in (lambda m: m.encode_image(pixels()), lambda m: m.encode_text(tokens)):
        wanted, found = (gradients(without_chance(each), partial(run, each)) for each in (model, fast))
        assert_close(wanted, found, 1e-12)
    report.revert()
    assert torch.equal(fast.encode_text(tokens), model.encode_text(tokens))


def test_towers_of_open_clip_in_half_precision(open_clip: Any) -> None:
    model = tower(open_clip, torch.float32)
    fast = fused_copy(model, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted, found = (each.encode_image(pixels(torch.float32)) for each in (model, fast))
    assert_close({"output": wanted}, {"output": found.float()}, 2.0**-4)
