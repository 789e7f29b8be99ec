"""A served model: reads the items of requests in any thread, and runs the work of several requests at once."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from xfm_fast.encoders import (
    Modality,
    Role,
    XFMEncoder,
    batch_tokens,
    open_encoder,
    xfm_fingerprint,
)
from xfm_fast.errors import DataError, ExportError, InputError, UnavailableError, XFMError
from xfm_fast.export.session.tasks import SessionRanks
from xfm_fast.export.slots import largest
from xfm_fast.loading import open_model, open_session
from xfm_fast.models.processor import MAX_WORDS, token_limit
from xfm_fast.serve.options import SourceOptions
from xfm_fast.tasks.ranking import ModelRanks, Picture, Query, Ranker, Ranking, RankModel
from xfm_fast.tasks.reranking import Rank, rank_score
from xfm_fast.tokenizer import pre_caption

_HEADS = ("contrastive", "matching")
_RANK_GRAPHS = ("vision", "text", "image_memory", "fusion")

Ability = Literal["embed", "embed_sparse", "rank", "compare", "classify"]
"""What a model computes: features, sparse features, relevance, similarity of features, scores of labels."""
Scoring = Literal["match", "similarity", "sum", "probability", "activation", "logit"]
"""Score of a pair: of X-FM, see `Rank`; of a cross-encoder its probability, what `predict` returns, or its logit."""
Content: TypeAlias = str | Picture
"""A text or an image file of a request."""
Pairs: TypeAlias = tuple[tuple[int, int], ...]


class TooLongError(InputError):
    """A text is longer than the model reads, and the request refuses truncation."""

    def __init__(self, name: str, length: str, max_tokens: int) -> None:
        super().__init__(
            f"{name} has {length}, and the model reads {max_tokens:,} tokens; shorten it, or let it be truncated"
        )


@dataclass(frozen=True)
class Reading:
    """How a request wants its items read, and pairs of them scored; without pairs all are embedded.

    Attributes:
        role: Selects the model's prompt for queries or documents.
        following: Role of all items but the first, where it is another.
        prompt: Name of a prompt, which comes before the role.
        truncate: Truncate texts that are too long, instead of refusing them.
        side: The end of a text that is truncated.
        normalise: Divide features by their L2 norms.
        pairs: Indices of the items to score.
        scoring: Replaces the model's score of pairs.
    """

    role: Role | None = None
    following: Role | None = None
    prompt: str | None = None
    truncate: bool = True
    side: Literal["left", "right"] = "right"
    normalise: bool = True
    pairs: Pairs = ()
    scoring: Scoring | None = None


@dataclass(frozen=True)
class Work:
    """Items of a request as the model reads them.

    Attributes:
        reading: See `Reading`; with the score of its pairs.
        tokens: Tokens of the texts and patches of the images, as read.
        truncated: Indices of the truncated items.
        needed: Returns whether the request goes on.
    """

    items: tuple[Any, ...]
    reading: Reading = Reading()
    tokens: int = 0
    truncated: tuple[int, ...] = ()
    needed: Callable[[], bool] = lambda: True


class ServedModel(ABC):
    """A model behind the service.

    `read` may run in several threads at a time, `answer` in one.

    Attributes:
        name: Name in requests and answers.
        source: Origin of the weights, for messages.
        random: The weights are random and results mean nothing.
        abilities: What it computes.
        modalities: What it reads.
        width: Numbers of a feature.
        max_tokens: Tokens that it reads of a text.
        device: Device of the weights.
        encoder: The model as an `Encoder`, which made an index.
        quick: `read` takes microseconds for a short text, and no lock.
        prompts: Prompts of texts by name.
        labels: Names of the scores of a classifier.
    """

    name: str
    source: str
    random: bool
    abilities: tuple[Ability, ...]
    modalities: tuple[Modality, ...]
    max_tokens: int
    device: torch.device
    encoder: Any
    quick: bool
    width: int
    dtype: str
    prompts: Mapping[str, str] = MappingProxyType({})
    labels: Sequence[str] = ()

    @property
    def batch_tokens(self) -> int:
        """Default tokens of a batch."""
        return batch_tokens(self.device)

    @property
    def cache_bytes(self) -> int:
        """Bytes of what is cached between requests."""
        return 0

    @abstractmethod
    def read(
        self,
        contents: Sequence[Content],
        names: Sequence[str],
        reading: Reading,
        check: Callable[[], object],
    ) -> Work:
        """Make the work of a request, and choose the score of its pairs; `check` raises once it has ended."""

    def cost(self, work: Work) -> int:
        """Count the tokens that the work computes."""
        return work.tokens

    @abstractmethod
    def answer(self, works: Sequence[Work]) -> list[Tensor | Exception]:
        """Compute features `[items, width]` or scores `[pairs]` of several requests, or the error of one."""

    @abstractmethod
    def warm_up(self) -> None:
        """Run everything once, so that no request waits for autotuning."""


@dataclass(frozen=True)
class RankWork(Work):
    """Work of an X-FM, whose items are the token ids of texts and images."""

    @cached_property
    def queries(self) -> list[Query]:
        """Pairs for the fusion encoder: one query if all pairs share their first item."""
        pairs = self.reading.pairs
        if self.reading.scoring == "similarity":
            return []
        groups: Sequence[tuple[int, ...]] = pairs
        if len({first for first, _ in pairs}) == 1:
            groups = [(pairs[0][0], *(second for _, second in pairs))]
        queries = []
        for group in groups:
            items = [self.items[index] for index in group]
            images = tuple(item for item in items if isinstance(item, Picture))
            texts = tuple(item for item in items if not isinstance(item, Picture))
            queries.append(Query(images, texts))
        return queries

    @property
    def embedded(self) -> tuple[Any, ...]:
        """Items to embed."""
        return () if self.reading.scoring == "match" else self.items

    def result(self, rankings: Sequence[Ranking], features: Sequence[Tensor]) -> Tensor:
        """Return scores `[pairs]`, or features `[items, embed_dim]`."""
        scoring, pairs = self.reading.scoring, self.reading.pairs
        if scoring == "match":
            return torch.cat([ranking.matches.flatten() for ranking in rankings])
        rows = torch.stack([*features])
        if not pairs:
            return rows
        first, second = torch.tensor(pairs).unbind(1)
        cosines = (rows[first] * rows[second]).sum(1)
        if scoring == "similarity":
            return (1 + cosines) / 2
        logits = torch.cat([ranking.scores.flatten() for ranking in rankings])
        return rank_score("sum", logits, cosines)


class XFMModel(ServedModel):
    """An X-FM or its export; `cache_bytes` is the size of the cache of image memories."""

    modalities = ("text", "image")
    quick = True

    def __init__(self, options: SourceOptions, cache_bytes: int, name: str | None = None) -> None:
        lengths: list[int | None] = []
        if options.is_export:
            opened = open_session(options, options.runtime)
            model = opened.model
            missing = [graph for graph in _RANK_GRAPHS if graph not in model.manifest.graph_names]
            if missing:
                raise ExportError(
                    f"serving needs the graphs {', '.join(_RANK_GRAPHS)} and {options} lacks {', '.join(missing)}; "
                    "export them"
                )
            self.source = f"{options} ({opened.origin}, {model.description})"
            self.random = opened.origin.startswith("random weights")
            tokenizer = model.processor.tokenizer
            lengths = [largest(model.slots(graph), "length") for graph in ("text", "fusion")]
            ranks: RankModel = SessionRanks(model)
        else:
            opened = open_model(options, needs=_HEADS, tasks=("retrieval",))
            model = opened.model
            if model.device.type == "cpu" and options.dtype in (None, "fp32", "bf16"):
                model.freeze()
            self.source, self.random = str(options), options.model is None
            tokenizer = model.tokenizer
            ranks = ModelRanks(model)
        if tokenizer is None:
            raise UnavailableError(
                f"{options} has no tokenizer to read texts with; give the model's with --tokenizer"
            )
        self.tokenizer, self.config = tokenizer, ranks.config
        heads = _HEADS if self.config.fusion_layers else ("contrastive",)
        self.heads = tuple(head for head in heads if head in model.heads)
        embeds = "contrastive" in self.heads
        self.abilities = ("embed", "rank", "compare") if embeds else ("rank",)
        self.name, self.device = name or opened.name, model.device
        self.width, self.dtype = self.config.embed_dim, ranks.dtype_name
        self.max_tokens = min([token_limit(self.config), *filter(None, lengths)])
        self.ranker = Ranker(ranks, cache_bytes)
        # Score of a text with an image; see `rank_score`.
        self.rank: Rank = options.rank or opened.rank
        self._model, self._options = model, options

    @cached_property
    def encoder(self) -> XFMEncoder:
        options = self._options
        if options.is_export:
            fingerprint = self._model.fingerprint()[:32]
        elif options.dtype in (None, "fp32"):
            fingerprint = xfm_fingerprint(self._model)
        else:
            # Of the weights before they are cast.
            fingerprint = open_encoder(options, device="cpu").fingerprint
        return XFMEncoder(self._model, options, fingerprint, self.name, rank=self.rank)

    @property
    def cache_bytes(self) -> int:
        return self.ranker.cache.nbytes

    def _choose_scoring(self, contents: Sequence[Content], pairs: Pairs) -> Scoring:
        """Return the score of all pairs; raises if they need different ones, or the model has none for them."""
        mixed = {isinstance(contents[a], str) != isinstance(contents[b], str) for a, b in pairs}
        if len(mixed) > 1:
            raise InputError(
                "text-image pairs and pairs of one modality have different scores; send two requests"
            )
        scoring: Rank = self.rank if mixed == {True} else "similarity"
        heads = {"matching"} if scoring == "match" else {"contrastive"}
        if scoring == "sum":
            heads.add("matching")
        for head in sorted(heads - {*self.heads}):
            raise UnavailableError(f"model {self.name!r} has no {head} head; serve one that has it")
        return scoring

    def read(
        self,
        contents: Sequence[Content],
        names: Sequence[str],
        reading: Reading,
        check: Callable[[], object],
    ) -> Work:
        if reading.prompt is not None:
            raise InputError(f"{self.name} has no prompt {reading.prompt!r}; leave it out")
        reading = replace(reading, scoring=self._choose_scoring(contents, reading.pairs))
        items, truncated, tokens = list[Any](), list[int](), 0
        for index, content in enumerate(contents):
            check()
            if isinstance(content, Picture):
                items.append(content)
                tokens += self.config.num_image_tokens
                continue
            ids, complete = self.read_text(content, names[index])
            items.append(ids)
            tokens += len(ids)
            if not complete:
                truncated.append(index)
                if not reading.truncate:
                    length = f"more than {MAX_WORDS} words or {self.max_tokens} tokens"
                    raise TooLongError(names[index], length, self.max_tokens)
        return RankWork(tuple(items), reading, tokens, tuple(truncated))

    def read_text(self, text: str, name: str) -> tuple[tuple[int, ...], bool]:
        """Return the token ids of a text, cleaned and truncated like captions, and whether it is complete."""
        try:
            # One word and one token more than the model reads, to detect truncation.
            words = pre_caption(text, MAX_WORDS + 1).split(" ")
            (ids,) = self.tokenizer.encode_ids([" ".join(words[:MAX_WORDS])], self.max_tokens + 1)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        complete = len(words) <= MAX_WORDS and len(ids) <= self.max_tokens
        if len(ids) > self.max_tokens:
            ids = [*ids[: self.max_tokens - 1], ids[-1]]
        return tuple(ids), complete

    def cost(self, work: Work) -> int:
        # Texts once per pair, and images that are not cached.
        items, cache = work.items, self.ranker.features
        if work.reading.scoring != "similarity":
            items = tuple(work.items[index] for pair in work.reading.pairs for index in pair)
            cache = self.ranker.cache
        tokens, images = 0, set()
        for item in items:
            if not isinstance(item, Picture):
                tokens += len(item)
            elif item.key not in cache:
                images.add(item.key)
        return tokens + len(images) * self.config.num_image_tokens

    def warm_up(self) -> None:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        items = ((bos, eos, eos), Ranker.picture(black_square(), "a black square"))
        match = Reading(pairs=((0, 1),), scoring="match")
        works = {"matching": RankWork(items, match), "contrastive": RankWork(items)}
        self.answer([works[head] for head in works if head in self.heads])

    def answer(self, works: Sequence[Any]) -> list[Tensor | Exception]:
        items = [item for work in works for item in work.embedded]
        texts = [item for item in items if not isinstance(item, Picture)]
        images = [item for item in items if isinstance(item, Picture)]
        rankings: Any = iter(self.ranker.rank([query for work in works for query in work.queries]))
        text_rows: Any = iter(self.ranker.embed_captions(texts) if texts else ())
        image_rows: Any = iter(self.ranker.embed_images(images))
        results: list[Tensor | Exception] = []
        for work in works:
            ranked = [next(rankings) for _ in work.queries]
            rows = [
                next(image_rows if isinstance(item, Picture) else text_rows)
                for item in work.embedded
            ]
            failures = [result for result in (*ranked, *rows) if isinstance(result, XFMError)]
            results.append(failures[0] if failures else work.result(ranked, rows))
        return results


def black_square() -> bytes:
    """Return a PNG file to warm up with."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()
