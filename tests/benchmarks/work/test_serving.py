"""The load on the service: its requests, by how many clients they are sent, and a whole measurement."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from xfm_fast.benchmarks.options import ServeOptions
from xfm_fast.benchmarks.record import OURS
from xfm_fast.benchmarks.work import serving
from xfm_fast.benchmarks.work.serving import crop_url, drive, known, new
from xfm_fast.errors import UnavailableError


class Site(BaseHTTPRequestHandler):
    """Answers every request with documents, and counts concurrent ones."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    now = most = 0
    bodies: list[Any]

    def do_POST(self) -> None:
        kind = type(self)
        with kind.lock:
            kind.now += 1
            kind.most = max(kind.most, kind.now)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        kind.bodies.append(body)
        with kind.lock:
            kind.now -= 1
        self.send_response(200 if body["documents"] else 422)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[tuple[int, type[Site]]]:
    kind = type("Mine", (Site,), {"bodies": [], "most": 0, "now": 0})
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


def test_every_request_is_sent_once_by_so_many_clients(site: tuple[int, type[Site]]) -> None:
    port, seen = site
    latencies = drive(port, [{"documents": [number]} for number in range(40)], 4)
    assert sorted(body["documents"][0] for body in seen.bodies) == list(range(40))
    assert seen.most <= 4
    assert len(latencies) == 40
    with pytest.raises(UnavailableError, match="422"):
        drive(port, [{"documents": []}], 1)


def test_kinds_of_requests() -> None:
    chance, captions = random.Random(1), ["a red square", "a blue square"]
    photos = [Image.effect_noise((64, 48), 80).convert("RGB") for _ in range(3)]
    catalogue = [crop_url(photo, chance) for photo in photos]
    asked = known(chance, captions, catalogue, 3)
    assert {each["image"] for each in asked["documents"]} == {*catalogue}
    asked = new(chance, captions, photos, 5)
    assert asked["query"]["image"] not in catalogue
    assert len(asked["documents"]) == 5
    assert {*asked["documents"]} <= {*captions}


@pytest.mark.slow
def test_the_whole_measurement_of_a_tiny_model() -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    document = serving.run(ServeOptions(random="tiny", device="cpu", clients=(1, 4), requests=8, rounds=3))
    assert document.ok
    assert {row.work for row in document.rows} == {"serve-known", "serve-new"}
    for row in document.rows:
        assert row.status == "measured", row.reason
        assert row.number("clients_p99_s")
        assert row.parity is not None
        assert row.parity.passed
        if row.backend == OURS:
            assert {other.backend for other in row.against} == {"one-at-a-time"}
