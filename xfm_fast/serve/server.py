"""A service on a socket: uvicorn, with deadlines for clients and a graceful end."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from xfm_fast.encoders import is_library_model
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.search import open_index
from xfm_fast.serve.app import Service
from xfm_fast.serve.library import load_library_model
from xfm_fast.serve.model import ServedModel, XFMModel
from xfm_fast.serve.options import ServiceOptions, SourceOptions
from xfm_fast.serve.search import Search

_CONNECTION_LIMIT = 512
# Connections that wait to be accepted, and those that asyncio accepts before it reads from any: far
# fewer than `_CONNECTION_LIMIT`, so that no connection is ended before its first bytes are read.
_BACKLOG, _ACCEPTED = 2048, 64
_SOCKET_BUFFER = 1 << 18
# Seconds for a head, from the connection or its first byte, and for the rest of a refused body.
_HEAD_SECONDS = 10.0


def run(
    source: SourceOptions,
    options: ServiceOptions,
    loaded: Callable[[Service, socket.socket], None],
    models: Sequence[str] = (),
) -> None:
    """Load models and serve them until SIGTERM; `loaded` is called once they are warm, before the first request."""
    with listen(options) as sock:
        service = open_service(source, options, models)
        server = Server(service, lambda: loaded(service, sock))
        server.run([sock])
    service.close()
    if server.failure is not None:
        raise server.failure


def load(
    path: str | Path | None, options: SourceOptions, cache_bytes: int, name: str | None = None
) -> ServedModel:
    """Load a model from any source.

    Args:
        path: The model, as `options.model`.
        options: See `SourceOptions`.
        cache_bytes: Size of the cache of image memories.
        name: Name in requests and answers. [that of its folder]

    Raises:
        XFMError: The model cannot be loaded, or cannot be served.
    """
    options = options if path is None else replace(options, model=str(path))
    options.check()
    if is_library_model(options):
        return load_library_model(options, name)
    return XFMModel(options, cache_bytes, name)


def open_service(
    source: SourceOptions, options: ServiceOptions, models: Sequence[str] = ()
) -> Service:
    """Load the models, or that of `source`; their names are those of `source` in order, or all of a single model."""
    sources = models or (source.model,)
    names = [*source.name]
    for name in names:
        if not name.strip() or names.count(name) > 1:
            raise InputError(f"--name {name!r} is empty or given twice; choose others")
    if len(sources) > 1 and len(names) not in (0, len(sources)):
        raise InputError(
            f"--name is given {len(names)} times for {len(sources)} models; give one for each, in order"
        )
    served: dict[str, ServedModel] = {}
    for index, path in enumerate(sources):
        name = names[index] if names else None
        model = load(path, source, options.cache_mb << 20, name)
        if model.name in served:
            raise InputError(f"two models are called {model.name!r}; tell them apart with --name")
        served[model.name] = model
        if len(sources) == 1:
            served |= dict.fromkeys(names, model)
    index, path, images = None, options.index, options.images
    if path is not None and path.is_dir() and images is not None:
        # A folder of images has no others: it is the folder of an index.
        index = open_index(images, path)
    elif path is not None:
        index = open_index(path, images=images)
    service = Service([*dict.fromkeys(served.values())], options, served)
    if index is not None:
        Search(service, index).add()
    return service


def listen(options: ServiceOptions) -> socket.socket:
    """Open a listening socket; raises `UnavailableError` if the address is taken or unknown."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        sock = socket.create_server((options.host, options.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UnavailableError(
            f"cannot listen on --host {options.host} --port {options.port} ({error.strerror or error}); choose others"
        ) from None
    for direction in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        # For each connection; by default the system holds megabytes that the ledger does not count.
        sock.setsockopt(socket.SOL_SOCKET, direction, _SOCKET_BUFFER)
    # asyncio does so for sockets that it opens itself. Without it the body of an answer, sent after
    # the head, waits 40 ms until the client acknowledges the head.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def address(sock: socket.socket) -> str:
    """Return the URL of a service for clients on this machine."""
    name = sock.getsockname()
    host, port = str(name[0]), name[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with deadlines for heads and unread answers, and a limit of open
    connections.

    The application sets the deadline of a body. Above `limit` open connections, a new one ends the
    connection that has waited the longest for its client: to send a request, or to read an answer.
    """

    def __init__(self, *args: Any, seconds: float, limit: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.since, self.waits_for = self.loop.time(), ""
        self._limit, self._timer = limit, None
        self._seconds = {"head": min(_HEAD_SECONDS, seconds), "reader": seconds}

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # An answer counts in the ledger until all of it has left the process.
        transport.set_write_buffer_limits(0)
        connections: list[Any] = [
            connection for connection in self.connections if not connection.transport.is_closing()
        ]
        if len(connections) > self._limit:
            oldest: Any = min(
                (
                    connection
                    for connection in connections
                    if connection.waits_for != "answer" and connection is not self
                ),
                key=lambda connection: connection.since,
                default=self,
            )
            oldest.transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        """Start the deadline of what the connection waits for, if that has changed."""
        if self.flow.write_paused:
            waits_for = "reader"
        elif self.cycle is not None and not self.cycle.response_complete:
            waits_for = "body" if self.cycle.more_body else "answer"
        else:
            # uvicorn's own deadline runs from the end of an answer to the next byte.
            waits_for = "head" if self.timeout_keep_alive_task is None else "next request"
        if waits_for == self.waits_for:
            return
        self.since, self.waits_for = self.loop.time(), waits_for
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if waits_for in self._seconds:
            self._timer = self.loop.call_later(self._seconds[waits_for], self.transport.abort)


class Server(uvicorn.Server):
    """A server that runs until SIGTERM, SIGINT or SIGHUP and then finishes the requests in flight."""

    def __init__(self, service: Service, ready: Callable[[], object] = lambda: None) -> None:
        self._service, self._ready = service, ready
        self.failure: BaseException | None = None
        seconds = service.options.timeout
        # At most `max_queue` connections wait for an answer, so that another one can always be
        # ended.
        limit = _CONNECTION_LIMIT + service.options.max_queue
        protocol: Any = partial(Connection, seconds=seconds, limit=limit)
        super().__init__(
            uvicorn.Config(
                service.app,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_ACCEPTED,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=int(seconds) + 1,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or ():
            # asyncio uses `backlog` for both.
            sock.listen(_BACKLOG)
        self._service.warm_up().add_done_callback(self._begin)

    def _begin(self, warming: asyncio.Task[None]) -> None:
        """Announce the service, or end it if a model does not run."""
        if warming.cancelled():
            return
        self.failure = warming.exception()
        if self.failure is None:
            self._ready()
        else:
            self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals like uvicorn, SIGHUP too, but exit with 0 after a graceful end."""
        earlier = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                code = getattr(signal, name, None)
                # `nohup` ignores SIGHUP.
                if code is not None and signal.getsignal(code) != signal.SIG_IGN:
                    earlier[code] = signal.signal(code, self.handle_exit)
        try:
            yield
        finally:
            for code, handler in earlier.items():
                signal.signal(code, handler)
