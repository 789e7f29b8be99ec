"""`xfm-fast serve` as a process: it starts, is asked, and ends in order; and what it refuses to serve."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import string
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.runner import invoke
from tests.conftest import config, golden, load_tensors
from tests.serve.conftest import CAPTIONS, ask, image, photo, process, raw, running, until
from xfm_fast.errors import InputError, UnavailableError, XFMError
from xfm_fast.models.xfm import XFM
from xfm_fast.serve import Service, ServiceOptions, SourceOptions, load


def listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_random_weights_warn_and_sigterm_waits_for_requests_in_flight() -> None:
    with process("--random", "tiny") as (begun, port):
        # A body of which the last byte comes after the signal.
        body = json.dumps({"query": CAPTIONS[0], "documents": CAPTIONS}).encode()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            sock.sendall(raw("/v1/rerank", body)[:-1])
            asked = json.dumps({"query": "a red circle", "documents": [image(1), image(2)]}).encode()
            reply = ask(port, "POST", "/v1/rerank", asked, {"content-type": "application/json"})
            assert "RANDOM" in reply.json["warning"]
            begun.send_signal(signal.SIGTERM)
            assert until(lambda: not listening(port)), "it still takes connections"
            assert begun.poll() is None
            sock.sendall(body[-1:])
            assert b"200 OK" in sock.recv(4096)
        assert begun.wait(60) == 0
        (line,) = begun.stderr.read().splitlines()
        assert "RANDOM" in line


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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "timeout", "seconds", "status"), [("SIGTERM", 2, 30, 504), ("SIGHUP", 60, 2, 200)])
def test_requests_in_flight_at_the_end_get_a_response(name: str, timeout: int, seconds: int, status: int) -> None:
    with process("--random", "tiny", "--timeout", timeout, seconds, program=("-c", SLOW)) as (begun, port):
        request = raw("/v1/embeddings", json.dumps({"input": CAPTIONS}).encode(), "connection: close")
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            sock.sendall(request)
            assert until(lambda: b"xfm_active_requests 1.0" in ask(port, "GET", "/metrics").body)
            begun.send_signal(getattr(signal, name))
            assert f"HTTP/1.1 {status} ".encode() in sock.recv(4096)
        assert begun.wait(30) == 0
        assert "Traceback" not in begun.stderr.read()


def test_bad_options_exit_with_2(tmp_path: Path, weights: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, message in (
            ([weights, "--port", taken.getsockname()[1]], "--port"),
            ([], "--random"),
            ([tmp_path / "nothing"], "nothing"),
            ([weights, "--api-key", ""], "API key"),
            ([weights, "--host", "no such host"], "--host no such host"),
            ([weights, "--config", "x.yaml"], "--config x.yaml"),
            ([weights, "--max-queue", "0"], "max-queue"),
            ([weights, "--timeout", "inf"], "timeout"),
            ([weights, "--name", ""], "--name"),
            ([weights, "--memory-mb", "5"], "--memory-mb 5"),
            ([weights, "--drain", "5"], "--timeout"),
        ):
            done = invoke(["serve", "--port", 0, *arguments] if arguments else ["serve"])
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


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "xfm_fast.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = invoke(["serve", "--random", "tiny", "--port", 0])
    assert done.exit_code == 2
    assert "uvicorn" in done.stderr
    assert "pip install 'xfm-fast[serve]'" in done.stderr
