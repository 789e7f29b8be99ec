"""A tiny model, and services of it: in a thread on a free port, or in a process of its own."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from tests.library_models import write_clip
from tests.search.conftest import write_model
from xfm_fast.models.xfm import XFM
from xfm_fast.serve import ServiceOptions, SourceOptions

if TYPE_CHECKING:
    from xfm_fast.serve import Service
    from xfm_fast.serve.work import Batcher

SECONDS = 60.0
CAPTIONS = [
    "a red circle",
    "Two blue squares, left of a triangle!",
    "green",
    "a yellow star above a circle",
]


def until(condition: Callable[[], bool]) -> bool:
    """Wait for a condition, half a minute at most; returns whether it became true."""
    for _ in range(1500):
        if condition():
            return True
        time.sleep(0.02)
    return False


def photo(seed: int, width: int = 48, height: int = 37, file_format: str = "PNG") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, file_format)
    return stream.getvalue()


def data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def image(seed: int) -> dict[str, str]:
    return {"image": data_url(photo(seed))}


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, packed: bytes, before: bytes = b"") -> bytes:
    """Make a PNG of these compressed pixels, and chunks before them."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def saved(side: int, mode: str, file_format: str, **settings: Any) -> bytes:
    lines = np.zeros((side, side, 3), np.uint8)
    lines[::7] = 200
    stream = io.BytesIO()
    Image.fromarray(lines).convert(mode).save(stream, file_format, **settings)
    return stream.getvalue()


def inflating_png(more: int) -> bytes:
    """Make a PNG whose data inflate to so many MB more than its pixels."""
    packer = zlib.compressobj()
    packed = packer.compress(bytes(8 * 25)) + packer.flush(zlib.Z_FULL_FLUSH)
    # From one flush to the next, a stream may be repeated.
    return png(
        8, 8, packed + (packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)) * more
    )


def scans(side: int, count: int) -> bytes:
    """Make a progressive JPEG with many scans."""
    content = saved(side, "RGB", "JPEG", progressive=True, quality=1)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + b"\xff\xd9"


def raw(path: str, body: bytes, *headers: str) -> bytes:
    """Format a POST as bytes."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return "\r\n".join([f"{head}content-length: {len(body)}", *headers, "\r\n"]).encode() + body


def scores(answer: Any) -> list[float]:
    """Relevance in the order of the documents."""
    return [
        result["relevance_score"]
        for result in sorted(answer["results"], key=lambda result: result["index"])
    ]


@dataclass(frozen=True)
class Running:
    """A service in a thread of this process."""

    service: Service
    port: int

    @property
    def batcher(self) -> Batcher:
        """The batcher of the first model."""
        return self.service.batchers[self.service.models[0]]

    def post(self, path: str, content: Any, headers: dict[str, str] | None = None) -> Any:
        """Post a body, or values as JSON."""
        return post(
            self.port,
            path,
            content if isinstance(content, bytes) else json.dumps(content).encode(),
            headers,
        )

    def get(self, path: str, headers: dict[str, str] | None = None) -> Any:
        return get(self.port, path, headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)


def post(port: int, path: str, body: bytes, headers: dict[str, str] | None = None) -> Any:
    headers = {"content-type": "application/json"} | (headers or {})
    return httpx.post(
        f"http://127.0.0.1:{port}{path}", content=body, headers=headers, timeout=SECONDS
    )


def get(port: int, path: str, headers: dict[str, str] | None = None) -> Any:
    return httpx.get(f"http://127.0.0.1:{port}{path}", headers=headers, timeout=SECONDS)


@contextmanager
def running(service: Service) -> Iterator[Running]:
    from xfm_fast.serve import Server, listen

    with listen(service.options) as sock:
        server = Server(service)
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        try:
            assert until(lambda: service.warmed_up)
            yield Running(service, sock.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            service.close()
            assert not thread.is_alive(), "the service did not end"


@contextmanager
def process(
    *arguments: object, program: tuple[str, ...] = ("-m", "xfm_fast")
) -> Iterator[tuple[Any, int]]:
    """Run a service in another process; yields it and its port."""
    command = [
        sys.executable,
        *program,
        "serve",
        "--port",
        "0",
        "--device",
        "cpu",
        *map(str, arguments),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as begun:
        try:
            assert begun.stdout is not None
            # The lines before it describe the models.
            line = next((line for line in begun.stdout if line.startswith("serving")), "")
            match = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            assert match, line + (begun.stderr.read() if begun.stderr and not line else "")
            yield begun, int(match[1])
        finally:
            begun.kill()


Start = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def extra() -> None:
    """Skip the tests of this folder where the extra is not installed."""
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(name, reason="the extra 'serve'")


@pytest.fixture(scope="session")
def weights(extra: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model without zeros and ones among its weights, so that every term counts."""
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
    """Load the served model offline."""
    return XFM.from_pretrained(weights)


@pytest.fixture(scope="session")
def start(weights: Path) -> Start:
    """Starts a service with options of its own; a context manager."""

    def begin(folder: Path = weights, rank: Any = None, **options: Any) -> Any:
        from xfm_fast.serve import Service, load

        service_options = replace(ServiceOptions(port=0, timeout=20, cache_mb=64), **options)
        return running(
            Service(
                [
                    load(
                        folder,
                        SourceOptions(device="cpu", rank=rank),
                        service_options.cache_mb << 20,
                    )
                ],
                service_options,
            )
        )

    return begin


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model of sentence-transformers that reads texts and images."""
    return write_clip(tmp_path_factory.mktemp("served-clip") / "tiny-clip")


@pytest.fixture(
    scope="session", params=["tiny-xfm", pytest.param("tiny-clip", marks=pytest.mark.slow)]
)
def start_any(request: pytest.FixtureRequest, start: Start, weights: Path) -> Start:
    """Starts a service of an X-FM, or of a model of sentence-transformers."""
    if request.param == "tiny-xfm":
        return start
    pytest.importorskip("sentence_transformers")
    return partial(start, request.getfixturevalue("clip"))


@pytest.fixture(scope="session")
def served_any(start_any: Start) -> Iterator[Running]:
    """Start a service of either model that tests share."""
    with start_any() as service:
        yield service


@pytest.fixture(scope="session")
def served(start: Start) -> Iterator[Running]:
    """Start a service that tests share."""
    with start() as service:
        yield service
