"""No body of a request costs the service more than a second of CPU and 64 MB, or its life."""

from __future__ import annotations

import base64
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.serve import bodies
from tests.serve.conftest import SECONDS
from tests.serve.test_process import process

resource = pytest.importorskip("resource", reason="limits of a process")
if not hasattr(resource, "prlimit"):
    pytest.skip("the costs of another process are read from /proc", allow_module_level=True)

MOST_MEGABYTES = 64
# Five times a second, for machines that are slow or busy.
MOST_CPU_SECONDS = 5.0


@dataclass(frozen=True)
class Cost:
    status: int
    cpu_seconds: float
    megabytes: float
    health: float

    @property
    def score(self) -> float:
        return max(self.cpu_seconds, self.megabytes / MOST_MEGABYTES, 2 * self.health)


@dataclass(frozen=True)
class Limited:
    """A service in a process that may take 1 GB more than it does at rest."""

    pid: int
    port: int

    def ask(self, method: str, path: str, body: bytes | None = None) -> int:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()

    def cost(self, path: str, body: bytes) -> Cost:
        """What a body costs, and the longest time that /health took meanwhile."""
        done, slowest = threading.Event(), [0.0]

        def watch() -> None:
            while not done.is_set():
                began = time.perf_counter()
                assert self.ask("GET", "/health") == 200
                slowest[0] = max(slowest[0], time.perf_counter() - began)
                done.wait(0.02)

        self._write("clear_refs", "5")
        before, seconds = self._memory("VmRSS"), self._seconds()
        thread = threading.Thread(target=watch)
        thread.start()
        try:
            status = self.ask("POST", path, body)
        finally:
            done.set()
            thread.join()
        return Cost(status, self._seconds() - seconds, (self._memory("VmHWM") - before) / 1024, slowest[0])

    def limit(self) -> None:
        most = self._memory("VmSize") * 1024 + (1 << 30)
        resource.prlimit(self.pid, resource.RLIMIT_AS, (most, most))

    def _memory(self, name: str) -> int:
        with open(f"/proc/{self.pid}/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    def _seconds(self) -> float:
        with open(f"/proc/{self.pid}/stat") as line:
            user, system = line.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _write(self, name: str, text: str) -> None:
        with open(f"/proc/{self.pid}/{name}", "w") as file:
            file.write(text)


@pytest.fixture(scope="module")
def limited() -> Iterator[Limited]:
    with process("--random", "tiny", "--cache-mb", "0") as (begun, port):
        service = Limited(begun.pid, port)
        for _ in range(5):
            assert service.ask("POST", "/v1/embeddings", b'{"input": ["a"]}') == 200
        service.limit()
        yield service
        assert service.ask("GET", "/health") == 200


def _items(name: str, items: str) -> bytes:
    return f'{{"query": "a", "{name}": {items}}}'.encode()


def _list(token: str, count: int) -> str:
    return f"[{','.join([token] * count)}]"


def _pictures(content: bytes, count: int = 1) -> bytes:
    return _items("documents", json.dumps([{"image": base64.b64encode(content).decode()}] * count))


def _plain(side: int, kind: str, count: int = 1) -> bytes:
    return _pictures(bodies.FORMS[kind](side, 1), count)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda: _items("documents", _list("0", 1_000_000)), id="zeros"),
        pytest.param(lambda: _items("documents", _list("{}", 100_000)), id="objects"),
        pytest.param(lambda: _items("other", _list("[]", 300_000)), id="lists of an unknown field"),
        pytest.param(lambda: _items("documents", _list('""', 330_000)), id="empty texts"),
        pytest.param(lambda: _items("documents", f'[{{"content": {_list("{}", 12_000)}}}]'), id="parts"),
        pytest.param(lambda: _pictures(bodies.png_with_more(8, 700)), id="inflates"),
        pytest.param(lambda: _plain(4096, "webp-lossless", 8), id="eight WebPs"),
        pytest.param(lambda: _pictures(bodies.scans(2048, 300)), id="scans"),
        pytest.param(lambda: _pictures(bodies.FORMS["png-chunks"](8, 50_000)), id="chunks"),
        pytest.param(lambda: _pictures(bodies.FORMS["jpeg-segments"](8, 100_000)), id="segments"),
    ],
)
def test_what_looks_small_is_refused_cheaply(limited: Limited, body: Any) -> None:
    cost = limited.cost("/v1/rerank", body())
    assert cost.status in (413, 422), cost
    assert cost.cpu_seconds <= MOST_CPU_SECONDS, cost
    assert cost.megabytes <= MOST_MEGABYTES, cost


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda: _plain(3300, "jpeg"), id="11 megapixels"),
        pytest.param(lambda: _plain(1600, "png-alpha"), id="transparent"),
        pytest.param(lambda: _plain(1600, "webp"), id="webp"),
        pytest.param(lambda: _plain(224, "png", 256), id="thumbnails"),
        pytest.param(lambda: _pictures(bodies.FORMS["png-texts"](8, 60), 30), id="texts of PNG"),
    ],
)
def test_what_people_send_is_answered_cheaply(limited: Limited, body: Any) -> None:
    cost = limited.cost("/v1/rerank", body())
    assert cost.status == 200, cost
    assert cost.cpu_seconds <= MOST_CPU_SECONDS, cost
    assert cost.megabytes <= MOST_MEGABYTES, cost


def _dearest(limited: Limited, seed: int, trials: int) -> list[tuple[Cost, bodies.Gene]]:
    """Bodies made at random, and the dearest of them varied."""
    rng = random.Random(seed)
    found: list[tuple[Cost, bodies.Gene]] = []
    for trial in range(trials):
        choices = bodies.gene(rng) if trial < trials // 2 else bodies.mutated(rng.choice(found[:8])[1], rng)
        found.append((limited.cost(choices["path"], bodies.body(choices)), choices))
        found.sort(key=lambda each: -each[0].score)
    return found


@pytest.mark.parametrize(("seed", "trials"), [(0, 40), pytest.param(1, 600, marks=pytest.mark.slow)])
def test_the_dearest_body_under_a_megabyte(limited: Limited, seed: int, trials: int) -> None:
    found = _dearest(limited, seed, trials)
    print("\n".join(map(str, found[:10])))
    for cost, choices in found:
        assert cost.status in (200, 400, 413, 422), (cost, choices)
        assert cost.cpu_seconds <= MOST_CPU_SECONDS, (cost, choices)
        assert cost.megabytes <= MOST_MEGABYTES, (cost, choices)


def test_many_at_once_leave_the_service_alive(limited: Limited) -> None:
    """As many as may wait, each with as much as it may ask for; those beyond the memory hear 429."""
    body, statuses = _plain(4000, "jpeg", 1), list[int]()
    threads = [
        threading.Thread(target=lambda: statuses.append(limited.ask("POST", "/v1/rerank", body))) for _ in range(48)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 48
    assert {*statuses} <= {200, 413, 429, 503, 504}
