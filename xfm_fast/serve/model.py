"""The served model: loaded from a run, a checkpoint or an export, and run for several requests at once."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import DataError, ExportError, InputError, UnavailableError, XFMError
from xfm_fast.export.session.tasks import SessionRanks
from xfm_fast.export.slots import largest
from xfm_fast.loading import open_model, open_session
from xfm_fast.serve.options import SourceOptions
from xfm_fast.tasks.ranking import ModelRanks, Picture, Query, Ranker, Ranking, RankModel
from xfm_fast.tasks.reranking import Rank, rank_score
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

_HEADS = ("contrastive", "matching")
_RANK_GRAPHS = ("vision", "text", "image_memory", "fusion")
# The official evaluation truncates captions to this length.
_MOST_WORDS, _MOST_TOKENS = 30, 40

Read = tuple[int, ...] | Picture
"""An input of the model: the token ids of a text, or an image."""


@dataclass(frozen=True)
class Work:
    """Items of a request, and the pairs of them to be scored by `scoring`; without pairs all are embedded."""

    items: tuple[Read, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    scoring: Rank = "similarity"

    @cached_property
    def queries(self) -> list[Query]:
        """Pairs for the fusion encoder: one query where all pairs share their first item."""
        if self.scoring == "similarity":
            return []
        shared = len({first for first, _ in self.pairs}) == 1
        groups = (
            [(self.pairs[0][0], *(second for _, second in self.pairs))] if shared else self.pairs
        )
        return [
            Query(
                tuple(each for number in group if isinstance(each := self.items[number], Picture)),
                tuple(
                    each for number in group if not isinstance(each := self.items[number], Picture)
                ),
            )
            for group in groups
        ]

    @property
    def embedded(self) -> tuple[Read, ...]:
        """Items that are embedded."""
        return () if self.scoring == "match" else self.items

    def result(self, rankings: Sequence[Ranking], features: Sequence[Tensor]) -> Tensor:
        """Scores `[pairs]`, or features `[items, embed_dim]`."""
        if self.scoring == "match":
            return torch.cat([ranking.matches.flatten() for ranking in rankings])
        rows = torch.stack([*features])
        if not self.pairs:
            return rows
        first, second = torch.tensor(self.pairs).unbind(1)
        cosines = (rows[first] * rows[second]).sum(1)
        if self.scoring == "similarity":
            return (1 + cosines) / 2
        return rank_score(
            "sum", torch.cat([ranking.scores.flatten() for ranking in rankings]), cosines
        )


@dataclass(frozen=True)
class ServedModel:
    """A model that runs the work of several requests together."""

    name: str
    # Origin of the weights, for messages.
    source: str
    # The weights are random, and results mean nothing.
    random: bool
    # The available ones of `contrastive` and `matching`.
    heads: tuple[str, ...]
    tokenizer: CaptionTokenizer
    device: torch.device
    ranker: Ranker
    # Length that texts are truncated to.
    most_tokens: int
    # Score of a text with an image; see `xfm_fast.tasks.reranking.rank_score`.
    rank: Rank = "match"

    @property
    def config(self) -> XFMConfig:
        """Sizes of the model."""
        return self.ranker.model.config

    def read_text(self, text: str, name: str) -> tuple[tuple[int, ...], bool]:
        """Return the token ids of a text, cleaned and truncated like captions, and whether that is all of it."""
        try:
            # A word and a token more than the model reads show that there are more.
            words = pre_caption(text, _MOST_WORDS + 1).split(" ")
            ids = self.tokenizer.encode_ids([" ".join(words[:_MOST_WORDS])], self.most_tokens + 1)[
                0
            ]
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        fits = len(ids) <= self.most_tokens
        return tuple(ids if fits else [*ids[: self.most_tokens - 1], ids[-1]]), fits and len(
            words
        ) <= _MOST_WORDS

    def read_image(
        self, content: bytes, name: str, peak: int = 0, needed: Callable[[], bool] = lambda: True
    ) -> Picture:
        """An image file, which is decoded when its batch begins, to save memory; see `Picture`."""
        return self.ranker.picture(content, name)._replace(name=name, peak=peak, needed=needed)

    def cost(self, work: Work) -> int:
        """Tokens of texts, once per pair, and of images that are not cached."""
        numbers = (
            range(len(work.items))
            if work.scoring == "similarity"
            else chain.from_iterable(work.pairs)
        )
        items = [work.items[number] for number in numbers]
        cache = self.ranker.features if work.scoring == "similarity" else self.ranker.cache
        images = {each.key for each in items if isinstance(each, Picture) and each.key not in cache}
        texts = sum(len(each) for each in items if not isinstance(each, Picture))
        return texts + len(images) * self.config.num_image_tokens

    def warm_up(self) -> None:
        """Run everything once, so that no request waits for autotuning."""
        tokens = (
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
            self.tokenizer.eos_token_id,
        )
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, "PNG")
        items = (tokens, self.read_image(stream.getvalue(), "a black square"))
        scoring = {"matching": Work(items, ((0, 1),), "match"), "contrastive": Work(items)}
        self.answer([work for head, work in scoring.items() if head in self.heads])

    def answer(self, works: Sequence[Work]) -> list[Tensor | Exception]:
        """Results of several requests, or the error of a request with a damaged image."""
        items = [item for work in works for item in work.embedded]
        texts = [item for item in items if not isinstance(item, Picture)]
        rankings: Any = iter(self.ranker.rank([query for work in works for query in work.queries]))
        of_texts: Any = iter(self.ranker.embed_captions(texts) if texts else ())
        of_images: Any = iter(
            self.ranker.embed_images([item for item in items if isinstance(item, Picture)])
        )
        results: list[Tensor | Exception] = []
        for work in works:
            ranked = [next(rankings) for _ in work.queries]
            rows = [
                next(of_images if isinstance(item, Picture) else of_texts) for item in work.embedded
            ]
            failed = next((each for each in [*ranked, *rows] if isinstance(each, XFMError)), None)
            results.append(work.result(ranked, rows) if failed is None else failed)
        return results


def load(path: str | Path | None, options: SourceOptions, cache_bytes: int) -> ServedModel:
    """Load a model from any source.

    Args:
        path: The model, as `options.model`.
        options: See `SourceOptions`.
        cache_bytes: Size of the cache of image memories.

    Raises:
        XFMError: The model cannot be loaded, or cannot be served.
    """
    if options.name is not None and not options.name.strip():
        raise InputError(f"--name {options.name!r} is empty; leave it out, or name the model")
    options = options if path is None else replace(options, model=str(path))
    options.check()
    if options.is_export:
        opened = open_session(options, options.runtime)
        model = opened.model
        missing = [graph for graph in _RANK_GRAPHS if graph not in model.manifest.graph_names]
        if missing:
            raise ExportError(
                f"serving needs the graphs {', '.join(_RANK_GRAPHS)} and {options} lacks {', '.join(missing)}; "
                "export them"
            )
        source = f"{options} ({opened.origin}, {model.description})"
        random = opened.origin.startswith("random weights")
        tokenizer, longest = (
            model.processor.tokenizer,
            [largest(model.slots(g), "length") for g in ("text", "fusion")],
        )
        ranks: RankModel = SessionRanks(model)
    else:
        opened = open_model(options, needs=_HEADS, tasks=("retrieval",))
        model = opened.model
        if model.device.type == "cpu" and options.dtype in (None, "fp32", "bf16"):
            model.freeze()
        source, random, tokenizer, longest = (
            str(options),
            options.model is None,
            model.tokenizer,
            [],
        )
        ranks = ModelRanks(model)
    if tokenizer is None:
        raise UnavailableError(
            f"{options} has no tokenizer to read texts with; give the model's with --tokenizer"
        )
    usable = set(model.heads) - (set() if model.config.fusion_layers else {"matching"})
    return ServedModel(
        options.name or opened.name, source, random, tuple(head for head in _HEADS if head in usable), tokenizer,
        model.device, Ranker(ranks, cache_bytes),
        min(_MOST_TOKENS, model.config.max_text_length, *filter(None, longest)), options.rank or opened.rank,
    )  # fmt: skip
