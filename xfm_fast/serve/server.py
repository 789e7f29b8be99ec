"""A service on a socket: uvicorn with timeouts of slow clients and a graceful end."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from xfm_fast.errors import UnavailableError
from xfm_fast.serve.app import Service
from xfm_fast.serve.model import ServedModel, load
from xfm_fast.serve.options import ServiceOptions, SourceOptions


def run(
    path: str | Path | None,
    source: SourceOptions | None = None,
    options: ServiceOptions | None = None,
    *,
    loaded: Callable[[ServedModel, socket.socket], None] = lambda model, sock: None,
) -> None:
    """Load a model and serve it until SIGTERM; `loaded` is called before the first request."""
    source, options = source or SourceOptions(), options or ServiceOptions()
    with bind(options) as sock:
        model = load(path, source, options.cache_mb << 20)
        model.warm_up()
        server = Server(Service(model, options))
        try:
            sock.listen(options.max_connections)
        except OSError as error:
            raise _port_error(options, error) from None
        loaded(model, sock)
        server.run([sock])


def bind(options: ServiceOptions) -> socket.socket:
    """A bound socket that does not listen yet, so that clients are refused while the model loads."""
    host, port = options.host, options.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, place = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UnavailableError(f"--host {host} is no address ({error}); use 127.0.0.1 or 0.0.0.0") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
    except OSError as error:
        sock.close()
        raise _port_error(options, error) from None
    return sock


def _port_error(options: ServiceOptions, error: OSError) -> UnavailableError:
    return UnavailableError(
        f"cannot listen on {options.host}:{options.port} ({error.strerror or error}); choose another --port or --host"
    )


def address(sock: socket.socket) -> str:
    """The URL of a service for clients on this machine."""
    name = sock.getsockname()
    host, port = str(name[0]), name[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, then finishes the requests in flight and returns."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.servers: list[asyncio.Server] = []
        options = service.options

        protocol: Any = partial(PatientProtocol, options.read_timeout)
        super().__init__(
            uvicorn.Config(
                service.app, http=protocol, ws="none", lifespan="on", log_config=None, log_level="warning",
                access_log=False, proxy_headers=False, server_header=False, limit_concurrency=options.max_connections,
                timeout_keep_alive=max(1, min(30, int(options.read_timeout))),
                timeout_graceful_shutdown=options.drain + 1,
            )
        )  # fmt: skip

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on listening sockets."""
        asyncio.run(self.serve(sockets))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Like uvicorn's, with SIGHUP, but a process that ended gracefully after a signal returns 0."""
        main = threading.current_thread() is threading.main_thread()
        signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        # `nohup` ignores SIGHUP.
        signals = [each for each in signals if main and signal.getsignal(each) != signal.SIG_IGN]
        earlier = {each: signal.signal(each, self.handle_exit) for each in signals}
        try:
            yield
        finally:
            for each, handler in earlier.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the shutdown; a second SIGINT does not wait for requests."""
        for server in self.servers if self.should_exit and sig == signal.SIGINT else ():
            server.get_loop().call_soon_threadsafe(self.service.stop)
        self.service.draining = self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the requests in flight, and answer the late ones with 503."""
        asyncio.get_running_loop().call_later(self.service.options.drain, self.service.stop)
        await super().shutdown(sockets)


class PatientProtocol(H11Protocol):
    """A connection that must send a request, and read a response, within `patience` seconds each.

    uvicorn limits only the time between requests: a slow head or an unread response would keep a connection for ever.
    """

    def __init__(self, patience: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.patience = patience
        self._alarm: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._set()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop()
        elif self._alarm is None:
            self._set()

    def on_response_complete(self) -> None:
        self._stop()
        # The client may still send a refused body, or not read the response.
        if self.conn.their_state is h11.SEND_BODY or self.transport.get_write_buffer_size():
            self._set()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _set(self) -> None:
        # One second after the limit of the body, which has a response.
        self._alarm = self.loop.call_later(self.patience + 1, self._late)

    def _stop(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _late(self) -> None:
        self._alarm = None
        receiving = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if receiving or self.transport.get_write_buffer_size():
            self.transport.abort()
