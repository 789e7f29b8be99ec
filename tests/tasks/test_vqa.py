"""Answer ranking: exact log-likelihoods, independent of padding; the metric of VQA v2."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.agreement import inputs_of, with_weights
from tests.conftest import config, load_json
from xfm_fast.packing import ImageGroups, Packing
from xfm_fast.tasks import vqa_model
from xfm_fast.tasks.vqa import exact_match, normalise_answer, vqa_accuracy
from xfm_fast.tasks.vqa_model import AnswerTrie, VQAModel


@pytest.fixture(scope="module")
def model() -> VQAModel:
    return with_weights(
        VQAModel(config("tiny_b"), decoder_layers=3), "tiny_b", torch.float64, "vqa"
    )


@pytest.fixture(scope="module")
def x() -> dict[str, Tensor]:
    return {
        k.partition("/")[2]: v
        for k, v in inputs_of("tiny_b/ft_inputs", torch.float64).items()
        if k[:4] == "vqa/"
    }


def question(x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return x["image"], x["question_ids"], x["question_atts"]


def whole_answer_log_likelihoods(model: VQAModel, x: dict[str, Tensor], q: int) -> Tensor:
    """Decode every answer alone, without cache, prefix sharing or padding: the definition."""
    length = int(x["question_atts"][q].sum())
    memory = model.encode_questions(x["image"][q : q + 1], x["question_ids"][q : q + 1, :length])
    out = []
    for ids, real in zip(x["answer_ids"], x["answer_atts"].bool(), strict=True):
        tokens = ids[real][None]
        packing = Packing.from_mask(torch.ones_like(tokens))
        hidden = model.text_decoder(tokens, packing, memory, ImageGroups(torch.tensor([0, 1])))
        log_probs = model.text_decoder.logits(hidden).log_softmax(-1)
        out.append(log_probs[:-1].gather(1, tokens[0, 1:, None]).sum())
    return torch.stack(out)


@torch.inference_mode()
def test_padding_changes_answers_only_in_the_official_evaluation(
    model: VQAModel, x: dict[str, Tensor]
) -> None:
    def scores(extra: int, attend_to_padding: bool) -> Tensor:
        ids = torch.nn.functional.pad(x["question_ids"], (0, extra), value=1)
        mask = torch.nn.functional.pad(x["question_atts"], (0, extra))
        memory = model.encode_questions(x["image"], ids, mask, attend_to_padding=attend_to_padding)
        ranking = model.rank_answers(memory, x["answer_ids"], k=10)
        return torch.empty_like(ranking.scores).scatter_(1, ranking.indices, ranking.scores)

    assert torch.allclose(scores(0, False), scores(5, False), rtol=1e-12, atol=0)
    assert not torch.allclose(scores(0, True), scores(5, True), rtol=1e-3, atol=0)


FAMILY = [
    [0, 5, 2], [0, 5, 6, 2], [0, 5, 6, 7, 2], [0, 5, 6, 8, 2], [0, 9, 6, 7, 2], [0, 9, 2], [0, 9, 2], [0, 10, 11],
    [0, 10, 11, 12, 13, 2], [0, 14, 2],
]  # fmt: skip
"""Answers that begin alike, that are the beginning of another one, that come twice, and that end
without `</s>`.
"""


def family() -> Tensor:
    return torch.tensor([ids + [1] * (6 - len(ids)) for ids in FAMILY])


def decoded_rows(model: VQAModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of states that reach the vocabulary, a call each."""
    seen: list[int] = []
    transform = model.text_decoder.lm_head.transform

    def counting(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return transform(hidden)

    monkeypatch.setattr(model.text_decoder.lm_head, "transform", counting)
    return seen


@torch.inference_mode()
@pytest.mark.parametrize("nodes_of_a_pass", [8192, 1])
def test_answers_that_begin_alike_are_decoded_once(
    model: VQAModel, x: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, nodes_of_a_pass: int
) -> None:
    monkeypatch.setattr(vqa_model, "_NODES", nodes_of_a_pass)
    inputs = x | {"answer_ids": family(), "answer_atts": family().ne(1)}
    memory, trie = model.encode_questions(*question(x)), AnswerTrie.of(family(), None, model.config)
    rows = decoded_rows(model, monkeypatch)
    ranking = model.rank_answers(memory, trie, k=10)
    assert sum(rows) == 3 * trie.nodes
    for q in range(3):
        expected = whole_answer_log_likelihoods(model, inputs, q)
        assert torch.allclose(
            ranking.scores[q], expected.sort(descending=True).values, rtol=1e-12, atol=0
        )
        assert torch.allclose(ranking.scores[q], expected[ranking.indices[q]], rtol=1e-12, atol=0)


@torch.inference_mode()
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(("k", "best"), [(10, 3), (6, 2)])
def test_the_best_are_exact_without_decoding_all(
    model: VQAModel,
    x: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    k: int,
    best: int,
    twice: bool,
) -> None:
    monkeypatch.setattr(vqa_model, "_SEEDS", 1)
    memory, trie = (
        model.encode_questions(*question(x)),
        AnswerTrie.of(x["answer_ids"], None, model.config),
    )
    every = model.rank_answers(memory, trie, k=k, count_first_token_twice=twice)
    rows = decoded_rows(model, monkeypatch)
    ranking = model.rank_answers(memory, trie, k=k, best=best, count_first_token_twice=twice)
    assert torch.equal(ranking.indices, every.indices[:, :best])
    assert torch.allclose(ranking.scores, every.scores[:, :best], rtol=1e-12, atol=0)
    assert sum(rows) < 3 * trie.nodes


@torch.inference_mode()
def test_questions_of_any_length_are_answered_freely_in_one_batch(
    model: VQAModel, x: dict[str, Tensor]
) -> None:
    lengths = x["question_atts"].sum(1).tolist()
    assert len(set(lengths)) > 1
    together = model.generate(model.encode_questions(*question(x)), max_length=7, num_beams=3)
    for q, length in enumerate(lengths):
        memory = model.encode_questions(
            x["image"][q : q + 1], x["question_ids"][q : q + 1, :length]
        )
        alone = model.generate(memory, max_length=7, num_beams=3)[0].tolist()
        assert together[q].tolist() == alone + [model.config.pad_token_id] * (
            together.shape[1] - len(alone)
        )


@pytest.mark.parametrize(
    ("field", "golden"),
    [("answer_type", "perAnswerType"), ("question_type", "perQuestionType"), ("question_id", "")],
)
def test_official_accuracy(field: str, golden: str) -> None:
    official, inputs = load_json("metrics/metrics")["vqa"], load_json("metrics/vqa_inputs")
    predicted = {entry["question_id"]: entry["answer"] for entry in inputs["predictions"]}
    people = [[answer["answer"] for answer in entry["answers"]] for entry in inputs["annotations"]]
    predictions = [predicted[entry["question_id"]] for entry in inputs["annotations"]]
    accuracies = vqa_accuracy(
        predictions, people, [str(entry[field]) for entry in inputs["annotations"]]
    )
    assert accuracies.pop("overall") == official["accuracy"]["overall"]
    assert accuracies == (official["accuracy"][golden] if golden else official["per_question"])


def test_official_normalisation() -> None:
    for row in load_json("metrics/metrics")["vqa_normalisation"]:
        assert normalise_answer(row["raw"]) == row["normalised"]


def test_exact_match() -> None:
    share = exact_match([" red ", "Blue", "one"], ["red", "blue", "two"])
    assert share == pytest.approx(1 / 3)
