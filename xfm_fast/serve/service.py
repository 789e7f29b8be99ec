"""The service: its addresses, its limits, and the way of a request through it."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xfm_fast.errors import InputError, XFMError
from xfm_fast.serve.batching import Batcher
from xfm_fast.serve.budget import COPIES, Budget, Memory
from xfm_fast.serve.documentation import openapi, page
from xfm_fast.serve.metrics import CONTENT_TYPE, Metrics
from xfm_fast.serve.model import Found, ServedModel, Work
from xfm_fast.serve.options import ServiceOptions
from xfm_fast.serve.problem import Problem
from xfm_fast.serve.requests import Prepared, Reader

_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::\d*)?")
# For work that cannot be interrupted, at the end of the process.
_LAST_SECONDS = 0.5
# Addresses that need no key: what a supervisor asks.
_OPEN = ("/health", "/ready")


class Service:
    """A model behind an ASGI application.

    Args:
        model: what answers.
        options: see `ServiceOptions`.

    Attributes:
        app: the application.
        draining: no longer ready, since the process is about to end.
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
        budget = options.batch_tokens or model.default_budget
        self.batcher: Batcher[Work, Found] = Batcher(
            model.answer, budget, options.batch_wait_ms / 1e3,
            coming=lambda: self._reading, seen=lambda pieces, cost: self.metrics.batch(pieces, cost),
        )  # fmt: skip
        self.metrics = Metrics(model, self.batcher.__len__, lambda: len(self._budgets))
        # Requests that only wait for images of the web must not keep others from being read.
        self._threads = ThreadPoolExecutor(32 if options.allow_urls else 8, thread_name_prefix="request")
        reader = self.reader
        posts = {
            "/v1/rerank": reader.rerank, "/v2/rerank": reader.rerank, "/rerank": reader.rerank,
            "/v1/embeddings": reader.embeddings, "/v1/score": reader.score, "/score": reader.score,
        }  # fmt: skip
        gets = {
            "/health": self._health, "/ready": self._ready, "/metrics": self._metrics, "/v1/models": self._models,
            "/openapi.json": self._openapi, "/docs": self._docs,
        }  # fmt: skip
        routes = [Route(path, self._answering(prepare), methods=["POST"]) for path, prepare in posts.items()]
        routes += [Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()]
        application = Starlette(
            routes=routes,
            exception_handlers={Problem: _problem, HTTPException: _refusal, Exception: _fault},
            lifespan=self._lifespan,
        )
        self.app: ASGIApp = _Gate(application, self, {*posts, *gets})

    def close(self, seconds: float | None = None) -> None:
        """End the threads when what waits is done; wait for that so many seconds at most."""
        self.batcher.close(seconds)
        self.reader.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def stop(self) -> None:
        """Answer the requests in work with 503; in the thread of their event loop."""
        self.draining = True
        for budget in [*self._budgets]:
            budget.end(_ending())

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.close, _LAST_SECONDS)

    def check(self, headers: Headers, path: str) -> None:
        """Refuse a request by its head: another site's, or one without the key.

        Raises:
            Problem: 403 or 401.
        """
        # A page of the web can have its name resolved to this machine, and would then speak for the browser's user.
        if self.options.loopback and not _is_local(headers.get("host", "localhost")):
            raise Problem(
                403, f"host {headers['host'][:100]!r} is not this machine, to which alone the service listens"
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

    def _answering(self, prepare: Callable[[Budget], Prepared]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            most = self.options.max_queue
            if self.draining:
                raise _ending()
            if len(self._budgets) >= most:
                raise Problem(429, f"{most} requests are in work; ask again in a second", {"retry-after": "1"})
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
                # Nobody is there to read it.
                return Response(status_code=499)
            finally:
                alarm.cancel()
                self._budgets.discard(budget)
                budget.close()

        return endpoint

    async def _answer(self, request: Request, prepare: Callable[[Budget], Prepared], budget: Budget) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Browsers send JSON across sites only where a service says that they may, and this one never does.
            raise Problem(415, f"content-type is {kind[:60] or 'missing'!r}; send application/json")
        with ExitStack() as ends:
            self._reading += 1
            try:
                await self._body(request, budget)
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

    async def _body(self, request: Request, budget: Budget) -> None:
        """Read the body into the budget; raises `Problem` when it is too large or too slow."""
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

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(openapi(secured=self.options.api_key is not None))

    async def _docs(self, request: Request) -> Response:
        return HTMLResponse(page(openapi(secured=self.options.api_key is not None), self.model.name))


class _Gate:
    """Looks at the head of every request, and counts all answers."""

    def __init__(self, app: ASGIApp, service: Service, paths: set[str]) -> None:
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def counted(message: Message) -> None:
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
                await _told(problem)(scope, receive, counted)
                return
            await self._app(scope, receive, counted)
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
    """End the request when its client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    budget.end(ClientDisconnect())


def _ending() -> Problem:
    return Problem(503, "the service is about to end; ask another one", {"connection": "close"})


def _told(problem: Problem) -> JSONResponse:
    return JSONResponse(problem.content(), problem.status, problem.headers)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return _told(error)


async def _refusal(request: Request, error: Exception) -> Response:
    """Addresses and methods that there are not."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    message = f"{request.method} {path} is not served; see /docs for what is"
    return _told(Problem(error.status_code, message, dict(error.headers or {})))


async def _fault(request: Request, error: Exception) -> Response:
    said: Any = " ".join(str(error).split())[:200]
    return _told(Problem(500, f"this is a fault of xfm-fast, {type(error).__name__}: {said}; please report it"))
