"""`local_attn_depth > 0`: a region is what the last blocks see when they attend to its patches only."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from tests.agreement import assert_agrees, inputs_of, tensors, with_weights
from tests.conftest import config, load_json
from xfm_fast.kernels import ops
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import box_giou_loss, box_l1_loss, contrastive_loss, masked_lm_loss, matching_loss

VARIANTS = [("tiny_a", 1), ("tiny_b", 1), ("tiny_b", 2)]


@cache
def model_of(case: str, depth: int) -> XFM:
    return with_weights(XFM(config(case, local_attn_depth=depth)), case, torch.float64)


def outputs(model: XFM, x: dict[str, Tensor], prefix: str, image: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Feature, match logits and the three losses of a batch. Text embeddings are detached as in pretraining."""
    out: dict[str, Tensor] = {}
    text = model.encode_text(x[f"{prefix}text_ids"], x[f"{prefix}text_atts"])
    real = x[f"{prefix}text_atts"]
    out[f"{prefix}image_feat"] = feature = model.project_image(image)
    memory, own = model.image_memory(image, mask), torch.arange(len(text))
    texts = torch.cat([own, own, x[f"{prefix}itm_text_neg_idx"]])
    images = torch.cat([own, x[f"{prefix}itm_image_neg_idx"], own])
    out[f"{prefix}itm_logits"] = itm = model.match_logits(
        model.fuse(text.detach()[texts], real[texts], memory, images, first_token_only=True)
    )
    hidden = model.encode_text(x[f"{prefix}text_ids_masked"], real).detach()
    rows = own[:, None]
    logits = model.imlm_logits(model.fuse(hidden, real, memory)[rows, x[f"{prefix}masked_pos"]])
    out[f"{prefix}forward_loss_itc"] = contrastive_loss(feature, model.project_text(text), model.temp)
    out[f"{prefix}forward_loss_itm"] = matching_loss(itm, torch.arange(len(itm)) < len(own))
    out[f"{prefix}forward_loss_mlm"] = masked_lm_loss(logits, x[f"{prefix}masked_ids"])
    return out


def region_outputs(model: XFM, x: dict[str, Tensor]) -> dict[str, Tensor]:
    regions, whole = model.encode_regions(x["r_image"], x["r_idx_to_group_img"], x["r_image_atts"])
    out = outputs(model, x, "r_", regions, x["r_image_atts"])
    out["r_image_embeds"], out["r_image_embeds_fullatts"] = regions, whole
    text = model.encode_text(x["r_text_ids"], x["r_text_atts"]).detach()
    fused = model.fuse(text, x["r_text_atts"], model.image_memory(whole), first_token_only=True)
    out["r_bbox_coord"] = boxes = model.predict_boxes(fused)
    target, is_image = x["r_target_bbox"], x["r_is_image"]
    out["r_loss_bbox"] = out["r_forward_loss_bbox"] = box_l1_loss(boxes, target, is_image)
    out["r_loss_giou"] = out["r_forward_loss_giou"] = box_giou_loss(boxes, target, is_image)
    out["r_loss_bbox_noisimage"] = box_l1_loss(boxes, target)
    out["r_loss_giou_noisimage"] = box_giou_loss(boxes, target)
    parts = ("itc", "itm", "mlm", "bbox", "giou")
    out["total_region"] = torch.stack([out[f"r_forward_loss_{part}"] for part in parts]).sum()
    return out


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("case", "depth"), VARIANTS)
def test_outputs(case: str, depth: int, backend: ops.Backend) -> None:
    x, model = inputs_of(f"{case}/inputs", torch.float64), model_of(case, depth)
    truth = tensors(f"local_attn/{case}_depth{depth}")
    with torch.inference_mode(), ops.use_backend(backend):
        image = model.encode_image(x["image"])
        found = outputs(model, x, "", image, None) | region_outputs(model, x) | {"image_embeds": image[:2]}
    assert set(truth) <= set(found)
    for name, value in truth.items():
        assert_agrees(name, found[name], value, None, torch.float64)


@pytest.mark.parametrize(("case", "depth"), VARIANTS)
def test_gradient_norms(case: str, depth: int) -> None:
    golden = load_json(f"local_attn/{case}_depth{depth}_grads")["total_region"]
    model = model_of(case, depth)
    model.zero_grad(set_to_none=True)
    total = region_outputs(model, inputs_of(f"{case}/inputs", torch.float64))["total_region"]
    total.backward()
    largest = max(norm for norm in golden["grad_norm"].values() if norm is not None)
    for name, parameter in model.named_parameters():
        norm = golden["grad_norm"][name]
        if norm is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None, name
            assert float(parameter.grad.norm()) == pytest.approx(norm, rel=1e-9, abs=1e-13 * largest), name
    model.zero_grad(set_to_none=True)


def test_masking_every_block_hides_what_is_outside() -> None:
    """With all blocks masked, pixels outside a region change neither its token nor the patches inside."""
    x, model = inputs_of("tiny_b/inputs", torch.float64), model_of("tiny_b", 2)
    index, mask = torch.tensor([0]), x["r_image_atts"][1:2]
    inside = mask[0].bool()
    assert not inside.all()
    grid, patch = model.config.grid, model.config.patch_size
    outside = (~inside[1:]).view(grid, grid).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    pixels = x["r_image"][:1]
    changed = torch.where(outside, torch.randn_like(pixels), pixels)
    with torch.inference_mode():
        before, _ = model.encode_regions(pixels, index, mask)
        after, _ = model.encode_regions(changed, index, mask)
    assert torch.equal(before[:, inside], after[:, inside])
    assert not torch.equal(before[:, ~inside], after[:, ~inside])


def test_a_region_of_the_whole_image_is_the_image() -> None:
    x, model = inputs_of("tiny_a/inputs", torch.float64), model_of("tiny_a", 1)
    index = torch.tensor([1, 0, 1])
    with torch.inference_mode():
        regions, whole = model.encode_regions(x["r_image"], index, torch.ones(3, model.config.num_image_tokens))
    assert torch.allclose(regions, whole, rtol=0, atol=1e-12)
