"""The HTTP application: endpoints, limits, and the path of a request to the model and back."""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from pydantic.json_schema import models_json_schema
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xfm_fast import __version__
from xfm_fast.errors import InputError, XFMError
from xfm_fast.serve.batching import Batcher
from xfm_fast.serve.budget import COPIES, Budget, Memory
from xfm_fast.serve.metrics import CONTENT_TYPE, Metrics
from xfm_fast.serve.model import Found, ServedModel, Work
from xfm_fast.serve.options import ServiceOptions
from xfm_fast.serve.problem import Problem
from xfm_fast.serve.requests import Prepared, Reader
from xfm_fast.serve.schema import (
    EmbeddingsAnswer,
    EmbeddingsRequest,
    ErrorAnswer,
    RerankAnswer,
    RerankRequest,
    ScoreAnswer,
    ScoreRequest,
)

_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::\d*)?")
# For threads that cannot be interrupted, at the end of the process.
_LAST_SECONDS = 0.5
# Paths that need no key: probes of a supervisor.
_OPEN = ("/health", "/ready")
_SCHEMAS = "#/components/schemas/"
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """FastAPI's description, with the models of the bodies, which endpoints bound before they parse them."""
        document = super().openapi()
        _, models = models_json_schema(
            [(kind, "validation") for kind in (RerankRequest, EmbeddingsRequest, ScoreRequest)],
            ref_template=f"{_SCHEMAS}{{model}}",
        )
        document["components"]["schemas"] |= models["$defs"]
        return document


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
        self.reader = Reader(model, options)
        self.batcher: Batcher[Work, Found] = Batcher(
            model.answer, options.batch_tokens or model.default_budget, options.batch_wait_ms / 1e3,
            coming=lambda: self._reading, seen=lambda pieces, cost: self.metrics.batch(pieces, cost),
        )  # fmt: skip
        self.metrics = Metrics(model, self.batcher.__len__, lambda: len(self._budgets))
        # Downloads of images must not keep other requests from being read.
        self._threads = ThreadPoolExecutor(32 if options.allow_urls else 8, thread_name_prefix="request")
        application = self._application()
        paths = {getattr(route, "path", "") for route in application.routes}
        self.app: ASGIApp = _Gate(application, self, paths)

    def close(self, seconds: float | None = None) -> None:
        """End the threads after the queued work, waiting at most this long."""
        self.batcher.close(seconds)
        self.reader.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def stop(self) -> None:
        """Answer the requests in flight with 503; called in the thread of their event loop."""
        self.draining = True
        for budget in [*self._budgets]:
            budget.end(_ending())

    def check(self, headers: Headers, path: str) -> None:
        """Raise `Problem` 403 for a request of another site, and 401 for one without the key."""
        # DNS rebinding: a web page may resolve its own name to this machine and speak for the browser's user.
        if self.options.loopback and not _is_local(headers.get("host", "localhost")):
            raise Problem(
                403, f"host {headers['host'][:100]!r} is not this machine, and the service listens on loopback only"
            )
        key = self.options.api_key
        if key is None or path in _OPEN:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode(), key.encode()):
            raise Problem(
                401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                {"www-authenticate": "Bearer"},
            )  # fmt: skip

    def _application(self) -> FastAPI:
        # `_Gate` checks the key, before routing; this only describes it.
        key = [Security(HTTPBearer(auto_error=False))] if self.options.api_key is not None else []
        application = _Application(
            title="xfm-fast", version=__version__, description="X-FM ranks and embeds texts and images.",
            dependencies=key, redoc_url=None, swagger_ui_oauth2_redirect_url=None, separate_input_output_schemas=False,
            exception_handlers={HTTPException: _refuse, Exception: _report}, lifespan=self._lifespan,
        )  # fmt: skip
        reader = self.reader
        for prepare, kind, answer, paths in (
            (reader.rerank, RerankRequest, RerankAnswer, ("/v1/rerank", "/v2/rerank", "/rerank")),
            (reader.embeddings, EmbeddingsRequest, EmbeddingsAnswer, ("/v1/embeddings",)),
            (reader.score, ScoreRequest, ScoreAnswer, ("/v1/score", "/score")),
        ):
            content = {"application/json": {"schema": {"$ref": f"{_SCHEMAS}{kind.__name__}"}}}
            for path in paths:
                application.add_api_route(
                    path, self._endpoint(prepare), methods=["POST"], name=prepare.__name__,
                    description=inspect.getdoc(kind), response_model=answer, responses=_ERRORS,
                    openapi_extra={"requestBody": {"required": True, "content": content}},
                )  # fmt: skip
        for path, endpoint, response in (
            ("/health", self._health, JSONResponse),
            ("/ready", self._ready, JSONResponse),
            ("/v1/models", self._models, JSONResponse),
            ("/metrics", self._metrics, PlainTextResponse),
        ):
            application.add_api_route(
                path, endpoint, methods=["GET"], name=path.rpartition("/")[2], response_class=response
            )
            application.add_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
        return application

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.close, _LAST_SECONDS)

    def _endpoint(self, prepare: Callable[[Budget], Prepared]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            most = self.options.max_queue
            if self.draining:
                raise _ending()
            if len(self._budgets) >= most:
                raise Problem(429, f"{most} requests in flight; ask again in a second", {"retry-after": "1"})
            task = asyncio.current_task()
            assert task is not None
            budget = Budget(self.memory, self.options, task)
            self._budgets.add(budget)
            timeout = self.options.timeout
            alarm = asyncio.get_running_loop().call_later(timeout, budget.end, Problem.late(timeout))
            try:
                return await self._answer(request, prepare, budget)
            except asyncio.CancelledError:
                if budget.ending is None:
                    raise
                task.uncancel()
                if isinstance(budget.ending, ClientDisconnect):
                    return Response(status_code=499)
                raise budget.ending from None
            except XFMError as error:
                raise Problem.of(error) from error
            except MemoryError:
                raise Problem(503, "there is no memory left for this request; ask again later") from None
            except ClientDisconnect:
                return Response(status_code=499)
            finally:
                alarm.cancel()
                self._budgets.discard(budget)
                budget.close()

        return endpoint

    async def _answer(self, request: Request, prepare: Callable[[Budget], Prepared], budget: Budget) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Browsers send JSON to other sites only where CORS permits it, and this service never does.
            raise Problem(415, f"content-type is {kind[:60] or 'missing'!r}; send application/json")
        with ExitStack() as ends:
            self._reading += 1
            try:
                await self._read_body(request, budget)
                ends.callback(asyncio.ensure_future(_watch(request, budget)).cancel)
                prepared = await budget.run(self._threads, prepare, budget)
            finally:
                self._reading -= 1
            found = await self.batcher.submit(prepared.work, self.model.cost(prepared.work))
            if prepared.work.queries:
                reused = sum(int(ranking.reused.sum()) for ranking in found.rankings)
                images = sum(len(ranking.reused) for ranking in found.rankings)
                self.metrics.images(reused, images - reused)
            content = await budget.run(self._threads, lambda: prepared.finish(found).model_dump_json(exclude_none=True))
        return Response(content, media_type="application/json")

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

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.model.name, "random_weights": self.model.random})

    async def _ready(self, request: Request) -> Response:
        if self.draining:
            raise _ending()
        return JSONResponse({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _models(self, request: Request) -> Response:
        model = self.model
        facts = {"id": model.name, "object": "model", "created": 0, "owned_by": "xfm-fast"}
        more = {"heads": model.heads, "dimensions": model.config.embed_dim, "random_weights": model.random}
        return JSONResponse({"object": "list", "data": [facts | more]})


class _Gate:
    """Checks the head of every request, and counts all responses."""

    def __init__(self, app: ASGIApp, service: Service, paths: set[str]) -> None:
        self._app, self._service, self._paths = app, service, paths

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

        path = scope["path"] if scope["path"] in self._paths else "other"
        try:
            try:
                self._service.check(Headers(scope=scope), scope["path"])
            except Problem as problem:
                await problem.response()(scope, receive, count)
                return
            await self._app(scope, receive, count)
        finally:
            self._service.metrics.answered(path, status, time.perf_counter() - started)


def _is_local(host: str) -> bool:
    parts = _HOST.fullmatch(host)
    if parts is None:
        return False
    name = parts[2] if parts[1] is None else parts[1]
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def _watch(request: Request, budget: Budget) -> None:
    """End the request when its client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    budget.end(ClientDisconnect())


def _ending() -> Problem:
    return Problem(503, "the service is about to end; ask another one", {"connection": "close"})


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, Problem):
        return error.response()
    message = f"{request.method} {request.url.path[:100]} is not served; see /docs for what is"
    return Problem(error.status_code, message, error.headers).response()


async def _report(request: Request, error: Exception) -> Response:
    text = " ".join(str(error).split())[:200]
    return Problem(500, f"internal error, {type(error).__name__}: {text}; please report it").response()
