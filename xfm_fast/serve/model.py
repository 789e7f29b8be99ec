"""The served model: loaded from a run, a checkpoint or an export, and run for several requests at once."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
_MAX_WORDS, _MAX_TOKENS = 30, 40

Input = tuple[int, ...] | Picture
"""An input of the model: the token ids of a text, or an image."""


@dataclass(frozen=True)
class Work:
    """Items of a request, and the pairs of them to score by `scoring`; without pairs all are embedded."""

    items: tuple[Input, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    scoring: Rank = "similarity"

    @cached_property
    def queries(self) -> list[Query]:
        """Pairs for the fusion encoder: one query if all pairs share their first item."""
        if self.scoring == "similarity":
            return []
        groups: Sequence[tuple[int, ...]] = self.pairs
        if len({first for first, _ in self.pairs}) == 1:
            groups = [(self.pairs[0][0], *(second for _, second in self.pairs))]
        queries = []
        for group in groups:
            items = [self.items[index] for index in group]
            images = tuple(item for item in items if isinstance(item, Picture))
            texts = tuple(item for item in items if not isinstance(item, Picture))
            queries.append(Query(images, texts))
        return queries

    @property
    def embedded(self) -> tuple[Input, ...]:
        """Items to embed."""
        return () if self.scoring == "match" else self.items

    def result(self, rankings: Sequence[Ranking], features: Sequence[Tensor]) -> Tensor:
        """Return scores `[pairs]`, or features `[items, embed_dim]`."""
        if self.scoring == "match":
            return torch.cat([ranking.matches.flatten() for ranking in rankings])
        rows = torch.stack([*features])
        if not self.pairs:
            return rows
        first, second = torch.tensor(self.pairs).unbind(1)
        cosines = (rows[first] * rows[second]).sum(1)
        if self.scoring == "similarity":
            return (1 + cosines) / 2
        logits = torch.cat([ranking.scores.flatten() for ranking in rankings])
        return rank_score("sum", logits, cosines)


@dataclass(frozen=True)
class ServedModel:
    """A model that runs the work of several requests together."""

    name: str
    source: str  # origin of the weights, for messages
    random: bool  # random weights, whose results mean nothing
    heads: tuple[str, ...]  # of `contrastive` and `matching`
    tokenizer: CaptionTokenizer
    device: torch.device
    ranker: Ranker
    max_tokens: int  # texts are truncated to this length
    rank: Rank = "match"  # score of a text with an image; see `xfm_fast.tasks.reranking.rank_score`

    @property
    def config(self) -> XFMConfig:
        """Sizes of the model."""
        return self.ranker.model.config

    def read_text(self, text: str, name: str) -> tuple[tuple[int, ...], bool]:
        """Return the token ids of a text, cleaned and truncated like captions, and whether it is complete."""
        try:
            # One word and one token more than the model reads, to detect truncation.
            words = pre_caption(text, _MAX_WORDS + 1).split(" ")
            (ids,) = self.tokenizer.encode_ids([" ".join(words[:_MAX_WORDS])], self.max_tokens + 1)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        complete = len(words) <= _MAX_WORDS and len(ids) <= self.max_tokens
        if len(ids) > self.max_tokens:
            ids = [*ids[: self.max_tokens - 1], ids[-1]]
        return tuple(ids), complete

    def read_image(
        self, content: bytes, name: str, peak: int = 0, needed: Callable[[], bool] = lambda: True
    ) -> Picture:
        """Wrap an image file, which is decoded when its batch begins, to save memory; see `Picture`."""
        return self.ranker.picture(content, name)._replace(name=name, peak=peak, needed=needed)

    def cost(self, work: Work) -> int:
        """Count the tokens of texts, once per pair, and of images that are not cached."""
        items, cache = work.items, self.ranker.features
        if work.scoring != "similarity":
            items = tuple(work.items[index] for pair in work.pairs for index in pair)
            cache = self.ranker.cache
        tokens, images = 0, set()
        for item in items:
            if not isinstance(item, Picture):
                tokens += len(item)
            elif item.key not in cache:
                images.add(item.key)
        return tokens + len(images) * self.config.num_image_tokens

    def warm_up(self) -> None:
        """Run everything once, so that no request waits for autotuning."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, "PNG")
        items = ((bos, eos, eos), self.read_image(stream.getvalue(), "a black square"))
        works = {"matching": Work(items, ((0, 1),), "match"), "contrastive": Work(items)}
        self.answer([works[head] for head in works if head in self.heads])

    def answer(self, works: Sequence[Work]) -> list[Tensor | Exception]:
        """Compute the results of several requests, or the error of a request with a damaged image."""
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
    max_tokens = _MAX_TOKENS
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
        tokenizer = model.processor.tokenizer
        for graph in ("text", "fusion"):
            max_tokens = min(max_tokens, largest(model.slots(graph), "length") or max_tokens)
        ranks: RankModel = SessionRanks(model)
    else:
        opened = open_model(options, needs=_HEADS, tasks=("retrieval",))
        model = opened.model
        if model.device.type == "cpu" and options.dtype in (None, "fp32", "bf16"):
            model.freeze()
        source, random = str(options), options.model is None
        tokenizer = model.tokenizer
        ranks = ModelRanks(model)
    if tokenizer is None:
        raise UnavailableError(
            f"{options} has no tokenizer to read texts with; give the model's with --tokenizer"
        )
    heads = [head for head in _HEADS if head in model.heads]
    if not model.config.fusion_layers and "matching" in heads:
        heads.remove("matching")
    return ServedModel(
        name=options.name or opened.name,
        source=source,
        random=random,
        heads=tuple(heads),
        tokenizer=tokenizer,
        device=model.device,
        ranker=Ranker(ranks, cache_bytes),
        max_tokens=min(max_tokens, model.config.max_text_length),
        rank=options.rank or opened.rank,
    )
