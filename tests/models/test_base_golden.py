"""The base model, at 224 and 384 pixels, against the official code on weights that a rule generates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.agreement import EXACT, tensors
from tests.conftest import base_inputs, base_state, config, load_json
from xfm_fast.checkpoint import to_ours
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import contrastive_loss, masked_image_loss, masked_lm_loss, matching_loss

# Generating 1.3 GB of weights alone takes longer than a quick test may.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def all_cores() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, 2))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return base_state()


@cache
def stats() -> dict[str, dict[str, Any]]:
    return load_json("base/stats")["tensors"]


def official_error(name: str) -> float:
    """The relative error of the official code in fp32: of a loss its own, of a tensor the worst of all tensors.

    The error of four logits is one draw, and another library's may be three times as large. Tensors at the end of the
    same encoders round alike, so that together they tell how far any of them may be off.
    """
    errors = {
        key: entry["official_fp32_max_abs_diff_vs_fp64"] / entry["abs_max"]
        for key, entry in stats().items()
        if "official_fp32_max_abs_diff_vs_fp64" in entry and (entry["shape"] or key == name)
    }
    return max(errors.values()) if stats()[name]["shape"] else errors[name]


def build(weights: dict[str, Tensor], dtype: torch.dtype, **overrides: Any) -> XFM:
    cfg = config("base", **overrides)
    with torch.device("meta"):
        model = XFM(cfg)
    state, _ = to_ours(weights, cfg)
    model.load_state_dict({name: state[name] for name in model.state_dict()}, assign=True)
    return model.to(dtype).eval()


def compare(found: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every slice that is stored of the named tensors, and the mean and norm of the tensors themselves."""
    golden = tensors("base/outputs")
    wrong: list[str] = []
    for name, value in found.items():
        entry = stats()[name]
        scale = entry["abs_max"]
        allowed = EXACT * scale
        if dtype == torch.float32:
            allowed = (3 * official_error(name) + 4 * torch.finfo(dtype).eps) * scale
        assert [*value.shape] == entry["shape"]
        kept = [key for key in golden if key == name or key.startswith(f"{name}[")]
        if kept:
            truth = golden[kept[0]]
            part = value[tuple(slice(0, size) for size in truth.shape)]
            error = float((part.double() - truth).abs().max())
            if not error <= allowed:
                wrong.append(f"{name}: error {error:.2e} exceeds {allowed:.2e}")
        assert float(value.double().norm()) == pytest.approx(entry["norm"], rel=1e-5)
        assert float(value.double().mean()) == pytest.approx(entry["mean"], abs=1e-5 * scale)
    assert not wrong, "\n".join(wrong)


@torch.inference_mode()
def at_224(model: XFM, dtype: torch.dtype) -> dict[str, Tensor]:
    x = {name: t.to(dtype) if t.is_floating_point() else t for name, t in base_inputs().items()}
    ids, mask = x["text_30_ids"], x["text_30_atts"]
    out: dict[str, Tensor] = {}
    out["image_embeds_224"] = image = model.encode_image(x["image_224"])
    out["image_embeds_masked_224"] = masked = model.encode_image(
        x["image_224"], x["image_mask_224"]
    )
    out["text_embeds_30"] = padded = model.encode_text(ids, mask, keep_padding=True)
    out["image_feat_224"], out["text_feat_30"] = features = (
        model.project_image(image),
        model.project_text(padded),
    )
    memory = model.image_memory(image)
    out["cross_embeds_224"] = fused = model.fuse(padded, mask, memory, keep_padding=True)
    out["cross_cls_224"] = fused[:, 0]
    text = model.encode_text(ids, mask)
    texts, images = torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([0, 1, 1, 0, 0, 1])
    out["itm_logits_all_224"] = itm = model.match_logits(
        model.fuse(text[texts], mask[texts], memory, images, first_token_only=True)
    )
    out["itm_logits_pos_224"] = itm[:2]
    out["bbox_coord_224"] = model.predict_boxes(fused)
    hidden = model.encode_text(x["text_30_ids_masked"], mask)
    rows = torch.arange(2)[:, None]
    out["imlm_logits"] = imlm = model.imlm_logits(
        model.fuse(hidden, mask, memory)[rows, x["masked_pos"]]
    )
    out["mlm_text_logits"] = mlm = model.mlm_logits(hidden[rows, x["masked_pos"]])
    out["loss_imlm"] = masked_lm_loss(imlm, x["masked_ids"])
    out["loss_mlm_text"] = masked_lm_loss(mlm, x["masked_ids"])
    out["loss_itc"] = contrastive_loss(*features, model.temp)
    out["loss_itm"] = matching_loss(itm, torch.arange(6) < 2)
    out["loss_mim"] = masked_image_loss(masked, image, x["image_mask_224"])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_base_at_224(weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    out = at_224(build(weights, dtype), dtype)
    compare(out, dtype)
    for name in ("imlm_logits", "mlm_text_logits"):
        assert torch.equal(out[name].argmax(-1), tensors("base/outputs")[f"{name}.argmax"])


def test_base_at_384(weights: dict[str, Tensor]) -> None:
    """The position tables are interpolated from 14x14 patches, as the official loader does it."""
    model = build(weights, torch.float32, image_size=384)
    x = base_inputs()
    table = model.vision_encoder.state_dict()["blocks.0.attn.relative_position_bias_table"]
    golden = tensors("base/outputs")["interpolated_relative_position_bias_table_384_block0"]
    assert torch.allclose(table.double(), golden.double(), rtol=0, atol=1e-6)
    with torch.inference_mode():
        image = model.encode_image(x["image_384"])
        ids, mask = x["text_40_ids"], x["text_40_atts"]
        text = model.encode_text(ids, mask, keep_padding=True)
        fused = model.fuse(text, mask, model.image_memory(image), keep_padding=True)
        found = {
            "image_embeds_384": image,
            "text_embeds_40": text,
            "image_feat_384": model.project_image(image),
            "text_feat_40": model.project_text(text),
            "cross_embeds_384": fused,
            "cross_cls_384": fused[:, 0],
            "itm_logits_pos_384": model.match_logits(fused),
        }
    compare(found, torch.float32)
