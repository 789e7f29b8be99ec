"""Clients that do nothing, or never finish, beside good ones, which get their answers; all that is held is counted."""

from __future__ import annotations

import gc
import json
import re
import socket
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.serve.conftest import (
    CAPTIONS,
    Start,
    data_url,
    get,
    image,
    photo,
    post,
    process,
    raw,
    scores,
    until,
)
from tests.serve.test_limits import GOOD, Paused, still_good
from xfm_fast.models.xfm import XFM

HEAD = b"POST /v1/rerank HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
UNREAD = {"query": "a", "documents": ["a red circle " * 2500] * 60, "return_documents": True}
MEGABYTE = 1 << 20


def connect(port: int, sent: bytes = b"", window: int = 4096) -> socket.socket:
    """Connect with a small window, so that an answer stays in the service."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    sock.settimeout(60)
    sock.connect(("127.0.0.1", port))
    sock.sendall(sent)
    return sock


def ended(sock: socket.socket) -> bool:
    """Return whether the service has closed a connection, after reading its bytes."""
    sock.settimeout(0.001)
    with suppress(TimeoutError):
        try:
            while sock.recv(1 << 16):
                pass
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
        return True
    return False


# What a client sends before it waits for ever; the byte that it then goes on to send, if any.
WAITING: dict[str, tuple[bytes, bytes]] = {
    "nothing": (b"", b""),
    "half a head": (b"POST /v1/rerank HT", b""),
    "a header without end": (HEAD + b"x: ", b"x"),
    "a slow body": (HEAD + b"content-length: 1000000\r\n\r\n", b" "),
    "the body of what was refused": (
        HEAD.replace(b"json", b"xml") + b"content-length: 1000000\r\n\r\n",
        b" ",
    ),
    "the body of a probe": (
        b"GET /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n",
        b" ",
    ),
    "half a second request": (b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea", b"l"),
}


@pytest.mark.parametrize("name", WAITING)
def test_a_client_that_never_finishes_is_dropped(start_any: Start, name: str) -> None:
    sent, more = WAITING[name]
    with start_any(timeout=1) as service, connect(service.port, sent) as sock:

        def dropped() -> bool:
            with suppress(OSError):
                sock.sendall(more)
            return ended(sock)

        assert until(dropped)
        assert until(lambda: not service.service.ledger.used)
        # A machine that is busy may be late.
        assert until(lambda: service.post("/v1/rerank", GOOD).status_code == 200)


def test_an_answer_is_held_until_it_is_read_or_its_client_dropped(start_any: Start) -> None:
    body = json.dumps(UNREAD).encode()
    with start_any(timeout=4) as service, connect(service.port, raw("/v1/rerank", body)) as unread:
        ledger = service.service.ledger
        assert until(lambda: b"200 OK" in unread.recv(15, socket.MSG_PEEK))
        # It takes no place in the queue.
        assert until(lambda: not service.service.active)
        assert ledger.used > 2 * len(body)
        assert until(lambda: not ledger.used)
        assert until(lambda: ended(unread))
        with connect(
            service.port, raw("/v1/rerank", body, "connection: close"), window=1 << 20
        ) as sock:
            received = b""
            while piece := sock.recv(1 << 16):
                received += piece
            assert len(json.loads(received.partition(b"\r\n\r\n")[2])["results"]) == 60
        assert until(lambda: not ledger.used)


def test_too_many_connections_keep_nobody_out(
    start_any: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xfm_fast.serve import server

    monkeypatch.setattr(server, "_CONNECTION_LIMIT", 8)
    with start_any(max_queue=2) as service, ExitStack() as stack:
        idle = [
            stack.enter_context(connect(service.port, sent))
            for sent, _ in WAITING.values()
            for _ in range(4)
        ]
        for _ in range(3):
            still_good(service)
            assert service.get("/health").status_code == 200
            idle += [stack.enter_context(connect(service.port)) for _ in range(4)]
        assert until(lambda: sum(not ended(sock) for sock in idle) <= 10)
        # The oldest have gone.
        assert all(map(ended, idle[:20]))
        assert not ended(idle[-1])


def test_slow_bodies_give_way_where_others_need_their_memory(start_any: Start) -> None:
    with start_any(memory_mb=16, timeout=10) as service, ExitStack() as stack:
        body = b"{" + b" " * (MEGABYTE - 2)
        slow = [
            stack.enter_context(connect(service.port, raw("/v1/rerank", body + b"}")[:-1]))
            for _ in range(8)
        ]
        ledger = service.service.ledger
        assert until(lambda: ledger.used >= 15 * MEGABYTE)
        large = {**GOOD, "documents": ["a blue square " * 2000] * 20}

        def answered() -> bool:
            status = service.post("/v1/rerank", large).status_code
            assert status in (200, 429)
            return status == 200

        assert until(answered)
        slow[0].settimeout(60)
        assert b" 429 " in slow[0].recv(100)
        still_good(service)
    assert not ledger.arriving


def padded(field: str) -> bytes:
    """Make a request with a field that is ignored."""
    return f'{{"query": "a red circle", "documents": ["a blue square"], "other": {field}}}'.encode()


# Bodies that hold many times more, once they are parsed.
HEAVY: dict[str, Callable[[int], bytes]] = {
    "objects": lambda seed: padded("[" + ",".join(['{"a":0}'] * 15_000) + "]"),
    "empty keys": lambda seed: padded("[" + ",".join(['{"":{"":0}}'] * 10_000) + "]"),
    "lists": lambda seed: padded("[" + ",".join(["[0]"] * 30_000) + "]"),
    "numbers": lambda seed: padded("[" + ",".join(["0.1"] * 32_000) + "]"),
    "keys": lambda seed: padded("{" + ",".join(f'"{key:x}":0' for key in range(12_000)) + "}"),
    "wide": lambda seed: padded('"\U0001f600' + "a" * 500_000 + '"'),
    "escaped": lambda seed: padded('"\\ud83d\\ude00' + "a" * 500_000 + '"'),
    "Chinese": lambda seed: padded('"' + "\u6f22" * 170_000 + '"'),
    "images": lambda seed: json.dumps(
        {"query": "a", "documents": [{"image": data_url(photo(100 * seed + offset, 90, 80))} for offset in range(16)]}
    ).encode(),
    "texts": lambda seed: json.dumps({"query": "a", "documents": ["a " * 16_000] * 16}).encode(),
}  # fmt: skip


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Return a function that measures the growth of Python objects in bytes."""
    tracemalloc.start()
    try:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        yield lambda: tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", HEAVY)
def test_the_ledger_counts_what_requests_hold(start_any: Start, name: str) -> None:
    """In the model, in its queue, and once their clients have left."""
    bodies = [raw("/v1/rerank", HEAVY[name](index)) for index in range(5)]
    with start_any(memory_mb=1024, timeout=60) as service, ExitStack() as stack:
        ledger, batcher = service.service.ledger, service.batcher
        # What is made once, is made before.
        assert service.post("/v1/rerank", HEAVY[name](9)).status_code == 200
        paused = Paused(service)
        with traced() as held:
            tracemalloc.reset_peak()
            socks = [connect(service.port, bodies[0])]
            stack.enter_context(socks[0])
            assert paused.begun.wait(60)
            for index, body in enumerate(bodies[1:], 1):
                socks.append(stack.enter_context(connect(service.port, body)))
                assert until(lambda index=index: len(batcher) == index)
            assert until(lambda: all(account.submitted for account in service.service.active))
            assert held() <= ledger.used + MEGABYTE
            # Nor did they take more while they were read.
            assert tracemalloc.get_traced_memory()[1] <= ledger.used + MEGABYTE
            for sock in socks:
                sock.close()
            # Those that wait are dropped; the one that the model works on is not.
            assert until(lambda: not service.service.active)
            assert until(lambda: len(batcher) == 0)
            assert ledger.used > 0
            assert held() <= ledger.used + MEGABYTE
            paused.works.clear()
            paused.go.set()
            assert until(lambda: not ledger.used)
            assert until(lambda: held() <= MEGABYTE)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (GOOD, 200),
        ({"query": "a"}, 422),
        (b"{", 400),
        ({"query": "a", "documents": ["b"], "model": "another"}, 404),
        (b" " * 3_000_000, 413),
    ],
)
def test_nothing_names_a_request_after_its_answer(
    start_any: Start, monkeypatch: pytest.MonkeyPatch, content: Any, status: int
) -> None:
    """Without a collection of cycles: until one, their bytes would be held and not counted."""
    from xfm_fast.serve import app

    references: list[weakref.ref[Any]] = []

    class Account(app.Account):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            references.append(weakref.ref(self))

    monkeypatch.setattr(app, "Account", Account)
    with start_any(memory_mb=32, timeout=1) as service, httpx.Client() as client:
        gc.disable()
        try:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            url, headers = (
                f"http://127.0.0.1:{service.port}/v1/rerank",
                {"content-type": "application/json"},
            )
            # On a connection that stays open.
            assert until(
                lambda: client.post(url, content=body, headers=headers).status_code == status
            )
            with connect(service.port, raw("/v1/rerank", body)[:-1]) as sock:
                assert until(lambda: ended(sock))
            paused = Paused(service)
            if status == 200:
                assert client.post(url, content=body, headers=headers).status_code == 504
                assert len(references) >= 3
                paused.go.set()
                # Work knows whether its request goes on.
                assert paused.works
                paused.works.clear()
            assert until(lambda: not any(reference() for reference in references))
        finally:
            gc.enable()


class Crowd:
    """Hostile clients of every kind in threads, until `stop`."""

    def __init__(self, port: int, silent: int, clients: int) -> None:
        self.port, self.stop = port, threading.Event()
        self._silent = silent
        shared = json.dumps(
            {"query": CAPTIONS[0], "documents": [image(seed) for seed in range(6)]}
        ).encode()
        leaving = [HEAVY["images"](index) for index in range(clients)]
        self._clients: list[Callable[[int], object]] = []
        for index in range(clients):
            self._clients += [
                lambda turn: self._wait(
                    connect(port, HEAD + b"content-length: 900000\r\n\r\n" + b" " * 800_000)
                ),
                lambda turn, index=index: self._leave(leaving[index], turn),
                lambda turn: self._leave(shared, turn),
                lambda turn: self._wait(
                    connect(port, raw("/v1/rerank", json.dumps(UNREAD).encode()))
                ),
                lambda turn: self._leave(HEAVY["objects"](turn), 9),
            ]

    def __enter__(self) -> Crowd:
        self._idle = [
            connect(self.port, b"POST /v1" * (index % 2)) for index in range(self._silent)
        ]
        self._threads = [
            threading.Thread(target=self._run, args=(client,)) for client in self._clients
        ]
        for thread in self._threads:
            thread.start()
        return self

    def leave(self) -> None:
        """End all but those that are silent."""
        self.stop.set()
        for thread in self._threads:
            thread.join(60)

    def __exit__(self, *_: object) -> None:
        self.leave()
        for sock in self._idle:
            sock.close()

    def _run(self, client: Callable[[int], object]) -> None:
        for turn in range(10_000):
            if self.stop.is_set():
                return
            with suppress(OSError):
                client(turn)

    def _wait(self, sock: socket.socket) -> None:
        with sock:
            self.stop.wait(8)

    def _leave(self, body: bytes, turn: int) -> None:
        with connect(self.port, raw("/v1/rerank", body)):
            self.stop.wait(0.02 * (turn % 10))
        # As many as the service has time for: this is no flood.
        self.stop.wait(1)


def gauge(port: int, name: str) -> int:
    match = re.search(rf"^{name} (\S+)$", get(port, "/metrics").text, re.MULTILINE)
    assert match
    return int(float(match[1]))


def descriptors(pid: int) -> int:
    return len([*Path(f"/proc/{pid}/fd").iterdir()])


_MEMORY_MB = 256


def _offline(request: pytest.FixtureRequest, family: str) -> tuple[Path, Callable[[Path], Any]]:
    """Return the folder of a model, and a function that compares an image with the captions as the service does."""
    if family == "tiny-xfm":
        model: XFM = request.getfixturevalue("model")
        return request.getfixturevalue("weights"), lambda path: model.match(path, CAPTIONS)
    library = pytest.importorskip("sentence_transformers")
    folder = request.getfixturevalue("clip")
    clip = library.SentenceTransformer(str(folder), device="cpu")

    def compare(path: Path) -> Any:
        feature = clip.encode(Image.open(path).convert("RGB"), normalize_embeddings=True)
        return (1 + clip.encode(CAPTIONS, normalize_embeddings=True) @ feature) / 2

    return folder, compare


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="descriptors of another process are read from /proc"
)
@pytest.mark.parametrize("family", ["tiny-xfm", pytest.param("tiny-clip", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("silent", "clients", "seconds"),
    [(40, 1, 3), pytest.param(900, 4, 60, marks=pytest.mark.slow)],
    ids=["few", "many"],
)
def test_good_clients_beside_hostile_ones(
    request: pytest.FixtureRequest,
    family: str,
    tmp_path: Path,
    silent: int,
    clients: int,
    seconds: int,
) -> None:
    """Check that good clients get the right answers, memory follows the ledger, and everything is released."""
    folder, match = _offline(request, family)
    good: list[tuple[bytes, Any]] = []
    for seed in range(6):
        path = tmp_path / f"{seed}.png"
        path.write_bytes(photo(seed))
        body = {"query": image(seed), "documents": CAPTIONS}
        good.append((json.dumps(body).encode(), match(path)))
    answers: list[tuple[int, Any]] = []
    samples: list[tuple[int, int]] = []

    def be_good(index: int) -> None:
        for turn in range(10_000):
            if crowd.stop.is_set():
                return
            position = (index + turn) % len(good)
            reply = post(port, "/v1/rerank", good[position][0])
            answers.append((reply.status_code, (reply.json(), position)))
            if reply.status_code != 200:
                time.sleep(0.2)

    with process(folder, "--memory-mb", _MEMORY_MB, "--cache-mb", 0, "--timeout", 5) as (
        begun,
        port,
    ):
        for body, _ in good:
            assert post(port, "/v1/rerank", body).status_code == 200
        opened, before = descriptors(begun.pid), gauge(port, "xfm_process_resident_bytes")
        peak = 0
        with Crowd(port, silent, clients) as crowd, ThreadPoolExecutor(2) as threads:
            done = [threads.submit(be_good, index) for index in range(2)]
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.1)
                assert get(port, "/health").status_code == 200
                samples.append(
                    (
                        gauge(port, "xfm_request_bytes"),
                        gauge(port, "xfm_process_resident_bytes") - before,
                    )
                )
                peak = max(peak, descriptors(begun.pid) - opened)
            crowd.leave()
            for future in done:
                future.result()
            began = time.monotonic()
            assert until(lambda: gauge(port, "xfm_request_bytes") == 0)
            # While silent clients are still there.
            assert until(lambda: descriptors(begun.pid) <= opened + 2)
            recovered = time.monotonic() - began
        after = gauge(port, "xfm_process_resident_bytes") - before
    compared = 0
    for status, (answer, position) in answers:
        # A machine that is busy may be late.
        assert status in (200, 429, 504), answer
        if status == 200:
            np.testing.assert_allclose(
                scores(answer), good[position][1].tolist(), rtol=0, atol=1e-5
            )
            compared += 1
    ledger, grown = (max(column) for column in zip(*samples, strict=True))
    print(
        f"{compared} of {len(answers)} good answers compared; up to {peak} more descriptors, {ledger >> 20} MB in the "
        f"ledger, {grown >> 20} MB more resident; {recovered:.1f} s later {after >> 20} MB more are resident"
    )
    assert compared >= 4
    assert ledger <= _MEMORY_MB * MEGABYTE
    # What is decoded and computed, and what the allocator keeps, are no part of the ledger.
    assert grown <= ledger + 128 * MEGABYTE
