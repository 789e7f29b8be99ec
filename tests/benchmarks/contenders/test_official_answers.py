"""The official ranking of answers against golden vectors of the official code, and against ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.agreement import inputs_of, tensors, with_weights
from tests.conftest import config
from xfm_fast.benchmarks.contenders.official_algorithm import OfficialAnswerTwin
from xfm_fast.tasks.vqa import VQAModel


@pytest.fixture(scope="module")
def model() -> VQAModel:
    return with_weights(VQAModel(config("tiny_b"), decoder_layers=3), "tiny_b", torch.float64, "vqa")


@pytest.fixture(scope="module")
def x() -> dict[str, Tensor]:
    return {k.partition("/")[2]: v for k, v in inputs_of("tiny_b/ft_inputs", torch.float64).items() if k[:4] == "vqa/"}


@torch.inference_mode()
def test_official_ranking(model: VQAModel, x: dict[str, Tensor]) -> None:
    twin, golden = OfficialAnswerTwin(model), tensors("tiny_b/ft_outputs")
    question = x["image"], x["question_ids"], x["question_atts"]
    ranking = twin.rank_answers(*question, x["answer_ids"], x["answer_atts"], k=4)
    assert torch.equal(ranking.indices, golden["vqa/topk_ids"])
    assert torch.allclose(ranking.probabilities, golden["vqa/topk_probs"], rtol=1e-4)


@torch.inference_mode()
def test_ours_ranks_alike_where_nothing_is_padded(model: VQAModel, x: dict[str, Tensor]) -> None:
    twin = OfficialAnswerTwin(model)
    memory = model.encode_questions(x["image"], x["question_ids"], x["question_atts"])
    ours = model.rank_answers(memory, x["answer_ids"], k=6, count_first_token_twice=True)
    for q, length in enumerate(x["question_atts"].sum(1).tolist()):
        alone = x["image"][q : q + 1], x["question_ids"][q : q + 1, :length], x["question_atts"][q : q + 1, :length]
        theirs = twin.rank_answers(*alone, x["answer_ids"], x["answer_atts"], k=6)
        assert torch.equal(ours.indices[q], theirs.indices[0])
        assert torch.allclose(ours.scores[q], theirs.scores[0], rtol=1e-10, atol=0)
