"""The HTTP application: endpoints, limits, metrics, and the path of a request to the model and back."""

from __future__ import annotations

import asyncio
import base64
import re
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from xfm_fast import __version__
from xfm_fast.errors import DataError, InputError, NonFiniteError, UnavailableError, XFMError
from xfm_fast.io import advice
from xfm_fast.memory import resident_bytes
from xfm_fast.serve import schema
from xfm_fast.serve.images import check_image, decode_base64, fetch, is_url, web_client
from xfm_fast.serve.model import Read, ServedModel, Work
from xfm_fast.serve.options import ServiceOptions, is_loopback
from xfm_fast.serve.schema import (
    MAX_INPUTS,
    EmbeddingsRequest,
    Item,
    Problem,
    RerankRequest,
    ScoreRequest,
)
from xfm_fast.serve.work import Account, Batcher, Ledger
from xfm_fast.tasks.ranking import Picture
from xfm_fast.tasks.reranking import Rank

# What a number of a feature takes in the answer, as a value and as text; and copies of documents that are sent back.
_NUMBER_BYTES, _ECHO_COPIES = 128, 3
# Tokens of a batch.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::\d*)?")
# Paths that need no key: probes of a supervisor.
_OPEN = ("/health", "/ready")

Items = Sequence[tuple[str, Item]]
"""Items of a request, with the names that errors use."""


class Service:
    """A model as an ASGI application.

    Args:
        model: The model that answers.
        options: See `ServiceOptions`.

    Attributes:
        app: The application.
    """

    def __init__(self, model: ServedModel, options: ServiceOptions) -> None:
        self.model, self.options = model, options
        self.ledger = Ledger(options.memory_mb << 20)
        # Requests whose body has arrived and whose answer is not there.
        self.active: set[Account] = set()
        metrics = Metrics(self)
        tokens = (
            options.batch_tokens or _BATCH_TOKENS["cpu" if model.device.type == "cpu" else "cuda"]
        )
        self.batcher = Batcher(
            model.answer, tokens, coming=lambda: sum(not each.submitted for each in self.active),
            observe=metrics.observe_batch,
        )  # fmt: skip
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="request")
        self._web = web_client() if options.allow_urls else None
        self.app: ASGIApp = _Gate(self, self._application(metrics), metrics)

    def close(self) -> None:
        """End the threads once they have done what they do."""
        self.batcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _application(self, metrics: Metrics) -> FastAPI:
        app = FastAPI(
            title="xfm-fast", version=__version__, description="X-FM ranks and embeds texts and images.",
            # `_Gate` checks the key, before routing; this only describes it.
            dependencies=[Security(HTTPBearer(auto_error=False))] if self.options.api_key is not None else [],
            redoc_url=None, swagger_ui_oauth2_redirect_url=None, separate_input_output_schemas=False,
            responses={status: {"model": schema.ErrorAnswer} for status in ("4XX", "5XX")},
            exception_handlers=dict.fromkeys(
                (HTTPException, RequestValidationError, XFMError, MemoryError, Exception), _respond_to_error
            ),
        )  # fmt: skip
        for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
            app.post(path, response_model=schema.RerankAnswer)(self.rerank)
        app.post("/v1/embeddings", response_model=schema.EmbeddingsAnswer)(self.embeddings)
        for path in ("/v1/score", "/score"):
            app.post(path, response_model=schema.ScoreAnswer)(self.score)
        model = self.model

        @app.get("/health")
        async def health() -> dict[str, Any]:
            return {"status": "ok", "model": model.name, "random_weights": model.random}

        @app.get("/ready")
        async def ready() -> dict[str, str]:
            return {"status": "ready"}

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            facts = {
                "id": model.name,
                "object": "model",
                "created": 0,
                "owned_by": "xfm-fast",
                "heads": model.heads,
            }
            facts |= {"dimensions": model.config.embed_dim, "random_weights": model.random}
            return {"object": "list", "data": [facts]}

        @app.get("/metrics", response_model=None)
        async def read_metrics() -> Response:
            return Response(generate_latest(metrics), media_type="text/plain; version=0.0.4")

        return app

    async def rerank(self, request: Request, body: RerankRequest) -> Response:
        """Order documents by their relevance to a query.

        The fusion encoder compares a text with an image: `relevance_score` is the probability that the text describes
        the image; with `--rank` it is the cosine similarity or match logit + cosine. Two texts, or two images, are
        compared by their features: cosine similarity, mapped from [-1, 1] to [0, 1]. All documents are of one kind,
        because the two scores are not comparable.
        """
        items = {"query": [body.query], "documents": body.documents}
        pairs = [(0, number) for number in range(1, 1 + len(body.documents))]
        answer_bytes = _ECHO_COPIES * request.state.account.received if body.return_documents else 0
        scores, facts = await self._compute(request, body, items, pairs, answer_bytes)
        values = scores.tolist()
        results = [
            schema.Ranked(
                index=index, relevance_score=values[index],
                document=body.documents[index].model_dump(exclude_none=True) if body.return_documents else None,
            )
            for index in scores.argsort(descending=True, stable=True).tolist()[: body.top_n]
        ]  # fmt: skip
        return _json(schema.RerankAnswer(**facts, results=results))

    async def embeddings(self, request: Request, body: EmbeddingsRequest) -> Response:
        """Embed texts and images: L2-normalised features; their dot products are cosine similarities."""
        size = self.model.config.embed_dim
        if body.dimensions not in (None, size):
            raise Problem(
                422,
                f"dimensions={body.dimensions}, but features of this model have {size}; leave it out",
            )
        answer_bytes = _NUMBER_BYTES * size * len(body.input)
        features, facts = await self._compute(
            request, body, {"input": body.input}, (), answer_bytes
        )
        rows, encoded = features.numpy().astype("<f4"), body.encoding_format == "base64"
        values = [
            base64.b64encode(row.tobytes()).decode() if encoded else row.tolist() for row in rows
        ]
        data = [
            schema.Embedding(index=index, embedding=value) for index, value in enumerate(values)
        ]
        return _json(schema.EmbeddingsAnswer(**facts, data=data))

    async def score(self, request: Request, body: ScoreRequest) -> Response:
        """Score pairs like documents of a rerank request: one with each of the others, or as many with as many."""
        first, second = len(body.text_1), len(body.text_2)
        if first not in (1, second):
            raise Problem(
                422,
                f"text_1 has {first} items and text_2 {second}; give one in text_1, or as many in both",
            )
        items = {"text_1": body.text_1, "text_2": body.text_2}
        pairs = [(number if first > 1 else 0, first + number) for number in range(second)]
        scores, facts = await self._compute(request, body, items, pairs)
        data = [
            schema.Score(index=index, score=score) for index, score in enumerate(scores.tolist())
        ]
        return _json(schema.ScoreAnswer(**facts, created=int(time.time()), data=data))

    async def _compute(
        self,
        request: Request,
        body: schema.Body,
        lists: dict[str, list[Item]],
        pairs: Sequence[tuple[int, int]],
        answer_bytes: int = 0,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Scores `[pairs]`, or features `[items, embed_dim]` without pairs; and the common fields of responses."""
        model, account, files = self.model, request.state.account, dict[str, bytes]()
        if body.model not in (None, model.name):
            raise Problem(
                404, f"model {body.model!r} is not served here; use {model.name!r}, or leave it out"
            )
        items = [
            (f"{name}[{place}]", item)
            for name, given in lists.items()
            for place, item in enumerate(given)
        ]
        scoring = self._scoring(items, pairs)
        if self._web is not None:
            urls = {
                name: item.image
                for name, item in items
                if item.image is not None and is_url(item.image)
            }
            downloads = [
                asyncio.ensure_future(fetch(self._web, url, account)) for url in urls.values()
            ]
            try:
                files = dict(zip(urls, await asyncio.gather(*downloads), strict=True))
            finally:
                # After an error, the others would go on.
                for download in downloads:
                    download.cancel()
        account.hold(answer_bytes)
        reads, truncated = await account.run(self._threads, self._read, items, files, account)
        work = Work(tuple(reads), tuple(pairs), scoring)
        account.submitted = True
        values = await self.batcher.submit(work, model.cost(work), account.lease())
        if not values.isfinite().all():
            raise NonFiniteError(
                "the results are not finite; the weights may need a wider dtype: use fp32"
            )
        images = model.config.num_image_tokens
        tokens = sum(images if isinstance(each, Picture) else len(each) for each in reads)
        return values, {
            "id": uuid.uuid4().hex, "model": model.name, "scoring": scoring,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "truncated": truncated or None,
            "warning": "THE WEIGHTS ARE RANDOM: these results mean nothing" if model.random else None,
        }  # fmt: skip

    def _scoring(self, items: Items, pairs: Sequence[tuple[int, int]]) -> Rank:
        """The score of all pairs; raises where they need different ones or the model lacks the head."""
        is_text = [item.text is not None for _, item in items]
        mixed = {is_text[a] != is_text[b] for a, b in pairs}
        if len(mixed) > 1:
            raise Problem(
                422,
                "pairs of a text with an image, and pairs of one kind, have different scores; send two requests",
            )
        scoring: Rank = self.model.rank if mixed == {True} else "similarity"
        for head, unneeded in (("matching", "similarity"), ("contrastive", "match")):
            if scoring != unneeded and head not in self.model.heads:
                raise UnavailableError(
                    f"model {self.model.name!r} has no {head} head; serve one that has it"
                )
        return scoring

    def _read(
        self, items: Items, files: Mapping[str, bytes], account: Account
    ) -> tuple[list[Read], list[str]]:
        """Return inputs of the model, and names of truncated texts; runs in a thread. `files` are downloaded images."""
        reads, truncated, most = list[Read](), list[str](), self.options.max_characters
        for name, item in items:
            account.check()
            if item.text is None:
                content = files[name] if name in files else decode_base64(item.image or "", name)
                content, peak = check_image(content, name, account)
                reads.append(self.model.read_image(content, name, peak, lambda: not account.ended))
            elif len(item.text) > most:
                message = f"{name} has {len(item.text):,} characters, over the limit of {most:,} (--max-characters)"
                raise Problem(422, f"{message}; shorten it")
            else:
                ids, whole = self.model.read_text(item.text, name)
                reads.append(ids)
                if not whole:
                    truncated.append(name)
        return reads, truncated


def _json(answer: schema.Answer) -> Response:
    headers = {"x-truncated-inputs": str(len(answer.truncated))} if answer.truncated else {}
    return Response(
        answer.model_dump_json(exclude_none=True), headers=headers, media_type="application/json"
    )


async def _respond_to_error(request: Request, error: Exception) -> Response:
    match error:
        case Problem():
            problem = error
        case HTTPException():
            message = f"{request.method} {request.url.path[:100]}: {error.detail}; see /docs for what is served"
            problem = Problem(error.status_code, message, error.headers)
        case RequestValidationError():
            first = error.errors()[0]
            # FastAPI's frame names the error, and its traceback that frame, and so the body: until a collection.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            place = "".join(
                f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:]
            )
            if first["type"] == "json_invalid":
                problem = Problem(
                    400, f"the body is not valid JSON ({first['ctx']['error']} at {place})"
                )
            else:
                problem = Problem(422, f"{place.lstrip('.') or 'the body'}: {advice(first)}")
        case DataError() | InputError() | UnavailableError():
            problem = Problem(422, str(error))
        case XFMError():
            problem = Problem(500, str(error))
        case MemoryError():
            problem = Problem(503, "there is no memory left for this request; ask again later")
        case _:
            text = " ".join(str(error).split())[:200]
            problem = Problem(
                500, f"internal error, {type(error).__name__}: {text}; please report it"
            )
    return problem.response()


class _Gate:
    """ASGI middleware: the limits of requests, before FastAPI parses a body, and the count of responses."""

    def __init__(self, service: Service, app: FastAPI, metrics: Metrics) -> None:
        self._service, self._options, self._app, self._metrics = (
            service,
            service.options,
            app,
            metrics,
        )
        self._paths = {getattr(route, "path", "") for route in app.routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # 499: the client left before its response.
        started, status, headers = time.perf_counter(), 499, Headers(scope=scope)

        async def count(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-content-type-options", b"nosniff")],
                }
            await send(message)

        try:
            self._check_head(headers, scope["path"])
            if scope["method"] == "POST":
                await self._bounded(scope, headers, receive, count)
            else:
                await self._app(scope, receive, count)
        except (Problem, MemoryError) as error:
            if status == 499:
                response = await _respond_to_error(Request(scope), error)
                await response(scope, receive, count)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)

    def _check_head(self, headers: Headers, path: str) -> None:
        """Raise `Problem` 403 for a request of another site, and 401 for one without the key."""
        # DNS rebinding: a web page may resolve its own name to this machine and speak for the browser's user.
        host = headers.get("host", "localhost")
        parts = _HOST.fullmatch(host)
        if self._options.loopback and (
            parts is None or not is_loopback(parts[1] or parts[2] or "")
        ):
            raise Problem(
                403,
                f"host {host[:100]!r} is not this machine, and the service listens on loopback only",
            )
        key = self._options.api_key
        scheme, _, given = headers.get("authorization", "").partition(" ")
        known = scheme.lower() == "bearer" and secrets.compare_digest(
            given.strip().encode(), (key or "").encode()
        )
        if key is not None and path not in _OPEN and not known:
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            raise Problem(401, message, {"www-authenticate": "Bearer"})

    async def _bounded(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        """Answer a request within its limits of memory and time; drop it once its client has left."""
        active, seconds = self._service.active, self._options.timeout
        self._check_queue()
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            # Browsers send JSON to other sites only where CORS permits it, and this service never does.
            raise Problem(
                415, f"content-type is {content_type[:60] or 'missing'!r}; send application/json"
            )
        account = Account(self._service.ledger, self._options)
        # Arguments: an exception that its own frame names would keep all that the frame holds until a collection.
        late = (
            408,
            f"the body did not arrive within {seconds:g} s; send it faster",
            {"connection": "close"},
        )
        tasks: list[asyncio.Future[Any]] = []
        try:
            async with asyncio.timeout(seconds) as deadline:
                stream = Request(scope, receive).stream()
                bodies = [
                    await account.read(stream, lambda: deadline.expired() or deadline.reschedule(0))
                ]
                self._check_queue()
                active.add(account)
                late = (
                    504,
                    f"no answer within {seconds:g} s; ask for less, or later",
                    {"retry-after": "5"},
                )

                async def replay() -> Message:
                    return (
                        {"type": "http.request", "body": bodies.pop()}
                        if bodies
                        else {"type": "http.disconnect"}
                    )

                async def deliver(message: Message) -> None:
                    if message["type"] == "http.response.start":
                        active.discard(account)
                        if not deadline.expired():
                            # `Connection` drops a client that does not read; this is for servers that do not.
                            deadline.reschedule(asyncio.get_running_loop().time() + seconds + 1)
                    elif not message.get("more_body"):
                        await send({**message, "more_body": True})
                        # A server takes this when it has sent the rest: until then, the answer is held.
                        message = {"type": "http.response.body"}
                    await send(message)

                scope.setdefault("state", {})["account"] = account
                MAX_INPUTS.set(self._options.max_inputs)
                tasks += map(
                    asyncio.ensure_future, (self._app(scope, replay, deliver), _disconnect(receive))
                )
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if tasks[0].done():
                    await tasks[0]
        except TimeoutError:
            account.check()
            raise Problem(*late) from None
        except ClientDisconnect:
            pass
        finally:
            active.discard(account)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # Servers keep the scope of an idle connection, and a task its exception, whose frames name the task.
            scope.get("state", {}).pop("account", None)
            tasks.clear()
            account.close()

    def _check_queue(self) -> None:
        most = self._options.max_queue
        if len(self._service.active) >= most:
            raise Problem(
                429, f"{most} requests in flight; ask again in a second", {"retry-after": "1"}
            )


async def _disconnect(receive: Receive) -> None:
    """Return when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Metrics(CollectorRegistry):
    """Prometheus metrics of a service."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
        counts, tokens = [1 << n for n in range(8)], [64 * 4**n for n in range(7)]
        self.requests = Counter(
            "xfm_requests", "Requests answered.", ("path", "status"), registry=self
        )
        self.seconds = Histogram(
            "xfm_request_seconds", "From head to answer.", ("path",), registry=self, buckets=seconds
        )
        self.pieces = Histogram(
            "xfm_batch_requests", "Requests computed together.", registry=self, buckets=counts
        )
        self.tokens = Histogram(
            "xfm_batch_tokens", "Tokens computed together.", registry=self, buckets=tokens
        )
        for name, meaning, read in (
            (
                "xfm_queue_requests",
                "Requests that wait for the model.",
                lambda: len(service.batcher),
            ),
            (
                "xfm_active_requests",
                "Requests in flight, waiting ones included.",
                lambda: len(service.active),
            ),
            ("xfm_request_bytes", "Memory that requests hold.", lambda: service.ledger.used),
            (
                "xfm_cache_bytes",
                "Bytes of cached image memories.",
                lambda: service.model.ranker.cache.nbytes,
            ),
            ("xfm_process_resident_bytes", "Memory of the process.", resident_bytes),
        ):
            Gauge(name, meaning, registry=self).set_function(read)

    def observe_batch(self, requests: int, tokens: int) -> None:
        """Count a batch."""
        self.pieces.observe(requests)
        self.tokens.observe(tokens)
