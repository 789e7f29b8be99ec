"""A service on a socket: uvicorn, with a graceful end."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from xfm_fast.errors import UnavailableError
from xfm_fast.serve.app import Service
from xfm_fast.serve.model import ServedModel, load
from xfm_fast.serve.options import ServiceOptions, SourceOptions

_MOST_CONNECTIONS = 512


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
        return socket.create_server((options.host, options.port), family=family, backlog=_MOST_CONNECTIONS)
    except OSError as error:
        raise UnavailableError(
            f"cannot listen on --host {options.host} --port {options.port} ({error.strerror or error}); choose others"
        ) from None


def address(sock: socket.socket) -> str:
    """The URL of a service for clients on this machine."""
    name = sock.getsockname()
    host, port = str(name[0]), name[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves until SIGTERM, SIGINT or SIGHUP, then finishes the requests in flight and returns."""

    def __init__(self, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                service.app, http="h11", ws="none", lifespan="off", log_config=None, log_level="warning",
                access_log=False, proxy_headers=False, server_header=False, limit_concurrency=_MOST_CONNECTIONS,
                timeout_keep_alive=30, timeout_graceful_shutdown=int(service.options.timeout) + 1,
            )
        )  # fmt: skip

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
