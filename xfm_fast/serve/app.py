"""The HTTP application: limits of requests, errors and metrics."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xfm_fast import __version__
from xfm_fast.errors import DataError, InputError, UnavailableError, XFMError
from xfm_fast.io import advice
from xfm_fast.memory import resident_bytes
from xfm_fast.serve import schema
from xfm_fast.serve.model import ServedModel, TooLongError
from xfm_fast.serve.options import ServiceOptions, is_loopback
from xfm_fast.serve.routes import TEI_PATHS, Call, Routes
from xfm_fast.serve.schema import MAX_INPUTS, Problem
from xfm_fast.serve.service import ModelService
from xfm_fast.serve.work import Account

# Bytes of an answer that may wait in the buffer of its connection, uncounted.
_SMALL_ANSWER = 1 << 14
_SOON, _LATER, _CLOSE = {"retry-after": "1"}, {"retry-after": "5"}, {"connection": "close"}
_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::\d*)?")
# Paths without a key: probes of a supervisor.
_OPEN_PATHS = ("/live", "/health", "/ready")
PAGES = {("GET", "/"), ("GET", "/search")}
"""Requests without a key for a page without data."""
PICTURE_PATH = "/search/picture/"
"""Path of requests of GET that take time and memory."""


class Service(ModelService):
    """Models as an ASGI application.

    Args:
        models: The models that answer; a request that names none gets the first that can do it.
        options: See `ServiceOptions`.
        names: The model of each name in requests. [by `ServedModel.name`]

    Attributes:
        routes: Its routes, to which others may be added.
        app: The application. It answers 503 until `warm_up`, which its first request begins.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        options: ServiceOptions,
        names: Mapping[str, ServedModel] | None = None,
    ) -> None:
        metrics = Metrics(self, models)
        super().__init__(models, options, names, metrics.observe)
        self.routes = self._application(metrics)
        self.app: ASGIApp = _Gate(self, self.routes, metrics)

    def _application(self, metrics: Metrics) -> FastAPI:
        # `_Gate` checks the key before routing; this documents it.
        key = [] if self.options.api_key is None else [Security(HTTPBearer(auto_error=False))]
        errors = (HTTPException, RequestValidationError, XFMError, MemoryError, Exception)
        app = FastAPI(
            title="xfm-fast",
            version=__version__,
            description="Models embed, compare, rank and classify texts and images.",
            dependencies=key,
            redoc_url=None,
            swagger_ui_oauth2_redirect_url=None,
            separate_input_output_schemas=False,
            responses={status: {"model": schema.ErrorAnswer} for status in ("4XX", "5XX")},
            exception_handlers=dict.fromkeys(errors, _respond_to_error),
        )
        routes = Routes(self)
        routes.add(app)
        self.calls = routes.calls

        @app.get("/metrics", response_model=None)
        async def read_metrics() -> Response:
            return Response(generate_latest(metrics), media_type="text/plain; version=0.0.4")

        return app


async def _respond_to_error(request: Request, error: Exception) -> Response:
    """Convert an exception to an error response."""
    is_tei = request.url.path in TEI_PATHS or getattr(request.state, "is_tei", False)
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
        case TooLongError():
            problem = Problem(413 if is_tei else 422, str(error))
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
    return problem.response(is_tei)


class _Gate:
    """ASGI middleware that limits requests before FastAPI parses a body, and counts responses."""

    def __init__(self, service: Service, app: FastAPI, metrics: Metrics) -> None:
        self._service, self._options = service, service.options
        self._loopback = self._options.loopback
        self._app, self._metrics = app, metrics
        self._counters: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    @cached_property
    def _paths(self) -> set[str]:
        return {getattr(route, "path", "") for route in self._app.routes}

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
            self._check_head(headers, scope)
            if not self._service.warmed_up and scope["path"] != "/live":
                self._service.warm_up()
                raise Problem(503, "the models are warming up; ask again in a second", _SOON)
            if scope["method"] == "POST" or scope["path"].startswith(PICTURE_PATH):
                await self._answer_within_limits(scope, headers, receive, count)
            else:
                await self._app(scope, receive, count)
        except (Problem, MemoryError) as error:
            if status == 499:
                response = await _respond_to_error(Request(scope), error)
                await response(scope, receive, count)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            if (path, status) not in self._counters:
                self._counters[path, status] = (
                    self._metrics.requests.labels(path, str(status)),
                    self._metrics.seconds.labels(path),
                )
            requests, seconds = self._counters[path, status]
            requests.inc()
            seconds.observe(time.perf_counter() - started)

    def _check_head(self, headers: Headers, scope: Scope) -> None:
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
        key, path = self._options.api_key, scope["path"]
        if key is None or path in _OPEN_PATHS or (scope["method"], path) in PAGES:
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
        if scope["method"] == "POST" and content_type != "application/json":
            # Browsers send JSON to other sites only where CORS permits it, and this service never
            # does.
            raise Problem(
                415, f"content-type is {content_type[:60] or 'missing'!r}; send application/json"
            )
        account = Account(self._service.ledger, self._options.max_body_bytes, seconds)
        # Arguments of the `Problem` once time is over. An exception would keep its frame, and so
        # the body, alive.
        late = 408, f"the body did not arrive within {seconds:g} s; send it faster", _CLOSE
        watch = _Watch()
        try:
            async with asyncio.timeout(seconds) as deadline:

                def expire() -> None:
                    if not deadline.expired():
                        deadline.reschedule(0)

                bodies = [await account.read(Request(scope, receive).stream(), expire)]
                self._check_queue()
                active.add(account)
                late = 504, f"no answer within {seconds:g} s; ask for less, or later", _LATER

                async def replay() -> Message:
                    if bodies:
                        return {"type": "http.request", "body": bodies.pop()}
                    return {"type": "http.disconnect"}

                async def deliver(message: Message) -> None:
                    if message["type"] == "http.response.start":
                        watch.end()
                        active.discard(account)
                        if not deadline.expired():
                            # `Connection` drops a client that does not read; this is for servers
                            # that do not.
                            deadline.reschedule(asyncio.get_running_loop().time() + seconds + 1)
                    elif not message.get("more_body") and len(message["body"]) > _SMALL_ANSWER:
                        await send({**message, "more_body": True})
                        # The server takes this message once the answer is sent, which is held until
                        # then.
                        message = {"type": "http.response.body"}
                    await send(message)

                scope.setdefault("state", {})["account"] = account
                MAX_INPUTS.set(self._options.max_inputs)
                watch.begin(receive)
                call = self._service.calls.get(scope["path"])
                if call is None:
                    await self._app(scope, replay, deliver)
                else:
                    response = await _respond(Request(scope), call, bodies)
                    await response(scope, replay, deliver)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not watch.client_left or task is None:
                raise
            task.uncancel()
        except TimeoutError:
            account.check()
            raise Problem(*late) from None
        except ClientDisconnect:
            pass
        finally:
            watch.end()
            active.discard(account)
            # Servers keep the scope of an idle connection.
            scope.get("state", {}).pop("account", None)
            account.close()

    def _check_queue(self) -> None:
        limit = self._options.max_queue
        if len(self._service.active) >= limit:
            raise Problem(429, f"{limit} requests in flight; ask again in a second", _SOON)


async def _respond(request: Request, call: Call, bodies: list[bytes]) -> Response:
    """Answer a request without FastAPI, which takes longer to do the same."""
    content = bodies.pop()
    try:
        try:
            body = call.schema.model_validate_json(content)
        except ValidationError as error:
            request.state.is_tei = request.url.path == "/rerank" and b'"texts"' in content
            errors = [{**first, "loc": ("body", *first["loc"])} for first in error.errors()[:1]]
            raise RequestValidationError(errors) from None
        finally:
            del content
        return await call.endpoint(request, body)
    except Exception as error:
        return await _respond_to_error(request, error)


class _Watch:
    """Cancels the task of a request whose client disconnects before the answer."""

    def __init__(self) -> None:
        self.client_left = False
        self._task: asyncio.Task[None] | None = None

    def begin(self, receive: Receive) -> None:
        """Begin to watch for the current task."""
        request = asyncio.current_task()
        assert request is not None
        self._task = asyncio.create_task(self._wait(receive, request))

    async def _wait(self, receive: Receive, request: asyncio.Task[Any]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.client_left = True
        request.cancel()

    def end(self) -> None:
        """End the watch."""
        if self._task is not None:
            self._task.cancel()
            self._task = None


class Metrics(CollectorRegistry):
    """Prometheus metrics of a service."""

    def __init__(self, service: Service, models: Sequence[ServedModel]) -> None:
        super().__init__()
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
        self.requests = Counter(
            "xfm_requests", "Requests answered.", ("path", "status"), registry=self
        )
        self.seconds = Histogram(
            "xfm_request_seconds", "From head to answer.", ("path",), registry=self, buckets=seconds
        )
        counts = [1 << n for n in range(8)]
        self.batches = Histogram(
            "xfm_batch_requests",
            "Requests computed together.",
            ("model",),
            registry=self,
            buckets=counts,
        )
        tokens = [64 * 4**n for n in range(7)]
        self.tokens = Histogram(
            "xfm_batch_tokens",
            "Tokens computed together.",
            ("model",),
            registry=self,
            buckets=tokens,
        )
        queue = Gauge(
            "xfm_queue_requests", "Requests waiting for the model.", ("model",), registry=self
        )
        cache = Gauge("xfm_cache_bytes", "Bytes of cached images.", ("model",), registry=self)
        for model in models:
            queue.labels(model.name).set_function(lambda model=model: len(service.batchers[model]))
            cache.labels(model.name).set_function(lambda model=model: model.cache_bytes)

        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "xfm_active_requests": (
                "Requests in flight, waiting ones included.",
                lambda: len(service.active),
            ),
            "xfm_request_bytes": ("Memory that requests hold.", lambda: service.ledger.used),
            "xfm_process_resident_bytes": ("Memory of the process.", resident_bytes),
        }
        for name, (description, measure) in gauges.items():
            Gauge(name, description, registry=self).set_function(measure)

    def observe(self, model: ServedModel, requests: int, tokens: int) -> None:
        """Count a batch of a model."""
        self.batches.labels(model.name).observe(requests)
        self.tokens.labels(model.name).observe(tokens)
