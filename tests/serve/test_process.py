"""`xfm-fast serve` as a process: it starts, is asked, and ends in order; and what it refuses to serve."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.cli.runner import invoke
from tests.serve.conftest import CAPTIONS, get, image, post, process, raw, until
from xfm_fast.errors import InputError, UnavailableError, XFMError
from xfm_fast.serve import ServiceOptions, SourceOptions, load
from xfm_fast.serve.server import listen


def listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_the_body_of_an_answer_does_not_wait_for_the_head() -> None:
    with (
        listen(ServiceOptions(port=0)) as sock,
        socket.create_connection(sock.getsockname()) as client,
    ):
        accepted, _ = sock.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert client.getpeername() == accepted.getsockname()


@pytest.mark.slow
def test_random_weights_warn_and_sigterm_waits_for_requests_in_flight() -> None:
    with process("--random", "tiny") as (begun, port):
        # A body of which the last byte comes after the signal.
        body = json.dumps({"query": CAPTIONS[0], "documents": CAPTIONS}).encode()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            sock.sendall(raw("/v1/rerank", body)[:-1])
            request = json.dumps(
                {"query": "a red circle", "documents": [image(1), image(2)]}
            ).encode()
            reply = post(port, "/v1/rerank", request)
            assert "RANDOM" in reply.json()["warning"]
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
from xfm_fast.serve.model import XFMModel
answer, calls, seconds = XFMModel.answer, [], float(sys.argv.pop())
def slow(model, works):
    # Weights are warmed up by a first call.
    calls.append(works)
    time.sleep(seconds if len(calls) > 1 else 0)
    return answer(model, works)
XFMModel.answer = slow
runpy.run_module("xfm_fast", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "timeout", "seconds", "status"), [("SIGTERM", 2, 30, 504), ("SIGHUP", 60, 2, 200)]
)
def test_requests_in_flight_at_the_end_get_a_response(
    name: str, timeout: int, seconds: int, status: int
) -> None:
    with process("--random", "tiny", "--timeout", timeout, seconds, program=("-c", SLOW)) as (
        begun,
        port,
    ):
        request = raw(
            "/v1/embeddings", json.dumps({"input": CAPTIONS}).encode(), "connection: close"
        )
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            sock.sendall(request)
            assert until(lambda: b"xfm_active_requests 1.0" in get(port, "/metrics").content)
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
            ([weights, "--timeout", "inf"], "timeout"),
            ([weights, "--name", "a", "--name", "a"], "--name"),
            ([weights, weights], "--name"),
            ([weights, weights, "--name", "a"], "--name"),
            ([weights, "--memory-mb", "0"], "--memory-mb"),
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
    second = shutil.copytree(weights, tmp_path / "other")
    options = {"kind": "text", "classes": ["no", "yes"]}
    (second / "task.json").write_text(json.dumps({"format": 1, "task": options}))
    with pytest.raises(XFMError, match="other"):
        load(second, SourceOptions(device="cpu"), 0)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "xfm_fast.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = invoke(["serve", "--random", "tiny", "--port", 0])
    assert done.exit_code == 2
    assert "uvicorn" in done.stderr
    assert "pip install '.[serve]'" in done.stderr


def test_the_image_runs_what_there_is() -> None:
    """Its commands fit the CLI, the extras and the probes; it is built elsewhere."""
    import ast
    import re
    import tomllib

    from xfm_fast.cli.app import app
    from xfm_fast.serve.app import _OPEN_PATHS

    root = Path(__file__).resolve().parents[2]
    text = (root / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    steps = [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]
    by_name = dict(steps)
    names = [name for name, _ in steps]
    # Without rights, and after everything is installed.
    assert by_name["USER"] == "xfm"
    assert names.index("USER") > max(n for n, name in enumerate(names) if name == "RUN")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.search(r'pip install "/src\[([\w,]+)\]"', text)
    assert extras is not None
    assert {*extras[1].split(",")} <= {*project["optional-dependencies"]}
    minor = re.search(r"python:3\.(\d+)-slim", by_name["FROM"])
    assert minor is not None
    assert int(minor[1]) >= int(project["requires-python"].removeprefix(">=3."))
    program, *arguments = ast.literal_eval(by_name["ENTRYPOINT"])
    assert program in project["scripts"]
    _, bound, *_ = app.parse_args([*arguments, "org/model"], exit_on_error=False)
    options = bound.arguments["options"]
    assert (options.host, str(options.port)) == ("0.0.0.0", by_name["EXPOSE"])
    assert bound.arguments["models"] == ("org/model",)
    *_, check = ast.literal_eval(by_name["HEALTHCHECK"].partition("CMD ")[2])
    compile(check, "check", "exec")
    assert any(f":{options.port}{path}'" in check for path in _OPEN_PATHS)
