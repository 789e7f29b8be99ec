"""Models of transformers whose layers are ViT's, CLIP's or BERT's under other names, against the untouched models."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from tests.replace.text_models import batch as texts  # noqa: E402
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
from xfm_fast import accelerate  # noqa: E402
from xfm_fast.errors import InputError  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 63,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VISION: dict[str, Any] = SIZES | {"image_size": IMAGE, "patch_size": 8}
TEXT: dict[str, Any] = SIZES | {"vocab_size": 111, "max_position_embeddings": 40, "pad_token_id": 1}
# By the layer: the model, and what its configuration has beside the sizes.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTMSNLayer": ("ViTMSNModel", VISION),
    "IJepaLayer": ("IJepaModel", VISION),
    "ASTLayer": ("ASTModel", SIZES | {"max_length": 48, "num_mel_bins": 32, "patch_size": 8}),
    "VivitLayer": ("VivitModel", VISION | {"num_frames": 4, "tubelet_size": [2, 8, 8]}),
    "VideoMAELayer": ("VideoMAEModel", VISION | {"num_frames": 4, "qkv_bias": False, "qv_bias": False}),
    "YolosLayer": ("YolosModel", VISION | {"image_size": [IMAGE, IMAGE], "num_detection_tokens": 5}),
    "DPTViTLayer": ("DPTModel", VISION | {"backbone_out_indices": [0, 0, 1, 1]}),
    "ViltLayer": ("ViltModel", VISION | TEXT),
    "PixioLayer": ("PixioModel", VISION | {"mlp_ratio": 2, "drop_path_rate": 0.2}),
    "OwlViTEncoderLayer": ("OwlViTVisionModel", VISION),
    "Owlv2EncoderLayer": ("Owlv2VisionModel", VISION),
    "Owlv2EncoderLayer of texts": ("Owlv2TextModel", TEXT | {"max_position_embeddings": 11}),
    "BlipEncoderLayer": ("BlipVisionModel", VISION),
    "Blip2EncoderLayer": ("Blip2VisionModel", VISION),
    "InstructBlipEncoderLayer": ("InstructBlipVisionModel", VISION),
    "MegatronBertLayer": ("MegatronBertModel", TEXT),
    "RemBertLayer": ("RemBertModel", TEXT | {"input_embedding_size": 24}),
    "RobertaPreLayerNormLayer": ("RobertaPreLayerNormModel", TEXT),
    "XLMRobertaXLLayer": ("XLMRobertaXLModel", TEXT),
    "RoFormerLayer": ("RoFormerModel", TEXT),
    "RoFormerLayer of values": ("RoFormerModel", TEXT | {"rotary_value": True}),
    "JinaEmbeddingsV3Layer": ("JinaEmbeddingsV3Model", TEXT),
    "EsmLayer": ("EsmModel", TEXT | {"position_embedding_type": "rotary", "mask_token_id": 4, "token_dropout": True}),
}
# transformers makes rotary positions in fp32, and an additive causal mask overflows in float64.
SINGLE = ("JinaEmbeddingsV3Layer", "EsmLayer", "RoFormerLayer", "RoFormerLayer of values", "Owlv2EncoderLayer of texts")
# transformers 4 has no such model, or adds biases and rotates where a row cannot say it.
ONLY_5 = ("PixioLayer", "JinaEmbeddingsV3Layer", "EsmLayer")
if int(transformers.__version__.split(".")[0]) < 5:
    KINDS = {kind: row for kind, row in KINDS.items() if kind not in ONLY_5}


def made(kind: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **options: Any) -> Any:
    name, own = KINDS[kind]
    model = getattr(transformers, name)
    attention = attention if model._supports_sdpa else "eager"
    return randomised(model(model.config_class(**own | options, attn_implementation=attention)), dtype)


def given(kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    if KINDS[kind][1].get("vocab_size") and kind != "ViltLayer":
        return texts()
    if kind == "ASTLayer":
        return {"input_values": torch.randn(2, 48, 32, generator=generator, dtype=dtype)}
    if kind in ("VivitLayer", "VideoMAELayer"):
        return {"pixel_values": torch.randn(2, 4, 3, IMAGE, IMAGE, generator=generator, dtype=dtype)}
    return {"pixel_values": pixels(dtype, batch=5)} | (texts() if kind == "ViltLayer" else {})


def precise(kind: str) -> tuple[torch.dtype, float]:
    return (torch.float32, 1e-5) if kind in SINGLE else (torch.float64, 1e-12)


def states(model: Any, batch: dict[str, Any]) -> Tensor:
    torch.manual_seed(5)  # ViLT shuffles its patches
    return model(**batch).last_hidden_state


def real(kind: str, model: Any, batch: dict[str, Any]) -> Tensor:
    out, mask = states(model, batch), batch.get("attention_mask")
    return out if mask is None or kind == "ViltLayer" else out[mask.bool()]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_gradients_and_way_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, bound = precise(kind)
    model, batch = made(kind, dtype), given(kind, dtype)
    fast = copy.deepcopy(model)
    report = accelerate(fast)
    layer = kind.split()[0]
    assert [entry.class_name for entry in report.replaced].count(layer) == 2, str(report)
    wanted, found = (gradients(without_chance(m), partial(real, kind, m, batch)) for m in (model, fast))
    assert_close(wanted, found, bound)
    with torch.no_grad(), monkeypatch.context() as patched:
        outputs = real(kind, model.eval(), batch)
        only_fused(patched, fast, layer)
        for _ in range(2):
            assert_close({"output": outputs}, {"output": real(kind, fast.eval(), batch)}, bound)
    report.revert()
    with torch.no_grad():
        assert torch.equal(real(kind, fast, batch), outputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_single_precision(kind: str, attention: str) -> None:
    model, batch = made(kind, torch.float32, attention), given(kind, torch.float32)
    fast = fused_copy(model, verify=None if kind == "ViltLayer" else batch)
    wanted, found = (gradients(without_chance(m), partial(real, kind, m, batch)) for m in (model, fast))
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        scale = max(float(value.abs().max()), largest / 20)
        assert float((found[name] - value).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_keeps_mean_and_spread(kind: str) -> None:
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")
    model = made(kind, torch.float32, **dict.fromkeys(names, 0.2))
    fast, copies, moments = fused_copy(model), 256, []
    batch = {name: value[:1].expand(copies, *value.shape[1:]) for name, value in given(kind, torch.float32).items()}
    with torch.no_grad():
        for each in (model.train(), fast.train()):
            drawn = states(each, batch)
            moments.append((drawn.mean(0), drawn.std(0)))
    (mean, spread), (other, width) = moments
    error = (other - mean) / (spread * (2 / copies) ** 0.5)
    assert float(spread.min()) > 1e-4
    assert float(error.square().mean()) < 2
    assert 0.9 < float((width / spread).mean()) < 1.1


def test_a_parameter_that_a_row_does_not_name_is_never_left_out() -> None:
    model = made("ViTMSNLayer")
    for part in [part for part in model.modules() if type(part).__name__ == "ViTMSNLayer"]:
        part.register_parameter("shift", torch.nn.Parameter(torch.zeros(48)))
    with pytest.raises(InputError, match="shift"):
        accelerate(model, include="*ayer*")
