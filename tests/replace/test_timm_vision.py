"""timm's vision transformers: fused blocks against the untouched ones."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")

from timm.layers import DropPath  # noqa: E402

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
from xfm_fast.replace.swap import is_fused  # noqa: E402

SMALL = {"img_size": IMAGE, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 3, "num_classes": 7}
PARTS = ("Attention", "EvaAttention", "AttentionRope", "Mlp", "GluMlp", "SwiGLU", "DropPath", "LayerScale")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BEiT-v2": ("beitv2_base_patch16_224", {}),
    "BEiT with a shared bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "BEiT with both biases": ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True}),
    "BEiT without bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "init_values": None, "qkv_bias": False}),
    "ViT": ("vit_base_patch16_224", {}),
    "ViT with LayerScale and norms of queries and keys": (
        "vit_base_patch16_224",
        {"init_values": 0.1, "qk_norm": True},
    ),
    "CLIP's ViT": ("vit_base_patch16_clip_quickgelu_224", {}),
    "DeiT": ("deit_base_distilled_patch16_224", {}),
    "BEiT-3": ("beit3_base_patch16_224", {}),
    "EVA": ("eva_giant_patch14_224", {}),
    "EVA-02": ("eva02_tiny_patch14_224", {}),
    "EVA-02 large": ("eva02_large_patch14_224", {}),
}


def made(kind: str = "BEiT-v2", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    name, own = MODELS[kind]
    return randomised(timm.create_model(name, **SMALL | own | options), dtype)


def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return gradients(without_chance(model), partial(model, x))


@pytest.mark.parametrize("kind", MODELS)
def test_forward_and_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(kind, drop_path_rate=0.2), pixels()
    fast = copy.deepcopy(model)
    report = accelerate(fast)
    assert len(report.replaced) >= 2
    assert not [entry for entry in report.left if "Block" in entry.class_name]
    assert_close(outcome(model, x), outcome(fast, x), 1e-12)
    with torch.no_grad():
        wanted = model.eval()(x)
        only_fused(monkeypatch, fast, *PARTS)
        assert_close({"output": wanted}, {"output": fast.eval()(x)}, 1e-12)


@pytest.mark.parametrize("kind", ["BEiT-v2", "BEiT with a shared bias", "ViT", "EVA-02 large"])
def test_single_precision(kind: str) -> None:
    model, x = made(kind, torch.float32), pixels(torch.float32)
    fast = copy.deepcopy(model)
    report = accelerate(fast, verify=x)
    assert report.differences
    assert_close(outcome(model, x), outcome(fast, x), 1e-5)


@pytest.mark.parametrize("keep", [0.7, 0.0])
@pytest.mark.parametrize("scaled", [True, False])
def test_stochastic_depth_is_drawn_alike(keep: float, scaled: bool) -> None:
    model = made(drop_path_rate=0.3)
    for part in model.modules():
        if isinstance(part, DropPath):
            part.drop_prob, part.scale_by_keep = 1 - keep, scaled
    fast, found = copy.deepcopy(model), []
    accelerate(fast)
    for each in (model, fast):
        torch.manual_seed(3)
        found.append(gradients(each.train(), partial(each, pixels(batch=9))))
    assert_close(found[0], found[1], 1e-12)
    assert float((found[0]["output"] - model.eval()(pixels(batch=9))).abs().max()) > 1e-3


@pytest.mark.parametrize("where", ["attn_drop_rate", "proj_drop_rate"])
@pytest.mark.parametrize("kind", ["BEiT-v2", "ViT"])
def test_dropout_keeps_the_mean(kind: str, where: str) -> None:
    model, x = made(kind, torch.float64, depth=1, **{where: 0.2}), pixels(batch=1)
    fast = fused_copy(model)
    rows, means = x.expand(1024, -1, -1, -1), []
    with torch.no_grad():
        for each in (model.train(), fast.train()):
            torch.manual_seed(0)
            drawn = each(rows)
            means.append((drawn.mean(0), drawn.std(0)))
        plain = fast.eval()(x)[0]
    (wanted, spread), (found, other) = means
    assert float(spread.min()) > 1e-4
    assert float(((found - wanted).abs() / spread).max()) < 5 * (2 / 1024) ** 0.5
    assert float((other / spread - 1).abs().max()) < 0.2
    assert float((found - plain).abs().max()) < 10 * float(spread.max())


def test_half_precision() -> None:
    model, x = made(dtype=torch.float32), pixels(torch.float32)
    fast = fused_copy(model, dtype=torch.bfloat16)
    with torch.no_grad():
        assert_close({"output": model(x)}, {"output": fast(x)}, 2.0**-5)
    wanted, found = outcome(model, x), outcome(fast, x)
    assert {name: t.dtype for name, t in found.items() if name != "output"} == {
        name: t.dtype for name, t in wanted.items() if name != "output"
    }
    assert_close(wanted, found, 2.0**-4)


def test_autocast() -> None:
    model, x = made(dtype=torch.float32), pixels(torch.float32)
    fast = fused_copy(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(outcome(model, x), outcome(fast, x), 2.0**-4)


@pytest.mark.parametrize("kind", ["BEiT-v2", "BEiT with a shared bias", "ViT"])
def test_gradient_checkpointing(kind: str) -> None:
    model, x = made(kind, drop_path_rate=0.3), pixels()
    fast = fused_copy(model)
    fast.set_grad_checkpointing()
    found = []
    for each in (model.train(), fast.train()):
        torch.manual_seed(3)
        found.append(gradients(each, partial(each, x)))
    assert_close(found[0], found[1], 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["BEiT-v2", "ViT"])
def test_compiled(kind: str) -> None:
    model, x = made(kind, torch.float32), pixels(torch.float32)
    fast = fused_copy(model)
    without_chance(fast)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert_close(outcome(model, x), gradients(fast, partial(compiled, x)), 1e-5)
    with torch.no_grad():
        assert_close({"output": model.eval()(x)}, {"output": compiled(x)}, 1e-5)


def test_same_objects_keys_and_way_back() -> None:
    model, x = made(), pixels()
    parts, keys = [*model.modules()], [*model.state_dict()]
    kinds, wanted = [type(part) for part in parts], model(x)
    with accelerated(model):
        assert [*model.state_dict()] == keys
        assert all(a is b for a, b in zip(model.modules(), parts, strict=True))
        copied = copy.deepcopy(model)
        assert is_fused(copied.blocks[0])
        assert_close({"output": wanted}, {"output": copied(x)}, 1e-12)
    assert [type(part) for part in model.modules()] == kinds
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("name", ["blocks.0.attn", "blocks.0.mlp.fc1", "blocks.1.norm2", "blocks.1.drop_path1"])
def test_a_hook_inside_is_called(name: str) -> None:
    model, x, seen = made(drop_path_rate=0.1), pixels(), []
    wanted = model(x)
    accelerate(model)
    handle = model.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    assert_close({"output": wanted}, {"output": model(x)}, 1e-12)
    assert seen == [name]
    handle.remove()
    model(x)
    assert seen == [name]


def test_weights_that_change_are_seen() -> None:
    model, x = made(dtype=torch.float32), pixels(torch.float32)
    fast = fused_copy(model)
    with torch.no_grad():
        fast(x)
        for each in (model, fast):
            for name, parameter in each.named_parameters():
                if "q_bias" in name or "table" in name or "gamma" in name:
                    parameter.add_(0.5)
        assert_close({"output": model(x)}, {"output": fast(x)}, 1e-5)


def test_another_input_size() -> None:
    model = made()
    fast = fused_copy(model)
    for each in (model, fast):
        each.set_input_size((48, 40))
    x = pixels(size=48)[..., :40]
    assert_close(outcome(model, x), outcome(fast, x), 1e-12)


def test_masks_run_the_original() -> None:
    model = made("ViT")
    fast = fused_copy(model)
    x, mask = torch.randn(2, 5, WIDTH, dtype=torch.float64), torch.tril(torch.ones(5, 5, dtype=torch.bool))
    for options in ({"attn_mask": mask}, {"is_causal": True}):
        wanted, found = (each.blocks[0](x, **options) for each in (model, fast))
        assert torch.equal(wanted, found)
    empty = fast.blocks[0](x[:0])
    assert empty.shape == (0, 5, WIDTH)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("ViT", {"norm_layer": "rmsnorm"}, "norm1 is a RmsNorm"),
        ("ViT", {"attn_layer": "diff"}, "attn is a DiffAttention"),
        ("ViT", {"norm_layer": partial(nn.LayerNorm, bias=False)}, "norm1 has no weight or no bias"),
    ],
)
def test_other_blocks_are_left_alone(kind: str, options: dict[str, Any], reason: str) -> None:
    model = made(kind, **options)
    with pytest.raises(InputError, match=reason):
        accelerate(model, include="blocks.*")


def test_gated_attention_is_left_alone() -> None:
    model = made("EVA")
    for block in model.blocks:
        block.attn.gate = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(InputError, match="attn has a gate"):
        accelerate(model, include="blocks.*")
