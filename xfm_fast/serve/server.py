"""A service on a socket: uvicorn, with deadlines for clients and a graceful end."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from xfm_fast.errors import UnavailableError
from xfm_fast.serve.app import Service
from xfm_fast.serve.model import ServedModel, load
from xfm_fast.serve.options import ServiceOptions, SourceOptions

_MOST_CONNECTIONS = 512
# Connections that wait to be accepted, and those that asyncio accepts before it reads from any of them: few beside
# `_MOST_CONNECTIONS`, so that none is ended before what it has sent is read.
_BACKLOG, _ACCEPTED = 2048, 64
_SYSTEM_BYTES = 1 << 18
# Seconds for a head, from the connection or its first byte, and for the rest of a body that was refused.
_HEAD_SECONDS = 10.0


def run(
    source: SourceOptions, options: ServiceOptions, loaded: Callable[[ServedModel, socket.socket], None]
) -> None:  # fmt: skip
    """Load a model and serve it until SIGTERM; `loaded` is called before the first request."""
    model = load(None, source, options.cache_mb << 20)
    model.warm_up()
    service = Service(model, options)
    with listen(options) as sock:
        loaded(model, sock)
        Server(service).run([sock])
    service.close()


def listen(options: ServiceOptions) -> socket.socket:
    """A listening socket; raises `UnavailableError` where the address is taken or unknown."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        sock = socket.create_server((options.host, options.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UnavailableError(
            f"cannot listen on --host {options.host} --port {options.port} ({error.strerror or error}); choose others"
        ) from None
    for direction in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        # Of each connection: the system would hold megabytes that no ledger counts.
        sock.setsockopt(socket.SOL_SOCKET, direction, _SYSTEM_BYTES)
    return sock


def address(sock: socket.socket) -> str:
    """The URL of a service for clients on this machine."""
    name = sock.getsockname()
    host, port = str(name[0]), name[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(H11Protocol):
    """HTTP/1.1 of uvicorn with deadlines for heads and unread answers, and a bound that keeps nobody out.

    The deadline of a body is the application's. Where `most` others are open, a new connection ends the one that has
    waited the longest for its client: to send a request, or to read an answer.
    """

    def __init__(self, *arguments: Any, seconds: float, most: int, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.since, self.waits_for = self.loop.time(), ""
        self._most, self._timer = most, None
        self._seconds = {"head": min(_HEAD_SECONDS, seconds), "reader": seconds}

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # The application waits, and counts what it holds, until all of an answer is with the system.
        transport.set_write_buffer_limits(0)
        opened: Any = [each for each in self.connections if not each.transport.is_closing()]
        if len(opened) > self._most:
            waiting = (each for each in opened if each.waits_for != "answer" and each is not self)
            min(waiting, key=lambda each: each.since, default=self).transport.abort()
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
        """Begin the deadline of what the connection waits for, where that has changed."""
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
        seconds = self._seconds.get(waits_for)
        self._timer = (
            None if seconds is None else self.loop.call_later(seconds, self.transport.abort)
        )


class Server(uvicorn.Server):
    """Serves until SIGTERM, SIGINT or SIGHUP, then finishes the requests in flight and returns."""

    def __init__(self, service: Service) -> None:
        seconds = service.options.timeout
        # Those whose answer is computed are at most `max_queue`, so that one that waits is always there to end.
        most = _MOST_CONNECTIONS + service.options.max_queue
        protocol: Any = partial(Connection, seconds=seconds, most=most)
        super().__init__(
            uvicorn.Config(
                service.app, http=protocol, ws="none", lifespan="off", log_config=None, log_level="warning",
                access_log=False, proxy_headers=False, server_header=False, backlog=_ACCEPTED,
                timeout_keep_alive=30, timeout_graceful_shutdown=int(seconds) + 1,
            )
        )  # fmt: skip

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or ():
            # asyncio has set both numbers to one.
            sock.listen(_BACKLOG)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Like uvicorn's, with SIGHUP, but a process that ended gracefully after a signal returns 0."""
        main = threading.current_thread() is threading.main_thread()
        signals = [
            getattr(signal, name)
            for name in ("SIGINT", "SIGTERM", "SIGHUP")
            if hasattr(signal, name)
        ]
        # `nohup` ignores SIGHUP.
        signals = [each for each in signals if main and signal.getsignal(each) != signal.SIG_IGN]
        earlier = {each: signal.signal(each, self.handle_exit) for each in signals}
        try:
            yield
        finally:
            for each, handler in earlier.items():
                signal.signal(each, handler)
