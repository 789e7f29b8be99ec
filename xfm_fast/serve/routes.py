"""The endpoints: requests and answers in the formats of Cohere, Jina, OpenAI, TEI and vLLM."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from pydantic_core import to_json

from xfm_fast.encoders import Role
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.serve import schema
from xfm_fast.serve.library import LibraryModel, normalised
from xfm_fast.serve.model import Ability, Reading, Scoring, ServedModel
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
_ROLES: dict[str, Role] = {
    "search_query": "query",
    "query": "query",
    "search_document": "document",
    "passage": "document",
    "document": "document",
}


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
        embed = Call(schema.TeiEmbedRequest, self.embed)
        embed_sparse = Call(schema.TeiEmbedRequest, self.embed_sparse)
        embeddings = Call(schema.EmbeddingsRequest, self.embeddings)
        cohere_embed = Call(schema.EmbedRequest, self.cohere_embed)
        rerank = Call(schema.RerankRequest, self.rerank)
        score = Call(schema.ScoreRequest, self.score)
        predict = Call(schema.TeiPredictRequest, self.predict)
        roots: dict[Ability, Call] = {
            "embed": embed,
            "embed_sparse": embed_sparse,
            "rank": rerank,
            "classify": predict,
        }
        self.calls: dict[str, Call] = {
            "/v1/embeddings": embeddings,
            "/embeddings": embeddings,
            "/v1/rerank": rerank,
            "/v2/rerank": rerank,
            "/rerank": rerank,
            "/v1/embed": cohere_embed,
            "/v2/embed": cohere_embed,
            "/v1/score": score,
            "/score": score,
            "/embed": embed,
            "/embed_sparse": embed_sparse,
            "/predict": predict,
            "/similarity": Call(schema.TeiSimilarityRequest, self.similarity),
            "/tokenize": Call(schema.TeiTokenizeRequest, self.tokenize),
            "/": roots[service.models[0].abilities[0]],
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
        for path, endpoint in {
            "/health": self.health,
            "/ready": self.ready,
            "/info": self.info,
            "/v1/models": self.models,
        }.items():
            app.get(path)(endpoint)

    async def embeddings(self, request: Request, body: schema.EmbeddingsRequest) -> Response:
        """Embed texts and images: L2-normalised features; their dot products are cosine similarities."""
        model = self._service.choose(body.model, "embed")
        role, prompt = _by_task(model, (body.task or "").rpartition(".")[2])
        reading = Reading(
            role, None, body.prompt_name or prompt, body.truncate, normalise=body.normalized
        )
        size = _check_dimensions(model, body.dimensions)
        lists = {"input": body.input}
        answer_bytes = _NUMBER_BYTES * size * len(body.input)
        result = await self._service.compute(request, model, lists, (), reading, answer_bytes)

        def content() -> dict[str, Any]:
            features = _shortened(result.values, body.dimensions, body.normalized)
            data = [
                {"object": "embedding", "index": index, "embedding": row}
                for index, row in enumerate(_encoded(features, body.encoding_format))
            ]
            return {"object": "list", "data": data, **_fields(result, body)}

        return await self._answer(request, result, content)

    async def cohere_embed(self, request: Request, body: schema.EmbedRequest) -> Response:
        """Embed texts or images in Cohere's form; int8 and uint8 scale numbers from [-1, 1], binary packs signs."""
        model = self._service.choose(body.model, "embed")
        role, prompt = _by_task(model, body.input_type or "")
        reading = Reading(
            role,
            None,
            body.prompt_name or prompt,
            body.truncate != "NONE",
            "left" if body.truncate == "START" else "right",
        )
        size = _check_dimensions(model, body.output_dimension)
        lists: dict[str, Sequence[Item]] = {}
        if body.images:
            lists["images"] = [ImageItem(image) for image in body.images]
        else:
            lists = {"texts": body.texts} if body.texts else {"inputs": body.inputs or []}
        (items,) = lists.values()
        types = body.embedding_types or ["float"]
        answer_bytes = _NUMBER_BYTES * size * len(items) * len(types)
        result = await self._service.compute(request, model, lists, (), reading, answer_bytes)
        version = request.url.path[2]

        def content() -> dict[str, Any]:
            features = _shortened(result.values, body.output_dimension)
            embeddings: Any = {name: _encoded(features, name) for name in types}
            form = "embeddings_by_type"
            if body.embedding_types is None and version == "1":
                embeddings, form = embeddings["float"], "embeddings_floats"
            return {
                "response_type": form,
                "embeddings": embeddings,
                "texts": [item for item in items if isinstance(item, str)],
                "meta": _meta(version, input_tokens=result.work.tokens),
                **_fields(result, body),
            }

        return await self._answer(request, result, content)

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
        model = self._service.choose(body.model, "rank", "compare")
        side = "left" if body.truncation_direction.lower() == "left" else "right"
        scoring: Scoring | None = "logit" if body.raw_scores else None
        reading = Reading(
            "query", "document", body.prompt_name, body.truncate is not False, side, scoring=scoring
        )
        name = "texts" if is_tei else "documents"
        lists = {"query": [body.query], name: documents}
        pairs = tuple((0, index) for index in range(1, 1 + len(documents)))
        echo = body.return_documents or body.return_text
        answer_bytes = _ECHO_COPIES * request.state.account.received if echo else 0
        result = await self._service.compute(request, model, lists, pairs, reading, answer_bytes)
        scores = result.values
        order = np.argsort(-scores, kind="stable").tolist()[: body.top_n]
        values = scores.tolist()
        if is_tei:
            ranks: list[dict[str, Any]] = [
                {"index": index, "score": values[index]} for index in order
            ]
            if echo:
                for rank in ranks:
                    rank["text"] = documents[rank["index"]]
            return await self._answer(request, result, lambda: ranks)
        results: list[dict[str, Any]] = [
            {"index": index, "relevance_score": values[index]} for index in order
        ]
        if echo:
            for row in results:
                item = documents[row["index"]]
                row["document"] = (
                    {"image": item.image} if isinstance(item, ImageItem) else {"text": item}
                )
        fields = _fields(result, body, scoring=True)
        content = {
            "object": "list",
            "results": results,
            "meta": _meta("2", search_units=1),
            **fields,
        }
        return await self._answer(request, result, lambda: content)

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
        reading = Reading(prompt=body.prompt_name, scoring="activation")
        result = await self._service.compute(request, model, lists, pairs, reading)
        content = {
            "object": "list",
            "created": int(time.time()),
            "data": [
                {"object": "score", "index": index, "score": score}
                for index, score in enumerate(result.values.tolist())
            ],
            **_fields(result, body, scoring=True),
        }
        return await self._answer(request, result, lambda: content)

    async def embed(self, request: Request, body: schema.TeiEmbedRequest) -> Response:
        """Embed texts in TEI's form: a list of features."""
        model = self._service.choose(body.model, "embed")
        size = _check_dimensions(model, body.dimensions)
        result = await self._service.compute(
            request,
            model,
            {"inputs": body.inputs},
            (),
            _tei_reading(body, normalise=body.normalize),
            _NUMBER_BYTES * size * len(body.inputs),
        )

        def content() -> list[list[float]]:
            return _shortened(result.values, body.dimensions, body.normalize).tolist()

        return await self._answer(request, result, content)

    async def embed_sparse(self, request: Request, body: schema.TeiEmbedRequest) -> Response:
        """Embed texts as sparse features in TEI's form: for each the indices of its entries and their values."""
        model = self._service.choose(body.model, "embed_sparse")
        answer_bytes = (_NUMBER_BYTES * _SPARSE_NUMBERS + 4 * model.width) * len(body.inputs)
        result = await self._service.compute(
            request, model, {"inputs": body.inputs}, (), _tei_reading(body), answer_bytes
        )

        def content() -> list[list[dict[str, Any]]]:
            data = []
            for row in result.values:
                (indices,) = row.nonzero()
                entries = zip(indices.tolist(), row[indices].tolist(), strict=True)
                data.append([{"index": index, "value": value} for index, value in entries])
            return data

        return await self._answer(request, result, content)

    async def predict(self, request: Request, body: schema.TeiPredictRequest) -> Response:
        """Classify texts or pairs of texts in TEI's form: for each the labels and their scores, best first."""
        model = self._service.choose(body.model, "classify")
        assert isinstance(model, LibraryModel)
        items, is_batch = _predicted(body.inputs)
        texts: list[Item] = [text for item in items for text in item]
        pairs, end = list[tuple[int, int]](), 0
        for item in items:
            pairs.append((end, end + len(item) - 1))
            end += len(item)
        scoring: Scoring = "logit" if body.raw_scores else "probability"
        result = await self._service.compute(
            request, model, {"inputs": texts}, tuple(pairs), _tei_reading(body, scoring=scoring)
        )
        data = []
        for row in result.values.reshape(len(items), -1).tolist():
            scores = sorted(zip(row, model.labels, strict=True), reverse=True)
            data.append([{"score": score, "label": label} for score, label in scores])
        return await self._answer(request, result, lambda: data if is_batch else data[0])

    async def similarity(self, request: Request, body: schema.TeiSimilarityRequest) -> Response:
        """Compare sentences with one by the cosine similarity of their features, in TEI's form."""
        model = self._service.choose(body.model, "compare")
        sentences = body.inputs.sentences
        lists = {"source_sentence": [body.inputs.source_sentence], "sentences": sentences}
        pairs = tuple((0, index) for index in range(1, 1 + len(sentences)))
        reading = _tei_reading(body.parameters)
        result = await self._service.compute(request, model, lists, pairs, reading)
        return await self._answer(request, result, lambda: (2 * result.values - 1).tolist())

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

    async def _answer(
        self, request: Request, result: Result, content: Callable[[], Any]
    ) -> Response:
        """Make the answer, in a thread if it is long."""
        headers = {"x-compute-tokens": str(result.work.tokens)}
        if result.truncated:
            headers["x-truncated-inputs"] = str(len(result.truncated))
        if result.values.size > _QUICK_NUMBERS:
            account: Account = request.state.account
            encoded = await account.run(self._service.threads, lambda: to_json(content()))
        else:
            encoded = to_json(content())
        return Response(encoded, headers=headers, media_type="application/json")

    async def health(self) -> dict[str, Any]:
        """Answer while the process is alive."""
        model = self._service.models[0]
        return {"status": "ok", "model": model.name, "random_weights": model.random}

    async def ready(self) -> dict[str, str]:
        """Answer once all models are warmed up; 503 before."""
        return {"status": "ready"}

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
        ability, model_type = served.abilities[0], dict[str, Any]()
        if isinstance(served, LibraryModel) and served.labels:
            labels = {str(index): label for index, label in enumerate(served.labels)}
            name = "reranker" if ability == "rank" else "classifier"
            model_type[name] = {
                "id2label": labels,
                "label2id": {b: int(a) for a, b in labels.items()},
            }
        else:
            model_type["embedding"] = {
                "pooling": "splade" if ability == "embed_sparse" else "model"
            }
        return {
            "model_id": served.name,
            "model_sha": None,
            "model_dtype": served.dtype,
            "model_type": model_type,
            "max_concurrent_requests": options.max_queue,
            "max_input_length": served.max_tokens,
            "max_batch_tokens": self._service.batch_tokens(served),
            "max_batch_requests": None,
            "max_client_batch_size": options.max_inputs,
            "auto_truncate": True,
            "tokenization_workers": 8,
            "version": __version__,
        }


def _by_task(model: ServedModel, name: str) -> tuple[Role | None, str | None]:
    """Return the role and the prompt for Cohere's `input_type` or Jina's `task`."""
    prompts = model.encoder.prompts if isinstance(model, LibraryModel) else {}
    return _ROLES.get(name), name if name in prompts else None


def _tei_reading(body: schema.TeiBody, **settings: Any) -> Reading:
    side = "left" if body.truncation_direction.lower() == "left" else "right"
    return Reading(None, None, body.prompt_name, body.truncate is not False, side, **settings)


def _check_dimensions(model: ServedModel, dimensions: int | None) -> int:
    """Return the numbers of a feature in the answer."""
    if dimensions is not None and dimensions > model.width:
        raise Problem(
            422,
            f"dimensions={dimensions}, but features of {model.name} have {model.width}; ask for at most as many",
        )
    return dimensions or model.width


def _shortened(features: np.ndarray, dimensions: int | None, normalise: bool = True) -> np.ndarray:
    if dimensions is None or dimensions == features.shape[1]:
        return features
    features = features[:, :dimensions]
    return normalised(features) if normalise else features


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
    schema._check_length(items)
    for item in items:
        if not isinstance(item, list) or len(item) not in (1, 2):
            break
        if not all(isinstance(text, str) for text in item):
            break
    else:
        return items, is_batch
    raise InputError(
        "inputs: give a text, a pair of texts, or a list of them, each as a list of one or two texts"
    )


def _meta(version: str, **billed: int) -> dict[str, Any]:
    """Return the field `meta` of Cohere's answers."""
    return {"api_version": {"version": version}, "billed_units": billed}


def _fields(result: Result, body: schema.Body, *, scoring: bool = False) -> dict[str, Any]:
    """Return the common fields of answers."""
    tokens = result.work.tokens
    fields: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "model": body.model or result.model.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    if scoring:
        fields["scoring"] = result.work.scoring
    if result.truncated:
        fields["truncated"] = result.truncated
    if result.model.random:
        fields["warning"] = "THE WEIGHTS ARE RANDOM: these results mean nothing"
    return fields
