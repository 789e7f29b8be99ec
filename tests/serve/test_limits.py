"""Bad requests get a 4xx that names the thing, and the service goes on."""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from tests.serve.conftest import Running, Start, data_url, image, photo, png, raw, until
from xfm_fast.data.images import load_image
from xfm_fast.serve.model import Work
from xfm_fast.tasks import ranking

GOOD = {"query": "a red circle", "documents": ["a blue square"]}


def still_good(service: Running) -> None:
    assert service.post("/v1/rerank", GOOD).status_code == 200


def with_image(value: str) -> dict[str, Any]:
    return {"query": "a red circle", "documents": [{"image": value}]}


def huge_png(side: int) -> dict[str, Any]:
    """Make a PNG whose header states more pixels than there are."""
    return with_image(data_url(png(side, side, zlib.compress(bytes(100)))))


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", 400, "body"),
        (b"\xff\xfe{}", 400, ""),
        (b'{"query": ', 400, "JSON"),
        (json.dumps(GOOD).encode("utf-16"), 400, "UTF-8"),
        (b'{"query": ' + b"[" * 100_000, 400, ""),
        (b'{"a": [' + b"0," * 300_000 + b"0]}", 422, "values"),
        ({"documents": ["a"]}, 422, "query: "),
        ({"query": "a", "documents": []}, 422, "documents: "),
        ({"query": "a\ud800", "documents": ["b"]}, 400, "hex escape"),
        ({"query": "a", "documents": [{"text": "a", "image": "b"}]}, 422, "documents[0]: "),
        ({"query": "a", "documents": ["b"] * 2049}, 422, "documents: "),
        ({"query": "a" * 32769, "documents": ["b"]}, 422, "query[0] has 32,769"),
        ({"query": "?!", "documents": ["b"]}, 422, "query[0]: "),
        ({"query": "a", "documents": ["b"], "model": "gpt-4"}, 404, "'gpt-4'"),
        ({"query": "a", "documents": ["b", image(1)]}, 422, "two requests"),
        (with_image("data:text/plain;base64,aGVsbG8="), 422, "text/plain"),
        (with_image("data:image/png;base64,%%%"), 422, "%%%"),
        (with_image(data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n")), 422, "documents[0]"),
        (with_image(data_url(photo(1)[:200])), 422, "documents[0]"),
        (with_image(data_url(photo(1))[:-1]), 422, "documents[0]"),
        (huge_png(60_000), 413, "60000x60000"),
        (huge_png(400), 422, "documents[0]"),
        (with_image("http://169.254.169.254/latest/meta-data"), 422, "--allow-urls"),
        ({"input": [[1, 2]]}, 422, "token ids"),
        ({"input": "a", "dimensions": 5000}, 422, "dimensions=5000"),
        ({"text_1": ["a", "b"], "text_2": ["c"]}, 422, "text_1 has 2"),
    ],
)
def test_bad_requests(served_any: Running, content: Any, status: int, message: str) -> None:
    if served_any.service.models[0].name == "tiny-clip" and message in (
        "query[0]: ",
        "two requests",
    ):
        pytest.skip("it reads these")
    paths = {"input": "/v1/embeddings", "text_1": "/v1/score"}
    path = next((paths[name] for name in paths if name in str(content)), "/v1/rerank")
    reply = served_any.post(path, content)
    assert message in reply.json()["message"]
    assert reply.status_code == status
    assert reply.json()["message"] == reply.json()["error"]["message"]


def test_limits_are_options(start_any: Start) -> None:
    """Accept a passage of 512 tokens and the largest batch of OpenAI's API; options change the limits."""
    with start_any(timeout=120) as service:
        body = {"input": ["a passage of many words " * 150] * 2048}
        assert len(service.post("/v1/embeddings", body).json()["data"]) == 2048
    with start_any(max_inputs=2, max_characters=5) as service:
        for texts, message in (
            (["a"] * 3, "--max-inputs"),
            (["a red"], ""),
            (["circle"], "--max-characters"),
        ):
            reply = service.post("/v1/embeddings", {"input": texts})
            assert reply.status_code == (422 if message else 200)
            assert message in reply.text


def test_addresses_methods_and_types(served_any: Running) -> None:
    assert (
        served_any.get("/v1/nothing").status_code,
        served_any.get("/v1/rerank").status_code,
    ) == (
        404,
        405,
    )
    assert "GET /v1/nothing" in served_any.get("/v1/nothing").json()["message"]
    reply = served_any.post("/v1/rerank", GOOD, {"content-type": "text/plain"})
    assert (reply.status_code, "text/plain" in reply.json()["message"]) == (415, True)


def test_a_page_of_the_web_cannot_speak_for_a_browser(served: Running) -> None:
    for host in ("localhost:1234", "[::1]:1234", "[::1]", "127.0.0.1"):
        assert served.get("/health", {"host": host}).status_code == 200
    for host in (
        "evil.example:80",
        "[::1].evil.com",
        "localhost.evil.com",
        "127.0.0.1@evil.com",
        "[::1",
        "[]",
        ":",
    ):
        assert served.get("/health", {"host": host}).status_code == 403, host


def test_the_api_key_is_required(start: Start) -> None:
    with start(api_key="of-gold") as service:
        for headers in (
            {},
            {"authorization": "Bearer of-silver"},
            {"authorization": "Basic of-gold"},
        ):
            assert service.post("/v1/rerank", GOOD, headers).status_code == 401
        assert (
            service.post("/v1/rerank", GOOD, {"authorization": "Bearer of-gold"}).status_code == 200
        )
        assert service.get("/metrics").status_code == 401
        for probe in ("/live", "/health", "/ready"):
            assert service.get(probe).status_code == 200
        described = service.get("/openapi.json", {"authorization": "Bearer of-gold"}).json()
        assert all(
            call["security"] for methods in described["paths"].values() for call in methods.values()
        )


def test_bodies_are_bounded(start_any: Start) -> None:
    """Limit one body, with or without a declared length, and all bodies: eight fit at once, not nine."""
    with start_any(memory_mb=16) as service:
        reply = service.post("/v1/rerank", bytes(20 << 20))
        assert (reply.status_code, "1,048,576 bytes" in reply.json()["message"]) == (413, True)
        with service.connect() as sock:
            head = (
                "POST /v1/rerank HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            )
            sock.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
            for _ in range(18):
                sock.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            assert b"413" in sock.recv(100)
        socks = [service.connect() for _ in range(9)]
        heard = b""

        def refused() -> bool:
            nonlocal heard
            for sock in socks:
                with suppress(TimeoutError):
                    heard += sock.recv(4096)
            return b"429" in heard

        for sock in socks:
            sock.sendall(raw("/v1/rerank", bytes(1 << 20))[:-1])
            sock.settimeout(0.02)
        assert until(refused)
        for sock in socks:
            sock.close()
        assert until(lambda: not service.service.ledger.used)
        still_good(service)


class Paused:
    """Pauses the model of a service: `begun` is set when it begins, and it waits for `go`."""

    def __init__(self, service: Running) -> None:
        self.begun, self.go, self.works = threading.Event(), threading.Event(), list[Work]()
        self._answer = service.batcher.run
        service.batcher.run = self

    def __call__(self, works: Sequence[Work]) -> Sequence[Any]:
        self.works += works
        self.begun.set()
        self.go.wait(60)
        return self._answer(works)


def test_a_full_queue_is_429(start_any: Start) -> None:
    with start_any(max_queue=2) as service, ThreadPoolExecutor(2) as threads:
        paused = Paused(service)
        replies = [threads.submit(service.post, "/v1/rerank", GOOD) for _ in range(2)]
        assert paused.begun.wait(60)
        assert until(lambda: b"xfm_active_requests 2.0" in service.get("/metrics").content)
        reply = service.post("/v1/rerank", GOOD)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
        assert service.get("/health").status_code == 200
        paused.go.set()
        assert [future.result().status_code for future in replies] == [200, 200]
        still_good(service)


def test_late_requests_are_504_and_slow_bodies_408(start_any: Start) -> None:
    with start_any(timeout=0.3) as service:
        paused = Paused(service)
        # The second one is not begun, since nobody waits for it any more.
        for _ in range(2):
            assert service.post("/v1/rerank", GOOD).status_code == 504
        with service.connect() as sock:
            sock.sendall(raw("/v1/rerank", b"{" * 100)[:-99])
            assert b"408" in sock.recv(4096)
        paused.go.set()
    assert len(paused.works) == 1


def test_decoding_ends_with_the_request(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def slow(source: bytes, size: int, name: str | None = None) -> Any:
        seen.append(str(name))
        time.sleep(0.1)
        return load_image(source, size, name)

    body = json.dumps({"query": "a", "documents": [image(seed) for seed in range(60)]}).encode()
    with start(timeout=0.4) as service:
        monkeypatch.setattr(ranking, "load_image", slow)
        assert service.post("/v1/rerank", body).status_code == 504
        assert until(lambda: not service.service.ledger.used)
        assert until(lambda: len(service.batcher) == 0)
        assert service.get("/health").status_code == 200
    assert 0 < len(seen) < 60


def test_work_of_a_client_that_left_is_not_begun(start_any: Start) -> None:
    with start_any() as service, ThreadPoolExecutor(1) as threads:
        paused = Paused(service)
        first = threads.submit(service.post, "/v1/rerank", GOOD)
        assert paused.begun.wait(60)
        with service.connect() as sock:
            sock.sendall(raw("/v1/rerank", json.dumps(GOOD).encode()))
            assert until(lambda: len(service.batcher) == 1)
        assert until(lambda: b"xfm_active_requests 1.0" in service.get("/metrics").content)
        paused.go.set()
        assert first.result().status_code == 200
        assert until(lambda: not len(service.batcher))
        assert len(paused.works) == 1
        still_good(service)


def test_a_damaged_image_fails_only_its_own_request(start_any: Start) -> None:
    damaged = bytearray(photo(1))
    damaged[len(damaged) // 2] ^= 255
    body = [with_image(data_url(content)) for content in (photo(2), bytes(damaged), photo(3))]
    with start_any(timeout=60) as service, ThreadPoolExecutor(4) as threads:
        paused = Paused(service)
        first = threads.submit(service.post, "/v1/rerank", GOOD)
        assert paused.begun.wait(60)
        replies = [threads.submit(service.post, "/v1/rerank", content) for content in body]
        assert until(lambda: len(service.batcher) == 3)
        paused.go.set()
        assert [reply.result().status_code for reply in (first, *replies)] == [200, 200, 422, 200]
        # The three were computed together.
        assert len(paused.works) == 4


def test_an_internal_error_is_500(served_any: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        # `None` is no function.
        patched.setattr(served_any.batcher, "run", None)
        reply = served_any.post("/v1/rerank", GOOD)
        assert reply.status_code == 500
        assert "TypeError" in reply.json()["message"]
    still_good(served_any)
