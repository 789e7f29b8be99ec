"""The HTTP application: endpoints, limits, metrics, and the path of a request to the model and back."""

from __future__ import annotations

import asyncio
import base64
import re
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
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
from xfm_fast.serve.model import Input, ServedModel, Work
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

# Bytes of a feature's number in the response, as a value and as text; and copies of documents that
# are returned.
_NUMBER_BYTES, _ECHO_COPIES = 128, 3
# Default tokens of a batch.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
_SOON, _LATER, _CLOSE = {"retry-after": "1"}, {"retry-after": "5"}, {"connection": "close"}
_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::\d*)?")
# Paths without a key: probes of a supervisor.
_OPEN_PATHS = ("/health", "/ready")

Items = Sequence[tuple[str, Item]]
"""Items of a request, with their names in errors."""


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
        # Requests between the arrival of the body and the response.
        self.active: set[Account] = set()
        metrics = Metrics(self)
        device = "cpu" if model.device.type == "cpu" else "cuda"
        self.batcher = Batcher(
            model.answer,
            options.batch_tokens or _BATCH_TOKENS[device],
            coming=lambda: sum(not account.submitted for account in self.active),
            observe=metrics.observe_batch,
        )
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="request")
        self._web = web_client() if options.allow_urls else None
        self.app: ASGIApp = _Gate(self, self._application(metrics), metrics)

    def close(self) -> None:
        """End the threads after their current work."""
        self.batcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _application(self, metrics: Metrics) -> FastAPI:
        # `_Gate` checks the key before routing; this documents it.
        key = [] if self.options.api_key is None else [Security(HTTPBearer(auto_error=False))]
        errors = (HTTPException, RequestValidationError, XFMError, MemoryError, Exception)
        app = FastAPI(
            title="xfm-fast",
            version=__version__,
            description="X-FM ranks and embeds texts and images.",
            dependencies=key,
            redoc_url=None,
            swagger_ui_oauth2_redirect_url=None,
            separate_input_output_schemas=False,
            responses={status: {"model": schema.ErrorAnswer} for status in ("4XX", "5XX")},
            exception_handlers=dict.fromkeys(errors, _respond_to_error),
        )
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
            description = {
                "id": model.name,
                "object": "model",
                "created": 0,
                "owned_by": "xfm-fast",
                "heads": model.heads,
                "dimensions": model.config.embed_dim,
                "random_weights": model.random,
            }
            return {"object": "list", "data": [description]}

        @app.get("/metrics", response_model=None)
        async def read_metrics() -> Response:
            return Response(generate_latest(metrics), media_type="text/plain; version=0.0.4")

        return app

    async def rerank(self, request: Request, body: RerankRequest) -> Response:
        """Order documents by their relevance to a query.

        The fusion encoder compares a text with an image: `relevance_score` is the probability that
        the text describes the image; with `--rank` it is the cosine similarity or match logit +
        cosine. Two texts, or two images, are compared by their features: cosine similarity, mapped
        from [-1, 1] to [0, 1]. All documents are of one kind, because the two scores are not
        comparable.
        """
        items = {"query": [body.query], "documents": body.documents}
        pairs = [(0, index) for index in range(1, 1 + len(body.documents))]
        answer_bytes = _ECHO_COPIES * request.state.account.received if body.return_documents else 0
        scores, fields = await self._compute(request, body, items, pairs, answer_bytes)
        values, results = scores.tolist(), []
        for index in scores.argsort(descending=True, stable=True).tolist()[: body.top_n]:
            result = schema.Ranked(index=index, relevance_score=values[index])
            if body.return_documents:
                result.document = body.documents[index].model_dump(exclude_none=True)
            results.append(result)
        return _json(schema.RerankAnswer(**fields, results=results))

    async def embeddings(self, request: Request, body: EmbeddingsRequest) -> Response:
        """Embed texts and images: L2-normalised features; their dot products are cosine similarities."""
        size = self.model.config.embed_dim
        if body.dimensions not in (None, size):
            raise Problem(
                422,
                f"dimensions={body.dimensions}, but features of this model have {size}; leave it out",
            )
        items = {"input": body.input}
        answer_bytes = _NUMBER_BYTES * size * len(body.input)
        features, fields = await self._compute(request, body, items, (), answer_bytes)
        data = []
        for index, row in enumerate(features.numpy().astype("<f4")):
            if body.encoding_format == "base64":
                embedding = base64.b64encode(row.tobytes()).decode()
            else:
                embedding = row.tolist()
            data.append(schema.Embedding(index=index, embedding=embedding))
        return _json(schema.EmbeddingsAnswer(**fields, data=data))

    async def score(self, request: Request, body: ScoreRequest) -> Response:
        """Score pairs like documents of a rerank request: one item with many, or two lists of equal length."""
        first, second = len(body.text_1), len(body.text_2)
        if first not in (1, second):
            raise Problem(
                422,
                f"text_1 has {first} items and text_2 {second}; give one in text_1, or lists of equal length",
            )
        items = {"text_1": body.text_1, "text_2": body.text_2}
        pairs = [(index if first > 1 else 0, first + index) for index in range(second)]
        scores, fields = await self._compute(request, body, items, pairs)
        data = [
            schema.Score(index=index, score=score) for index, score in enumerate(scores.tolist())
        ]
        return _json(schema.ScoreAnswer(**fields, created=int(time.time()), data=data))

    async def _compute(
        self,
        request: Request,
        body: schema.Body,
        lists: dict[str, list[Item]],
        pairs: Sequence[tuple[int, int]],
        answer_bytes: int = 0,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Compute scores `[pairs]`, or without pairs features `[items, embed_dim]`, and common fields of answers."""
        model, account, files = self.model, request.state.account, dict[str, bytes]()
        if body.model not in (None, model.name):
            raise Problem(
                404, f"model {body.model!r} is not served here; use {model.name!r}, or leave it out"
            )
        items = [
            (f"{name}[{index}]", item) for name in lists for index, item in enumerate(lists[name])
        ]
        scoring = self._choose_scoring(items, pairs)
        if self._web is not None:
            urls = {name: item.image for name, item in items if item.image and is_url(item.image)}
            downloads = [
                asyncio.ensure_future(fetch(self._web, url, account)) for url in urls.values()
            ]
            try:
                files = dict(zip(urls, await asyncio.gather(*downloads), strict=True))
            finally:
                # After an error, the other downloads would go on.
                for download in downloads:
                    download.cancel()
        account.hold(answer_bytes)
        inputs, truncated = await account.run(self._threads, self._read, items, files, account)
        work = Work(tuple(inputs), tuple(pairs), scoring)
        account.submitted = True
        values = await self.batcher.submit(work, model.cost(work), account.lease())
        if not values.isfinite().all():
            raise NonFiniteError(
                "the results are not finite; the weights may need a wider dtype: use fp32"
            )
        images = [item for item in inputs if isinstance(item, Picture)]
        tokens = len(images) * model.config.num_image_tokens
        tokens += sum(len(item) for item in inputs if not isinstance(item, Picture))
        fields: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "model": model.name,
            "scoring": scoring,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        if truncated:
            fields["truncated"] = truncated
        if model.random:
            fields["warning"] = "THE WEIGHTS ARE RANDOM: these results mean nothing"
        return values, fields

    def _choose_scoring(self, items: Items, pairs: Sequence[tuple[int, int]]) -> Rank:
        """Return the score of all pairs; raises if they need different ones or the model lacks the head."""
        is_text = [item.text is not None for _, item in items]
        mixed = {is_text[a] != is_text[b] for a, b in pairs}
        if len(mixed) > 1:
            raise Problem(
                422,
                "text-image pairs and pairs of one modality have different scores; send two requests",
            )
        scoring: Rank = self.model.rank if mixed == {True} else "similarity"
        heads = {"matching"} if scoring == "match" else {"contrastive"}
        if scoring == "sum":
            heads.add("matching")
        for head in sorted(heads - {*self.model.heads}):
            raise UnavailableError(
                f"model {self.model.name!r} has no {head} head; serve one that has it"
            )
        return scoring

    def _read(
        self, items: Items, files: Mapping[str, bytes], account: Account
    ) -> tuple[list[Input], list[str]]:
        """Make the inputs of the model, and list truncated texts; runs in a thread. `files` are downloaded images."""
        inputs, truncated, limit = list[Input](), list[str](), self.options.max_characters
        for name, item in items:
            account.check()
            if item.text is None:
                content = files[name] if name in files else decode_base64(item.image or "", name)
                content, peak = check_image(content, name, account)
                inputs.append(self.model.read_image(content, name, peak, lambda: not account.ended))
                continue
            if len(item.text) > limit:
                raise Problem(
                    422,
                    f"{name} has {len(item.text):,} characters, over the limit of {limit:,} (--max-characters); "
                    "shorten it",
                )
            ids, complete = self.model.read_text(item.text, name)
            inputs.append(ids)
            if not complete:
                truncated.append(name)
        return inputs, truncated


def _json(answer: schema.Answer) -> Response:
    headers = {"x-truncated-inputs": str(len(answer.truncated))} if answer.truncated else {}
    return Response(
        answer.model_dump_json(exclude_none=True), headers=headers, media_type="application/json"
    )


async def _respond_to_error(request: Request, error: Exception) -> Response:
    """Convert an exception to an error response."""
    match error:
        case Problem():
            problem = error
        case HTTPException():
            message = f"{request.method} {request.url.path[:100]}: {error.detail}; see /docs for what is served"
            problem = Problem(error.status_code, message, error.headers)
        case RequestValidationError():
            first = error.errors()[0]
            # Break a reference cycle of FastAPI's frame, the error and its traceback, which would
            # keep the body.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            path = ""
            for key in first["loc"][1:]:
                path += f"[{key}]" if isinstance(key, int) else f".{key}"
            if first["type"] == "json_invalid":
                message = f"the body is not valid JSON ({first['ctx']['error']} at {path})"
                problem = Problem(400, message)
            else:
                problem = Problem(422, f"{path.lstrip('.') or 'the body'}: {advice(first)}")
        case DataError() | InputError() | UnavailableError():
            problem = Problem(422, str(error))
        case XFMError():
            problem = Problem(500, str(error))
        case MemoryError():
            problem = Problem(503, "there is no memory left for this request; ask again later")
        case _:
            text = " ".join(str(error).split())[:200]
            message = f"internal error, {type(error).__name__}: {text}; please report it"
            problem = Problem(500, message)
    return problem.response()


class _Gate:
    """ASGI middleware that limits requests before FastAPI parses a body, and counts responses."""

    def __init__(self, service: Service, app: FastAPI, metrics: Metrics) -> None:
        self._service, self._options = service, service.options
        self._loopback = self._options.loopback
        self._app, self._metrics = app, metrics
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
                headers = [*message["headers"], (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": headers}
            await send(message)

        try:
            self._check_head(headers, scope["path"])
            if scope["method"] == "POST":
                await self._answer_within_limits(scope, headers, receive, count)
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
        if self._loopback:
            # DNS rebinding: a web page may resolve its own name to this machine and speak for the
            # browser's user.
            host = headers.get("host", "localhost")
            match = _HOST.fullmatch(host)
            if match is None or not is_loopback(match[1] or match[2] or ""):
                raise Problem(
                    403,
                    f"host {host[:100]!r} is not this machine, and the service listens on loopback only",
                )
        key = self._options.api_key
        if key is None or path in _OPEN_PATHS:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        matches = secrets.compare_digest(token.strip().encode(), key.encode())
        if scheme.lower() != "bearer" or not matches:
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            raise Problem(401, message, {"www-authenticate": "Bearer"})

    async def _answer_within_limits(
        self, scope: Scope, headers: Headers, receive: Receive, send: Send
    ) -> None:
        """Answer a request within its limits of memory and time; drop it once its client has left."""
        active, seconds = self._service.active, self._options.timeout
        self._check_queue()
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            # Browsers send JSON to other sites only where CORS permits it, and this service never
            # does.
            raise Problem(
                415, f"content-type is {content_type[:60] or 'missing'!r}; send application/json"
            )
        account = Account(self._service.ledger, self._options.max_body_bytes, seconds)
        # Arguments of the `Problem` once time is over. An exception would keep its frame, and so
        # the body, alive.
        late = 408, f"the body did not arrive within {seconds:g} s; send it faster", _CLOSE
        tasks: list[asyncio.Future[Any]] = []
        try:
            async with asyncio.timeout(seconds) as deadline:
                stream = Request(scope, receive).stream()

                def expire() -> None:
                    if not deadline.expired():
                        deadline.reschedule(0)

                bodies = [await account.read(stream, expire)]
                self._check_queue()
                active.add(account)
                late = 504, f"no answer within {seconds:g} s; ask for less, or later", _LATER

                async def replay() -> Message:
                    if bodies:
                        return {"type": "http.request", "body": bodies.pop()}
                    return {"type": "http.disconnect"}

                async def deliver(message: Message) -> None:
                    if message["type"] == "http.response.start":
                        active.discard(account)
                        if not deadline.expired():
                            # `Connection` drops a client that does not read; this is for servers
                            # that do not.
                            deadline.reschedule(asyncio.get_running_loop().time() + seconds + 1)
                    elif not message.get("more_body"):
                        await send({**message, "more_body": True})
                        # The server takes this message once the answer is sent, which is held until
                        # then.
                        message = {"type": "http.response.body"}
                    await send(message)

                scope.setdefault("state", {})["account"] = account
                MAX_INPUTS.set(self._options.max_inputs)
                tasks.append(asyncio.ensure_future(self._app(scope, replay, deliver)))
                tasks.append(asyncio.ensure_future(_wait_for_disconnect(receive)))
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
            # Servers keep the scope of an idle connection, and a task's exception refers to the
            # task.
            scope.get("state", {}).pop("account", None)
            tasks.clear()
            account.close()

    def _check_queue(self) -> None:
        limit = self._options.max_queue
        if len(self._service.active) >= limit:
            raise Problem(429, f"{limit} requests in flight; ask again in a second", _SOON)


async def _wait_for_disconnect(receive: Receive) -> None:
    """Return when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Metrics(CollectorRegistry):
    """Prometheus metrics of a service."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
        self.requests = Counter(
            "xfm_requests", "Requests answered.", ("path", "status"), registry=self
        )
        self.seconds = Histogram(
            "xfm_request_seconds", "From head to answer.", ("path",), registry=self, buckets=seconds
        )
        counts = [1 << n for n in range(8)]
        self.pieces = Histogram(
            "xfm_batch_requests", "Requests computed together.", registry=self, buckets=counts
        )
        tokens = [64 * 4**n for n in range(7)]
        self.tokens = Histogram(
            "xfm_batch_tokens", "Tokens computed together.", registry=self, buckets=tokens
        )

        def gauge(name: str, description: str, read: Callable[[], float]) -> None:
            Gauge(name, description, registry=self).set_function(read)

        cache = service.model.ranker.cache
        gauge("xfm_queue_requests", "Requests waiting for the model.", lambda: len(service.batcher))
        gauge(
            "xfm_active_requests",
            "Requests in flight, waiting ones included.",
            lambda: len(service.active),
        )
        gauge("xfm_request_bytes", "Memory that requests hold.", lambda: service.ledger.used)
        gauge("xfm_cache_bytes", "Bytes of cached image memories.", lambda: cache.nbytes)
        gauge("xfm_process_resident_bytes", "Memory of the process.", resident_bytes)

    def observe_batch(self, requests: int, tokens: int) -> None:
        """Count a batch."""
        self.pieces.observe(requests)
        self.tokens.observe(tokens)
