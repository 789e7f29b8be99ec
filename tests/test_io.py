"""JSON and YAML of any content are read or refused by `ValueError` in bounds; files are written whole, locks held."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.conftest import STATE, assert_same
from xfm_fast import io
from xfm_fast.checkpoint import load_pretrained_files, read_state_dict, save_pretrained
from xfm_fast.config import XFMConfig
from xfm_fast.data.files import find_files
from xfm_fast.data.files import read_json as read_annotations
from xfm_fast.errors import CheckpointError, DataError, StorageError
from xfm_fast.io import (
    hold,
    is_plain_name,
    open_data,
    open_to_append,
    parse_json,
    parse_yaml,
    read_bytes,
    write_bytes,
)
from xfm_fast.kernels.files import is_stream, write_whole

ROOT = Path(__file__).parents[1]
DEEP = "[" * 20_000
HOSTILE = {
    "deep": (DEEP, "nested"),
    "half a pair": (r'{"a": "\ud800"}', r"half of a surrogate pair, \\ud800"),
    "half a pair as a key": (r'{"\udfff": 1}', r"half of a surrogate pair, \\udfff"),
    "long number": ("1" + "0" * 4000, "more than 64 bits"),
}
LAUGHS = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
)


@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_hostile_texts(parse: Callable[[str], Any], text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}|more than"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("&a [*a]", "nested more than 64 deep"),
        (LAUGHS, "aliases"),
        ("!!timestamp x", "a tag does not fit"),
        ("a: 0x" + "f" * 20, "more than 64 bits"),
        (b"\xff\xfe", "not UTF-8"),
        (" " * (1 << 21), "more than 1,048,576 bytes"),
    ],
)
def test_hostile_yaml(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


def test_only_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a file"):
            read_bytes(path, 10)
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match="not a file"):
            find_files(str(path))
        with pytest.raises(DataError, match="not a file"):
            read_annotations(path, "a list")
        with pytest.raises(CheckpointError, match="not a file"):
            read_state_dict(path)
    (tmp_path / "long").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_bytes(tmp_path / "long", 10)


def test_foreign_files_are_opened_at_once_or_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero"), tmp_path, Path("a\0b")):
        for opened in (open_data, open_to_append):
            with pytest.raises((OSError, ValueError), match=r"not a file|NUL|null"):
                opened(path)
    with pytest.raises(FileNotFoundError):
        open_data(tmp_path / "absent")
    for content in (b"a", b"b"):
        with open_to_append(tmp_path / "new") as file:
            file.write(content)
    with open_data(tmp_path / "new") as file:
        assert file.read() == b"ab"


def test_a_pipe_that_takes_the_name_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(io, "require_file", Path)
    for opened in (open_data, open_to_append):
        with pytest.raises(OSError, match="not a file"):
            opened(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a.onnx", True),
        ("ä", True),
        *((n, False) for n in ("", ".", "..", "a/b", "/a", "a\\b", "a\0", "x" * 256)),
    ],
)
def test_plain_names(name: str, plain: bool) -> None:
    assert is_plain_name(name) == plain


BIGGER = {"w": torch.randn(600, 600)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_pretrained(STATE, XFMConfig.preset("tiny"), tmp_path / "saved")
    return tmp_path / "saved"


def assert_untouched(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_pretrained_files(folder)
    assert loaded.config == XFMConfig.preset("tiny")
    assert_same(loaded.state, STATE)


@pytest.mark.parametrize(("call", "successes"), [("fsync", 1), ("replace", 0)])
def test_a_failing_system_call(
    saved: Path, monkeypatch: pytest.MonkeyPatch, call: str, successes: int
) -> None:
    real, calls = getattr(os, call), 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > successes:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(StorageError, match="No space left") as error:
        save_pretrained(BIGGER, XFMConfig.preset("base"), saved)
    monkeypatch.undo()
    assert str(saved) in str(error.value)
    assert_untouched(saved)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL needs a POSIX system")
def test_a_killed_process_leaves_the_earlier_save(saved: Path) -> None:
    program = f"""
        import os, signal, torch
        from xfm_fast.checkpoint import save_pretrained
        from xfm_fast.config import XFMConfig
        real, calls = os.fsync, 0
        def fsync(handle):
            global calls
            calls += 1
            if calls == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)
        os.fsync = fsync
        save_pretrained({{"w": torch.randn(600, 600)}}, XFMConfig.preset("base"), {str(saved)!r})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    for leftover in saved.glob(".*.tmp"):
        leftover.unlink()
    assert_untouched(saved)


def _write_pair(stream: Path) -> None:
    write_bytes({stream.with_name("beside"): b"new", stream: b"content"})


def _write_one(stream: Path) -> None:
    write_bytes({stream: b"content"})


@pytest.mark.parametrize("write", [_write_pair, lambda path: write_whole(path, b"content")])
def test_streams_are_written_through(tmp_path: Path, write: Callable[[Path], None]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write(pipe)
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    (tmp_path / "beside").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write(full)
    assert (tmp_path / "beside").read_bytes() == b"old"
    assert pipe.is_fifo()
    assert full.is_char_device()
    assert len([*tmp_path.iterdir()]) == 3


@pytest.mark.parametrize("write", [_write_pair, lambda path: write_whole(path, b"content")])
def test_a_pipe_without_a_reader_is_refused(tmp_path: Path, write: Callable[[Path], None]) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no process reads this pipe"):
        write(tmp_path / "pipe")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("write", [_write_one, lambda path: write_whole(path, b"content")])
@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}", "/dev/../dev/fd/{}"])
def test_names_of_open_files_are_written_where_they_stand(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    """As `command /dev/stdout >> FILE` means it; a rename would replace the name of a device."""
    with (tmp_path / "out").open("w+b", buffering=0) as file:
        file.write(b"before ")
        path = Path(name.format(file.fileno()))
        assert is_stream(path)
        write(path)
        file.write(b" after")
    assert (tmp_path / "out").read_bytes() == b"before content after"


def test_standard_streams_are_no_files_to_replace(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        program = (
            "from pathlib import Path; from xfm_fast.kernels.files import *; "
            "print(is_stream(Path('/dev/stdout')))"
        )
        subprocess.run([sys.executable, "-c", program], stdout=out, cwd=ROOT, check=True)
    assert (tmp_path / "out").read_text() == "True\n"


@pytest.fixture(params=["fcntl", "no locks there"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no locks there":
        monkeypatch.setattr(
            io.fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "no"))
        )
    return request.param


def _holding(lock: Path) -> subprocess.Popen[str]:
    program = f"""
        import time
        from pathlib import Path
        from xfm_fast.io import hold
        with hold(Path({str(lock)!r}), "it"):
            print("held", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_one_holds_and_the_second_is_told_who(tmp_path: Path, locks: str) -> None:
    lock = tmp_path / "run" / ".lock"
    other = _holding(lock)
    try:
        message = rf"the run is in use by process {other.pid} on .* since 20"
        with pytest.raises(StorageError, match=message), hold(lock, "the run"):
            pytest.fail("it was held twice")
    finally:
        other.kill()
        other.wait()
    # What a killed process leaves is no obstacle.
    assert lock.exists()
    with hold(lock, "the run"):
        with (
            pytest.raises(StorageError, match=rf"in use by process {os.getpid()} "),
            hold(lock, "the run"),
        ):
            pytest.fail("it was held twice")
        assert lock.exists()
    assert not lock.exists()


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "letter.txt"
    target.write_text("kept")
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(StorageError, match=r"\.lock"), hold(tmp_path / ".lock", "the run"):
        pass
    assert target.read_text() == "kept"


def test_a_forked_child_does_not_hold(tmp_path: Path) -> None:
    program = f"""
        import os, time
        from pathlib import Path
        from xfm_fast.io import hold
        with hold(Path({str(tmp_path / "l")!r}), "it"):
            if not os.fork():
                print(os.getpid(), flush=True)
                time.sleep(60)
            os.kill(os.getpid(), 9)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.wait()
    try:
        with hold(tmp_path / "l", "it"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
