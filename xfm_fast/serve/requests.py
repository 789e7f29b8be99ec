"""Requests: from the body to the work of the model, and from its results to a response."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from xfm_fast.errors import NonFiniteError
from xfm_fast.io import advice, parse_json
from xfm_fast.serve.budget import Budget
from xfm_fast.serve.images import image_content, is_url
from xfm_fast.serve.model import Found, Read, ServedModel, Text, Work
from xfm_fast.serve.options import ServiceOptions
from xfm_fast.serve.problem import Problem
from xfm_fast.serve.schema import (
    Answer,
    Embedding,
    EmbeddingsAnswer,
    EmbeddingsRequest,
    Item,
    Ranked,
    Request,
    RerankAnswer,
    RerankRequest,
    Score,
    ScoreAnswer,
    ScoreRequest,
    Usage,
)
from xfm_fast.serve.web import WebFetcher
from xfm_fast.tasks.ranking import Picture, Query
from xfm_fast.tasks.reranking import Rank, rank_score

R = TypeVar("R", bound=Request)
# Cohere's unit of billing, in documents.
_DOCUMENTS_PER_UNIT = 100


class Prepared(NamedTuple):
    """A parsed request: the work of the model, and the function that makes a response of its results."""

    work: Work
    finish: Callable[[Found], Answer]


class Reader:
    """Parses requests for a model, within the limits of a service; thread-safe."""

    def __init__(self, model: ServedModel, options: ServiceOptions) -> None:
        self.model, self.options = model, options
        # A slow site delays only the requests that name it.
        self._fetching = ThreadPoolExecutor(32, thread_name_prefix="fetch")

    def rerank(self, budget: Budget) -> Prepared:
        """Order documents by their relevance to a query."""
        request = self._parse(RerankRequest, budget)
        scoring = self._scoring([(request.query, document) for document in request.documents])
        query, *documents = self._read(
            [("query", request.query), *_named("documents", request.documents)], budget, shown=request.return_documents
        )
        if isinstance(query, Text):
            compared = Query(tuple(_pictures(documents)), (query.ids,))
        else:
            compared = Query((query,), tuple(_ids(documents)))
        work = _work(scoring, (compared,), (query, *documents))
        shown = [
            item.model_dump(include={"text", "image"}, exclude_none=True) if request.return_documents else None
            for item in request.documents
        ]
        top_n = request.top_n

        def finish(found: Found) -> Answer:
            scores = _scores(scoring, found, lambda rows: rows[1:] @ rows[0])
            order = scores.argsort(descending=True, stable=True).tolist()[:top_n]
            values = scores.tolist()
            results = [Ranked(index=index, relevance_score=values[index], document=shown[index]) for index in order]
            units = -(-len(documents) // _DOCUMENTS_PER_UNIT)
            meta = {"api_version": {"version": "1"}, "billed_units": {"search_units": units}}
            return RerankAnswer(
                **self._facts("rerank", [query, *documents]), results=results, scoring=scoring, meta=meta
            )

        return Prepared(work, finish)

    def embeddings(self, budget: Budget) -> Prepared:
        """Embed texts and images."""
        request = self._parse(EmbeddingsRequest, budget)
        size = self.model.config.embed_dim
        if request.dimensions not in (None, size):
            raise Problem(422, f"dimensions={request.dimensions}, but features of this model have {size}; leave it out")
        self.model.require("contrastive")
        as_text = request.encoding_format == "base64"
        items = self._read(_named("input", request.input), budget)

        def finish(found: Found) -> Answer:
            assert found.features is not None
            rows = _finite(found.features).numpy().astype("<f4")
            values = [base64.b64encode(row.tobytes()).decode() if as_text else row.tolist() for row in rows]
            data = [Embedding(index=index, embedding=value) for index, value in enumerate(values)]
            return EmbeddingsAnswer(**self._facts("embd", items), data=data)

        return Prepared(Work(items=tuple(items)), finish)

    def score(self, budget: Budget) -> Prepared:
        """Score pairs."""
        request = self._parse(ScoreRequest, budget)
        first, second = request.text_1, request.text_2
        if len(first) not in (1, len(second)):
            raise Problem(
                422, f"text_1 has {len(first)} items and text_2 {len(second)}; give one in text_1, or as many in both"
            )
        if len(first) == 1:
            first = first * len(second)
        scoring = self._scoring(list(zip(first, second, strict=True)))
        # An item of many pairs is read once.
        distinct = {id(item): (name, item) for name, item in [*_named("text_1", first), *_named("text_2", second)]}
        read = self._read([*distinct.values()], budget)
        reads = dict(zip(distinct, read, strict=True))
        pairs = [(reads[id(a)], reads[id(b)]) for a, b in zip(first, second, strict=True)]
        compared = tuple(Query(tuple(_pictures(pair)), tuple(_ids(pair))) for pair in pairs)
        work = _work(scoring, compared, tuple(item for pair in pairs for item in pair))

        def finish(found: Found) -> Answer:
            scores = _scores(scoring, found, lambda rows: (rows[0::2] * rows[1::2]).sum(1))
            data = [Score(index=index, score=score) for index, score in enumerate(scores.tolist())]
            facts = self._facts("score", [*reads.values()])
            return ScoreAnswer(**facts, created=int(time.time()), data=data, scoring=scoring)

        return Prepared(work, finish)

    def close(self) -> None:
        """End the threads."""
        self._fetching.shutdown(wait=False, cancel_futures=True)

    def _parse(self, kind: type[R], budget: Budget) -> R:
        try:
            value = parse_json(budget.take_json())
        except ValueError as error:
            raise Problem(400, f"the body is not valid JSON ({error})") from None
        if not isinstance(value, dict):
            raise Problem(400, f"the body is a {type(value).__name__}; send an object, such as {{...}}")
        most = self.options.max_documents
        for name, items in value.items():
            if isinstance(items, list) and len(items) > most:
                raise Problem(422, f"{name[:40]} holds {len(items):,} items; give at most {most:,}")
        try:
            request = kind.model_validate(value)
        except ValidationError as error:
            raise Problem(422, _message(error)) from None
        if request.model is not None and request.model != self.model.name:
            raise Problem(404, f"model {request.model!r} is not served here; use {self.model.name!r}, or leave it out")
        return request

    def _scoring(self, pairs: Sequence[tuple[Item, Item]]) -> Rank:
        """The score that compares all pairs; raises where they need different ones or the model lacks the head."""
        mixed = {(a.text is None) != (b.text is None) for a, b in pairs}
        if len(mixed) > 1:
            raise Problem(
                422, "pairs of a text with an image, and pairs of one kind, have different scores; send two requests"
            )
        scoring: Rank = self.model.rank if mixed == {True} else "similarity"
        for head, unneeded in (("matching", "similarity"), ("contrastive", "match")):
            if scoring != unneeded:
                self.model.require(head)
        return scoring

    def _read(self, items: Sequence[tuple[str, Item]], budget: Budget, *, shown: bool = False) -> list[Any]:
        options = self.options
        fetcher = WebFetcher(options.max_body_mb << 20, budget=budget) if options.allow_urls else None

        def read(named: tuple[str, Item]) -> Read:
            name, item = named
            budget.check()
            if item.text is not None:
                length, most = len(item.text), options.max_characters
                if length > most:
                    raise Problem(422, f"{name} has {length:,} characters, over the limit of {most:,}; shorten it")
                return self.model.read_text(item.text, name)
            assert item.image is not None
            content, peak = image_content(item.image, name, fetcher, options.max_pixels, budget)
            return self.model.read_image(content, name)._replace(peak=peak, needed=budget.live)

        remote = any(item.image is not None and is_url(item.image) for _, item in items)
        found = list((self._fetching.map if remote else map)(read, items))
        if not shown:
            budget.keep(sum(len(each.content) for each in _pictures(found)))
        return found

    def _facts(self, kind: str, items: Sequence[Read]) -> dict[str, Any]:
        images = self.model.config.num_image_tokens
        tokens = sum(len(item.ids) if isinstance(item, Text) else images for item in items)
        warning = "THE WEIGHTS ARE RANDOM: these results mean nothing" if self.model.random else None
        usage = Usage(prompt_tokens=tokens, total_tokens=tokens)
        return {"id": f"{kind}-{uuid.uuid4().hex}", "model": self.model.name, "usage": usage, "warning": warning}


def _work(scoring: Rank, queries: tuple[Query, ...], items: tuple[Read, ...]) -> Work:
    """The work that a score needs: pairs for the fusion encoder, items for their features."""
    return Work(() if scoring == "similarity" else queries, () if scoring == "match" else items)


def _scores(scoring: Rank, found: Found, cosine: Callable[[Tensor], Tensor]) -> Tensor:
    """Scores of pairs; `cosine` computes cosine similarities from features."""
    if scoring == "match":
        return _finite(torch.cat([ranking.matches.flatten() for ranking in found.rankings]))
    assert found.features is not None
    similar = cosine(found.features)
    if scoring == "similarity":
        return _finite((1 + similar) / 2)
    return _finite(rank_score("sum", torch.cat([ranking.scores.flatten() for ranking in found.rankings]), similar))


def _named(name: str, items: Sequence[Item]) -> list[tuple[str, Item]]:
    return [(f"{name}[{number}]", item) for number, item in enumerate(items)]


def _pictures(items: Sequence[Read]) -> list[Picture]:
    return [item for item in items if isinstance(item, Picture)]


def _ids(items: Sequence[Read]) -> list[tuple[int, ...]]:
    return [item.ids for item in items if isinstance(item, Text)]


def _finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise NonFiniteError("the results are not finite; the dtype may be too narrow for these weights: use fp32")
    return values


def _message(error: ValidationError) -> str:
    """The location and remedy of the first error that pydantic found."""
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    return f"{place.lstrip('.') or 'the request'}: {advice(first)}"
