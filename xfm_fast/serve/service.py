"""The service: its addresses, its limits, and the way of a request through it."""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xfm_fast.errors import XFMError
from xfm_fast.serve.batching import Batcher
from xfm_fast.serve.documentation import openapi, page
from xfm_fast.serve.metrics import CONTENT_TYPE, Metrics
from xfm_fast.serve.model import Found, ServedModel, Work
from xfm_fast.serve.options import ServiceOptions
from xfm_fast.serve.problem import Problem
from xfm_fast.serve.requests import Prepared, Reader

# Bodies in work together, in bodies of the largest size.
_BODIES = 8
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
        self.model, self.options = model, options
        self.draining = False
        self._active = 0
        self._bytes = 0
        self._reading = 0
        self.reader = Reader(model, options)
        budget = options.batch_tokens or model.default_budget
        self.batcher: Batcher[Work, Found] = Batcher(
            model.answer, budget, options.batch_wait_ms / 1e3,
            coming=lambda: self._reading, seen=lambda pieces, cost: self.metrics.batch(pieces, cost),
        )  # fmt: skip
        self.metrics = Metrics(model, self.batcher.__len__, lambda: self._active)
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

    def close(self) -> None:
        """End the threads, when what waits is done."""
        self.batcher.close()
        self.reader.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.close)

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

    def _answering(self, prepare: Callable[[bytes, float], Prepared]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            most = self.options.max_queue
            if self.draining:
                raise Problem(503, "the service is about to end; ask another one", {"connection": "close"})
            if self._active >= most:
                raise Problem(429, f"{most} requests are in work; ask again in a second", {"retry-after": "1"})
            self._active += 1
            try:
                return await self._answer(request, prepare)
            except XFMError as error:
                raise Problem.of(error) from error
            except ClientDisconnect:
                # Nobody is there to read it.
                return Response(status_code=499)
            finally:
                self._active -= 1

        return endpoint

    async def _answer(self, request: Request, prepare: Callable[[bytes, float], Prepared]) -> Response:
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + self.options.timeout
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Browsers send JSON across sites only where a service says that they may, and this one never does.
            raise Problem(415, f"content-type is {kind[:60] or 'missing'!r}; send application/json")
        self._reading += 1
        size = 0
        try:
            try:
                body = await self._body(request)
                size = len(body)
                prepared = await loop.run_in_executor(self._threads, prepare, body, deadline)
                del body
            finally:
                self._reading -= 1
            found = await self._computed(request, prepared.work, deadline - time.monotonic())
            if prepared.work.queries:
                reused = sum(int(ranking.reused.sum()) for ranking in found.rankings)
                images = sum(len(ranking.reused) for ranking in found.rankings)
                self.metrics.images(reused, images - reused)
            content = await loop.run_in_executor(
                self._threads, lambda: prepared.finish(found).model_dump_json(exclude_none=True)
            )
        finally:
            self._bytes -= size
        return Response(content, media_type="application/json")

    async def _body(self, request: Request) -> bytes:
        """The body, whose size is counted among those in work. Raises `Problem` when it is too large or too slow."""
        most = self.options.max_body_mb << 20
        too_large = Problem(413, f"the body has more than {most:,} bytes; shrink the images, or send fewer")
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise too_large
        body = bytearray()
        counted = 0
        try:
            async with asyncio.timeout(self.options.read_timeout):
                async for piece in request.stream():
                    body += piece
                    self._bytes += len(piece)
                    counted += len(piece)
                    if len(body) > most:
                        raise too_large
                    if self._bytes > _BODIES * most:
                        raise Problem(
                            429, f"requests of {self._bytes:,} bytes are in work; ask again in a second",
                            {"retry-after": "1"},
                        )  # fmt: skip
        except BaseException as error:
            self._bytes -= counted
            if isinstance(error, TimeoutError):
                raise Problem(
                    408, f"the body did not arrive within {self.options.read_timeout:g} s; send it faster",
                    {"connection": "close"},
                ) from None  # fmt: skip
            raise
        return bytes(body)

    async def _computed(self, request: Request, work: Work, seconds: float) -> Found:
        """What the model says; given up where the client goes or time runs out."""
        answer = asyncio.ensure_future(self.batcher.submit(work, self.model.cost(work)))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({answer, gone}, timeout=max(seconds, 0), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if gone.done():
                raise ClientDisconnect
            raise Problem.late(self.options.timeout)
        finally:
            for task in (answer, gone):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.model.name, "random_weights": self.model.random})

    async def _ready(self, request: Request) -> Response:
        if self.draining:
            raise Problem(503, "the service is about to end")
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
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
