"""The twin against golden vectors of the official code: results, losses, gradients."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.agreement import inputs_of, tensors, with_weights
from tests.conftest import CASES, config, load_json
from xfm_fast.batches import ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.benchmarks.backends.official_algorithm import OfficialTrainingTwin, OfficialTwin
from xfm_fast.benchmarks.backends.official_finetuning import OfficialFineTuningTwin
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.vqa import VQAModel


def _close(ours: Tensor, theirs: Tensor) -> None:
    eps = torch.finfo(ours.dtype).eps
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1000 * eps, f"relative error {error:.1e}"


@cache
def _model(case: str, dtype: torch.dtype = torch.float64, **changes: int | bool) -> XFM:
    return with_weights(XFM(config(case, **changes)), case, dtype)


@pytest.mark.parametrize("case", CASES)
def test_reproduces_the_official_outputs(case: str) -> None:
    twin = OfficialTwin(_model(case).eval())
    x, expected = inputs_of(f"{case}/inputs", torch.float64), tensors(f"{case}/outputs")
    mask = x["text_atts"]
    with torch.no_grad():
        images, texts = twin.encode_image(x["image"]), twin.encode_text(x["text_ids"], mask)
        fused = twin.fuse_pairs(texts, mask, images)
        _close(images, expected["image_embeds"])
        _close(texts, expected["text_embeds"])
        _close(fused, expected["cross_embeds"])
        _close(twin.project_image(images), expected["image_feat"])
        _close(twin.project_text(texts), expected["text_feat"])
        _close(twin.match_logits(fused), expected["itm_logits"][: len(fused)])


@torch.no_grad()
def test_reproduces_the_official_retrieval() -> None:
    facts = load_json("tiny_b/config")
    model = with_weights(XFM(config("tiny_b")), "tiny_b", torch.float32)
    model.set_image_size(facts["ft_res"])
    twin = OfficialTwin(model.double())
    x, expected = inputs_of("tiny_b/ft_inputs", torch.float64), tensors("tiny_b/ft_outputs")
    mask = x["retrieval_eval/text_atts"]
    images = twin.encode_image(x["retrieval_eval/image"])
    texts = twin.encode_text(x["retrieval_eval/text_ids"], mask)
    i2t, t2i = twin.retrieve(images, texts, mask, facts["finetune"]["retrieval_eval"]["k_test"])
    _close(i2t, expected["retrieval_eval/score_i2t"])
    _close(t2i, expected["retrieval_eval/score_t2i"])


# Golden name → the batch, the losses that are summed, and changes of the configuration.
Golden = tuple[str, tuple[str, ...], dict[str, bool]]
GOLDEN: dict[str, Golden] = {
    "itc_idx": ("pairs with ids", ("itc",), {}),
    "imlm_nodetach": ("pairs", ("imlm",), {"detach_text_for_mlm": False}),
    "mim_patches_only": ("pairs", ("mim",), {"mim_patches_only": True}),
    "total_image": ("pairs", ("itc", "itm", "imlm", "mim"), {}),
    "total_region": ("regions", ("itc", "itm", "imlm", "bbox_l1", "bbox_giou"), {}),
    "total_imagenet": ("images", ("mim",), {}),
    "total_text": ("texts", ("mlm",), {}),
}
LOCAL = [("tiny_a", 1), ("tiny_b", 1), ("tiny_b", 2)]


def _text_fields(x: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    return {
        "input_ids": x[f"{prefix}text_ids"],
        "attention_mask": x[f"{prefix}text_atts"],
        "masked_input_ids": x[f"{prefix}text_ids_masked"],
        "masked_positions": x[f"{prefix}masked_pos"],
        "masked_labels": x[f"{prefix}masked_ids"],
    }


def _losses(model: XFM, x: dict[str, Tensor], batch: str) -> dict[str, Tensor]:
    twin = OfficialTrainingTwin(model)
    negatives = x["itm_image_neg_idx"], x["itm_text_neg_idx"]
    if batch == "texts":
        return twin.losses(TextBatch(**_text_fields(x, "t_")))
    if batch == "images":
        return twin.losses(ImageBatch(image=x["image"]), patch_mask=x["image_mask"])
    if batch == "regions":
        regions = RegionBatch(
            **_text_fields(x, "r_"),
            image=x["r_image"],
            image_index=x["r_idx_to_group_img"],
            region_mask=x["r_image_atts"],
            boxes=x["r_target_bbox"],
            is_image=x["r_is_image"],
        )
        return twin.losses(regions, hard_negatives=(x["r_itm_image_neg_idx"], x["r_itm_text_neg_idx"]))
    ids = x["idx"] if batch == "pairs with ids" else None
    pairs = PairBatch(**_text_fields(x, ""), image=x["image"], image_ids=ids, patch_mask=x["image_mask"])
    return twin.losses(pairs, hard_negatives=negatives)


def _assert_official(model: XFM, total: Tensor, golden: dict[str, object], what: str) -> None:
    model.zero_grad(set_to_none=True)
    total.backward()
    assert total.item() == pytest.approx(golden["value"], rel=1e-8)
    expected = golden["grad_norm"]
    assert isinstance(expected, dict)
    largest = max(norm for norm in expected.values() if norm is not None)
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, f"{what} reaches {name}, which it must not"
        else:
            assert parameter.grad is not None, f"{what} does not reach {name}"
            # Gradients that are zero but for rounding (key biases) are rounding here too.
            norm = float(parameter.grad.norm())
            assert norm == pytest.approx(expected[name], rel=1e-8, abs=1e-12 * largest), f"{what}: {name}"
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_official(case: str, name: str) -> None:
    batch, parts, changes = GOLDEN[name]
    model = _model(case, **changes)
    losses = _losses(model, inputs_of(f"{case}/inputs", torch.float64), batch)
    total = torch.stack([losses[part] for part in parts]).sum()
    _assert_official(model, total, load_json(f"{case}/grads")[name], name)


@pytest.mark.parametrize(("case", "depth"), LOCAL)
def test_local_attention_of_regions_is_official(case: str, depth: int) -> None:
    model = _model(case, local_attn_depth=depth)
    losses = _losses(model, inputs_of(f"{case}/inputs", torch.float64), "regions")
    golden = load_json(f"local_attn/{case}_depth{depth}_grads")
    _assert_official(model, torch.stack(list(losses.values())).sum(), golden["total_region"], "total_region")


def test_one_degenerate_box_silences_the_official_overlap_loss() -> None:
    x = inputs_of("tiny_a/inputs", torch.float64)
    boxes = x["r_target_bbox"].clone()
    boxes[0, 2] = -0.1
    losses = _losses(_model("tiny_a"), x | {"r_target_bbox": boxes}, "regions")
    assert losses["bbox_giou"].item() == 0
    assert losses["bbox_l1"].item() > 0


@torch.inference_mode()
def test_answers_are_ranked_as_officially() -> None:
    """Against the golden ranking, and against ours where nothing is padded."""
    model = with_weights(VQAModel(config("tiny_b"), decoder_layers=3), "tiny_b", torch.float64, "vqa")
    x = {k.partition("/")[2]: v for k, v in inputs_of("tiny_b/ft_inputs", torch.float64).items() if k[:4] == "vqa/"}
    twin, golden = OfficialFineTuningTwin(model), tensors("tiny_b/ft_outputs")
    question = x["image"], x["question_ids"], x["question_atts"]
    ranking = twin.rank_answers(*question, x["answer_ids"], x["answer_atts"], k=4)
    assert torch.equal(ranking.indices, golden["vqa/topk_ids"])
    assert torch.allclose(ranking.probabilities, golden["vqa/topk_probs"], rtol=1e-4)
    memory = model.encode_questions(*question)
    ours = model.rank_answers(memory, x["answer_ids"], k=6, count_first_token_twice=True)
    for q, length in enumerate(x["question_atts"].sum(1).tolist()):
        alone = x["image"][q : q + 1], x["question_ids"][q : q + 1, :length], x["question_atts"][q : q + 1, :length]
        theirs = twin.rank_answers(*alone, x["answer_ids"], x["answer_atts"], k=6)
        assert torch.equal(ours.indices[q], theirs.indices[0])
        assert torch.allclose(ours.scores[q], theirs.scores[0], rtol=1e-10, atol=0)
