"""The served model: loaded from a run, a checkpoint or an export, and run for several requests at once."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from xfm_fast.checkpoint.files import TOKENIZER_FILE
from xfm_fast.config import XFMConfig
from xfm_fast.errors import DataError, ExportError, InputError, UnavailableError, XFMError
from xfm_fast.export.session import SessionRanks
from xfm_fast.export.slots import largest
from xfm_fast.loading import open_model, open_session
from xfm_fast.models.xfm import XFM
from xfm_fast.serve.options import SourceOptions
from xfm_fast.tasks.ranking import ModelRanks, Picture, Query, Ranker, Ranking, RankModel
from xfm_fast.tasks.reranking import Rank
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

_HEADS = ("contrastive", "matching")
_RANK_GRAPHS = ("vision", "text", "image_memory", "fusion")
# The official evaluation truncates captions to this length.
_MOST_TOKENS = 40
_BUDGETS = {"cpu": 4096, "cuda": 65536}


class Text(NamedTuple):
    """A text as token ids."""

    ids: tuple[int, ...]


Read = Text | Picture
"""An input of the model: a text or an image."""


class Work(NamedTuple):
    """Work of a request: pairs to be scored, and items to be embedded."""

    queries: tuple[Query, ...] = ()
    items: tuple[Read, ...] = ()


class Found(NamedTuple):
    """Results of a `Work`: rankings in the order of queries, features `[items, embed_dim]`."""

    rankings: tuple[Ranking, ...]
    features: Tensor | None


@dataclass(frozen=True)
class ServedModel:
    """A model that runs the work of several requests together.

    Attributes:
        name: The model's name in requests and responses.
        source: Origin of the weights, for messages.
        random: The weights are random, and results mean nothing.
        heads: The available ones of `contrastive` and `matching`.
        most_tokens: Length that texts are truncated to.
        rank: Score of a text with an image; see `xfm_fast.tasks.reranking.rank_score`.
    """

    name: str
    source: str
    random: bool
    heads: tuple[str, ...]
    tokenizer: CaptionTokenizer
    device: torch.device
    ranks: RankModel
    cache_bytes: int
    most_tokens: int
    rank: Rank = "match"
    ranker: Ranker = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranker", Ranker(self.ranks, self.cache_bytes))

    @property
    def config(self) -> XFMConfig:
        """Sizes of the model."""
        return self.ranks.config

    @property
    def default_budget(self) -> int:
        """Default of --batch-tokens."""
        return _BUDGETS["cpu" if self.device.type == "cpu" else "cuda"]

    def require(self, head: str) -> None:
        """Raise `UnavailableError` if the model lacks a head."""
        if head not in self.heads:
            what = {"matching": "scores of texts with images", "contrastive": "features"}[head]
            raise UnavailableError(f"model {self.name!r} has no {head} head, which {what} need; serve one that has it")

    def read_text(self, text: str, name: str) -> Text:
        """Token ids of a text, cleaned and truncated like captions; raises `DataError` where it is empty then."""
        try:
            cleaned = pre_caption(text)
            rows = self.tokenizer.encode_ids([cleaned], self.most_tokens)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        return Text(tuple(rows[0]))

    def read_image(self, content: bytes, name: str) -> Picture:
        """An image file, which is decoded when its batch begins, to save memory."""
        return self.ranker.picture(content, name)._replace(name=name)

    def cost(self, work: Work) -> int:
        """Tokens of texts, once per pair, and of images that are not cached."""
        texts = [ids for query in work.queries for ids in query.captions for _ in query.pictures]
        texts += [item.ids for item in work.items if isinstance(item, Text)]
        memories, features = self.ranker.cache, self.ranker.features
        images = {each.key for query in work.queries for each in query.pictures if each.key not in memories}
        images |= {item.key for item in work.items if isinstance(item, Picture) and item.key not in features}
        return sum(map(len, texts)) + len(images) * self.config.num_image_tokens

    def warm_up(self) -> None:
        """Run everything once, so that no request waits for autotuning."""
        text = Text((self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.eos_token_id))
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, "PNG")
        picture = self.ranker.picture(stream.getvalue(), "a black square")
        queries = (Query((picture,), (text.ids,)),) if "matching" in self.heads else ()
        self.answer([Work(queries, (text, picture) if "contrastive" in self.heads else ())])

    def answer(self, works: Sequence[Work]) -> list[Found | Exception]:
        """Results for several requests, or the error of a request with a damaged image."""
        rankings = iter(self.ranker.rank([query for work in works for query in work.queries]))
        features = iter(self._features([item for work in works for item in work.items]))
        found: list[Found | Exception] = []
        for work in works:
            parts = [next(rankings) for _ in work.queries], [next(features) for _ in work.items]
            failed = next((each for part in parts for each in part if isinstance(each, XFMError)), None)
            ranked = tuple(each for each in parts[0] if isinstance(each, Ranking))
            rows = [each for each in parts[1] if isinstance(each, Tensor)]
            found.append(Found(ranked, torch.stack(rows) if rows else None) if failed is None else failed)
        return found

    def _features(self, items: Sequence[Read]) -> list[Tensor | XFMError]:
        texts = [item.ids for item in items if isinstance(item, Text)]
        of_texts = iter(self.ranker.embed_captions(texts) if texts else ())
        of_pictures = iter(self.ranker.embed_images([item for item in items if isinstance(item, Picture)]))
        return [next(of_texts) if isinstance(item, Text) else next(of_pictures) for item in items]


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
        return _export(options, cache_bytes)
    if options.model is not None and options.tokenizer is None and Path(options.model).expanduser().is_file():
        raise InputError(f"{options.model} holds no vocabulary; give RoBERTa's vocabulary with --tokenizer")
    opened = open_model(options, needs=_HEADS, tasks=("retrieval",))
    model: XFM = opened.model
    if model.tokenizer is None:
        raise UnavailableError(f"{options} has no tokenizer to read texts with; give the model's with --tokenizer")
    heads = tuple(head for head in _HEADS if head in model.heads and (head != "matching" or model.config.fusion_layers))
    if model.device.type == "cpu" and options.dtype in (None, "fp32", "bf16"):
        model.freeze()
    return ServedModel(
        options.name or opened.name, str(options), options.model is None, heads, model.tokenizer, model.device,
        ModelRanks(model), cache_bytes, min(_MOST_TOKENS, model.config.max_text_length), options.rank or opened.rank,
    )  # fmt: skip


def _export(options: SourceOptions, cache_bytes: int) -> ServedModel:
    opened = open_session(options, options.runtime)
    session, folder = opened.model, options.model
    missing = [graph for graph in _RANK_GRAPHS if graph not in session.manifest.graph_names]
    if missing:
        raise ExportError(
            f"serving needs the graphs {', '.join(_RANK_GRAPHS)} and {folder} lacks {', '.join(missing)}; export them"
        )
    tokenizer = session.processor.tokenizer
    if tokenizer is None:
        raise InputError(f"{folder} has no {TOKENIZER_FILE} to read texts with; give the model's with --tokenizer")
    longest = [largest(session.slots(graph), "length") for graph in ("text", "fusion")]
    tokens = min(_MOST_TOKENS, session.config.max_text_length, *filter(None, longest))
    return ServedModel(
        options.name or opened.name, f"{folder} ({opened.origin}, {session.description})",
        opened.origin.startswith("random weights"), tuple(head for head in _HEADS if head in session.heads), tokenizer,
        session.device, SessionRanks(session), cache_bytes, tokens, options.rank or opened.rank,
    )  # fmt: skip
