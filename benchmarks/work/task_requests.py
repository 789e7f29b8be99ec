"""The work of fine-tuned models, from pixels and tokens to what is asked for: requests beside those of `requests`.

A request of `nlvr2` is a sentence about two photographs, of `grounding` a photograph with several expressions, of
`captioning` a photograph to be described by three beams of 20 tokens behind a prompt, and of `vqa` a photograph with
several questions over a list of 3,129 answers:

- `vqa`: 128 candidates of every question ranked, which is what the official evaluation does;
- `vqa-best`: the best of these 128, which is what becomes of them;
- `vqa-all`: the best of the whole list, exactly;
- `vqa-list`: the whole list ranked.

In each of these the official procedure ranks its 128 candidates. It encodes an image for each of its questions and
expressions, and is spared the padding of questions, being asked them one after another. GFLOP a question, for the base
model, an image of 480 pixels with five questions of 10 tokens, and random weights, with which no answer stands out and
least can be left out:

- officially 533: 209 for the image and its keys and values, 285 to decode 128 x 8 tokens, 36 for 129 copies of keys and
  values;
- `vqa` 95: 42 for the image, 49 to decode about 175 distinct prefixes; `vqa-best` 70 (86 prefixes);
- `vqa-all` 417 (about 1,340 prefixes, 1,276 of them first tokens); `vqa-list` 1,175 (4,076). No order of the work makes
  that less: the normaliser of every prefix is needed, and it needs the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xfm_fast import flops
from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.tasks.answer_trie import AnswerTrie
from xfm_fast.tasks.vqa import AnswerRanking

from ..backends.engine import AnswerList, Clock, Engine, Schedule
from ..backends.official_finetuning import OfficialFineTuningTwin
from ..inputs import Material, Texts
from ..measure import Difference
from ..tasks import PROMPT, decoder_layers
from ..timing import relative_error
from .requests import Answer, Workload, counted

# Of the official configuration.
_BEAMS, _SHORTEST, _LONGEST = 3, 5, 20


class TaskWorkload(Workload):
    """Requests that a fine-tuned model answers; official texts are padded to the longest of a batch."""

    def __init__(self, material: Material, requests: int, image_size: int, texts: Texts | None = None) -> None:
        super().__init__(material, requests, image_size, texts)
        own = material.subjects.model(image_size, torch.float32, self.work).named_parameters()
        # Tables of embeddings are read by the row.
        self._weights = sum(p.numel() for name, p in own if ".embeddings." not in name)

    def _chosen(self, rows: Tensor) -> Texts:
        """Texts without what is padding in all of them."""
        assert self._texts is not None
        ids, mask = self._texts.ids[rows], self._texts.mask[rows]
        longest = int(mask.sum(1).max())
        return Texts(ids[:, :longest], mask[:, :longest])

    def tokens(self, numbers: Sequence[int], schedule: Schedule) -> tuple[int, int] | None:
        lengths = self.lengths(numbers)
        return None if not lengths else (sum(lengths), sum(self._padded(lengths, schedule)))

    def _padded(self, lengths: Sequence[int], schedule: Schedule) -> list[int]:
        return [max(lengths)] * len(lengths) if schedule == "official" else list(lengths)

    def traffic(self, numbers: Sequence[int], element: int) -> int:
        return element * (self._weights + len(numbers) * 3 * self.image_size**2)


class Statements(TaskWorkload):
    """Sentences to whether they describe two photographs."""

    work, unit = "nlvr2", "statements"

    def __init__(self, material: Material, image_size: int, requests: int) -> None:
        super().__init__(material, requests, image_size, material.texts(requests))
        self._pixels = material.pixels(requests + 1, image_size)

    def name(self, count: int) -> str:
        return f"judge {counted(count, 'statement')} on two images each of {self.image_size} px"

    def prepare(self, engine: Engine, dtype: torch.dtype) -> Answer:
        pixels = self._pixels.to(dtype)

        def answer(numbers: Sequence[int], clock: Clock) -> Tensor:
            rows = torch.tensor(list(numbers))
            return engine.statements(torch.cat((pixels[rows], pixels[rows + 1])), *self._chosen(rows), clock)

        return answer

    def _flops(self, numbers: Sequence[int], schedule: Schedule, answer: Any) -> flops.Count:
        return fused_texts(self.config, self.lengths(numbers), 2 * len(numbers), schedule, passes=2, outputs=2)


class _Several(TaskWorkload):
    """Photographs, each with several texts of its own."""

    def __init__(self, material: Material, image_size: int, texts: int, requests: int, given: Texts) -> None:
        super().__init__(material, requests, image_size, given)
        self.items = texts
        self._pixels = material.pixels(requests, image_size)

    def lengths(self, numbers: Sequence[int]) -> list[int]:
        return [self._lengths[row] for row in self._rows(numbers).tolist()]

    def _rows(self, numbers: Sequence[int]) -> Tensor:
        return (torch.tensor(list(numbers))[:, None] * self.items + torch.arange(self.items)).flatten()

    def _image_of(self, numbers: Sequence[int]) -> Tensor:
        return torch.arange(len(numbers), device=self._pixels.device).repeat_interleave(self.items)


class Expressions(_Several):
    """Expressions to boxes in their photograph."""

    work, unit = "grounding", "expressions"

    def __init__(self, material: Material, image_size: int, texts: int, requests: int, lengths: str) -> None:
        given = material.texts(requests * texts, lengths)
        super().__init__(material, image_size, texts, requests, given)

    def name(self, count: int) -> str:
        return f"ground {counted(self.items, 'expression')} each in {counted(count, 'image')} of {self.image_size} px"

    def prepare(self, engine: Engine, dtype: torch.dtype) -> Answer:
        pixels = self._pixels.to(dtype)

        def answer(numbers: Sequence[int], clock: Clock) -> Tensor:
            texts = self._chosen(self._rows(numbers))
            return engine.boxes(pixels[torch.tensor(list(numbers))], *texts, self._image_of(numbers), clock)

        return answer

    def _flops(self, numbers: Sequence[int], schedule: Schedule, answer: Any) -> flops.Count:
        return fused_texts(self.config, self.lengths(numbers), len(numbers), schedule, outputs=4)


class Captions(TaskWorkload):
    """Photographs to captions, by beam search."""

    work, unit = "captioning", "captions"

    def __init__(self, material: Material, image_size: int, requests: int) -> None:
        super().__init__(material, requests, image_size)
        self._pixels = material.pixels(requests, image_size)
        self._prompt = material.tokenizer.encode_prompt(PROMPT).to(material.device)
        self._scores: dict[tuple[int, ...], float] = {}

    def name(self, count: int) -> str:
        return f"caption {counted(count, 'image')} of {self.image_size} px, {_BEAMS} beams of {_LONGEST} tokens"

    def prepare(self, engine: Engine, dtype: torch.dtype) -> Answer:
        pixels = self._pixels.to(dtype)

        def answer(numbers: Sequence[int], clock: Clock) -> Tensor:
            return engine.captions(
                pixels[torch.tensor(list(numbers))], self._prompt, _LONGEST, _SHORTEST, _BEAMS, clock
            )  # fmt: skip

        return answer

    def compare(self, numbers: Sequence[int], ours: Tensor, theirs: Tensor) -> Difference:
        """Log-likelihoods of the captions, a token, officially in fp32: near ties lead a search to others as likely."""
        pairs = [(self._score(n, a), self._score(n, b)) for n, a, b in zip(numbers, ours, theirs, strict=True)]
        others = sum(one.tolist() != other.tolist() for one, other in zip(ours, theirs, strict=True))
        error = relative_error(*(torch.tensor(scores) for scores in zip(*pairs, strict=True)))
        return Difference(error, f"near ties led to {counted(others, 'other caption')}" if others else "")

    def _score(self, number: int, ids: Tensor) -> float:
        key = number % self.requests, *ids.tolist()
        if key not in self._scores:
            twin = OfficialFineTuningTwin(self.material.subjects.model(self.image_size, torch.float32, self.work))
            real, at = ids.ne(self.config.pad_token_id).long()[None], slice(key[0], key[0] + 1)
            with torch.inference_mode():
                loss = twin.captions(self._pixels[at], ids[None], real, len(self._prompt), label_smoothing=0.0)
            self._scores[key] = float(loss)
        return self._scores[key]

    def _flops(self, numbers: Sequence[int], schedule: Schedule, answer: Any) -> flops.Count:
        """As if the search ended with its longest caption."""
        config, images, given = self.config, len(numbers), len(self._prompt)
        copies = images * _BEAMS
        # What is copied for every beam from the beginning, and whose logits are all computed.
        begun, read = (copies, copies * given) if schedule == "official" else (images, images)
        count = flops.image_encoder(config, images)
        count += begun * _memory(config, config.num_image_tokens, config.vision_width)
        count += _decoded(config, [given] * begun, config.num_image_tokens) + flops.lm_head(config, read)
        for behind in range(given, answer.shape[1] - 1):
            count += _decoded(config, [1] * copies, config.num_image_tokens) + flops.lm_head(config, copies)
            count += decoder_layers(config) * flops.Count(attention=4 * copies * behind * config.text_width)
        return count


class _Kind(NamedTuple):
    """What is wanted of a question: `says` in a row's name, of numbers k and n answers."""

    says: str
    whole_list: bool = False
    best: int | None = None


ANSWERING = {
    "vqa": _Kind("{k} of {n} answers ranked"),
    "vqa-best": _Kind("the best of {k} of {n} answers", best=1),
    "vqa-all": _Kind("the best of all {n} answers (official: of {k})", True, best=1),
    "vqa-list": _Kind("all {n} answers ranked (official: {k})", True),
}


class Questions(_Several):
    """Questions to answers out of a list.

    Raises:
        InputError: more candidates than there are answers.
    """

    unit = "questions"

    def __init__(self, material: Material, work: str, image_size: int, texts: int, k: int, requests: int) -> None:
        self.work, self._kind = work, ANSWERING[work]
        config = material.config(image_size)
        ids, mask = material.answers()
        if k > len(ids):
            raise InputError(f"k={k}; with {len(ids)} answers it must be 1 to {len(ids)}")
        trie = AnswerTrie.of(ids, mask, config)
        self._list = AnswerList(ids, mask, trie, k, self._kind.whole_list, self._kind.best)
        super().__init__(material, image_size, texts, requests, material.questions(requests * texts))

    def name(self, count: int) -> str:
        said = self._kind.says.format(k=self._list.k, n=f"{self._list.trie.answers:,}")
        images = "an image" if count == 1 else f"each of {count} images"
        return f"{counted(self.items, 'question')} to {images} of {self.image_size} px, {said}"

    def prepare(self, engine: Engine, dtype: torch.dtype) -> Answer:
        pixels = self._pixels.to(dtype)

        def answer(numbers: Sequence[int], clock: Clock) -> AnswerRanking:
            texts, images = self._chosen(self._rows(numbers)), pixels[torch.tensor(list(numbers))]
            return engine.answers(images, *texts, self._image_of(numbers), self._list, clock)

        return answer

    def compare(self, numbers: Sequence[int], ours: AnswerRanking, theirs: AnswerRanking) -> Difference:
        # The official algorithm in another type has looked at the candidates alone too.
        return compared(ours, theirs, whole_list=self._kind.whole_list and ours.indices.shape != theirs.indices.shape)

    def _padded(self, lengths: Sequence[int], schedule: Schedule) -> list[int]:
        return list(lengths)

    def flops(self, numbers: Sequence[int], schedule: Schedule, answer: Any) -> int | None:
        """None where it depends on the model's certainty what has to be decoded."""
        if self._kind.best is not None and schedule != "official":
            return None
        return super().flops(numbers, schedule, answer)

    def _flops(self, numbers: Sequence[int], schedule: Schedule, answer: AnswerRanking) -> flops.Count:
        lengths, trie = self.lengths(numbers), self._list.trie
        if schedule == "official":
            return official_answering(self.config, lengths, self._list.k, self._list.ids.shape[1])
        nodes = [trie.nodes] * len(lengths)
        if not self._kind.whole_list:
            nodes = [len(each.unique()) for each in trie.answer_nodes[answer.indices]]
        return answering(self.config, lengths, nodes, len(numbers))


def compared(ours: AnswerRanking, truth: AnswerRanking, *, whole_list: bool = False) -> Difference:
    """Scores of the answers that are in both rankings of the same questions, and those of the best.

    Args:
        whole_list: ours looked at all answers: its best may be better, but none of the others' may be missing that is
            better than its last.
    """
    mine: list[float] = []
    theirs: list[float] = []
    alone = 0
    for indices, scores, other_indices, other_scores in zip(*map(torch.Tensor.tolist, (*ours, *truth)), strict=True):
        found, known = (dict(zip(*pair, strict=True)) for pair in ((indices, scores), (other_indices, other_scores)))
        shared = found.keys() & known.keys()
        mine += [found[index] for index in shared] + scores[:1]
        theirs += [known[index] for index in shared]
        theirs.append(max(scores[0], other_scores[0]) if whole_list else other_scores[0])
        if whole_list:
            missing = max((known[index] for index in known.keys() - found.keys()), default=scores[-1])
            mine.append(scores[-1])
            theirs.append(max(scores[-1], missing))
        else:
            # First tokens that are equally likely but for rounding decide which answers are candidates.
            alone += len(found) - len(shared)
    note = f"near ties put {alone} answers into one of the rankings alone" if alone else ""
    return Difference(relative_error(torch.tensor(mine), torch.tensor(theirs)), note)


def fused_texts(
    config: XFMConfig, lengths: Sequence[int], images: int, schedule: Schedule, *, outputs: int, passes: int = 1
) -> flops.Count:
    """Operations of texts that are fused with images in so many passes, up to the outputs of a head on token 0.

    The official procedure pads the texts, and encodes an image for each of them in every pass.
    """
    width, texts = config.text_width, len(lengths)
    count = flops.linear(texts, passes * width, 2 * passes * width) + flops.linear(texts, 2 * passes * width, outputs)
    if schedule == "official":
        padded, images = [max(lengths)] * texts, passes * texts
        count += flops.text_encoder(config, padded) + passes * flops.fusion(config, padded)
    else:
        count += flops.text_encoder(config, lengths) + flops.first_self_attention(config, lengths)
        count += flops.fusion(config, passes * list(lengths), first_token_only=True, self_attended=True)
    return count + flops.image_encoder(config, images) + flops.image_memory(config, images)


def answering(config: XFMConfig, lengths: Sequence[int], nodes: Sequence[int], images: int = 1) -> flops.Count:
    """Operations that answers to questions of some images need.

    Args:
        lengths: tokens of each question.
        nodes: prefixes that are decoded for each.
    """
    count = flops.image_encoder(config, images) + flops.image_memory(config, images)
    count += flops.text_encoder(config, lengths) + flops.fusion(config, lengths)
    for length, prefixes in zip(lengths, nodes, strict=True):
        count += _decoded(config, [1] * prefixes, length) + flops.lm_head(config, prefixes)
        count += _memory(config, length, config.text_width)
    return count


def official_answering(config: XFMConfig, lengths: Sequence[int], k: int, longest: int) -> flops.Count:
    """The same as the official code does it: k candidates of `longest` tokens, each with a copy of its question."""
    count = flops.Count()
    for length in lengths:
        count += answering(config, [length], [1])
        count += _decoded(config, [longest] * k, length) + flops.lm_head(config, longest * k)
        count += k * _memory(config, length, config.text_width)
    return count


def _decoded(config: XFMConfig, lengths: list[int], states: int) -> flops.Count:
    """Texts through the decoder, whose layers are those of the fusion encoder."""
    return flops.fusion(config.replace(fusion_layers=decoder_layers(config)), lengths, states)


def _memory(config: XFMConfig, states: int, width: int) -> flops.Count:
    """Keys and values of states in every layer of the decoder."""
    return decoder_layers(config) * flops.linear(states, width, 2 * config.text_width)


def made(
    work: str, material: Material, image_size: int, texts: int, k: int, requests: int, lengths: str
) -> TaskWorkload:  # fmt: skip
    """The requests of a kind of work that a task has."""
    if work == "nlvr2":
        return Statements(material, image_size, requests)
    if work == "grounding":
        return Expressions(material, image_size, texts, requests, lengths)
    if work == "captioning":
        return Captions(material, image_size, requests)
    return Questions(material, work, image_size, texts, k, requests)


TASK_WORK = (*ANSWERING, Statements.work, Expressions.work, Captions.work)
