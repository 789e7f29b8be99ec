"""Bad requests get a 4xx that names the thing, and the service goes on."""

from __future__ import annotations

import json
import socket
import threading
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest

from tests.serve.conftest import Running, Start, ask, data_url, image, photo, png, raw, until
from xfm_fast.data.images import load_image
from xfm_fast.serve.model import Found, ServedModel, Work
from xfm_fast.tasks import ranking

GOOD = {"query": "a red circle", "documents": ["a blue square"]}


def still_good(service: Running) -> None:
    assert service.post("/v1/rerank", GOOD).status == 200


def huge_png(width: int, height: int) -> str:
    """A PNG whose header names more pixels than there are."""
    return data_url(png(width, height, zlib.compress(bytes(100))))


def with_image(value: str) -> dict[str, Any]:
    return {"query": "a red circle", "documents": [{"image": value}]}


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", 400, "JSON"),
        (b"\xff\xfe{}", 400, "JSON"),
        (b"[]", 400, "list"),
        (b'{"query": ' + b"[" * 1000, 400, "64"),
        (b'{"query": "\\ud800", "documents": ["a"]}', 400, "surrogate"),
        ({"documents": ["a"]}, 422, "query: "),
        ({"query": "a", "documents": []}, 422, "documents: "),
        ({"query": "a", "documents": "b"}, 422, "documents: "),
        ({"query": "a", "documents": ["b", 3]}, 422, "documents[1]"),
        ({"query": "a", "documents": [{"text": "a", "image": "b"}]}, 422, "documents[0]: "),
        ({"query": "a", "documents": ["b"], "top_n": 0}, 422, "top_n: "),
        ({"query": "a", "documents": ["b"] * 41}, 422, "documents holds 41"),
        ({"query": "a" * 2001, "documents": ["b"]}, 422, "query has 2,001"),
        ({"query": "?!", "documents": ["b"]}, 422, "query: "),
        ({"query": "a", "documents": ["b"], "model": "gpt-4"}, 404, "'gpt-4'"),
        ({"query": "a", "documents": ["b", image(1)]}, 422, "two requests"),
        (with_image("data:image/png;base64"), 422, "documents[0]"),
        (with_image("data:image/png,abc"), 422, "documents[0]"),
        (with_image("data:text/plain;base64,aGVsbG8="), 422, "text/plain"),
        (with_image("data:image/png;base64,%%%"), 422, "%%%"),
        (with_image("data:image/png;base64,aGVsbG8"), 422, "documents[0]"),
        (with_image("data:image/png;base64,"), 422, "documents[0]"),
        (with_image("b\u00f6se"), 422, "documents[0]"),
        (with_image(data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n")), 422, "documents[0]"),
        (with_image(data_url(photo(1)[:200])), 422, "documents[0]"),
        (with_image(data_url(b"\xff\xd8\xff and no photograph")), 422, "documents[0]"),
        (with_image(huge_png(60_000, 60_000)), 413, "60000x60000"),
        (with_image(huge_png(500, 500)), 413, "500x500"),
        (with_image(huge_png(400, 400)), 422, "documents[0]"),
        (with_image("http://169.254.169.254/latest/meta-data"), 422, "--allow-urls"),
        (with_image("file:///etc/passwd"), 422, "documents[0]"),
        *((with_image(data_url(photo(1))[:-cut]), 422, "documents[0]") for cut in (1, 2, 3)),
        ({"input": [[1, 2]]}, 422, "token ids"),
        ({"input": "a", "dimensions": 5}, 422, "dimensions=5"),
        ({"input": "a", "encoding_format": "hex"}, 422, "encoding_format: "),
        ({"text_1": ["a", "b"], "text_2": ["c"]}, 422, "text_1 has 2"),
        ({"text_1": "a", "text_2": ["c", image(1)]}, 422, "two requests"),
    ],
)  # fmt: skip
def test_bad_requests(served: Running, content: Any, status: int, message: str) -> None:
    paths = {"input": "/v1/embeddings", "text_1": "/v1/score"}
    path = next((paths[name] for name in paths if name in str(content)), "/v1/rerank")
    reply = served.post(path, content)
    assert message in reply.message
    assert reply.status == status
    assert reply.json["message"] == reply.message
    still_good(served)


def test_addresses_methods_and_types(served: Running) -> None:
    assert (served.get("/v1/nothing").status, served.get("/v1/rerank").status) == (404, 405)
    assert "GET /v1/nothing" in served.get("/v1/nothing").message
    reply = ask(served.port, "POST", "/v1/rerank", json.dumps(GOOD).encode(), {"content-type": "text/plain"})
    assert (reply.status, "text/plain" in reply.message) == (415, True)


def test_a_page_of_the_web_cannot_speak_for_a_browser(served: Running) -> None:
    reply = served.get("/v1/models", {"host": "evil.example:80"})
    assert reply.status == 403
    assert "'evil.example:80'" in reply.message
    for host in ("localhost:1234", "[::1]:1234", "[::1]", "127.0.0.1"):
        assert served.get("/health", {"host": host}).status == 200
    for host in ("[::1].evil.com", "[::1]x:80", "localhost.evil.com", "127.0.0.1@evil.com", "[::1", "[]", ":"):
        assert served.get("/health", {"host": host}).status == 403, host


def test_no_response_is_sniffed_for_another_type(served: Running) -> None:
    for path in ("/docs", "/openapi.json", "/metrics", "/v1/nothing"):
        assert served.get(path).headers["x-content-type-options"] == "nosniff"


def test_the_api_key_is_required(start: Start) -> None:
    with start(api_key="of-gold") as service:
        for headers in ({}, {"authorization": "Bearer of-silver"}, {"authorization": "Basic of-gold"}):
            reply = service.post("/v1/rerank", GOOD, headers)
            assert reply.status == 401
            assert reply.headers["www-authenticate"] == "Bearer"
        assert service.post("/v1/rerank", GOOD, {"authorization": "Bearer of-gold"}).status == 200
        assert service.get("/metrics").status == 401
        assert (service.get("/health").status, service.get("/ready").status) == (200, 200)
        described = service.get("/openapi.json", {"authorization": "Bearer of-gold"}).json
        assert all(call["security"] for methods in described["paths"].values() for call in methods.values())


def test_bodies_of_a_hundred_megabytes(start: Start) -> None:
    with start(max_body_mb=1) as service:
        reply = service.post("/v1/rerank", bytes(100 << 20))
        assert (reply.status, "1,048,576 bytes" in reply.message) == (413, True)
        # Without a length, it is counted while it comes.
        with service.connect() as sock:
            head = "POST /v1/rerank HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            sock.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
            for _ in range(18):
                sock.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            assert b"413" in sock.recv(100)
        still_good(service)
        assert service.service.memory.used == 0


def test_bodies_together_are_bounded(start: Start) -> None:
    """Eight bodies have room at once; of more, one hears 429 before it is read whole."""
    with start(max_body_mb=1, memory_mb=24) as service:
        socks = [service.connect() for _ in range(9)]
        try:
            for sock in socks:
                sock.sendall(raw("/v1/rerank", bytes(1 << 20))[:-1])
                sock.settimeout(0.02)
            heard = b""

            def refused() -> bool:
                nonlocal heard
                for sock in socks:
                    with suppress(TimeoutError):
                        heard += sock.recv(4096)
                return b"429" in heard

            assert until(refused)
            assert b"bytes" in heard
        finally:
            for sock in socks:
                sock.close()
        assert until(lambda: not service.service.memory.used)
        still_good(service)


def _received(sock: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    sock.settimeout(60.0)
    content = b""
    with suppress(ConnectionResetError):
        while piece := sock.recv(4096):
            content += piece
    return content


def test_slow_clients_are_disconnected(start: Start) -> None:
    with start(read_timeout=1.0) as service:
        with service.connect() as silent, service.connect() as head, service.connect() as body:
            head.sendall(b"POST /v1/rer")
            body.sendall(raw("/v1/rerank", b"{" * 100)[:-99])
            assert b"408" in _received(body)
            assert (_received(silent), _received(head)) == (b"", b"")
        assert service.get("/health").status == 200


def test_a_client_that_reads_no_response_is_disconnected(start: Start) -> None:
    with start(read_timeout=0.5, max_documents=256) as service, service.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"input": ["a red circle"] * 256}).encode()
        # One after the other without waiting: the responses are more than the buffers of the system hold.
        sock.sendall(raw("/v1/embeddings", body) * 100)
        connections = service.server.server_state.connections
        assert until(lambda: any(each.transport.get_write_buffer_size() for each in connections))
        assert until(lambda: not connections), "the connection is still kept"


class Paused:
    """Pauses the model of a service: `begun` is set when it begins, and it waits for `go`."""

    def __init__(self, service: Running) -> None:
        self.begun, self.go, self.works = threading.Event(), threading.Event(), list[Work]()
        self._answer = service.service.batcher.run
        service.service.batcher.run = self

    def __call__(self, works: Sequence[Work]) -> list[Found | Exception]:
        self.works += works
        self.begun.set()
        self.go.wait(60)
        return self._answer(works)  # pyright: ignore[reportReturnType]


def test_a_full_queue_is_429_and_drains(start: Start) -> None:
    with start(max_queue=2) as service:
        paused = Paused(service)
        replies: list[int] = []
        threads = [
            threading.Thread(target=lambda: replies.append(service.post("/v1/rerank", GOOD).status)) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        assert paused.begun.wait(60)
        assert until(lambda: b"xfm_active_requests 2.0" in service.get("/metrics").body)
        reply = service.post("/v1/rerank", GOOD)
        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        assert "2 requests" in reply.message
        assert service.get("/health").status == 200
        paused.go.set()
        for thread in threads:
            thread.join(60)
        assert replies == [200, 200]
        still_good(service)


def test_late_requests_are_504(start: Start) -> None:
    with start(timeout=0.3) as service:
        paused = Paused(service)
        # The second one is not begun, since nobody waits for it any more.
        for _ in range(2):
            reply = service.post("/v1/rerank", GOOD)
            assert (reply.status, "0.3 s" in reply.message) == (504, True)
        paused.go.set()
    assert len(paused.works) == 1


@pytest.mark.parametrize("leaves", [False, True], ids=["deadline", "disconnect"])
def test_reading_and_decoding_end_with_the_request(
    start: Start, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:  # fmt: skip
    """A request that ended reads and decodes no further images."""
    seen: list[str] = []
    body = json.dumps({"query": "a", "documents": [image(seed) for seed in range(40)]}).encode()
    read_image = ServedModel.read_image

    def slow(source: bytes, size: int, name: str | None = None) -> Any:
        seen.append(str(name))
        time.sleep(0.2)
        return load_image(source, size, name)

    def read(model: ServedModel, content: bytes, name: str, *rest: Any) -> Any:
        seen.append(name)
        time.sleep(0.02)
        return read_image(model, content, name, *rest)

    for patch in ((ranking, "load_image", slow), (ServedModel, "read_image", read)):
        with start(timeout=60.0 if leaves else 0.5) as service, monkeypatch.context() as patched:
            patched.setattr(*patch)
            seen.clear()
            if leaves:
                with service.connect() as sock:
                    sock.sendall(raw("/v1/rerank", body))
                    assert until(lambda: bool(seen))
            else:
                assert service.post("/v1/rerank", body).status == 504
            assert until(lambda: not service.service.memory.used)
            assert 0 < len(seen) < 40
            assert service.get("/health").status == 200


def test_work_of_a_client_that_left_is_not_begun(start: Start) -> None:
    with start() as service:
        paused = Paused(service)
        first = threading.Thread(target=service.post, args=("/v1/rerank", GOOD))
        first.start()
        assert paused.begun.wait(60)
        with service.connect() as sock:
            sock.sendall(raw("/v1/rerank", json.dumps(GOOD).encode()))
            assert until(lambda: len(service.service.batcher) == 1)
        assert until(lambda: b"xfm_active_requests 1.0" in service.get("/metrics").body)
        paused.go.set()
        first.join(60)
        assert until(lambda: not len(service.service.batcher))
        assert len(paused.works) == 1
        still_good(service)


def test_an_internal_error_is_500(start: Start) -> None:
    def broken(works: Sequence[Work]) -> list[Found | Exception]:
        raise RuntimeError("a cable fell out")

    with start() as service:
        answer, service.service.batcher.run = service.service.batcher.run, broken
        reply = service.post("/v1/rerank", GOOD)
        assert reply.status == 500
        assert "RuntimeError: a cable fell out" in reply.message
        service.service.batcher.run = answer
        still_good(service)
