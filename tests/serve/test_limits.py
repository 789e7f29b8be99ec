"""Bad requests get a sentence with a 4xx, and the service goes on."""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest

from tests.serve.bodies import chunk
from tests.serve.conftest import Running, Start, data_url, image, photo, raw, until
from xfm_fast.data.images import load_image
from xfm_fast.serve.model import Found, ServedModel, Work
from xfm_fast.tasks import ranking

GOOD = {"query": "a red circle", "documents": ["a blue square"]}


def still_good(service: Running) -> None:
    assert service.post("/v1/rerank", GOOD).status == 200


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header says more pixels than there are."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def with_image(value: str) -> dict[str, Any]:
    return {"query": "a red circle", "documents": [{"image": value}]}


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 400, "not valid JSON"),
        (b"", 400, "not valid JSON"),
        (b"\xff\xfe{}", 400, "not valid JSON"),
        (b"[]", 400, "is a list"),
        (b'{"query": ' + b"[" * 1000, 400, "64"),
        (b'{"query": "\\ud800", "documents": ["a"]}', 400, "surrogate"),
        ({"documents": ["a"]}, 422, "query: "),
        ({"query": "a"}, 422, "documents: "),
        ({"query": "a", "documents": []}, 422, "documents: "),
        ({"query": "a", "documents": "b"}, 422, "documents: "),
        ({"query": "a", "documents": ["b", 3]}, 422, "documents[1]"),
        ({"query": "a", "documents": [{}]}, 422, "documents[0]: "),
        ({"query": "a", "documents": [{"text": "a", "image": "b"}]}, 422, "documents[0]: "),
        ({"query": "a", "documents": ["b"], "top_n": 0}, 422, "top_n: "),
        ({"query": "a", "documents": ["b"] * 41}, 422, "documents holds 41 items"),
        ({"query": "a" * 2001, "documents": ["b"]}, 422, "query has 2,001 characters"),
        ({"query": "?!", "documents": ["b"]}, 422, "query: caption '?!'"),
        ({"query": "a", "documents": ["b", ""]}, 422, "documents[1]: caption ''"),
        ({"query": "a", "documents": ["b"], "model": "gpt-4"}, 404, "'gpt-4'"),
        ({"query": "a", "documents": ["b", image(1)]}, 422, "two requests"),
        (with_image("data:image/png;base64"), 422, "documents[0]"),
        (with_image("data:image/png,abc"), 422, "documents[0]"),
        (with_image("data:text/plain;base64,aGVsbG8="), 422, "'text/plain'"),
        (with_image("data:image/png;base64,%%%"), 422, "'%%%'"),
        (with_image("data:image/png;base64,aGVsbG8"), 422, "documents[0]"),
        (with_image("data:image/png;base64,"), 422, "documents[0]"),
        (with_image("no base64 at all"), 422, "documents[0]"),
        (with_image("böse"), 422, "documents[0]"),
        (with_image(data_url(b"a text file as an image")), 422, "documents[0]"),
        (with_image(data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n")), 422, "documents[0]"),
        (with_image(data_url(photo(1)[:200])), 422, "documents[0]"),
        (with_image(data_url(b"\xff\xd8\xff and no photograph")), 422, "documents[0]"),
        (with_image(data_url(huge_png(60_000, 60_000))), 413, "is 60000x60000"),
        (with_image(data_url(huge_png(500, 500))), 413, "is 500x500"),
        (with_image(data_url(huge_png(400, 400))), 422, "documents[0]"),
        (with_image("http://169.254.169.254/latest/meta-data"), 422, "--allow-urls"),
        (with_image("file:///etc/passwd"), 422, "documents[0]"),
    ],
)  # fmt: skip
def test_rerank_says_what_is_wrong(served: Running, content: Any, status: int, message: str) -> None:
    reply = served.post("/v1/rerank", content)
    assert message in reply.message
    assert reply.status == status
    assert reply.json["message"] == reply.message
    still_good(served)


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("/v1/embeddings", {"input": [1, 2]}, "token ids"),
        ("/v1/embeddings", {"input": [[1, 2]]}, "token ids"),
        ("/v1/embeddings", {"input": "a", "dimensions": 5}, "dimensions=5"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format: "),
        ("/v1/embeddings", {"input": []}, "input: "),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1 has 2"),
        ("/v1/score", {"text_1": "a", "text_2": ["c", image(1)]}, "two requests"),
    ],
)
def test_others_say_what_is_wrong(served: Running, path: str, content: Any, message: str) -> None:
    reply = served.post(path, content)
    assert message in reply.message
    assert reply.status == 422


def test_addresses_methods_and_types(served: Running) -> None:
    assert (served.get("/v1/nothing").status, served.get("/v1/rerank").status) == (404, 405)
    assert "GET /v1/nothing" in served.get("/v1/nothing").message
    reply = served.ask("POST", "/v1/rerank", json.dumps(GOOD).encode(), {"content-type": "text/plain"})
    assert (reply.status, "text/plain" in reply.message) == (415, True)


def test_a_page_of_the_web_cannot_speak_for_a_browser(served: Running) -> None:
    reply = served.get("/v1/models", {"host": "evil.example:80"})
    assert reply.status == 403
    assert "'evil.example:80'" in reply.message
    for host in ("localhost:1234", "[::1]:1234", "[::1]", "127.0.0.1"):
        assert served.get("/health", {"host": host}).status == 200
    for host in ("[::1].evil.com", "[::1]x:80", "localhost.evil.com", "127.0.0.1@evil.com", "[::1", "[]", ":"):
        assert served.get("/health", {"host": host}).status == 403, host


def test_no_answer_is_taken_for_another_type(served: Running) -> None:
    for path in ("/docs", "/openapi.json", "/metrics", "/v1/nothing"):
        assert served.get(path).headers["x-content-type-options"] == "nosniff"


def test_base64_in_lines(served: Running) -> None:
    lines = base64.encodebytes(photo(1)).decode()
    for value in (lines, f"data:image/png;base64,{lines}", lines.replace("\n", "\r\n")):
        assert served.post("/v1/rerank", with_image(value)).status == 200


def test_the_key_is_asked_for(start: Start) -> None:
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


def _received(sock: socket.socket, seconds: float = 60.0) -> bytes:
    """All that comes until the other side closes."""
    sock.settimeout(seconds)
    heard = b""
    try:
        while piece := sock.recv(4096):
            heard += piece
    except ConnectionResetError:
        pass
    return heard


def test_slow_clients_are_disconnected(start: Start) -> None:
    with start(read_timeout=1.0) as service:
        with service.connect() as silent, service.connect() as head, service.connect() as body:
            head.sendall(b"POST /v1/rer")
            body.sendall(raw("/v1/rerank", b"{" * 100)[:-99])
            assert b"408" in _received(body)
            assert (_received(silent), _received(head)) == (b"", b"")
        assert service.get("/health").status == 200


def test_a_client_that_reads_no_answer_is_cut_off(start: Start) -> None:
    with start(read_timeout=0.5, max_documents=256) as service, service.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"input": ["a red circle"] * 256}).encode()
        # One after the other without waiting: the answers are more than the buffers of the system hold.
        sock.sendall(raw("/v1/embeddings", body) * 100)
        connections = service.server.server_state.connections
        assert until(lambda: any(each.transport.get_write_buffer_size() for each in connections))
        assert until(lambda: not connections), "the connection is still kept"


Answer = Callable[[Sequence[Work]], list[Found | Exception]]


def paused(service: Running, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Pauses the model: it sets the first event when it begins, and waits for the second."""
    asked, go = threading.Event(), threading.Event()
    answer: Answer = service.service.batcher._run  # pyright: ignore[reportAssignmentType]

    def waiting(works: Sequence[Work]) -> list[Found | Exception]:
        asked.set()
        go.wait(60)
        return answer(works)

    monkeypatch.setattr(service.service.batcher, "_run", waiting)
    return asked, go


def test_a_full_queue_says_so_and_drains(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(max_queue=2) as service:
        asked, go = paused(service, monkeypatch)
        replies: list[int] = []
        threads = [
            threading.Thread(target=lambda: replies.append(service.post("/v1/rerank", GOOD).status)) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        assert asked.wait(60)
        assert until(lambda: b"xfm_active_requests 2.0" in service.get("/metrics").body)
        reply = service.post("/v1/rerank", GOOD)
        assert (reply.status, reply.headers["retry-after"]) == (429, "1")
        assert "2 requests" in reply.message
        assert service.get("/health").status == 200
        go.set()
        for thread in threads:
            thread.join(60)
        assert replies == [200, 200]
        still_good(service)


def test_what_takes_too_long_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(timeout=0.3) as service:
        _, go = paused(service, monkeypatch)
        reply = service.post("/v1/rerank", GOOD)
        assert (reply.status, "0.3 s" in reply.message) == (504, True)
        # Its successor waits behind it and is not begun, once nobody waits for it.
        assert service.post("/v1/rerank", GOOD).status == 504
        go.set()


@pytest.mark.parametrize("leaves", [False, True], ids=["deadline", "disconnect"])
def test_reading_and_decoding_end_with_the_request(
    start: Start, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:  # fmt: skip
    """A request that ended reads and decodes no further images."""
    seen: list[str] = []
    body = json.dumps({"query": "a", "documents": [image(seed) for seed in range(40)]}).encode()

    def slow(source: bytes, size: int, name: str | None = None) -> Any:
        seen.append(str(name))
        time.sleep(0.2)
        return load_image(source, size, name)

    def read(model: ServedModel, content: bytes, name: str) -> Any:
        seen.append(name)
        time.sleep(0.02)
        return model.ranker.picture(content, name)

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


def test_work_of_a_client_that_left_is_not_begun(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with start() as service:
        asked, go = paused(service, monkeypatch)
        first = threading.Thread(target=service.post, args=("/v1/rerank", GOOD))
        first.start()
        assert asked.wait(60)
        body = json.dumps(GOOD).encode()
        with service.connect() as sock:
            sock.sendall(raw("/v1/rerank", body))
            assert until(lambda: len(service.service.batcher) == 1)
            (waiting,) = service.service.batcher._queue
        assert until(lambda: waiting.given_up)
        go.set()
        first.join(60)
        still_good(service)


def test_an_internal_error_is_500(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with start() as service:

        def broken(works: Sequence[Work]) -> list[Found | Exception]:
            raise RuntimeError("a cable fell out")

        with monkeypatch.context() as patch:
            patch.setattr(service.service.batcher, "_run", broken)
            reply = service.post("/v1/rerank", GOOD)
        assert reply.status == 500
        assert "RuntimeError: a cable fell out" in reply.message
        still_good(service)


def test_base64_that_was_cut_is_refused(served: Running) -> None:
    text = base64.b64encode(photo(1)).decode()
    for cut in range(1, 4):
        reply = served.post("/v1/rerank", with_image(f"data:image/png;base64,{text[:-cut]}"))
        assert reply.status == 422
