"""`xfm-fast serve` as a process: it starts, is asked, and ends in order; and what it refuses to serve."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.cli.runner import invoke
from tests.conftest import config, golden, load_tensors
from tests.serve.conftest import image, photo, raw, running, until
from xfm_fast.errors import InputError, UnavailableError, XFMError
from xfm_fast.models.xfm import XFM

pytest.importorskip("fastapi", reason="the extra 'serve'")
pytest.importorskip("uvicorn", reason="the extra 'serve'")
pytest.importorskip("prometheus_client", reason="the extra 'serve'")

from xfm_fast.serve import Service, ServiceOptions, SourceOptions, bind, load

CAPTIONS = ["a red circle", "two blue squares", "a green triangle"]


@contextmanager
def process(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A service in a process of its own, and its port."""
    command = [sys.executable, "-m", "xfm_fast", "serve", *map(str, arguments), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as begun:
        try:
            assert begun.stdout is not None
            line = begun.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            assert found, line + (begun.stderr.read() if begun.stderr and not line else "")
            yield begun, int(found[1])
        finally:
            begun.kill()


def post(port: int, path: str, content: Any) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, json.dumps(content), {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_random_weights_are_said_and_what_is_in_work_is_answered_after_sigterm() -> None:
    with process("--random", "tiny") as (begun, port):
        # A body of which the last byte comes after the signal.
        body = json.dumps({"query": CAPTIONS[0], "documents": CAPTIONS}).encode()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            sock.sendall(raw("/v1/rerank", body)[:-1])
            status, answer = post(port, "/v1/rerank", {"query": "a red circle", "documents": [image(1), image(2)]})
            assert status == 200
            assert "THE WEIGHTS ARE RANDOM" in answer["warning"]
            begun.send_signal(signal.SIGTERM)
            assert until(lambda: not listening(port)), "it still takes connections"
            assert begun.poll() is None
            sock.sendall(body[-1:])
            assert b"200 OK" in sock.recv(4096)
        assert begun.wait(60) == 0
        assert begun.stderr is not None
        (line,) = begun.stderr.read().splitlines()
        assert "THE WEIGHTS ARE RANDOM" in line


SLOW = """
import runpy, sys, time
from xfm_fast.serve.model import ServedModel
answer, calls, seconds = ServedModel.answer, [], float(sys.argv.pop())
def slow(model, works):
    # Weights are warmed up by a first call.
    calls.append(works)
    time.sleep(seconds if len(calls) > 1 else 0)
    return answer(model, works)
ServedModel.answer = slow
runpy.run_module("xfm_fast", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("signals", "drain", "seconds", "status"),
    [(["SIGTERM"], 1, 60, 503), (["SIGHUP"], 60, 2, 200), (["SIGINT", "SIGINT"], 60, 60, 503)],
)
def test_requests_in_work_at_the_end_are_answered(signals: list[str], drain: int, seconds: int, status: int) -> None:
    arguments = ("--random", "tiny", "--port", "0", "--device", "cpu", "--drain", drain, seconds)
    command = [sys.executable, "-c", SLOW, "serve", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as begun:
        try:
            assert begun.stdout is not None
            assert begun.stderr is not None
            port = int(re.findall(r"http://127\.0\.0\.1:(\d+)", begun.stdout.readline())[0])
            body = json.dumps({"input": CAPTIONS}).encode()
            request = raw("/v1/embeddings", body, "connection: close")
            with (
                socket.create_connection(("127.0.0.1", port), timeout=60) as computed,
                socket.create_connection(("127.0.0.1", port), timeout=60) as unread,
            ):
                computed.sendall(request)
                if status == 503:
                    unread.sendall(request[:-1])
                active = f"xfm_active_requests {1 + (status == 503)}.0"
                assert until(lambda: active in _metrics(port))
                for name in signals:
                    begun.send_signal(getattr(signal, name))
                    until(lambda: not listening(port))
                assert f"HTTP/1.1 {status} ".encode() in computed.recv(4096)
                if status == 503:
                    assert b"HTTP/1.1 503 " in unread.recv(4096)
            assert begun.wait(30) == 0
            assert "Traceback" not in begun.stderr.read()
        finally:
            begun.kill()


def _metrics(port: int) -> str:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    return connection.getresponse().read().decode()


def test_a_port_in_use_is_found_out_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = invoke(["serve", "nowhere", "--port", taken.getsockname()[1]])
    assert done.exit_code == 2
    assert "--port" in done.stderr


def test_one_line_and_code_2(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "weights.th").write_bytes(b"none")
    for arguments, message in (
        ([], "--random"),
        ([weights, "--random", "tiny"], "--random"),
        ([tmp_path / "nothing"], "nothing"),
        ([tmp_path / "weights.th"], "--tokenizer"),
        ([weights, "--api-key", ""], "API key"),
        ([weights, "--host", "no such host"], "--host no such host"),
        ([weights, "--config", "x.yaml"], "--config x.yaml"),
        ([weights, "--max-queue", "0"], "max-queue"),
        ([weights, "--name", ""], "--name"),
        ([weights, "--memory-mb", "5"], "--memory-mb 5"),
    ):
        done = invoke(["serve", *arguments, *(["--port", 0] if arguments else [])])
        assert done.exit_code == 2
        assert message in done.stderr, done.stderr


def test_models_without_a_tokenizer_or_of_other_tasks(tmp_path: Path, weights: Path) -> None:
    bare = shutil.copytree(weights, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(UnavailableError, match="--tokenizer"):
        load(bare, SourceOptions(device="cpu"), 0)
    with pytest.raises(InputError, match="--random"):
        load(None, SourceOptions(), 0)
    other = shutil.copytree(weights, tmp_path / "other")
    options = {"kind": "text", "classes": ["no", "yes"]}
    (other / "task.json").write_text(json.dumps({"format": 1, "task": options}))
    with pytest.raises(XFMError, match="other"):
        load(other, SourceOptions(device="cpu"), 0)


def test_an_official_checkpoint_is_served(tmp_path: Path) -> None:
    torch.save({"model": load_tensors("tiny_b/weights")}, tmp_path / "official.th")
    # The vocabulary of the golden model has no room for all bytes.
    words = ["<s>", "<pad>", "</s>", "<unk>", "Ġ", *string.ascii_lowercase]
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    source = SourceOptions(tokenizer=tmp_path, config=str(golden("tiny_b/config.json")), device="cpu", name="golden")
    served = load(tmp_path / "official.th", source, 0)
    offline = XFM.from_official(load_tensors("tiny_b/weights"), config("tiny_b"), tokenizer=tmp_path)
    (tmp_path / "1.png").write_bytes(photo(1))
    with running(Service(served, ServiceOptions(port=0))) as service:
        answer = service.post("/v1/score", {"text_1": image(1), "text_2": CAPTIONS, "model": "golden"}).json
    found = [each["score"] for each in answer["data"]]
    np.testing.assert_allclose(found, offline.match(tmp_path / "1.png", CAPTIONS), rtol=0, atol=1e-5)


def test_a_socket_that_another_process_took_meanwhile(weights: Path) -> None:
    from xfm_fast.serve import run

    first = bind(ServiceOptions(port=0))
    port = first.getsockname()[1]
    failed: list[Exception] = []

    def late() -> None:
        try:
            run(weights, SourceOptions(device="cpu"), ServiceOptions(port=port))
        except UnavailableError as error:
            failed.append(error)

    with first:
        first.listen()
        thread = threading.Thread(target=late)
        thread.start()
        thread.join(60)
    assert failed
    assert str(port) in str(failed[0])


def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "xfm_fast.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = invoke(["serve", "--random", "tiny", "--port", 0])
    assert done.exit_code == 2
    assert "uvicorn" in done.stderr
    assert "pip install 'xfm-fast[serve]'" in done.stderr
