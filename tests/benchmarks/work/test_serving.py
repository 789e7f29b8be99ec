"""The load on the service: its requests, its counts, and when a soak fails."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest
from PIL import Image

from xfm_fast.benchmarks.inputs import Collection
from xfm_fast.benchmarks.options import ServeOptions
from xfm_fast.benchmarks.record import OURS
from xfm_fast.benchmarks.work import serving
from xfm_fast.benchmarks.work.serving import Material, Request, Running, Soak, Window, drive, soak


class Answering(BaseHTTPRequestHandler):
    """Answers every request, and counts concurrent ones."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    now = most = 0
    bodies: list[Any]

    def do_POST(self) -> None:
        kind = type(self)
        with kind.lock:
            kind.now += 1
            kind.most = max(kind.most, kind.now)
        content = self.rfile.read(int(self.headers["content-length"]))
        kind.bodies.append(content)
        try:
            invalid = not json.loads(content).get("documents", ["?"])
        except ValueError:
            invalid = True
        with kind.lock:
            kind.now -= 1
        self.send_response(422 if invalid else 200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[tuple[int, type[Answering]]]:
    kind = type("Mine", (Answering,), {"bodies": [], "most": 0, "now": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_port, kind
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture
def material() -> Material:
    images = [Image.effect_noise((64, 48), 80).convert("RGB") for _ in range(3)]
    collection = Collection("noise", ["a", "b", "c"], images, ["a red square", "a blue square"], [0, 1])
    return Material.of(collection, 0)


def test_every_request_is_sent_once_by_so_many_clients(site: tuple[int, type[Answering]]) -> None:
    port, seen = site
    requests = [Request("/v1/rerank", json.dumps({"documents": [number]}).encode()) for number in range(40)]
    window = drive(port, requests, 4)
    assert sorted(json.loads(body)["documents"][0] for body in seen.bodies) == list(range(40))
    assert seen.most <= 4
    assert (len(window.latencies), window.failures) == (40, [])
    assert max(window.latencies) <= window.seconds


def test_unexpected_responses_are_counted(site: tuple[int, type[Answering]]) -> None:
    port, _ = site
    bad, good = Request("/v1/rerank", b"{"), Request("/v1/rerank", b'{"documents": [1]}')
    window = drive(port, [bad, good, good._replace(status=400)], 1)
    assert len(window.failures) == 2
    assert window.failures[0].startswith("status 422 for /v1/rerank")
    assert drive(port, [bad._replace(status=422)], 1).failures == []


def test_kinds_of_requests(material: Material) -> None:
    chance = random.Random(1)
    known, new = (json.loads(make(5, chance).body) for make in (material.known, material.new))
    assert len({each["image"] for each in known["documents"]} & {*material.catalogue}) == 5
    assert new["query"]["image"] not in material.catalogue
    assert {*new["documents"]} <= {"a red square", "a blue square"}
    assert {material.invalid(chance).status for _ in range(40)} == {400, 422}


def test_a_soak_sends_all_kinds_and_samples_memory(site: tuple[int, type[Answering]], material: Material) -> None:
    port, _ = site
    done = soak(Running(port, psutil.Process()), material, 4, 2, 0.5, 0)
    assert len(done.window.latencies) == 16 * (len(done.memory) - 1) > 0
    # This site knows no 400.
    assert all("400" not in failure.partition(" for ")[0] for failure in done.window.failures)


def test_a_soak_fails_when_memory_grows() -> None:
    window = Window(1.0, [0.1], [])
    steady = Soak(window, [1 << 30] * 4 + [(1 << 30) + (1 << 20) * n for n in range(6)])
    growing = Soak(window, [(1 << 30) + (64 << 20) * n for n in range(10)])
    filling = Soak(window, [1 << 29, 1 << 29, *[1 << 30] * 6])
    assert [each.verdict[0] for each in (steady, growing, filling)] == ["measured", "failed", "measured"]
    assert growing.grown == 4 * (64 << 20)


@pytest.mark.slow
def test_the_whole_measurement_of_a_tiny_model() -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    options = ServeOptions(random="tiny", device="cpu", clients=(1, 4), requests=8, rounds=3, soak=3.0)
    document = serving.run(options)
    assert document.ok
    works = {row.work for row in document.rows}
    assert works == {"serve-known", "serve-new", "serve-soak"}
    for row in document.rows:
        assert row.status == "measured", row.reason
        assert row.number("failures") == 0
        assert row.number("clients_p99_s")
        assert row.parity is not None
        assert row.parity.passed
        if row.backend == OURS and row.work != "serve-soak":
            assert {other.backend for other in row.against} == {"one-at-a-time", "one-at-a-time-cached"}
