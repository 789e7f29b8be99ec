"""A tiny model, and a service of it that listens on a free port of this machine."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.search.conftest import write_model
from xfm_fast.models.xfm import XFM
from xfm_fast.serve.model import load
from xfm_fast.serve.options import ServiceOptions, SourceOptions

if TYPE_CHECKING:
    from xfm_fast.serve import Server, Service

SECONDS = 60.0


def until(condition: Callable[[], bool]) -> bool:
    """Waits for a condition, half a minute at most; says whether it came true."""
    for _ in range(1500):
        if condition():
            return True
        time.sleep(0.02)
    return False


def photo(seed: int, width: int = 48, height: int = 37, kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image(seed: int) -> dict[str, str]:
    return {"image": data_url(photo(seed))}


def raw(path: str, body: bytes, *headers: str) -> bytes:
    """A POST as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return "\r\n".join([f"{head}content-length: {len(body)}", *headers, "\r\n"]).encode() + body


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return self.json["error"]["message"]


@dataclass(frozen=True)
class Running:
    """A service in a thread of this process."""

    service: Service
    server: Server
    port: int
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Reply:  # fmt: skip
        connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def post(self, path: str, content: Any, headers: dict[str, str] | None = None) -> Reply:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.ask("POST", path, body, {"content-type": "application/json"} | (headers or {}))

    def get(self, path: str, headers: dict[str, str] | None = None) -> Reply:
        return self.ask("GET", path, headers=headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)


@contextmanager
def running(service: Service) -> Iterator[Running]:
    from xfm_fast.serve import Server, bind

    with bind(service.options) as sock:
        sock.listen()
        server = Server(service)
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        try:
            yield Running(service, server, sock.getsockname()[1], thread)
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive(), "the service did not end"


Start = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def extra() -> None:
    """Skips the tests of this folder where the extra is not installed."""
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(name, reason="the extra 'serve'")


@pytest.fixture(scope="session")
def weights(extra: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` writes it; its weights are no zeros and ones, so that every term counts."""
    folder = write_model(tmp_path_factory.mktemp("served") / "tiny-xfm", seed=3)
    model = XFM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp":
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(weights: Path) -> XFM:
    """The model that is served, as one uses it offline."""
    return XFM.from_pretrained(weights)


@pytest.fixture
def start(weights: Path) -> Start:
    """Starts a service with options of its own; a context manager."""

    def begin(**options: Any) -> Any:
        from xfm_fast.serve import Service

        given = replace(ServiceOptions(port=0, drain=5, cache_mb=64), **options)
        return running(Service(load(weights, SourceOptions(device="cpu"), given.cache_mb << 20), given))

    return begin


@pytest.fixture(scope="module")
def served(weights: Path) -> Iterator[Running]:
    """A service that the tests of a file share."""
    from xfm_fast.serve import Service

    options = ServiceOptions(port=0, drain=5, cache_mb=64, max_pixels=200_000, max_documents=40)
    with running(Service(load(weights, SourceOptions(device="cpu"), 64 << 20), options)) as service:
        yield service
