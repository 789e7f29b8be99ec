"""The endpoints: requests and answers in the formats of Cohere, Jina, OpenAI, TEI and vLLM."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple, get_type_hints

import numpy as np
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from pydantic_core import to_json

from xfm_fast.encoders import Role
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.serve import schema
from xfm_fast.serve.library import LibraryModel, normalised
from xfm_fast.serve.model import Ability, Pairs, Reading, Scoring, ServedModel
from xfm_fast.serve.schema import ImageItem, Item, Problem
from xfm_fast.serve.service import ModelService, Result
from xfm_fast.serve.work import Account

# Bytes of a feature's number in the response, as a value and as text; and copies of documents that
# are returned.
_NUMBER_BYTES, _ECHO_COPIES = 128, 3
# Bytes of a token in the response, as values and as text.
_TOKEN_BYTES = 512
# Numbers of a sparse feature in the response.
_SPARSE_NUMBERS = 1024
# Numbers whose text takes less time than handing them to a thread.
_QUICK_NUMBERS = 1 << 15
TEI_PATHS = frozenset(("/", "/embed", "/embed_sparse", "/predict", "/similarity", "/tokenize"))
"""Paths whose errors have TEI's form; `/rerank` has it for bodies of TEI."""
_ROOTS: dict[Ability, str] = {
    "embed": "/embed",
    "embed_sparse": "/embed_sparse",
    "rank": "/rerank",
    "classify": "/predict",
}
_ROLES: dict[str, Role] = {
    "search_query": "query",
    "query": "query",
    "search_document": "document",
    "passage": "document",
    "document": "document",
}


Lists = Mapping[str, Sequence[Item]]
"""Items of a request by the field that holds them."""


class Call(NamedTuple):
    """A path's schema of bodies, and its endpoint."""

    schema: type[BaseModel]
    endpoint: Callable[[Request, Any], Awaitable[Response]]


class Routes:
    """The endpoints of a service.

    Attributes:
        calls: Those of POST by path. The service calls them; FastAPI documents them.
    """

    def __init__(self, service: ModelService) -> None:
        self._service = service
        endpoints: dict[str, Callable[[Request, Any], Awaitable[Response]]] = {
            "/v1/embeddings": self.embeddings,
            "/embeddings": self.embeddings,
            "/v1/rerank": self.rerank,
            "/v2/rerank": self.rerank,
            "/rerank": self.rerank,
            "/v1/embed": self.cohere_embed,
            "/v2/embed": self.cohere_embed,
            "/v1/score": self.score,
            "/score": self.score,
            "/embed": self.embed,
            "/embed_sparse": self.embed_sparse,
            "/predict": self.predict,
            "/similarity": self.similarity,
            "/tokenize": self.tokenize,
        }
        endpoints["/"] = endpoints[_ROOTS[service.models[0].abilities[0]]]
        self.calls = {
            path: Call(get_type_hints(endpoint)["body"], endpoint)
            for path, endpoint in endpoints.items()
        }

    def add(self, app: FastAPI) -> None:
        """Add all endpoints to an application."""
        answers: dict[str, Any] = {
            "embeddings": schema.EmbeddingsAnswer,
            "rerank": schema.RerankAnswer,
            "score": schema.ScoreAnswer,
        }
        for path, call in self.calls.items():
            answer = answers.get(call.endpoint.__name__)
            app.post(path, response_model=answer)(call.endpoint)
        app.get("/live")(self.live)
        app.get("/health")(self.health)
        app.get("/ready")(self.health)
        app.get("/info")(self.info)
        app.get("/v1/models")(self.models)

    async def embeddings(self, request: Request, body: schema.EmbeddingsRequest) -> Response:
        """Embed texts and images: L2-normalised features; their dot products are cosine similarities."""
        model = self._service.choose(body.model, "embed")
        task = (body.task or "").rpartition(".")[2]
        reading = replace(_by_task(model, body, task), normalise=body.normalized)

        def content(result: Result) -> dict[str, Any]:
            data = [
                {"object": "embedding", "index": index, "embedding": row}
                for index, row in enumerate(_encoded(result.values, body.encoding_format))
            ]
            return {"object": "list", "data": data, **_fields(result, body)}

        lists = {"input": body.input}
        return await self._embed(request, model, lists, content, reading, body.dimensions)

    async def cohere_embed(self, request: Request, body: schema.EmbedRequest) -> Response:
        """Embed texts or images in Cohere's form; int8 and uint8 scale numbers from [-1, 1], binary packs signs."""
        model = self._service.choose(body.model, "embed")
        reading = _by_task(model, body, body.input_type or "")
        images = [ImageItem(image) for image in body.images or ()]
        lists = {"texts": body.texts or [], "images": images, "inputs": body.inputs or []}
        texts = [item for items in lists.values() for item in items if isinstance(item, str)]
        types = body.embedding_types or ["float"]
        version = request.url.path[2]

        def content(result: Result) -> dict[str, Any]:
            embeddings: Any = {name: _encoded(result.values, name) for name in types}
            form = "embeddings_by_type"
            if body.embedding_types is None and version == "1":
                embeddings, form = embeddings["float"], "embeddings_floats"
            return {
                "response_type": form,
                "embeddings": embeddings,
                "texts": texts,
                "meta": _meta(version, input_tokens=result.work.tokens),
                **_fields(result, body),
            }

        return await self._embed(
            request, model, lists, content, reading, body.output_dimension, len(types)
        )

    async def rerank(self, request: Request, body: schema.RerankRequest) -> Response:
        """Order documents by their relevance to a query.

        A cross-encoder gives the probability of its logit; `raw_scores` asks for the logit. X-FM's
        fusion encoder compares a text with an image: `relevance_score` is the probability that the
        text describes the image; with `--rank` it is the cosine similarity or match logit + cosine.
        Otherwise items are compared by their features: cosine similarity, mapped from [-1, 1] to
        [0, 1]. X-FM needs documents of one kind, because the two scores are not comparable.
        """
        is_tei = request.state.is_tei = body.texts is not None
        documents = body.texts or body.documents or []
        scoring: Scoring | None = "logit" if body.raw_scores else None
        reading = replace(
            body.reading(),
            role="query",
            following="document",
            pairs=_one_with_many(documents),
            scoring=scoring,
        )

        def content(result: Result) -> Any:
            order = np.argsort(-result.values, kind="stable").tolist()[: body.top_n]
            score, document = ("score", "text") if is_tei else ("relevance_score", "document")
            results = []
            for index in order:
                row = {"index": index, score: float(result.values[index])}
                if body.return_documents:
                    item = documents[index]
                    is_text = isinstance(item, str)
                    if not is_tei:
                        item = {"text": item} if is_text else {"image": item.image}
                    row[document] = item
                results.append(row)
            if is_tei:
                return results
            meta = _meta("2", search_units=1)
            return {"object": "list", "results": results, "meta": meta, **_fields(result, body)}

        return await self._answer(
            request,
            self._service.choose(body.model, "rank", "compare"),
            {"query": [body.query], "texts" if is_tei else "documents": documents},
            content,
            reading,
            _ECHO_COPIES * request.state.account.received if body.return_documents else 0,
        )

    async def score(self, request: Request, body: schema.ScoreRequest) -> Response:
        """Score pairs: one item with many, or two lists of equal length; a cross-encoder as its `predict` does."""
        first, second = len(body.text_1), len(body.text_2)
        if first not in (1, second):
            raise Problem(
                422,
                f"text_1 has {first} items and text_2 {second}; give one in text_1, or lists of equal length",
            )
        model = self._service.choose(body.model, "rank", "compare")
        lists = {"text_1": body.text_1, "text_2": body.text_2}
        pairs = tuple((index if first > 1 else 0, first + index) for index in range(second))
        reading = Reading(prompt=body.prompt_name, pairs=pairs, scoring="activation")

        def content(result: Result) -> dict[str, Any]:
            data = [
                {"object": "score", "index": index, "score": score}
                for index, score in enumerate(result.values.tolist())
            ]
            created = int(time.time())
            return {"object": "list", "created": created, "data": data, **_fields(result, body)}

        return await self._answer(request, model, lists, content, reading)

    async def embed(self, request: Request, body: schema.TeiEmbedRequest) -> Response:
        """Embed texts in TEI's form: a list of features."""
        model, lists = self._service.choose(body.model, "embed"), {"inputs": body.inputs}
        reading = replace(body.reading(), normalise=body.normalize)
        return await self._embed(
            request, model, lists, lambda result: result.values.tolist(), reading, body.dimensions
        )

    async def embed_sparse(self, request: Request, body: schema.TeiEmbedRequest) -> Response:
        """Embed texts as sparse features in TEI's form: for each the indices of its entries and their values."""
        model, lists = self._service.choose(body.model, "embed_sparse"), {"inputs": body.inputs}
        answer_bytes = (_NUMBER_BYTES * _SPARSE_NUMBERS + 4 * model.width) * len(body.inputs)

        def content(result: Result) -> list[list[dict[str, Any]]]:
            data = []
            for row in result.values:
                (indices,) = row.nonzero()
                entries = zip(indices.tolist(), row[indices].tolist(), strict=True)
                data.append([{"index": index, "value": value} for index, value in entries])
            return data

        return await self._answer(request, model, lists, content, body.reading(), answer_bytes)

    async def predict(self, request: Request, body: schema.TeiPredictRequest) -> Response:
        """Classify texts or pairs of texts in TEI's form: for each the labels and their scores, best first."""
        model = self._service.choose(body.model, "classify")
        items, is_batch = _predicted(body.inputs)
        texts: list[Item] = [text for item in items for text in item]
        ends = [*accumulate(map(len, items))]
        pairs = tuple((end - len(item), end - 1) for item, end in zip(items, ends, strict=True))
        scoring: Scoring = "logit" if body.raw_scores else "probability"

        def content(result: Result) -> list[Any]:
            data = []
            for row in result.values.reshape(len(items), -1).tolist():
                scores = sorted(zip(row, model.labels, strict=True), reverse=True)
                data.append([{"score": score, "label": label} for score, label in scores])
            return data if is_batch else data[0]

        reading = replace(body.reading(), pairs=pairs, scoring=scoring)
        return await self._answer(request, model, {"inputs": texts}, content, reading)

    async def similarity(self, request: Request, body: schema.TeiSimilarityRequest) -> Response:
        """Compare sentences with one by the cosine similarity of their features, in TEI's form."""
        model, sentences = self._service.choose(body.model, "compare"), body.inputs.sentences
        lists = {"source_sentence": [body.inputs.source_sentence], "sentences": sentences}
        reading = replace(body.parameters.reading(), pairs=_one_with_many(sentences))
        return await self._answer(
            request, model, lists, lambda result: (2 * result.values - 1).tolist(), reading
        )

    async def tokenize(self, request: Request, body: schema.TeiTokenizeRequest) -> Response:
        """Tokenise whole texts in TEI's form; `start` and `stop` count characters."""
        model = self._service.candidates(body.model)[0]
        if not isinstance(model, LibraryModel) or model.tokenizer is None:
            raise UnavailableError(f"model {model.name!r} has no tokenizer to show; name another")
        for index, text in enumerate(body.inputs):
            self._service.check_text(text, f"inputs[{index}]")
        account: Account = request.state.account
        account.hold(_TOKEN_BYTES * account.received)
        prompt = model.encoder.prompt(name=body.prompt_name) or ""
        texts, describe = [prompt + text for text in body.inputs], model.tokenizer.describe
        data = await account.run(
            self._service.threads, lambda: to_json(describe(texts, body.add_special_tokens))
        )
        return Response(data, media_type="application/json")

    async def _embed(
        self,
        request: Request,
        model: ServedModel,
        lists: Lists,
        content: Callable[[Result], Any],
        reading: Reading,
        dimensions: int | None,
        forms: int = 1,
    ) -> Response:
        """Answer with features of so many numbers, in so many forms."""
        size = dimensions or model.width
        if size > model.width:
            raise Problem(
                422,
                f"dimensions={size}, but features of {model.name} have {model.width}; ask for at most as many",
            )

        def shortened(result: Result) -> Any:
            if size == result.values.shape[1]:
                return content(result)
            values = result.values[:, :size]
            return content(
                replace(result, values=normalised(values) if reading.normalise else values)
            )

        answer_bytes = _NUMBER_BYTES * size * sum(map(len, lists.values())) * forms
        return await self._answer(request, model, lists, shortened, reading, answer_bytes)

    async def _answer(
        self,
        request: Request,
        model: ServedModel,
        lists: Lists,
        content: Callable[[Result], Any],
        reading: Reading,
        answer_bytes: int = 0,
    ) -> Response:
        """Compute the result, and make the answer from it: in a thread if it is long."""
        service = self._service
        result = await service.compute(request, model, lists, reading, answer_bytes)
        headers = {"x-compute-tokens": str(result.work.tokens)}
        if result.truncated:
            headers["x-truncated-inputs"] = str(len(result.truncated))
        if result.values.size > _QUICK_NUMBERS:
            account: Account = request.state.account
            encoded = await account.run(service.threads, lambda: to_json(content(result)))
        else:
            encoded = to_json(content(result))
        return Response(encoded, headers=headers, media_type="application/json")

    async def live(self) -> dict[str, str]:
        """Answer while the process is alive."""
        return {"status": "ok"}

    async def health(self) -> dict[str, Any]:
        """Answer once all models are warmed up; 503 before."""
        model = self._service.models[0]
        return {"status": "ok", "model": model.name, "random_weights": model.random}

    async def models(self) -> dict[str, Any]:
        """List the served models and their names."""
        data = []
        for name, model in self._service.names.items():
            entry = {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "xfm-fast",
                "abilities": model.abilities,
                "modalities": model.modalities,
                "dimensions": model.width,
                "max_tokens": model.max_tokens,
                "random_weights": model.random,
            }
            data.append(entry)
        return {"object": "list", "data": data}

    async def info(self, model: str | None = None) -> dict[str, Any]:
        """Describe a model and the limits in TEI's form."""
        from xfm_fast import __version__

        options, served = self._service.options, self._service.candidates(model)[0]
        ability, labels = served.abilities[0], served.labels
        if labels:
            model_type = "reranker" if ability == "rank" else "classifier"
            details: dict[str, Any] = {
                "id2label": {str(index): label for index, label in enumerate(labels)},
                "label2id": {label: index for index, label in enumerate(labels)},
            }
        else:
            model_type = "embedding"
            details = {"pooling": "splade" if ability == "embed_sparse" else "model"}
        return {
            "model_id": served.name,
            "model_sha": None,
            "model_dtype": served.dtype,
            "model_type": {model_type: details},
            "max_concurrent_requests": options.max_queue,
            "max_input_length": served.max_tokens,
            "max_batch_tokens": self._service.batch_tokens(served),
            "max_batch_requests": None,
            "max_client_batch_size": options.max_inputs,
            "auto_truncate": True,
            "tokenization_workers": 8,
            "version": __version__,
        }


def _by_task(
    model: ServedModel, body: schema.EmbeddingsRequest | schema.EmbedRequest, task: str
) -> Reading:
    """Return a reading with the role and the prompt of Cohere's `input_type` or Jina's `task`."""
    prompt = body.prompt_name or (task if task in model.prompts else None)
    return replace(body.reading(), role=_ROLES.get(task), prompt=prompt)


def _one_with_many(items: Sequence[Item]) -> Pairs:
    return tuple((0, index) for index in range(1, 1 + len(items)))


def _encoded(features: np.ndarray, form: str) -> list[Any]:
    """Encode features in one of Cohere's or Jina's forms, or as little-endian float32 in base64."""
    if form == "float":
        return features.tolist()
    if form == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in features]
    if form in ("int8", "uint8"):
        scaled = np.clip(np.rint(features * 127), -128, 127).astype(np.int64)
        return (scaled + 128 * (form == "uint8")).tolist()
    packed = np.packbits(features > 0, axis=1).astype(np.int64)
    return (packed - 128 * (form == "binary")).tolist()


def _predicted(inputs: Any) -> tuple[list[list[str]], bool]:
    """Return the texts of each input of TEI's `/predict`, and whether it is a batch."""
    is_batch = isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], list)
    items: Any = inputs if is_batch else [[inputs] if isinstance(inputs, str) else inputs]
    schema.check_length(items)
    lengths = {len(item) if isinstance(item, list) else 0 for item in items}
    if lengths <= {1, 2} and all(isinstance(text, str) for item in items for text in item):
        return items, is_batch
    raise InputError(
        "inputs: give a text, a pair of texts, or a list of them, each as a list of one or two texts"
    )


def _meta(version: str, **billed: int) -> dict[str, Any]:
    """Return the field `meta` of Cohere's answers."""
    return {"api_version": {"version": version}, "billed_units": billed}


def _fields(result: Result, body: schema.Body) -> dict[str, Any]:
    """Return the common fields of answers."""
    tokens = result.work.tokens
    fields: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "model": body.model or result.model.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    if result.values.ndim == 1:
        fields["scoring"] = result.work.reading.scoring
    if result.truncated:
        fields["truncated"] = result.truncated
    if result.model.random:
        fields["warning"] = "THE WEIGHTS ARE RANDOM: these results mean nothing"
    return fields
