"""The HTTP application: endpoints, limits, metrics, and the path of a request to the model and back."""

from __future__ import annotations

import asyncio
import base64
import inspect
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from xfm_fast import __version__
from xfm_fast.errors import DataError, InputError, NonFiniteError, UnavailableError, XFMError
from xfm_fast.io import advice, parse_json
from xfm_fast.memory import resident_bytes
from xfm_fast.serve import schema
from xfm_fast.serve.images import WebFetcher, image_content, is_url
from xfm_fast.serve.model import Found, Read, ServedModel, Work
from xfm_fast.serve.options import ServiceOptions, is_loopback
from xfm_fast.serve.schema import EmbeddingsRequest, Item, Problem, RerankRequest, ScoreRequest
from xfm_fast.serve.work import COPIES, Batcher, Budget, Memory
from xfm_fast.tasks.ranking import Picture, Query
from xfm_fast.tasks.reranking import Rank, rank_score

# Tokens of a batch.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
# Cohere's unit of billing, in documents.
_DOCUMENTS_PER_UNIT = 100
_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::\d*)?")
# Paths that need no key: probes of a supervisor.
_OPEN = ("/health", "/ready")
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Call(NamedTuple):
    """A parsed request: named items, pairs of them to be scored, or none to embed all; and its response.

    `answer` gets scores `[pairs]` or features `[items, embed_dim]`, and the common fields of responses. It holds no
    item unless `shown`, so that the memory of the body is released.
    """

    items: Sequence[tuple[str, Item]]
    pairs: Sequence[tuple[int, int]]
    answer: Callable[[Tensor, dict[str, Any]], schema.Answer]
    shown: bool = False


class Service:
    """A model as an ASGI application.

    Args:
        model: The model that answers.
        options: See `ServiceOptions`.

    Attributes:
        app: The application.
        draining: The process is about to end and takes no more requests.
    """

    def __init__(self, model: ServedModel, options: ServiceOptions) -> None:
        if options.memory_mb < COPIES * options.max_body_mb:
            raise InputError(
                f"--memory-mb {options.memory_mb} holds no body of --max-body-mb {options.max_body_mb}; give at least "
                f"{COPIES * options.max_body_mb}"
            )
        self.model, self.options = model, options
        self.draining = False
        self.memory = Memory(options.memory_mb << 20)
        self._budgets: set[Budget] = set()
        self._reading = 0
        tokens = options.batch_tokens or _BATCH_TOKENS["cpu" if model.device.type == "cpu" else "cuda"]
        self.batcher: Batcher[Work, Found] = Batcher(
            model.answer, tokens, options.batch_wait_ms / 1e3,
            coming=lambda: self._reading, seen=self._observe_batch,
        )  # fmt: skip
        self.metrics = Metrics(model, self.batcher.__len__, lambda: len(self._budgets))
        # A slow site delays only the requests that name it.
        self._threads = ThreadPoolExecutor(32 if options.allow_urls else 8, thread_name_prefix="request")
        self._fetching = ThreadPoolExecutor(32, thread_name_prefix="fetch")
        self.app: ASGIApp = _Gate(self._application(), options, self.metrics)

    def close(self) -> None:
        """End the threads once they have done what they do."""
        self.batcher.close()
        for threads in (self._threads, self._fetching):
            threads.shutdown(wait=False, cancel_futures=True)

    def stop(self) -> None:
        """Answer the requests in flight with 503; called in the thread of their event loop."""
        self.draining = True
        for budget in [*self._budgets]:
            budget.end(_ending())

    def _observe_batch(self, requests: int, tokens: int) -> None:
        self.metrics.pieces.observe(requests)
        self.metrics.tokens.observe(tokens)

    def rerank(self, body: RerankRequest) -> Call:
        """Order documents by their relevance to a query."""
        count, top_n, shown = len(body.documents), body.top_n, body.return_documents
        documents = [
            item.model_dump(include={"text", "image"}, exclude_none=True) if shown else None for item in body.documents
        ]

        def answer(scores: Tensor, facts: dict[str, Any]) -> schema.Answer:
            values, order = scores.tolist(), scores.argsort(descending=True, stable=True).tolist()[:top_n]
            results = [
                schema.Ranked(index=index, relevance_score=values[index], document=documents[index]) for index in order
            ]
            units = -(-count // _DOCUMENTS_PER_UNIT)
            meta = {"api_version": {"version": "1"}, "billed_units": {"search_units": units}}
            return schema.RerankAnswer(**facts, results=results, meta=meta)

        items = [("query", body.query), *_named("documents", body.documents)]
        return Call(items, [(0, 1 + number) for number in range(count)], answer, shown)

    def embeddings(self, body: EmbeddingsRequest) -> Call:
        """Embed texts and images."""
        size = self.model.config.embed_dim
        if body.dimensions not in (None, size):
            raise Problem(422, f"dimensions={body.dimensions}, but features of this model have {size}; leave it out")
        encoded = body.encoding_format == "base64"

        def answer(features: Tensor, facts: dict[str, Any]) -> schema.Answer:
            rows = features.numpy().astype("<f4")
            values = [base64.b64encode(row.tobytes()).decode() if encoded else row.tolist() for row in rows]
            data = [schema.Embedding(index=index, embedding=value) for index, value in enumerate(values)]
            return schema.EmbeddingsAnswer(**facts, data=data)

        return Call(_named("input", body.input), (), answer)

    def score(self, body: ScoreRequest) -> Call:
        """Score pairs."""
        first, second = len(body.text_1), len(body.text_2)
        if first not in (1, second):
            raise Problem(422, f"text_1 has {first} items and text_2 {second}; give one in text_1, or as many in both")

        def answer(scores: Tensor, facts: dict[str, Any]) -> schema.Answer:
            data = [schema.Score(index=index, score=score) for index, score in enumerate(scores.tolist())]
            return schema.ScoreAnswer(**facts, created=int(time.time()), data=data)

        items = [*_named("text_1", body.text_1), *_named("text_2", body.text_2)]
        return Call(items, [(number if first > 1 else 0, first + number) for number in range(second)], answer)

    def _application(self) -> FastAPI:
        # `_Gate` checks the key, before routing; this only describes it.
        key = [Security(HTTPBearer(auto_error=False))] if self.options.api_key is not None else []

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            yield
            self.close()

        application = FastAPI(
            title="xfm-fast", version=__version__, description="X-FM ranks and embeds texts and images.",
            dependencies=key, redoc_url=None, swagger_ui_oauth2_redirect_url=None, separate_input_output_schemas=False,
            exception_handlers=dict.fromkeys(
                (HTTPException, XFMError, ClientDisconnect, MemoryError, Exception), _respond_to_error
            ),
            lifespan=lifespan,
        )  # fmt: skip
        calls: tuple[tuple[Callable[[Any], Call], type[schema.Request], type[schema.Answer], tuple[str, ...]], ...] = (
            (self.rerank, RerankRequest, schema.RerankAnswer, ("/v1/rerank", "/v2/rerank", "/rerank")),
            (self.embeddings, EmbeddingsRequest, schema.EmbeddingsAnswer, ("/v1/embeddings",)),
            (self.score, ScoreRequest, schema.ScoreAnswer, ("/v1/score", "/score")),
        )
        for plan, kind, answer, paths in calls:
            route = _bounded_route(partial(self._respond, kind, plan))
            for path in paths:
                application.router.add_api_route(
                    path, plan, methods=["POST"], description=inspect.getdoc(kind), response_model=answer,
                    responses={status: {"model": schema.ErrorAnswer} for status in ("4XX", "5XX")},
                    route_class_override=route,
                )  # fmt: skip
        for path, endpoint in (
            ("/health", self._health),
            ("/ready", self._ready),
            ("/v1/models", self._models),
            ("/metrics", self._metrics),
        ):
            name = path.rpartition("/")[2]
            application.add_api_route(path, endpoint, methods=["GET"], name=name, response_model=None)
            application.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)
        return application

    async def _health(self) -> dict[str, Any]:
        return {"status": "ok", "model": self.model.name, "random_weights": self.model.random}

    async def _ready(self) -> dict[str, Any]:
        if self.draining:
            raise _ending()
        return {"status": "ready"}

    async def _metrics(self) -> Response:
        return PlainTextResponse(generate_latest(self.metrics.registry), headers={"content-type": _METRICS_TYPE})

    async def _models(self) -> dict[str, Any]:
        model = self.model
        facts = {"id": model.name, "object": "model", "created": 0, "owned_by": "xfm-fast"}
        more = {"heads": model.heads, "dimensions": model.config.embed_dim, "random_weights": model.random}
        return {"object": "list", "data": [facts | more]}

    async def _respond(self, kind: type[schema.Request], plan: Callable[[Any], Call], request: Request) -> Response:
        """Answer a request within its limits of memory and time."""
        options, task = self.options, asyncio.current_task()
        if self.draining:
            raise _ending()
        if len(self._budgets) >= options.max_queue:
            raise Problem(429, f"{options.max_queue} requests in flight; ask again in a second", {"retry-after": "1"})
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            # Browsers send JSON to other sites only where CORS permits it, and this service never does.
            raise Problem(415, f"content-type is {content_type[:60] or 'missing'!r}; send application/json")
        budget = Budget(self.memory, options, task)
        self._budgets.add(budget)
        late = Problem(
            504, f"there was no answer within {options.timeout:g} s; ask for less, or later", {"retry-after": "5"}
        )
        alarm: Any = asyncio.get_running_loop().call_later(options.timeout, budget.end, late)
        watch: Any = None
        try:
            self._reading += 1
            try:
                await self._read_body(request, budget)
                watch = asyncio.ensure_future(_watch(request, budget))
                work, finish = await budget.run(self._threads, self._prepare, kind, plan, budget)
            finally:
                self._reading -= 1
            found = await self.batcher.submit(work, self.model.cost(work))
            content = await budget.run(self._threads, finish, found)
            return Response(content, media_type="application/json")
        except asyncio.CancelledError:
            if budget.ending is None or task is None:
                raise
            task.uncancel()
            raise budget.ending from None
        finally:
            alarm.cancel()
            if watch is not None:
                watch.cancel()
            self._budgets.discard(budget)
            budget.close()

    async def _read_body(self, request: Request, budget: Budget) -> None:
        """Read the body into the budget; raise `Problem` where it is too large or too slow."""
        most = self.options.max_body_mb << 20
        too_large = Problem(413, f"the body has more than {most:,} bytes; shrink the images, or send fewer")
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.options.read_timeout):
                async for piece in request.stream():
                    budget.take(len(piece))
                    body += piece
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise Problem(
                408, f"the body did not arrive within {self.options.read_timeout:g} s; send it faster",
                {"connection": "close"},
            ) from None  # fmt: skip
        budget.body = bytes(body)

    def _prepare(
        self, kind: type[schema.Request], plan: Callable[[Any], Call], budget: Budget
    ) -> tuple[Work, Callable[[Found], str]]:
        """The work of a request, and the function that makes a response of its results; runs in a thread."""
        items, pairs, answer, shown = plan(self._parse(kind, budget))
        scoring = self._scoring(items, pairs)
        reads = self._read(items, budget)
        if not shown:
            budget.keep(sum(len(each.content) for each in reads if isinstance(each, Picture)))
        work = Work(
            () if scoring == "similarity" else tuple(_queries(pairs, reads)), () if scoring == "match" else tuple(reads)
        )
        images = self.model.config.num_image_tokens
        tokens = sum(images if isinstance(each, Picture) else len(each) for each in reads)
        facts = {
            "id": f"{plan.__name__}-{uuid.uuid4().hex}", "model": self.model.name, "scoring": scoring,
            "usage": schema.Usage(prompt_tokens=tokens, total_tokens=tokens),
            "warning": "THE WEIGHTS ARE RANDOM: these results mean nothing" if self.model.random else None,
        }  # fmt: skip

        def finish(found: Found) -> str:
            values = _values(scoring, pairs, found)
            for ranking in found.rankings:
                for cached in ranking.reused.tolist():
                    self.metrics.images.labels("hit" if cached else "miss").inc()
            if not values.isfinite().all():
                raise NonFiniteError(
                    "the results are not finite; the dtype may be too narrow for these weights: use fp32"
                )
            return answer(values, facts).model_dump_json(exclude_none=True)

        return work, finish

    def _parse(self, kind: type[schema.Request], budget: Budget) -> schema.Request:
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
            body = kind.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
            raise Problem(422, f"{place.lstrip('.') or 'the request'}: {advice(first)}") from None
        if body.model not in (None, self.model.name):
            raise Problem(404, f"model {body.model!r} is not served here; use {self.model.name!r}, or leave it out")
        return body

    def _scoring(self, items: Sequence[tuple[str, Item]], pairs: Sequence[tuple[int, int]]) -> Rank:
        """The score of all pairs; raises where they need different ones or the model lacks the head."""
        is_text = [item.text is not None for _, item in items]
        mixed = {is_text[a] != is_text[b] for a, b in pairs}
        if len(mixed) > 1:
            raise Problem(
                422, "pairs of a text with an image, and pairs of one kind, have different scores; send two requests"
            )
        scoring: Rank = self.model.rank if mixed == {True} else "similarity"
        if scoring != "similarity":
            self.model.require("matching")
        if scoring != "match":
            self.model.require("contrastive")
        return scoring

    def _read(self, items: Sequence[tuple[str, Item]], budget: Budget) -> list[Read]:
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
            content, peak = image_content(item.image or "", name, fetcher, options.max_pixels, budget)
            return self.model.read_image(content, name, peak, budget.live)

        remote = any(item.image is not None and is_url(item.image) for _, item in items)
        return list((self._fetching.map if remote else map)(read, items))


def _named(name: str, items: Sequence[Item]) -> list[tuple[str, Item]]:
    return [(f"{name}[{number}]", item) for number, item in enumerate(items)]


def _queries(pairs: Sequence[tuple[int, int]], reads: Sequence[Read]) -> list[Query]:
    """Pairs as queries: one query where all pairs share their first item."""
    shared = len({first for first, _ in pairs}) == 1
    groups = [(pairs[0][0], *(second for _, second in pairs))] if shared else pairs
    return [
        Query(
            tuple(each for number in group if isinstance(each := reads[number], Picture)),
            tuple(each for number in group if not isinstance(each := reads[number], Picture)),
        )
        for group in groups
    ]


def _values(scoring: Rank, pairs: Sequence[tuple[int, int]], found: Found) -> Tensor:
    """Scores of pairs, or features of items."""
    if scoring == "match":
        return torch.cat([ranking.matches.flatten() for ranking in found.rankings])
    assert found.features is not None
    if not pairs:
        return found.features
    first, second = torch.tensor(pairs).unbind(1)
    cosines = (found.features[first] * found.features[second]).sum(1)
    if scoring == "similarity":
        return (1 + cosines) / 2
    return rank_score("sum", torch.cat([ranking.scores.flatten() for ranking in found.rankings]), cosines)


def _bounded_route(respond: Callable[[Request], Awaitable[Response]]) -> type[APIRoute]:
    """A route that FastAPI only describes: it would parse a whole body, on the event loop, before limits refuse it."""

    class Route(APIRoute):
        def get_route_handler(self) -> Any:
            return respond

    return Route


def _ending() -> Problem:
    return Problem(503, "the service is about to end; ask another one", {"connection": "close"})


async def _watch(request: Request, budget: Budget) -> None:
    """End the request when its client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    budget.end(ClientDisconnect())


async def _respond_to_error(request: Request, error: Exception) -> Response:
    match error:
        case Problem():
            problem = error
        case HTTPException():
            message = f"{request.method} {request.url.path[:100]} is not served; see /docs for what is"
            problem = Problem(error.status_code, message, error.headers)
        case ClientDisconnect():
            return Response(status_code=499)
        case DataError() | InputError() | UnavailableError():
            problem = Problem(422, str(error))
        case XFMError():
            problem = Problem(500, str(error))
        case MemoryError():
            problem = Problem(503, "there is no memory left for this request; ask again later")
        case _:
            text = " ".join(str(error).split())[:200]
            problem = Problem(500, f"internal error, {type(error).__name__}: {text}; please report it")
    return problem.response()


class _Gate:
    """ASGI middleware: checks the head of every request, and counts all responses."""

    def __init__(self, app: FastAPI, options: ServiceOptions, metrics: Metrics) -> None:
        self._app, self._options, self._metrics = app, options, metrics
        self._paths = {getattr(route, "path", "") for route in app.routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def count(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-content-type-options", b"nosniff")]}
            await send(message)

        try:
            refusal = self._refusal(Headers(scope=scope), scope["path"])
            await (self._app if refusal is None else refusal.response())(scope, receive, count)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)

    def _refusal(self, headers: Headers, path: str) -> Problem | None:
        """403 for a request of another site, and 401 for one without the key."""
        # DNS rebinding: a web page may resolve its own name to this machine and speak for the browser's user.
        host = headers.get("host", "localhost")
        parts = _HOST.fullmatch(host)
        if self._options.loopback and (parts is None or not is_loopback(parts[1] or parts[2] or "")):
            return Problem(403, f"host {host[:100]!r} is not this machine, and the service listens on loopback only")
        key = self._options.api_key
        scheme, _, given = headers.get("authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), (key or "").encode())
        if key is None or path in _OPEN or known:
            return None
        return Problem(
            401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
            {"www-authenticate": "Bearer"},
        )  # fmt: skip


class Metrics:
    """Prometheus metrics; `waiting` and `active` count requests in the queue and in flight."""

    def __init__(self, model: ServedModel, waiting: Callable[[], int], active: Callable[[], int]) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("xfm_requests", "Requests answered.", ("path", "status"), registry=registry)
        self.seconds = Histogram(
            "xfm_request_seconds", "From the request's head to its answer.", ("path",),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60), registry=registry,
        )  # fmt: skip
        self.pieces = Histogram(
            "xfm_batch_requests", "Requests computed together.", buckets=[1 << n for n in range(8)], registry=registry
        )
        self.tokens = Histogram(
            "xfm_batch_tokens", "Tokens computed together.", buckets=[64 * 4**n for n in range(7)], registry=registry
        )
        self.images = Counter("xfm_images", "Images of rank requests, by cache.", ("cache",), registry=registry)
        cache = model.ranker.cache
        gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
            ("xfm_queue_requests", "Requests that wait for the model.", waiting),
            ("xfm_active_requests", "Requests in flight, waiting ones included.", active),
            ("xfm_cache_bytes", "Bytes of cached image memories.", lambda: cache.nbytes),
            ("xfm_cache_images", "Images with a cached memory.", cache.__len__),
            ("xfm_process_resident_bytes", "Memory of the process.", resident_bytes),
        )
        for name, meaning, read in gauges:
            Gauge(name, meaning, registry=registry).set_function(read)
        labels = {"version": __version__, "model": model.name, "random_weights": str(model.random).lower()}
        Gauge("xfm_info", "The model that is served.", labels, registry=registry).labels(**labels).set(1)
