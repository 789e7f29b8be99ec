"""No body costs the service more than a second of CPU and 64 MB before the model computes, or its life."""

from __future__ import annotations

import base64
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.serve.conftest import (
    Running,
    chunk,
    get,
    inflating_png,
    png,
    post,
    process,
    saved,
    scans,
    until,
)

resource = pytest.importorskip("resource", reason="limits of a process")
if not hasattr(resource, "prlimit"):
    pytest.skip("the costs of another process are read from /proc", allow_module_level=True)

MOST_MEGABYTES = 64
# Five times a second, for machines that are slow or busy.
MOST_CPU_SECONDS = 5.0
REFUSED = (413, 422)


@dataclass(frozen=True)
class Limited:
    """A service in a process that may take 1 GB more than it does at rest."""

    pid: int
    port: int

    def post(self, path: str, body: bytes) -> int:
        return post(self.port, path, body).status_code

    def megabytes(self, name: str) -> float:
        with open(f"/proc/{self.pid}/status") as lines:
            return (
                next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
            )

    def cpu_seconds(self) -> float:
        with open(f"/proc/{self.pid}/stat") as line:
            user, system = line.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def limited() -> Iterator[Limited]:
    with process("--random", "tiny", "--cache-mb", "0") as (begun, port):
        service = Limited(begun.pid, port)
        for _ in range(5):
            assert service.post("/v1/embeddings", b'{"input": ["a"]}') == 200
        limit = (int(service.megabytes("VmSize")) << 20) + (1 << 30)
        resource.prlimit(begun.pid, resource.RLIMIT_AS, (limit, limit))
        yield service
        assert get(port, "/health").status_code == 200


def _items(items: str, name: str = "documents") -> bytes:
    return f'{{"query": "a", "{name}": {items}}}'.encode()


def _list(token: str, count: int) -> str:
    return f"[{','.join([token] * count)}]"


def _pictures(content: bytes, count: int = 1) -> bytes:
    # Trailing bytes, which decoders pass over, make each an image of its own.
    pictures = [
        base64.b64encode(content + index.to_bytes(3, "big")).decode() for index in range(count)
    ]
    return _items(json.dumps([{"image": picture} for picture in pictures]))


def _texts_of_png(count: int) -> bytes:
    packed = b"k\0\0" + zlib.compress(bytes(1 << 20))
    return png(
        8,
        8,
        zlib.compress(bytes(8 * 25)),
        (chunk(b"zTXt", packed) + chunk(b"iCCP", packed)) * count,
    )


BODIES: dict[str, tuple[Callable[[], bytes], tuple[int, ...]]] = {
    "zeros": (lambda: _items(_list("0", 1_000_000)), REFUSED),
    "objects": (lambda: _items(_list("{}", 100_000)), REFUSED),
    "nested": (lambda: _items(_list("[" * 60 + "]" * 60, 8000), "other"), REFUSED),
    "deep": (lambda: _items("[" * 200_000), (400, *REFUSED)),
    "parts": (lambda: _items(f'[{{"content": {_list("{}", 12_000)}}}]'), REFUSED),
    "keys": (lambda: _items("[" + ",".join(f'{{"k{number}":0}}' for number in range(60_000)) + "]"), REFUSED),
    "one text": (lambda: _items('["' + "漢" * 330_000 + '"]'), REFUSED),
    "inflates a little": (lambda: _pictures(inflating_png(40)), REFUSED),
    "inflates": (lambda: _pictures(inflating_png(700)), REFUSED),
    "eight WebPs": (lambda: _pictures(saved(4096, "RGBA", "WEBP", lossless=True, method=0), 8), REFUSED),
    "deep PNG": (lambda: _pictures(saved(4000, "I;16", "PNG")), REFUSED),
    "scans": (lambda: _pictures(scans(2048, 300)), REFUSED),
    "chunks": (lambda: _pictures(png(8, 8, zlib.compress(bytes(200)), chunk(b"teXt", b"") * 50_000)), REFUSED),
    "segments": (
        lambda: _pictures((jpeg := saved(8, "RGB", "JPEG"))[:2] + b"\xff\xfe\0\2" * 100_000 + jpeg[2:]), REFUSED
    ),
    "texts": (lambda: _items(json.dumps(["漢字 " * 400] * 200)), (200, 422)),
    "progressive": (lambda: _pictures(saved(1300, "RGB", "JPEG", quality=1, progressive=True)), (200,)),
    "thumbnails": (lambda: _pictures(saved(224, "RGB", "PNG"), 256), (200,)),
    "texts of PNG": (lambda: _pictures(_texts_of_png(60), 30), (200,)),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["zeros", "objects", "nested", "deep", "keys", "one text", "inflates a little"]
)
def test_a_small_attack_is_refused_while_health_answers(served: Running, name: str) -> None:
    make, statuses = BODIES[name]
    body, seconds = make(), time.process_time()
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(served.post, "/v1/rerank", body)
        assert served.get("/health").status_code == 200
        assert reply.result().status_code in statuses
    assert time.process_time() - seconds <= MOST_CPU_SECONDS
    assert until(lambda: not served.service.ledger.used)


@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES)
def test_a_body_costs_little(limited: Limited, name: str) -> None:
    make, statuses = BODIES[name]
    body = make()
    with open(f"/proc/{limited.pid}/clear_refs", "w") as file:
        file.write("5")
    before, seconds = limited.megabytes("VmRSS"), limited.cpu_seconds()
    assert limited.post("/v1/rerank", body) in statuses
    assert limited.cpu_seconds() - seconds <= MOST_CPU_SECONDS
    assert limited.megabytes("VmHWM") - before <= MOST_MEGABYTES


@pytest.mark.slow
def test_many_at_once_leave_the_service_alive(limited: Limited) -> None:
    """As many as may wait, each with as much as it may ask for; those beyond the memory get 429."""
    body = _pictures(saved(4000, "RGB", "JPEG", quality=1))
    with ThreadPoolExecutor(48) as threads:
        statuses = [*threads.map(lambda index: limited.post("/v1/rerank", body), range(48))]
    assert {*statuses} <= {200, 413, 429, 503, 504}
