"""The twin against golden vectors of the official code: results, losses, gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.agreement import assert_gradient_norms, inputs_of, tensors, with_weights
from tests.conftest import CASES, config, load_json
from tests.objectives.steps import BATCHES, gradients, model_of, negatives_of, region_batch, total
from xfm_fast.batches import PairBatch, RegionBatch
from xfm_fast.benchmarks.backends.official_algorithm import OfficialTrainingTwin, OfficialTwin
from xfm_fast.benchmarks.backends.official_finetuning import OfficialFineTuningTwin
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.vqa_model import VQAModel


def _close(ours: Tensor, expected: Tensor) -> None:
    eps = torch.finfo(ours.dtype).eps
    error = (ours - expected).abs().max() / expected.abs().max()
    assert error < 1000 * eps, f"relative error {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_reproduces_the_official_outputs(case: str) -> None:
    twin = OfficialTwin(model_of(case))
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


def losses(case: str, batch_name: str, **changes: Any) -> tuple[XFM, dict[str, Tensor]]:
    model, batch = model_of(case, **changes), BATCHES[batch_name](case)
    negatives = negatives_of(case, batch) if isinstance(batch, PairBatch | RegionBatch) else None
    return model, OfficialTrainingTwin(model).losses(batch, hard_negatives=negatives)


def assert_official(model: XFM, value: Tensor, golden: dict[str, Any], what: str) -> None:
    assert value.item() == pytest.approx(golden["value"], rel=1e-8)
    assert_gradient_norms(gradients(model, value), golden["grad_norm"], what, rel=1e-8, small=1e-12)


# Golden name → the batch, the losses that are summed, and changes of the configuration.
GOLDEN: dict[str, tuple[str, tuple[str, ...], dict[str, bool]]] = {
    "itc_idx": ("pairs with ids", ("itc",), {}),
    "imlm_nodetach": ("pairs", ("imlm",), {"detach_text_for_mlm": False}),
    "mim_patches_only": ("pairs", ("mim",), {"mim_patches_only": True}),
    "total_image": ("pairs", ("itc", "itm", "imlm", "mim"), {}),
    "total_region": ("regions", ("itc", "itm", "imlm", "bbox_l1", "bbox_giou"), {}),
    "total_imagenet": ("images", ("mim",), {}),
    "total_text": ("texts", ("mlm",), {}),
}


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_official(case: str, name: str) -> None:
    batch_name, terms, changes = GOLDEN[name]
    model, values = losses(case, batch_name, **changes)
    assert_official(
        model, total({term: values[term] for term in terms}), load_json(f"{case}/grads")[name], name
    )


@pytest.mark.parametrize(("case", "depth"), [("tiny_a", 1), ("tiny_b", 1), ("tiny_b", 2)])
def test_local_attention_of_regions_is_official(case: str, depth: int) -> None:
    model, values = losses(case, "regions", local_attn_depth=depth)
    golden = load_json(f"local_attn/{case}_depth{depth}_grads")["total_region"]
    assert_official(model, total(values), golden, "total_region")


def test_one_degenerate_box_silences_the_official_overlap_loss() -> None:
    batch = region_batch("tiny_a")
    boxes = batch.boxes.clone()
    boxes[0, 2] = -0.1
    negatives = negatives_of("tiny_a", batch)
    losses = OfficialTrainingTwin(model_of("tiny_a")).losses(
        replace(batch, boxes=boxes), hard_negatives=negatives
    )
    assert losses["bbox_giou"].item() == 0
    assert losses["bbox_l1"].item() > 0


@torch.inference_mode()
def test_answers_are_ranked_as_officially() -> None:
    """Against the golden ranking, and against ours where nothing is padded."""
    model = with_weights(
        VQAModel(config("tiny_b"), decoder_layers=3), "tiny_b", torch.float64, "vqa"
    )
    x = {
        k.partition("/")[2]: v
        for k, v in inputs_of("tiny_b/ft_inputs", torch.float64).items()
        if k[:4] == "vqa/"
    }
    twin, golden = OfficialFineTuningTwin(model), tensors("tiny_b/ft_outputs")
    question = x["image"], x["question_ids"], x["question_atts"]
    ranking = twin.rank_answers(*question, x["answer_ids"], x["answer_atts"], k=4)
    assert torch.equal(ranking.indices, golden["vqa/topk_ids"])
    assert torch.allclose(ranking.probabilities, golden["vqa/topk_probs"], rtol=1e-4)
    memory = model.encode_questions(*question)
    ours = model.rank_answers(memory, x["answer_ids"], k=6, count_first_token_twice=True)
    for q, length in enumerate(x["question_atts"].sum(1).tolist()):
        alone = (
            x["image"][q : q + 1],
            x["question_ids"][q : q + 1, :length],
            x["question_atts"][q : q + 1, :length],
        )
        official = twin.rank_answers(*alone, x["answer_ids"], x["answer_atts"], k=6)
        assert torch.equal(ours.indices[q], official.indices[0])
        assert torch.allclose(ours.scores[q], official.scores[0], rtol=1e-10, atol=0)
