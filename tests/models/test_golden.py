"""The model against the official code: every output, every intermediate, every gradient norm of two tiny models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.agreement import (
    assert_agrees,
    assert_gradient_norms,
    assert_rounded,
    inputs_of,
    relative_error,
    tensors,
    with_weights,
)
from tests.conftest import CASES, config, load_json
from tests.kernels.accuracy import draws
from tests.models.hidden_states import record_hidden_states
from xfm_fast.kernels import ops
from xfm_fast.models.fusion import ImageMemory
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import (
    box_giou_loss,
    box_l1_loss,
    contrastive_loss,
    hard_negative_weights,
    masked_image_loss,
    masked_lm_loss,
    matching_loss,
)

DTYPES = [torch.float64, torch.float32]
# What the official forward returns for a region batch in place of a loss that it does not compute.
NOT_COMPUTED = {"r_forward_loss_mim"}


@cache
def model_of(case: str, dtype: torch.dtype, **overrides: int) -> XFM:
    return with_weights(XFM(config(case, **overrides)), case, dtype)


def match_logits(
    model: XFM, x: dict[str, Tensor], text: Tensor, memory: ImageMemory, prefix: str = ""
) -> Tensor:
    """Positives, then every text with its negative image, then every image with its negative text."""
    count, mask = len(text), x[f"{prefix}text_atts"]
    image_negatives, text_negatives = (
        x[f"{prefix}itm_image_neg_idx"],
        x[f"{prefix}itm_text_neg_idx"],
    )
    own = torch.arange(count)
    texts, images = torch.cat([own, own, text_negatives]), torch.cat([own, image_negatives, own])
    return model.match_logits(
        model.fuse(text[texts], mask[texts], memory, images, first_token_only=True)
    )


def matches(logits: Tensor) -> Tensor:
    return torch.arange(len(logits)) < len(logits) // 3


def at(embeds: Tensor, positions: Tensor) -> Tensor:
    return embeds.gather(1, positions[..., None].expand(-1, -1, embeds.shape[-1]))


def image_lm_logits(
    model: XFM, x: dict[str, Tensor], memory: ImageMemory, prefix: str = "", *, detach: bool = False
) -> Tensor:
    text = model.encode_text(x[f"{prefix}text_ids_masked"], x[f"{prefix}text_atts"])
    fused = model.fuse(text.detach() if detach else text, x[f"{prefix}text_atts"], memory)
    return model.imlm_logits(at(fused, x[f"{prefix}masked_pos"]))


def outputs(model: XFM, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that outputs.safetensors holds."""
    out: dict[str, Tensor] = {}
    mask = x["text_atts"]
    out["image_embeds"] = image = model.encode_image(x["image"])
    out["image_atts"] = torch.ones(image.shape[:2], dtype=torch.int64)
    out["image_embeds_masked"] = masked = model.encode_image(x["image"], x["image_mask"])
    out["image_feat"] = image_feat = model.project_image(image)
    text = model.encode_text(x["text_ids"], mask)
    out["text_feat"] = text_feat = model.project_text(text)
    out["text_embeds"] = padded = model.encode_text(x["text_ids"], mask, keep_padding=True)
    memory = model.image_memory(image)
    out["cross_embeds"] = model.fuse(padded, mask, memory, keep_padding=True)
    out["itm_logits"] = itm = match_logits(model, x, text, memory)
    out["imlm_logits"] = imlm = image_lm_logits(model, x, memory)
    only_text = model.encode_text(x["t_text_ids_masked"], x["t_text_atts"])
    out["mlm_text_logits"] = mlm = model.mlm_logits(at(only_text, x["t_masked_pos"]))

    for suffix, ids in (("", None), ("_idx", x["idx"])):
        out[f"loss_itc{suffix}"] = contrastive_loss(image_feat, text_feat, model.temp, ids)
        weights = hard_negative_weights(image_feat, text_feat, model.temp, ids)
        out[f"hard_neg_weights_t2i{suffix}"], out[f"hard_neg_weights_i2t{suffix}"] = weights
    out["loss_itm"] = matching_loss(itm, matches(itm))
    out["loss_imlm"] = masked_lm_loss(imlm, x["masked_ids"])
    out["loss_mlm_text"] = out["total_text"] = masked_lm_loss(mlm, x["t_masked_ids"])
    out["loss_mim"] = masked_image_loss(masked, image, x["image_mask"])
    out["loss_mim_patches_only"] = masked_image_loss(
        masked, image, x["image_mask"], patches_only=True
    )
    for ours, theirs in (("itc", "itc"), ("itm", "itm"), ("imlm", "mlm"), ("mim", "mim")):
        out[f"forward_loss_{theirs}"] = out[f"loss_{ours}"]
    out["forward_imagenet_loss_mim"] = out["loss_mim"]
    out["total_image"] = out["loss_itc"] + out["loss_itm"] + out["loss_imlm"] + out["loss_mim"]
    return out | region_outputs(model, x)


def region_outputs(model: XFM, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of regions, with text embeddings detached as in pretraining."""
    out: dict[str, Tensor] = {}
    regions, whole = model.encode_regions(x["r_image"], x["r_idx_to_group_img"], x["r_image_atts"])
    out["r_image_embeds"], out["r_image_embeds_fullatts"] = regions, whole
    text = model.encode_text(x["r_text_ids"], x["r_text_atts"])
    features = model.project_image(regions), model.project_text(text)
    seen = model.image_memory(regions, x["r_image_atts"])
    out["r_itm_logits"] = itm = match_logits(model, x, text.detach(), seen, "r_")
    fused = model.fuse(
        text.detach(), x["r_text_atts"], model.image_memory(whole), first_token_only=True
    )
    out["r_bbox_coord"] = boxes = model.predict_boxes(fused)
    target, is_image = x["r_target_bbox"], x["r_is_image"]
    out["r_loss_bbox"] = out["r_forward_loss_bbox"] = box_l1_loss(boxes, target, is_image)
    out["r_loss_giou"] = out["r_forward_loss_giou"] = box_giou_loss(boxes, target, is_image)
    out["r_loss_bbox_noisimage"] = box_l1_loss(boxes, target)
    out["r_loss_giou_noisimage"] = box_giou_loss(boxes, target)
    out["r_forward_loss_itc"] = contrastive_loss(*features, model.temp)
    out["r_forward_loss_itm"] = matching_loss(itm, matches(itm))
    out["r_forward_loss_mlm"] = masked_lm_loss(
        image_lm_logits(model, x, seen, "r_", detach=True), x["r_masked_ids"]
    )
    parts = ("itc", "itm", "mlm", "bbox", "giou")
    out["total_region"] = torch.stack([out[f"r_forward_loss_{part}"] for part in parts]).sum()
    return out


@cache
def computed(case: str, dtype: torch.dtype, backend: ops.Backend) -> dict[str, Tensor]:
    model, x = model_of(case, dtype), inputs_of(f"{case}/inputs", dtype)
    with torch.inference_mode(), ops.use_backend(backend):
        return outputs(model, x)


@cache
def drawn(case: str) -> list[dict[str, Tensor]]:
    """What plain PyTorch makes of it in fp32, in several orders of summation."""
    return draws(lambda: computed.__wrapped__(case, torch.float32, "reference"))


def names(case: str) -> list[str]:
    return sorted(set(tensors(f"{case}/outputs")) - NOT_COMPUTED)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "name"), [(case, name) for case in CASES for name in names(case)])
def test_output(case: str, name: str, dtype: torch.dtype, backend: ops.Backend) -> None:
    truth, plain = tensors(f"{case}/outputs")[name], [tensors(f"{case}/outputs_fp32")[name]]
    if dtype == torch.float32:
        plain += [found[name] for found in drawn(case)]
    assert_agrees(name, computed(case, dtype, backend)[name], truth, plain, dtype)


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing_and_is_left_zero(case: str) -> None:
    """Without `keep_padding` the real tokens are the official ones, and padded positions are zero."""
    x = inputs_of(f"{case}/inputs", torch.float64)
    model, truth, real = (
        model_of(case, torch.float64),
        tensors(f"{case}/outputs"),
        x["text_atts"].bool(),
    )
    with torch.inference_mode():
        text = model.encode_text(x["text_ids"], x["text_atts"])
        fused = model.fuse(text, x["text_atts"], model.image_memory(model.encode_image(x["image"])))
    for name, value in (("text_embeds", text), ("cross_embeds", fused)):
        assert_agrees(name, value[real], truth[name][real], (), torch.float64)
        assert not value[~real].any()


@pytest.mark.parametrize("case", CASES)
def test_intermediates(case: str) -> None:
    x, stored = inputs_of(f"{case}/inputs", torch.float64), tensors(f"{case}/intermediates")
    model = model_of(case, torch.float64)
    mask = x["text_atts"]
    with torch.inference_mode(), record_hidden_states(model) as states:
        memory = model.image_memory(model.encode_image(x["image"]))
        text = model.encode_text(x["text_ids"], mask, keep_padding=True)
        model.fuse(text, mask, memory, keep_padding=True)
    blocks, layers, fused = states.vision, states.text, states.fusion
    found = {"patch_embed": blocks[0][:, 1:], "text_embeddings": layers[0]}
    found |= {f"vision_block_{i}": value for i, value in enumerate(blocks[1:])}
    found |= {f"text_layer_{i}": value for i, value in enumerate(layers[1:])}
    found |= {f"fusion_layer_{i}": value for i, value in enumerate(fused)}
    assert set(found) == set(stored)
    for name, value in found.items():
        assert_rounded(name, value, stored[name])


def test_recording_ends_with_its_block() -> None:
    model, x = model_of("tiny_b", torch.float64), inputs_of("tiny_b/inputs", torch.float64)
    mask, layers = x["text_atts"], model.config.fusion_layers
    with torch.inference_mode():
        with record_hidden_states(model) as states:
            memory = model.image_memory(model.encode_image(x["image"]))
            text = model.encode_text(x["text_ids"], mask)
            model.fuse(text, mask, memory, first_token_only=True)
        assert torch.equal(states.text[-1], text)
        assert len(states.fusion) == layers - 1, "the last layer computed no whole texts"
        recorded = [len(states.vision), len(states.text), len(states.fusion)]
        model.fuse(
            model.encode_text(x["text_ids"], mask),
            mask,
            model.image_memory(model.encode_image(x["image"])),
        )
        assert [len(states.vision), len(states.text), len(states.fusion)] == recorded
    assert not any("feed_forward" in vars(module) for module in model.modules())


def loss_itm(model: XFM, x: dict[str, Tensor], *, detach: bool) -> Tensor:
    text = model.encode_text(x["text_ids"], x["text_atts"])
    memory = model.image_memory(model.encode_image(x["image"]))
    logits = match_logits(model, x, text.detach() if detach else text, memory)
    return matching_loss(logits, matches(logits))


def loss_itc(model: XFM, x: dict[str, Tensor], ids: Tensor | None) -> Tensor:
    text = model.encode_text(x["text_ids"], x["text_atts"])
    image = model.encode_image(x["image"])
    return contrastive_loss(model.project_image(image), model.project_text(text), model.temp, ids)


def loss_imlm(model: XFM, x: dict[str, Tensor], *, detach: bool) -> Tensor:
    memory = model.image_memory(model.encode_image(x["image"]))
    return masked_lm_loss(image_lm_logits(model, x, memory, detach=detach), x["masked_ids"])


def loss_mim(model: XFM, x: dict[str, Tensor], *, patches_only: bool) -> Tensor:
    whole, masked = model.encode_image(x["image"]), model.encode_image(x["image"], x["image_mask"])
    return masked_image_loss(masked, whole, x["image_mask"], patches_only=patches_only)


def loss_mlm_text(model: XFM, x: dict[str, Tensor]) -> Tensor:
    text = model.encode_text(x["t_text_ids_masked"], x["t_text_atts"])
    return masked_lm_loss(model.mlm_logits(at(text, x["t_masked_pos"])), x["t_masked_ids"])


def region_boxes(model: XFM, x: dict[str, Tensor]) -> Tensor:
    _, whole = model.encode_regions(x["r_image"], x["r_idx_to_group_img"], x["r_image_atts"])
    text = model.encode_text(x["r_text_ids"], x["r_text_atts"]).detach()
    return model.predict_boxes(
        model.fuse(text, x["r_text_atts"], model.image_memory(whole), first_token_only=True)
    )


LOSSES: dict[str, Callable[[XFM, dict[str, Tensor]], Tensor]] = {
    "itc": lambda model, x: loss_itc(model, x, None),
    "itc_idx": lambda model, x: loss_itc(model, x, x["idx"]),
    "itm": lambda model, x: loss_itm(model, x, detach=True),
    "itm_finetune": lambda model, x: loss_itm(model, x, detach=False),
    "imlm": lambda model, x: loss_imlm(model, x, detach=True),
    "imlm_nodetach": lambda model, x: loss_imlm(model, x, detach=False),
    "mlm_text": loss_mlm_text,
    "mim": lambda model, x: loss_mim(model, x, patches_only=False),
    "mim_patches_only": lambda model, x: loss_mim(model, x, patches_only=True),
    "r_bbox": lambda model, x: box_l1_loss(
        region_boxes(model, x), x["r_target_bbox"], x["r_is_image"]
    ),
    "r_giou": lambda model, x: box_giou_loss(
        region_boxes(model, x), x["r_target_bbox"], x["r_is_image"]
    ),
}


def gradients(case: str, loss: str) -> tuple[Tensor, dict[str, Tensor | None]]:
    model = model_of(case, torch.float64)
    model.zero_grad(set_to_none=True)
    value = LOSSES[loss](model, inputs_of(f"{case}/inputs", torch.float64))
    value.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return value.detach(), found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_gradient_norms(case: str, loss: str) -> None:
    """The differentiable path, in evaluation mode: the norm of every parameter's gradient is the official one."""
    golden = load_json(f"{case}/grads")[loss]
    value, found = gradients(case, loss)
    assert float(value) == pytest.approx(golden["value"], rel=1e-10)
    assert_gradient_norms(found, golden["grad_norm"], loss, zero_is_none=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_full_gradients(loss: str) -> None:
    """Not only their norms: some gradients in full. Needs XFM_GOLDEN."""
    stored = {
        name.partition("|")[2]: value
        for name, value in tensors("tiny_a/grads_full").items()
        if name.startswith(f"{loss}|")
    }
    _, found = gradients("tiny_a", loss)
    compared = 0
    for name, expected in stored.items():
        gradient = found.get(name)
        if gradient is not None and expected.any():
            # Stored in fp32.
            assert (
                relative_error(gradient, expected) < 1e-6 or float(expected.abs().max()) < 1e-15
            ), f"{loss}: {name}"
            compared += 1
    assert compared, f"no stored gradient of {loss} was compared"


# `local_attn_depth > 0`: a region is what the last blocks see when they attend to its patches only.
LOCAL = [("tiny_a", 1), ("tiny_b", 1), ("tiny_b", 2)]


@pytest.mark.parametrize(("case", "depth"), LOCAL)
def test_outputs_of_local_attention(case: str, depth: int) -> None:
    x, model = (
        inputs_of(f"{case}/inputs", torch.float64),
        model_of(case, torch.float64, local_attn_depth=depth),
    )
    truth = tensors(f"local_attn/{case}_depth{depth}")
    with torch.inference_mode():
        found = outputs(model, x)
        found |= {
            "image_embeds": found["image_embeds"][:2],
            "r_image_feat": model.project_image(found["r_image_embeds"]),
        }
    assert set(truth) <= set(found)
    for name, value in truth.items():
        assert_agrees(name, found[name], value, (), torch.float64)


@pytest.mark.parametrize(("case", "depth"), LOCAL)
def test_gradient_norms_of_local_attention(case: str, depth: int) -> None:
    golden = load_json(f"local_attn/{case}_depth{depth}_grads")["total_region"]
    model = model_of(case, torch.float64, local_attn_depth=depth)
    model.zero_grad(set_to_none=True)
    region_outputs(model, inputs_of(f"{case}/inputs", torch.float64))["total_region"].backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_gradient_norms(found, golden["grad_norm"], "total_region", zero_is_none=True)
    model.zero_grad(set_to_none=True)
