"""Adapters on the linear layers of every listed family, and weights packed in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("timm")

from tests.replace import test_huggingface_vision as plain_vision  # noqa: E402
from tests.replace import test_look_alikes as look_alikes  # noqa: E402
from tests.replace import test_timm_vision as timm_vision  # noqa: E402
from tests.replace.text_models import TRANSFORMERS, batch, make  # noqa: E402
from xfm_fast import accelerate  # noqa: E402
from xfm_fast.kernels.cpu import products  # noqa: E402
from xfm_fast.replace.adapters import Adaptable, is_adapted  # noqa: E402
from xfm_fast.replace.swap import Fused, is_fused, original_class  # noqa: E402

Made = tuple[nn.Module, dict[str, Any]]
FAMILIES: dict[str, Callable[[torch.dtype], Made]] = {
    "BERT": lambda dtype: (make("BertModel", dtype), batch()),
    "CLIP's texts": lambda dtype: (plain_vision.made("CLIP's texts", dtype), plain_vision.given("CLIP's texts", dtype)),
}
for _kind in ("ViT", "DeiT", "BEiT", "Data2Vec", "CLIP's images"):
    FAMILIES[_kind] = lambda dtype, kind=_kind: (plain_vision.made(kind, dtype), plain_vision.given(kind, dtype))
for _kind in ("BEiT-v2", "BEiT without bias", "ViT", "EVA", "EVA-02", "EVA-02 large"):
    FAMILIES[f"timm's {_kind}"] = lambda dtype, kind=_kind: (
        timm_vision.made(kind, dtype),
        {"x": timm_vision.pixels(dtype)},
    )
for _kind in look_alikes.KINDS:
    FAMILIES[_kind] = lambda dtype, kind=_kind: (look_alikes.made(kind, dtype), look_alikes.given(kind, dtype))
if TRANSFORMERS >= 5:
    from tests.replace import test_text_families as texts
    from tests.replace import test_vision_families as vision

    for _kind in texts.MODELS:
        FAMILIES[_kind] = lambda dtype, kind=_kind: (texts.made(kind, dtype), texts.given(kind))
    for _kind in vision.MODELS:
        FAMILIES[_kind] = lambda dtype, kind=_kind: (vision.made(kind, dtype), vision.given(kind, dtype))
# Their code reads the weight and does not call the layer, so peft's adapters have no effect on it either.
WEIGHT_READ = {"timm's BEiT-v2": "attn.qkv", "timm's EVA": "attn.qkv", "timm's Swin V2": "attn.qkv"}
SINGLE = ("ModernBERT", "DeBERTa-v3", "DeBERTa-v2", *look_alikes.SINGLE)
QUICK = (
    "ViTMSNLayer",
    "BlipEncoderLayer",
    "RobertaPreLayerNormLayer",
    "MPNet",
    "ModernBERT",
    "DINOv3",
    "Swin",
    "CLIP's texts",
    "timm's BEiT-v2",
    "timm's EVA-02 large",
)


def chosen() -> list[Any]:
    """All families, of which a few run in the quick suite."""
    return [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES]


def states(model: nn.Module, given: dict[str, Any]) -> Tensor:
    # DINOv3 moves the places of its patches in training.
    torch.manual_seed(5)
    out: Any = model(**given)
    out = out if isinstance(out, Tensor) else out.last_hidden_state
    mask = given.get("attention_mask")
    return out if mask is None or mask.shape != out.shape[:2] else out[mask.bool()]


def multiplied(model: nn.Module) -> list[str]:
    """The linear layers that the fused forms of an accelerated model multiply with."""
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, Fused):
            continue
        for name, kinds in type(module).bypassed.items():
            part = module.get_submodule(name) if _has(module, name) else None
            if part is not None and isinstance(kinds, tuple) and Adaptable in kinds:
                found.append(f"{path}.{name}".lstrip("."))
    return found


def _has(module: nn.Module, name: str) -> bool:
    return any(path == name for path, _ in module.named_modules())


def adapted(model: nn.Module, targets: list[str]) -> nn.Module:
    made: Any = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    generator = torch.Generator().manual_seed(3)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return made.to(dtype)


def gradients(model: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    out = states(model, given)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    (out * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "lora_" in name}
    return {"output": out.detach(), **found}


def assert_near(found: Tensor, wanted: Tensor, band: float, scale: float | None = None) -> None:
    assert float((found - wanted).abs().max()) <= band * (float(wanted.abs().max()) if scale is None else scale)


@pytest.mark.parametrize("first", ["peft", "accelerate"])
@pytest.mark.parametrize("kind", chosen())
def test_adapters(kind: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, band = (torch.float32, 2e-5) if kind in SINGLE else (torch.float64, 1e-11)
    if kind == "CLIP's texts" and TRANSFORMERS < 5:
        # The causal masks of transformers 4 overflow in float64.
        dtype, band = torch.float32, 2e-5
    model, given = FAMILIES[kind](dtype)
    model.eval()
    probe = copy.deepcopy(model)
    accelerate(probe)
    targets = multiplied(probe)
    assert len(targets) >= 8
    original, fast = adapted(copy.deepcopy(model), targets), copy.deepcopy(model)
    if first == "peft":
        fast = adapted(fast, targets)
        report = accelerate(fast)
    else:
        report = accelerate(fast)
        fast = adapted(fast, targets)
    assert not report.declining, str(report)
    assert "LoRA adapters on" in str(report)
    wanted, found = gradients(original, given), gradients(fast, given)
    assert wanted.keys() == found.keys()
    largest = max(float(value.abs().max()) for name, value in wanted.items() if name != "output")
    for name, value in wanted.items():
        # The gradients of keys' adapters may be next to nothing.
        assert_near(found[name], value, band, None if name == "output" else max(float(value.abs().max()), largest / 20))
    called: list[nn.Module] = []
    forward = peft.tuners.lora.layer.Linear.forward
    monkeypatch.setattr(
        peft.tuners.lora.layer.Linear,
        "forward",
        lambda layer, *args, **more: called.append(layer) or forward(layer, *args, **more),
    )
    with torch.no_grad():
        plain, expected = states(model, given), states(original, given)
        called.clear()
        assert_near(states(fast, given), expected, band)
    assert called == []
    assert not torch.allclose(plain, expected, rtol=1e-2)


@pytest.mark.parametrize("blocked", [True, False], ids=["blocked", "dense"])
@pytest.mark.parametrize("kind", chosen())
def test_packed_weights(kind: str, blocked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda dtype, **_: blocked)
    model, given = FAMILIES[kind](torch.float32)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        wanted = states(model, given)
        report = accelerate(model, freeze=True)
        names = multiplied(model)
        assert names
        left = [name for name in names if "weight" in model.get_submodule(name)._parameters]
        # ALBERT's layers share one pack, and every other family has all of its weights in packs.
        assert left == []
        assert not report.declining, str(report)
        assert_near(states(model, given), wanted, 2e-5)
        report.revert()
        assert torch.equal(states(model, given), wanted)
    after = model.state_dict()
    assert [*after] == [*before]
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", WEIGHT_READ if TRANSFORMERS >= 5 else [])
def test_adapters_that_a_library_reads_past(kind: str) -> None:
    model, given = FAMILIES[kind](torch.float64)
    fast = adapted(copy.deepcopy(model.eval()), [WEIGHT_READ[kind]])
    accelerate(fast)
    assert any(is_adapted(part) for part in fast.modules())
    assert any(is_fused(part) and original_class(part).__name__.endswith("Block") for part in fast.modules())
    with torch.no_grad():
        wanted = states(model, given)
        assert_near(states(adapted(copy.deepcopy(model), [WEIGHT_READ[kind]]), given), wanted, 1e-12)
        assert_near(states(fast, given), wanted, 1e-11)
