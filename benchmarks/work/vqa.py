"""Visual question answering: an image with its questions over a list of 3,129 answers, ours against the official way.

Four kinds of work:

- `vqa`: 128 candidates of every question ranked, which is what the official evaluation does;
- `vqa-best`: the best of these 128, which is what becomes of them;
- `vqa-all`: the best of the whole list, exactly;
- `vqa-list` (one question; not in quick runs): the whole list ranked.

In each of them the official procedure ranks its 128 candidates. It is spared the padding of questions, being asked them
one after another, and encodes the image every time. GFLOP a question, for the base model, an image of 480 pixels with
five questions of 10 tokens, and random weights, with which no answer stands out and least can be left out:

- officially 533: 209 for the image and its keys and values, 285 to decode 128 x 8 tokens, 36 for 129 copies of keys and
  values;
- `vqa` 95: 42 for the image, 49 to decode about 175 distinct prefixes; `vqa-best` 70 (86 prefixes);
- `vqa-all` 417 (about 1,340 prefixes, 1,276 of them first tokens); `vqa-list` 1,175 (4,076). No order of the work makes
  that less: the normaliser of every prefix is needed, and it needs the whole vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xfm_fast import flops
from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.tasks.answer_trie import AnswerTrie
from xfm_fast.tasks.vqa import AnswerRanking, VQAModel

from .. import machine
from ..contenders.engine import wait_for
from ..contenders.official_algorithm import OfficialAnswerTwin
from ..material import photographs
from ..material.inputs import preset_config, random_state
from ..material.questions import ANSWERS, Texts, answer_list, questions
from ..measure import (
    DTYPES,
    MODEL_ROUNDING,
    MachineProbes,
    Progress,
    Samples,
    Watched,
    agreeing,
    differing,
    filled,
    interleave,
    parity_band,
    relative_error,
)
from ..options import VqaOptions
from ..record import OFFICIAL, OURS, Data, Document, Efficiency, Model, Parity, Point, Row, finite

_LABELS = {OURS: "xfm-fast", OFFICIAL: "official algorithm, eager"}
_DECODER_LAYERS = 12


class Work(NamedTuple):
    """A kind of work: how many of k candidates are wanted from how many questions; None stands for all that there are.

    Attributes:
        says: in a row's name, of numbers k and n answers.
    """

    name: str
    says: str
    whole_list: bool = False
    best: int | None = None
    questions: int | None = None


@dataclass(frozen=True)
class _Plan:
    """The options with everything decided."""

    device: torch.device
    dtypes: list[str]
    image_size: int
    questions: int
    k: int
    rounds: int
    budget_s: float
    quick: bool

    @property
    def works(self) -> list[Work]:
        works = [
            Work("vqa", "{k} of {n} answers ranked"),
            Work("vqa-best", "the best of {k} of {n} answers", best=1),
            Work("vqa-all", "the best of all {n} answers (official: of {k})", True, best=1),
        ]
        whole = Work("vqa-list", "all {n} answers ranked (official: {k})", True, questions=1)
        return works if self.quick else [*works, whole]


def run(options: VqaOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Document:
    """Measure questions to an image on this machine.

    An interruption (Ctrl-C) ends the run early and keeps the rows measured so far.

    Raises:
        XFMError: an option cannot be used, or the work does not fit into memory.
    """
    started = time.perf_counter()
    torch.set_num_threads(options.threads or machine.default_threads())
    torch.manual_seed(options.seed)
    device = machine.choose_device(options.device)
    dtypes, absent = machine.choose_dtypes(options.dtype, device)
    if options.k > ANSWERS:
        raise InputError(f"k={options.k}; with {ANSWERS} answers it must be 1 to {ANSWERS}")
    tiny, quick = options.preset == "tiny", options.quick
    plan = _Plan(
        device, dtypes, options.image_size or (48 if tiny else 480), options.questions or (2 if quick else 5),
        options.k, 2 if quick else 3, 0.2 if tiny else 10.0, quick,
    )  # fmt: skip
    document = Document.begun("vqa", vars(options), command, device.type)
    try:
        _Run(options, plan, progress or Progress(), document).measure(absent)
    except KeyboardInterrupt:
        document.interrupted = True
    except torch.OutOfMemoryError:
        raise UnavailableError(f"{plan.k} candidates do not fit into the memory of this GPU; lower --k") from None
    document.duration_s = time.perf_counter() - started
    return document


class _Run:
    def __init__(self, options: VqaOptions, plan: _Plan, progress: Progress, document: Document) -> None:
        self.options, self.plan, self.progress, self.document = options, plan, progress, document
        self.config = preset_config(options.preset).replace(image_size=plan.image_size)
        self.parity: dict[tuple[str, str], Parity] = {}

    def measure(self, absent: dict[str, str]) -> None:
        plan, document, options = self.plan, self.document, self.options
        self.progress.begin(3 + (not plan.quick))
        self.progress.stage("photograph, questions and answers")
        collection = photographs.bundled()
        pixels = collection.pixels([0], plan.image_size).to(plan.device)
        document.data = Data(
            origin=f"{collection.origin}; questions and {ANSWERS} answers in random tokens, with the lengths and the "
            "prefixes of VQA v2",
            photos=1, captions=plan.questions, tokenizer="random tokens", vocabulary=self.config.vocab_size,
        )  # fmt: skip
        state = random_state(self.config, (), options.seed)
        self.subjects = {
            dtype: Subject(self.config, state, pixels, plan, DTYPES[dtype], options.seed) for dtype in plan.dtypes
        }
        document.model = Model(
            preset=options.preset, origin=f"random weights (seed {options.seed})", trained=False,
            meaningful_recall=False, config=self.config.model_dump(),
            parameters=sum(p.numel() for p in self.subjects[plan.dtypes[0]].model.parameters()),
        )  # fmt: skip
        # The reference is the official procedure in fp32, whatever is measured.
        self.reference = self.subjects.get("fp32") or Subject(
            self.config, state, pixels, plan, torch.float32, options.seed
        )
        self.progress.stage("checking that both rank alike")
        self._check()
        probes = MachineProbes(plan.dtypes, plan.device)
        document.probes = probes.describe()
        works = plan.works
        for group in ([w for w in works if w.questions is None], [w for w in works if w.questions is not None]):
            if group:
                self.progress.stage(self._name(group[0]))
                self._time(group, probes)
        document.rows += [
            self._row(work, OURS, dtype).model_copy(update={"status": "not offered", "reason": reason})
            for work in works
            for dtype, reason in absent.items()
        ]

    def _check(self) -> None:
        """Rankings of the first question by both; what fails is not timed."""
        self.progress.step(f"{OFFICIAL} fp32")
        truth = self.reference.official(1)
        for dtype, subject in self.subjects.items():
            own = 0.0
            if dtype != "fp32":
                self.progress.step(f"{OFFICIAL} {dtype}")
                own = max(compare(subject.official(1), truth).error, MODEL_ROUNDING * torch.finfo(DTYPES[dtype]).eps)
            band = parity_band(DTYPES[dtype], own)
            for work in self.plan.works:
                self.progress.step(f"{OURS} {dtype}, {work.name}")
                error, note = compare(subject.ours(work, 1), truth, whole_list=work.whole_list)
                self.parity[work.name, dtype] = Parity(
                    error=finite(error), band=band, passed=error <= band, against=f"{OFFICIAL} fp32", note=note
                )  # fmt: skip

    def _time(self, works: Sequence[Work], probes: MachineProbes) -> None:
        plan, count = self.plan, works[0].questions or self.plan.questions
        official = plan.dtypes if not plan.quick or "fp32" not in plan.dtypes else ["fp32"]
        runs: dict[tuple[str, str, str], Callable[[], object]] = {
            (OFFICIAL, "", dtype): partial(self.subjects[dtype].official, count) for dtype in official
        }
        for work in works:
            for dtype in plan.dtypes:
                if self.parity[work.name, dtype].passed:
                    runs[OURS, work.name, dtype] = partial(self.subjects[dtype].ours, work, count)
        # A contender's key is its name and its type; here a contender does several kinds of work.
        watched = {
            f"{contender}/{name} {dtype}": Watched(run, plan.device) for (contender, name, dtype), run in runs.items()
        }
        # The check has run all code once.
        samples = interleave(
            watched, probes, rounds=plan.rounds, budget_s=plan.budget_s, deadline=float("inf"),
            warmups=int(plan.device.type == "cuda"), on_step=self.progress.step,
        )  # fmt: skip
        for work in works:
            self.document.rows += self._rows(work, _of(work, samples), watched)
        if samples.interrupted:
            raise KeyboardInterrupt

    def _rows(self, work: Work, samples: Samples, watched: dict[str, Watched]) -> list[Row]:
        rows = []
        for contender in (OURS, OFFICIAL):
            for dtype in self.plan.dtypes:
                row, key = self._row(work, contender, dtype), f"{contender} {dtype}"
                if row.parity is not None and not row.parity.passed:
                    error = float("inf") if row.parity.error is None else row.parity.error
                    rows.append(row.model_copy(update=differing(row, error, row.parity.band or 0.0)))
                    continue
                if key not in samples.rounds:
                    continue
                seen = watched[f"{contender}/{work.name if contender == OURS else ''} {dtype}"]
                row = filled(row, key, samples, seen.memory)
                if row.median_s is not None:
                    row.efficiency = self._efficiency(work, row, key, samples, seen.output)
                rows.append(row)
        return agreeing(rows)

    def _efficiency(
        self, work: Work, row: Row, key: str, samples: Samples, ranking: AnswerRanking
    ) -> Efficiency | None:  # fmt: skip
        """None where it depends on the model's certainty what has to be decoded."""
        subject, lengths = self.subjects[row.dtype], self.subjects[row.dtype].lengths[: row.items]
        if work.best is not None:
            return None
        nodes = subject.nodes(work, ranking)
        needed = answering(self.config, lengths, nodes).total
        own = needed if row.ours else official_answering(self.config, lengths, self.plan.k, subject.longest).total
        return Efficiency(
            flops=own, needed_flops=needed, mfu=samples.share_of_rate(key, needed),
            utilisation=samples.share_of_rate(key, own),
        )  # fmt: skip

    def _name(self, work: Work) -> str:
        count, answers = work.questions or self.plan.questions, self.reference.trie.answers
        said = work.says.format(k=self.plan.k, n=f"{answers:,}")
        return f"{count} question{'s' * (count != 1)} to an image of {self.plan.image_size} px, {said}"

    def _row(self, work: Work, contender: str, dtype: str) -> Row:
        count = work.questions or self.plan.questions
        lengths, answers = self.reference.lengths[:count], self.reference.trie.answers
        return Row(
            work=work.name, name=self._name(work),
            point=Point(
                image_size=self.plan.image_size, texts=count, mean_length=sum(lengths) / count, index=answers,
                k=answers if work.whole_list else self.plan.k,
            ),
            contender=contender, label=_LABELS[contender], dtype=dtype, status="measured", unit="questions",
            items=count, parity=self.parity.get((work.name, dtype)) if contender == OURS else None,
        )  # fmt: skip


def _of(work: Work, samples: Samples) -> Samples:
    """The samples of one kind of work, and of the official procedure, under the names of the contenders."""
    names = {f"{contender}/{name}": contender for contender, name in ((OURS, work.name), (OFFICIAL, ""))}

    def chosen(by_key: Mapping[str, Any]) -> dict[str, Any]:
        split = {key: key.rsplit(" ", 1) for key in by_key}
        return {f"{names[n]} {dtype}": by_key[key] for key, (n, dtype) in split.items() if n in names}

    return replace(samples, rounds=chosen(samples.rounds), failures=chosen(samples.failures))


class Subject:
    """A model with random weights in one type, its official twin, an image with questions, and the list of answers."""

    def __init__(
        self, config: XFMConfig, state: dict[str, Tensor], pixels: Tensor, plan: _Plan, dtype: torch.dtype, seed: int
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            # The decoder's own initialisation, the same in every type.
            torch.manual_seed(seed)
            model = VQAModel(config, decoder_layers=_DECODER_LAYERS)
        model.load_state_dict(state, strict=False)
        self.model = model.to(plan.device, dtype).eval().requires_grad_(False)
        self.twin = OfficialAnswerTwin(self.model)
        self._k, self._pixels, self._device = plan.k, pixels.to(dtype), plan.device
        self._answers = Texts(*(t.to(plan.device) for t in answer_list(config, seed)))
        self._questions = Texts(*(t.to(plan.device) for t in questions(config, plan.questions, seed)))
        self.trie = AnswerTrie.of(*self._answers, config)
        self.longest = self._answers.ids.shape[1]
        self.lengths: list[int] = self._questions.mask.sum(1).tolist()

    @torch.inference_mode()
    def ours(self, work: Work, count: int) -> AnswerRanking:
        """The first questions, of which the image is encoded once."""
        ids, mask = (t[:count] for t in self._questions)
        image = torch.zeros(count, dtype=torch.long, device=self._device)
        memory = self.model.encode_questions(self._pixels, ids, mask, image)
        k = self.trie.answers if work.whole_list else self._k
        # As the official score does it.
        found = self.model.rank_answers(memory, self.trie, k=k, best=work.best, count_first_token_twice=True)
        wait_for(self._device)
        return found

    @torch.inference_mode()
    def official(self, count: int) -> AnswerRanking:
        """The first questions, one after another."""
        found = []
        for ids, mask, length in zip(*(t[:count] for t in self._questions), self.lengths[:count], strict=True):
            question = self._pixels, ids[None, :length], mask[None, :length]
            found.append(self.twin.rank_answers(*question, *self._answers, k=self._k))
        wait_for(self._device)
        return AnswerRanking(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def nodes(self, work: Work, ranking: AnswerRanking) -> list[int]:
        """Distinct prefixes of the candidates of each question."""
        if work.whole_list:
            return [self.trie.nodes] * len(ranking.indices)
        return [len(nodes.unique()) for nodes in self.trie.answer_nodes[ranking.indices]]


class Difference(NamedTuple):
    """Largest difference between the scores that two rankings share, relative to the largest; and what to add."""

    error: float
    note: str


def compare(ours: AnswerRanking, truth: AnswerRanking, *, whole_list: bool = False) -> Difference:
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


def answering(config: XFMConfig, lengths: Sequence[int], nodes: Sequence[int]) -> flops.Count:
    """Operations that answers to questions of one image need.

    Args:
        lengths: tokens of each question.
        nodes: prefixes that are decoded for each.
    """
    count = flops.image_encoder(config, 1) + flops.image_memory(config, 1)
    count += flops.text_encoder(config, lengths) + flops.fusion(config, lengths)
    for length, prefixes in zip(lengths, nodes, strict=True):
        count += _decoding(config, [1] * prefixes, length) + _memory(config, length)
    return count


def official_answering(config: XFMConfig, lengths: Sequence[int], k: int, longest: int) -> flops.Count:
    """The same as the official code does it: k candidates of `longest` tokens, each with a copy of its question."""
    count = flops.Count()
    for length in lengths:
        count += flops.image_encoder(config, 1) + flops.image_memory(config, 1)
        count += flops.text_encoder(config, [length]) + flops.fusion(config, [length])
        count += _decoding(config, [1], length) + _decoding(config, [longest] * k, length)
        count += (k + 1) * _memory(config, length)
    return count


def _decoding(config: XFMConfig, lengths: list[int], question: int) -> flops.Count:
    """Texts through the decoder, whose layers are those of the fusion encoder, and to the vocabulary."""
    layers = flops.fusion(config.replace(fusion_layers=_DECODER_LAYERS), lengths, question)
    return layers + flops.lm_head(config, sum(lengths))


def _memory(config: XFMConfig, question: int) -> flops.Count:
    """Keys and values of a question in every layer of the decoder."""
    return _DECODER_LAYERS * flops.linear(question, config.text_width, 2 * config.text_width)
