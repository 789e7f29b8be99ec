"""Beam search against a plain twin without cache, shared memory or shared prompt; the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.agreement import inputs_of, tensors, with_weights
from tests.conftest import config
from xfm_fast.models.decoder import DecoderCache, DecoderMemory, generate
from xfm_fast.tasks.captioning import CaptioningModel

EOS = 2


@pytest.fixture(scope="module")
def model() -> CaptioningModel:
    return with_weights(
        CaptioningModel(config("tiny_b"), decoder_layers=3), "tiny_b", torch.float64, "captioning"
    )


@pytest.fixture(scope="module")
def x() -> dict[str, Tensor]:
    vectors = inputs_of("tiny_b/ft_inputs", torch.float64)
    return {
        name.partition("/")[2]: value
        for name, value in vectors.items()
        if name.startswith("captioning/")
    }


NextLogProbs = Callable[[list[int]], Tensor]


def plain_beam_search(
    next_log_probs: NextLogProbs,
    prompt: list[int],
    beams: int,
    longest: int,
    shortest: int,
    early: bool,
    penalty: float,
) -> list[int]:
    """Beam search for one image, with lists."""
    running = [(0.0, prompt)]
    finished: list[tuple[float, list[int]]] = []

    def keep(score: float, ids: list[int]) -> None:
        finished.append((score / len(ids) ** penalty, ids))
        finished.sort(key=lambda hypothesis: hypothesis[0])
        if len(finished) > beams:
            finished.pop(0)

    done = False
    while not done and len(running[0][1]) < longest:
        options = []
        for score, ids in running:
            log_probs = next_log_probs(ids).clone()
            if len(ids) < shortest:
                log_probs[EOS] = -torch.inf
            options += [(score + p, ids, token) for token, p in enumerate(log_probs.tolist())]
        options = sorted(options, key=lambda option: -option[0])[: 2 * beams]
        length, running = len(running[0][1]), []
        for rank, (score, ids, token) in enumerate(options):
            if token != EOS:
                running.append((score, [*ids, token]))
            elif rank < beams:
                keep(score, ids)
            if len(running) == beams:
                break
        done = len(finished) == beams and (
            early or finished[0][0] >= options[0][0] / length**penalty
        )
    if not done:
        for score, ids in running:
            keep(score, ids)
    best = finished[-1][1]
    return best if len(best) == longest else [*best, EOS]


class Chain:
    """A `Writer` whose next token depends on the last one alone: a language model that is searched
    in microseconds.
    """

    def __init__(self, words: int) -> None:
        self.table = 2 * torch.randn(words, words, dtype=torch.float64)
        self.positions = 98

    def begin(
        self, prompt_ids: Tensor, memory: object, capacity: int
    ) -> tuple[Tensor, DecoderCache]:
        past = DecoderCache(capacity)
        past.length += prompt_ids.shape[1]
        return prompt_ids[:, -1:].double(), past

    def step(self, input_ids: Tensor, memory: object, past: DecoderCache) -> Tensor:
        past.length += 1
        return input_ids[:, None].double()

    def logits(self, hidden: Tensor) -> Tensor:
        return self.table[hidden[:, 0].long()]


@pytest.mark.parametrize(
    ("beams", "penalty", "early"), [(2, 0.0, True), (5, 2.0, False), (5, 0.0, True)]
)
def test_beam_search_of_chains(beams: int, penalty: float, early: bool) -> None:
    """Many small language models, in which ends come early, late, low among the candidates, or not
    at all.
    """
    prompts = torch.tensor([[0, 3], [4, 5], [3, 6], [5, 4], [0, 0]])
    memory = DecoderMemory((), torch.arange(len(prompts) + 1), 1)
    for seed in range(12):
        torch.manual_seed(seed)
        chain, shortest = Chain(12), seed % 5
        rows = generate(
            chain, memory, prompts, max_length=8, min_length=shortest, num_beams=beams, length_penalty=penalty,
            early_stopping=early,
        ).tolist()  # fmt: skip
        captions = [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]
        log_probs = chain.table.log_softmax(-1)
        for prompt, ids in zip(prompts.tolist(), captions, strict=True):
            assert ids == plain_beam_search(
                lambda text, p=log_probs: p[text[-1]], prompt, beams, 8, shortest, early, penalty
            )


def test_loss_is_the_mean_over_predicted_tokens(
    model: CaptioningModel, x: dict[str, Tensor]
) -> None:
    with torch.inference_mode():
        plain = model(x["image"], x["text_ids"], prompt_length=3, label_smoothing=0.0)
        smooth = model(x["image"], x["text_ids"], prompt_length=3)
    labels = tensors("tiny_b/ft_outputs")["captioning/labels"]
    logits = tensors("tiny_b/ft_outputs")["captioning/logits"][:, :-1].flatten(0, 1)
    for losses, smoothing in ((plain, 0.0), (smooth, 0.1)):
        expected = torch.nn.functional.cross_entropy(
            logits, labels[:, 1:].flatten(), label_smoothing=smoothing
        )
        assert float(losses) == pytest.approx(float(expected), rel=1e-10)
