"""Every fine-tuning model against the official one: losses, scores, generated ids and gradient
norms.

`tiny_a`'s vectors are in a complete set only, so its tests need XFM_GOLDEN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.agreement import assert_agrees, assert_gradient_norms, inputs_of, tensors, with_weights
from tests.conftest import CASES, config, golden, load_json
from tests.kernels.accuracy import draws
from xfm_fast.batches import PairBatch
from xfm_fast.kernels import ops
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import contrastive_loss, hard_negative_weights, matching_loss, step
from xfm_fast.objectives.losses import HardNegatives
from xfm_fast.packing import ImageGroups, Packing, offsets
from xfm_fast.tasks.captioning import CaptioningModel
from xfm_fast.tasks.grounding import GroundingBatch, GroundingModel
from xfm_fast.tasks.image import LabelledImages
from xfm_fast.tasks.models import ClassificationModel
from xfm_fast.tasks.nlvr2 import (
    RESULT_FILE,
    NLVR2Batch,
    NLVR2Model,
    NLVR2Options,
    NLVR2Record,
    NLVR2Task,
)
from xfm_fast.tasks.task import TASKS as TASK_TYPES
from xfm_fast.tasks.task import PairInput
from xfm_fast.tasks.text import LabelledTexts
from xfm_fast.tasks.vqa import VQABatch, VQAModel
from xfm_fast.tokenizer import CaptionTokenizer

DECODER_LAYERS = {"tiny_a": 2, "tiny_b": 3}
CLASSIFIERS: dict[str, tuple[dict[str, Any], tuple[str | None, ...]]] = {
    "cls_fused": ({"labels": 5, "modality": "pair"}, ("image", "text_ids", "text_atts")),
    "cls_image": ({"labels": 5, "modality": "image", "head": "official_image"}, ("image",)),
    "cls_image_lp": (
        {"labels": 5, "modality": "image", "head": "official_image", "frozen": True},
        ("image",),
    ),
    "cls_text": ({"labels": 5, "modality": "text"}, (None, "text_ids", "text_atts")),
    "cls_text_regression": ({"labels": 1, "modality": "text"}, (None, "text_ids", "text_atts")),
}


def of(x: dict[str, Tensor], task: str) -> dict[str, Tensor]:
    return {
        name.partition("/")[2]: value for name, value in x.items() if name.startswith(f"{task}/")
    }


@cache
def model_of(task: str, case: str, dtype: torch.dtype) -> nn.Module:
    cfg, layers = config(case), DECODER_LAYERS[case]
    if task == "retrieval":
        # The official loader interpolates before anything is converted to fp64.
        model = with_weights(XFM(cfg, heads=("contrastive", "matching")), case, torch.float32)
        model.set_image_size(load_json(f"{case}/config")["ft_res"])
        return model.to(dtype)
    if task in CLASSIFIERS:
        weights = "cls_image" if task == "cls_image_lp" else task
        return with_weights(ClassificationModel(cfg, **CLASSIFIERS[task][0]), case, dtype, weights)
    build: dict[str, Callable[[], nn.Module]] = {
        "vqa": lambda: VQAModel(cfg, decoder_layers=layers),
        "nlvr": lambda: NLVR2Model(cfg),
        "grounding": lambda: GroundingModel(cfg),
        "captioning": lambda: CaptioningModel(cfg, decoder_layers=layers),
    }
    return with_weights(build[task](), case, dtype, task)


def vqa_train_loss(model: VQAModel, x: dict[str, Tensor]) -> Tensor:
    return model(
        x["image"], x["question_ids"], x["question_atts"], x["train_answer_ids"], x["train_answer_atts"],
        x["train_n_answers"], x["train_weights"],
    )  # fmt: skip


def vqa(model: VQAModel, x: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {"train_loss": vqa_train_loss(model, x)}
    question = x["image"], x["question_ids"], x["question_atts"]
    packing = Packing.from_mask(x["train_answer_atts"], keep_padding=True)
    groups = ImageGroups(offsets(x["train_n_answers"]))
    hidden = model.text_decoder(
        x["train_answer_ids"], packing, model.encode_questions(*question), groups
    )
    out["train_logits"] = packing.unpad(model.text_decoder.logits(hidden))
    memory = model.encode_questions(*question, attend_to_padding=True)
    start = x["answer_ids"][:1, :1].expand(memory.states, 1)
    alone = ImageGroups(torch.arange(memory.states + 1))
    hidden = model.text_decoder(start, Packing.from_mask(torch.ones_like(start)), memory, alone)
    out["start_logits"] = model.text_decoder.logits(hidden)
    out["first_token_probs"] = out["start_logits"].softmax(-1)[:, x["answer_ids"][:, 1]]
    ranking = model.rank_answers(
        memory, x["answer_ids"], x["answer_atts"], k=4, count_first_token_twice=True
    )
    return out | {"topk_ids": ranking.indices, "topk_probs": ranking.probabilities}


def nlvr(model: NLVR2Model, x: dict[str, Tensor]) -> dict[str, Tensor]:
    pair = x["image"], x["text_ids"], x["text_atts"]
    return {"logits": model.logits(*pair), "loss": model(*pair, x["targets"])}


def grounding(model: GroundingModel, x: dict[str, Tensor]) -> dict[str, Tensor]:
    text = x["text_ids"], x["text_atts"]
    l1, giou = model(x["image"], *text, x["target_bbox"])
    return {"coord": model.boxes(x["image"], *text), "loss_bbox": l1, "loss_giou": giou}


def captioning(model: CaptioningModel, x: dict[str, Tensor]) -> dict[str, Tensor]:
    ids, mask, prompt = x["text_ids"], x["text_atts"], x["prompt_ids"].shape[1]
    packing = Packing.from_mask(mask, keep_padding=True)
    hidden = model.text_decoder(
        ids, packing, model.decoder_memory(x["image"]), ImageGroups(torch.arange(len(ids) + 1))
    )
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    out = {
        "logits": packing.unpad(model.text_decoder.logits(hidden)),
        "labels": labels,
        "loss_per_sample_sum": model.token_losses(x["image"], ids, mask, prompt_length=prompt).sum(
            1
        ),
    }
    for beams in (1, 3):
        out[f"generated_beam{beams}"] = model.generate(
            x["image"], x["prompt_ids"], max_length=11, min_length=5, num_beams=beams
        )
    return out


def retrieval(model: XFM, x: dict[str, Tensor]) -> dict[str, Tensor]:
    image, mask = model.encode_image(x["image"]), x["text_atts"]
    text = model.encode_text(x["text_ids"], mask)
    features = model.project_image(image), model.project_text(text)
    index = torch.arange(len(text))
    texts, images = (
        torch.cat([index, index, x["itm_text_neg_idx"]]),
        torch.cat([index, x["itm_image_neg_idx"], index]),
    )
    logits = model.match_logits(
        model.fuse(
            text[texts], mask[texts], model.image_memory(image), images, first_token_only=True
        )
    )
    weights = hard_negative_weights(*features, model.temp, x["idx"])
    return {
        "image_embeds": image,
        "interpolated_table_block0": model.state_dict()[
            "vision_encoder.blocks.0.attn.relative_position_bias_table"
        ],
        "hard_neg_weights_t2i": weights[0],
        "hard_neg_weights_i2t": weights[1],
        "loss_itc": contrastive_loss(*features, model.temp, x["idx"]),
        "loss_itm": matching_loss(logits, torch.arange(len(logits)) < len(index)),
    }


@cache
def computed(task: str, case: str, dtype: torch.dtype, backend: ops.Backend) -> dict[str, Tensor]:
    x = inputs_of(f"{case}/ft_inputs", dtype)
    if task == "grounding_pretrain":
        # Several expressions share an image; texts and targets are those of the other grounding
        # test.
        inputs, text = of(x, task), of(x, "grounding")
        model = model_of("grounding", case, dtype)
        with torch.inference_mode(), ops.use_backend(backend):
            l1, giou = model(
                inputs["image"], text["text_ids"], text["text_atts"], text["target_bbox"],
                inputs["idx_to_group_img"], inputs["is_image"],
            )  # fmt: skip
        return {"loss_bbox": l1, "loss_giou": giou}
    model = model_of(task, case, dtype)
    with torch.inference_mode(), ops.use_backend(backend):
        if isinstance(model, ClassificationModel):
            given, values = CLASSIFIERS[task][1], of(x, "cls")
            arguments = [None if name is None else values[name] for name in given]
            targets = values["targets_regression" if model.labels == 1 else "targets"]
            outputs = {"loss": model(*arguments, targets=targets)}
            # The official probe returns its loss alone.
            return (
                outputs
                if task == "cls_image_lp"
                else outputs | {"logits": model.logits(*arguments)}
            )
        run: dict[str, Callable[..., dict[str, Tensor]]] = {
            "vqa": vqa,
            "nlvr": nlvr,
            "grounding": grounding,
            "captioning": captioning,
            "retrieval": retrieval,
        }
        return run[task](model, of(x, task))


@cache
def drawn(task: str, case: str) -> list[dict[str, Tensor]]:
    """Compute the outputs by plain PyTorch in fp32, in several orders of summation."""
    return draws(lambda: computed.__wrapped__(task, case, torch.float32, "reference"))


TASKS = ["vqa", "nlvr", "grounding", "grounding_pretrain", "captioning", "retrieval", *CLASSIFIERS]


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float64, "auto"), (torch.float64, "reference"), (torch.float32, "auto")],
)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("case", CASES)
def test_outputs(case: str, task: str, dtype: torch.dtype, backend: ops.Backend) -> None:
    truth, official = (
        of(tensors(f"{case}/ft_outputs"), task),
        of(tensors(f"{case}/ft_outputs_fp32"), task),
    )
    outputs = computed(task, case, dtype, backend)
    assert set(outputs) == set(truth)
    for name, value in truth.items():
        if value.is_floating_point():
            plain = [official[name]] + (
                [drawing[name] for drawing in drawn(task, case)] if dtype == torch.float32 else []
            )
            assert_agrees(f"{task}/{name}", outputs[name], value, plain, dtype)
        else:
            assert torch.equal(outputs[name], value), f"{task}/{name}: {outputs[name].tolist()}"


def test_metric_and_file_of_nlvr2() -> None:
    task = NLVR2Task(NLVR2Options(), config("tiny_b"), create_autospec(CaptionTokenizer))
    stored = np.load(golden("metrics/nlvr.npz"))
    rows = [{"answer": bool(false < true)} for false, true in stored["logits"]]
    records = [
        NLVR2Record(images=("a", "b"), sentence="c", label=bool(target))
        for target in stored["targets"]
    ]
    official = 100 * load_json("metrics/metrics")["nlvr"]["accuracy"]
    assert task.score(rows, records) == {"accuracy": pytest.approx(official, rel=1e-6)}
    records[0] = records[0].model_copy(update={"identifier": "test1-0-0-0"})
    lines = f"test1-0-0-0,{rows[0]['answer']}\n1,{rows[1]['answer']}\n"
    assert task.files(rows[:2], records[:2]) == {RESULT_FILE: lines.encode()}


def loss_of(task: str, case: str, model: nn.Module) -> Tensor:
    x = inputs_of(f"{case}/ft_inputs", torch.float64)
    values = of(x, task)
    if isinstance(model, ClassificationModel):
        values = of(x, "cls")
        arguments = [None if name is None else values[name] for name in CLASSIFIERS[task][1]]
        return model(
            *arguments, targets=values["targets_regression" if model.labels == 1 else "targets"]
        )
    if isinstance(model, VQAModel):
        return vqa_train_loss(model, values)
    if isinstance(model, NLVR2Model):
        return nlvr(model, values)["loss"]
    if isinstance(model, GroundingModel):
        losses = model(
            values["image"], values["text_ids"], values["text_atts"], values["target_bbox"]
        )
        return losses.l1 + losses.giou
    assert isinstance(model, XFM)
    losses = retrieval(model, values)
    return losses["loss_itc"] + losses["loss_itm"]


@pytest.mark.parametrize("task", ["retrieval", "nlvr", "grounding", "vqa", *CLASSIFIERS])
@pytest.mark.parametrize("case", CASES)
def test_gradient_norms(case: str, task: str) -> None:
    official = load_json(f"{case}/ft_grads")
    if task not in official:
        pytest.skip(f"the official gradients of {task} were not recorded")
    model = model_of(task, case, torch.float64)
    model.zero_grad(set_to_none=True)
    value = loss_of(task, case, model)
    value.backward()
    assert float(value.detach()) == pytest.approx(official[task]["value"], rel=1e-10)
    norms = official[task]["grad_norm"]
    expected = {
        name.replace("text_encoder.", "text_encoder.roberta."): norm for name, norm in norms.items()
    }
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_gradient_norms(gradients, expected, task, zero_is_none=True)
    model.zero_grad(set_to_none=True)


def batch_of_recipe(name: str, x: dict[str, Tensor]) -> Any:
    """Return the golden inputs as the batch of a task."""
    image: dict[str, Any] = {"image": x["image"]}
    if name == "vqa":
        return VQABatch(
            **image, input_ids=x["question_ids"], attention_mask=x["question_atts"], answer_ids=x["train_answer_ids"],
            answer_mask=x["train_answer_atts"], answers_per_question=x["train_n_answers"],
            answer_weights=x["train_weights"],
        )  # fmt: skip
    text: dict[str, Any] = {"input_ids": x["text_ids"], "attention_mask": x["text_atts"]}
    if name.startswith("cls_image"):
        return LabelledImages(**image, targets=x["targets"])
    if name.startswith("cls_text"):
        return LabelledTexts(
            **text, targets=x["targets_regression" if "regression" in name else "targets"]
        )
    if name == "nlvr":
        return NLVR2Batch(**image, **text, targets=x["targets"])
    if name == "grounding":
        return GroundingBatch(**image, **text, boxes=x["target_bbox"])
    if name == "captioning":
        return PairInput(**image, **text)
    nothing = torch.zeros(len(x["text_ids"]), 0, dtype=torch.long)
    masks: dict[str, Any] = {
        "masked_input_ids": x["text_ids"],
        "masked_positions": nothing,
        "masked_labels": nothing,
    }
    return PairBatch(**image, **text, **masks, image_ids=x["idx"])


RECIPES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "vqa": ("vqa", {"decoder_layers": 3, "generate": True}, {"loss": "vqa/train_loss"}),
    "nlvr": ("nlvr2", {}, {"loss": "nlvr/loss"}),
    "grounding": ("grounding", {}, {"bbox_l1": "grounding/loss_bbox", "bbox_giou": "grounding/loss_giou"}),
    "captioning": (
        "captioning", {"label_smoothing": 0, "max_tokens": 11, "max_length": 11},
        {"loss": "captioning/loss_per_sample_sum"},
    ),
    "retrieval": ("retrieval", {"max_tokens": 20}, {"itc": "retrieval/loss_itc", "itm": "retrieval/loss_itm"}),
    "cls_image": ("image", {"labels": "abcde", "head": "official_image"}, {"loss": "cls_image/loss"}),
    "cls_image_lp": ("image", {"labels": "abcde", "frozen": True}, {"loss": "cls_image_lp/loss"}),
    "cls_text": ("text", {"labels": "abcde", "max_tokens": 16}, {"loss": "cls_text/loss"}),
    "cls_text_regression": ("text", {"regression": True, "max_tokens": 16}, {"loss": "cls_text_regression/loss"}),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_losses_of_a_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`losses_of` gives a batch to the model as the official scripts do."""
    kind, options, losses = RECIPES[name]
    x, truth = inputs_of("tiny_b/ft_inputs", torch.float64), tensors("tiny_b/ft_outputs")
    values = of(x, "cls" if name.startswith("cls") else name)
    tokenizer = create_autospec(CaptionTokenizer)
    if name == "captioning":
        tokenizer.encode_prompt.return_value = values["prompt_ids"][0]
        # The official sums without smoothing, as a mean over the predicted tokens.
        predicted = (truth["captioning/labels"] != -100).sum()
        truth = {
            "captioning/loss_per_sample_sum": truth["captioning/loss_per_sample_sum"].sum()
            / predicted
        }
    if name == "retrieval":
        drawn = HardNegatives(values["itm_image_neg_idx"], values["itm_text_neg_idx"])
        monkeypatch.setattr(step, "sample_hard_negatives", lambda *_, **__: drawn)
    if "labels" in options:
        options = options | {"labels": tuple(options["labels"])}
    task = TASK_TYPES[kind](TASK_TYPES[kind].Options(**options), config("tiny_b"), tokenizer)
    outputs = task.losses_of(model_of(name, "tiny_b", torch.float64), batch_of_recipe(name, values))
    assert outputs.keys() == losses.keys() == set(task.losses)
    for loss, official in losses.items():
        assert float(outputs[loss].detach()) == pytest.approx(float(truth[official]), rel=1e-10)
