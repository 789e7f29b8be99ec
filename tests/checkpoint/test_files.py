"""Files of every form are read, damaged and foreign ones refused, code in them not run; folders are written whole."""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.checkpoint.conftest import STATE, assert_same, written
from tests.conftest import CASES, config, load_tensors
from xfm_fast.checkpoint import (
    files,
    hold,
    load_pretrained_files,
    read_state_dict,
    save_pretrained,
    to_official,
    to_ours,
    write_bytes,
    write_files,
)
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, StorageError
from xfm_fast.kernels.files import write_whole
from xfm_fast.models.xfm import XFM


@pytest.mark.parametrize("suffix", [".th", ".pth", ".bin", ".pt"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nesting", [(), ("model",), ("module",), ("state_dict",), ("module", "model")])
def test_torch_files(tmp_path: Path, suffix: str, zipped: bool, nesting: tuple[str, ...]) -> None:
    content: Any = STATE
    for name in nesting:
        content = {name: content, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
    path = tmp_path / f"checkpoint{suffix}"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_same(read_state_dict(path), STATE)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes(tmp_path: Path, prefix: str) -> None:
    torch.save({"model": {prefix + name: value for name, value in STATE.items()}}, tmp_path / "x.th")
    assert_same(read_state_dict(tmp_path / "x.th"), STATE)
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save(mixed, tmp_path / "y.th")
    assert_same(read_state_dict(tmp_path / "y.th"), mixed)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_safetensors_files(tmp_path: Path, name: str) -> None:
    save_file(STATE, tmp_path / name)
    assert_same(read_state_dict(str(tmp_path / name)), STATE)


def test_parameters_become_plain_tensors(tmp_path: Path) -> None:
    torch.save({"w": nn.Parameter(torch.ones(2))}, tmp_path / "x.th")
    assert type(read_state_dict(tmp_path / "x.th")["w"]) is Tensor


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.th", b"", "is empty"),
        ("x.safetensors", b"", "is empty"),
        ("x.safetensors", b"\x10\x00", "safetensors"),
        ("x.safetensors", b"\xff" * 8 + b"{}", "safetensors"),
        ("x.th", b"\xff\xd8\xff\xe0\x00\x10JFIF", "JPEG"),
        ("x.th", b"\x89PNG\r\n", "PNG"),
        ("x.th", b'{"a": 1, "b": [2]}', "JSON"),
        ("x.json", b"[1, 2, 3, 4, 5, 6]", "JSON"),
        ("x.json", b'{"abcd":{"e": 1}}', "JSON"),
        ("x.safetensors", b"\x08" + b"\0" * 7 + b"{}      ", "no tensors"),
        ("x.th", b"<!DOCTYPE html><html>", "HTML"),
        ("x.th", b"hello, this is no checkpoint\n", "text file"),
        ("x.th", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("x.th", b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09", "unknown kind"),
        ("x.th", b"\x80\x02", "truncated"),
        ("x.th", pickle.dumps([1, 2, 3], protocol=2), "PyTorch checkpoint"),
        ("x.th", b"PK\x03\x04 and then nothing", "truncated"),
    ],
)
def test_foreign_and_empty_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read_state_dict(written(tmp_path / name, data))
    assert name in str(error.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_state_dict(tmp_path / "nowhere.th")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_state_dict(tmp_path)


def _cyclic(path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, path)


def _repacked(
    path: Path, change: Callable[[bytes], bytes] = lambda data: data, how: int = zipfile.ZIP_DEFLATED
) -> None:
    torch.save({"w": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data))


def _flipped(path: Path) -> None:
    torch.save({"w": torch.full((1000,), 1.5)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((4,), 1.5).numpy().tobytes()) + 40] ^= 1
    path.write_bytes(data)


class _Huge:
    def __reduce__(self) -> Any:
        return bytearray, (1 << 62,)


def _of_two_disks(path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, path)
    data = bytearray(path.read_bytes())
    # The locator of the long end of the archive, which stands before the short one, numbers the disks.
    data[data.rindex(b"PK\x06\x07") + 16] = 2
    path.write_bytes(data)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "of two disks": (_of_two_disks, "damaged"),
    "holds itself": (_cyclic, "dict under 'model'"),
    "packed": (_repacked, "compressed"),
    "a bomb": (lambda path: _repacked(path, lambda data: bytes(1 << 24)), "compressed"),
    "a flipped bit": (_flipped, "damaged"),
    "expanded": (lambda path: torch.save({"w": torch.zeros(1).expand(1 << 50)}, path), "4 bytes"),
    "an allocation": (lambda path: path.write_bytes(pickle.dumps(_Huge(), 2)), "memory|PyTorch checkpoint"),
}


@pytest.mark.parametrize(("make", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_torch_files(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "x.th")
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "x.th")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.th")
    state = {f"layer.{i}.weight": torch.randn(40, 40) for i in range(4)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    with pytest.raises(CheckpointError, match="truncated"):
        read_state_dict(written(path, data[: int(len(data) * share)]))


def test_a_zip_archive_of_something_else(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.th", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"x\.th"):
        read_state_dict(tmp_path / "x.th")


class Payload:
    """Unpickling this makes the folder that it names."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, kind: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / "x.th"
    content = {"model": {"a": torch.zeros(1)}, "extra": Payload(trap)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"posix\.mkdir|nt\.mkdir"):
        read_state_dict(path)
    assert not trap.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(1), "epoch": 3}, "int under 'epoch'"),
        ({"model": {"a": torch.zeros(1), "b": None}}, r"\['model'\] has a NoneType under 'b'"),
        ({1: torch.zeros(1)}, "under 1"),
        ([torch.zeros(1)], "is a list"),
        (torch.zeros(1), "is a Tensor"),
        ({}, "no tensors"),
        ({"model": {}}, "no tensors"),
    ],
)
def test_content_that_is_no_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.th")
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "x.th")


@given(
    data=st.binary(min_size=0, max_size=200),
    start=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", b"\x08" + b"\0" * 7 + b"{"]),
)
def test_arbitrary_bytes_give_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: bytes
) -> None:
    path = written(tmp_path_factory.getbasetemp() / "arbitrary.th", start + data)
    with pytest.raises(CheckpointError):
        read_state_dict(path)


@pytest.mark.parametrize("case", CASES)
def test_save_and_load(tmp_path: Path, case: str) -> None:
    official, cfg = load_tensors(f"{case}/weights"), config(case)
    state, report = to_ours(official, cfg)
    save_pretrained(state, cfg, tmp_path / "new" / "model", unused=report.unused)
    loaded = load_pretrained_files(tmp_path / "new" / "model")
    assert loaded.config == cfg
    assert_same(loaded.state, state)
    assert loaded.unused is not None
    assert_same(to_official(loaded.state, loaded.config, unused=loaded.unused), official)
    assert sorted(path.name for path in (tmp_path / "new" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "unused.safetensors",
    ]


def test_a_save_without_dead_weights_removes_old_ones(tmp_path: Path) -> None:
    cfg = config("tiny_b")
    save_pretrained(STATE, cfg, tmp_path, unused={"fusion_proj.bias": torch.zeros(1)})
    save_pretrained(STATE, cfg, tmp_path)
    assert load_pretrained_files(tmp_path).unused is None


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    state = {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "strided": torch.arange(12.0).view(3, 4).t(),
        "expanded": torch.ones(1, 3).expand(2, 3),
        "half": torch.randn(5).half(),
        "bfloat": torch.randn(3, dtype=torch.bfloat16),
        "double": torch.randn(3, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "long": torch.arange(3),
        "odd name \N{SNOWMAN}": nn.Parameter(torch.ones(2)),
    }
    save_pretrained(state, XFMConfig.preset("tiny"), tmp_path)
    path = tmp_path / "model.safetensors"
    assert_same(load_file(path), {name: value.detach() for name, value in state.items()})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "xfm_fast_format": "1", "xfm_fast": version("xfm-fast")}


def test_dtypes_that_safetensors_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="complex64"):
        save_pretrained({"w": torch.zeros(2, dtype=torch.complex64)}, XFMConfig.preset("tiny"), tmp_path)
    with pytest.raises(CheckpointError, match="sparse"):
        save_pretrained({"w": torch.eye(2).to_sparse()}, XFMConfig.preset("tiny"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_dead_weights_make_no_file(tmp_path: Path) -> None:
    save_pretrained(STATE, XFMConfig.preset("tiny"), tmp_path, unused={})
    assert load_pretrained_files(tmp_path).unused is None


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_pretrained_files(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_pretrained_files(tmp_path)
    (tmp_path / "config.json").write_text(XFMConfig.preset("tiny").to_json())
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load_pretrained_files(tmp_path)
    save_file(STATE, tmp_path / "model.safetensors", metadata={"xfm_fast_format": "2"})
    with pytest.raises(CheckpointError, match="upgrade xfm-fast"):
        load_pretrained_files(tmp_path)
    save_file(STATE, tmp_path / "model.safetensors")
    assert_same(load_pretrained_files(tmp_path).state, STATE)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    save_pretrained(STATE, XFMConfig.preset("tiny"), folder)
    return folder


def assert_untouched(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_pretrained_files(folder)
    assert loaded.config == XFMConfig.preset("tiny")
    assert_same(loaded.state, STATE)


BIGGER = {"w": torch.randn(600, 600)}


@pytest.mark.parametrize(
    ("call", "successes"), [("fsync", 0), ("fsync", 1), ("write", 0), ("write", 1), ("write", 2), ("replace", 0)]
)
def test_full_disk(saved: Path, monkeypatch: pytest.MonkeyPatch, call: str, successes: int) -> None:
    where = files if call == "write" else os
    name = "_write" if call == "write" else call
    real, calls = getattr(where, name), 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > successes:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(where, name, failing)
    with pytest.raises(StorageError, match="No space left") as error:
        save_pretrained(BIGGER, XFMConfig.preset("base"), saved)
    monkeypatch.undo()
    assert str(saved) in str(error.value)
    assert "free space" in str(error.value)
    assert_untouched(saved)


def test_a_rename_that_fails_after_another_is_told(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def failing(source: Path, target: Path) -> None:
        if target.name == "config.json":
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(StorageError, match=r"config\.json.*model\.safetensors"):
        save_pretrained(BIGGER, XFMConfig.preset("base"), saved)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_file_size_limit(saved: Path) -> None:
    """The system itself refuses to write on, half-way through the weights."""
    resource = pytest.importorskip("resource", reason="limits on file size need a POSIX system")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError, match=r"model\.safetensors could not be written"):
            save_pretrained(BIGGER, XFMConfig.preset("base"), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_untouched(saved)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    folder = small_disk / "saved"
    save_pretrained(STATE, XFMConfig.preset("tiny"), folder)
    with pytest.raises(StorageError, match="No space left"):
        save_pretrained(BIGGER, XFMConfig.preset("base"), folder)
    assert_untouched(folder)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL needs a POSIX system")
@pytest.mark.parametrize("moment", [1, 2])
def test_a_killed_process_leaves_the_earlier_save(saved: Path, moment: int) -> None:
    program = f"""
        import os, signal, torch
        from xfm_fast.checkpoint import save_pretrained
        from xfm_fast.config import XFMConfig
        real, calls = os.fsync, 0
        def fsync(handle):
            global calls
            calls += 1
            if calls == {moment}:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)
        os.fsync = fsync
        save_pretrained({{"w": torch.randn(600, 600)}}, XFMConfig.preset("base"), {str(saved)!r})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    for leftover in saved.glob(".*.tmp"):
        leftover.unlink()
    assert_untouched(saved)


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    written(tmp_path / "file", b"x")
    with pytest.raises(StorageError, match="folder"):
        save_pretrained(STATE, XFMConfig.preset("tiny"), tmp_path / "file")


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_files({tmp_path / "a": interrupted})
    assert list(tmp_path.iterdir()) == []


def _write_pair(stream: Path) -> None:
    write_bytes({stream.with_name("beside"): b"new", stream: b"content"})


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


def test_saving_over_the_file_that_is_being_read(tmp_path: Path) -> None:
    save_pretrained(STATE, XFMConfig.preset("tiny"), tmp_path)
    loaded = load_pretrained_files(tmp_path)
    save_pretrained(loaded.state, loaded.config, tmp_path)
    assert_same(load_pretrained_files(tmp_path).state, STATE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"text_layers": 20_000}, "text_layers=3"), ({"vocab_size": 10**6}, "vocab_size=512")],
)
def test_a_false_config_is_seen_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    XFM(XFMConfig.preset("tiny")).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(XFMConfig.preset("tiny", **changes).to_json())
    monkeypatch.setattr(nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    with pytest.raises(CheckpointError, match=message):
        XFM.from_pretrained(tmp_path)


@pytest.fixture(params=["fcntl", "no fcntl", "no locks there"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no fcntl":
        monkeypatch.setattr(files, "fcntl", None)
    elif request.param == "no locks there":
        monkeypatch.setattr(files.fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "no")))
    return request.param


def _holding(lock: Path) -> subprocess.Popen[str]:
    program = f"""
        import time
        from pathlib import Path
        from xfm_fast.checkpoint import files, hold
        with hold(Path({str(lock)!r}), "it"):
            print("held", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
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
        with pytest.raises(StorageError, match=rf"in use by process {os.getpid()} "), hold(lock, "the run"):
            pytest.fail("it was held twice")
        assert lock.exists()
    assert not lock.exists()


def test_a_forked_child_does_not_hold(tmp_path: Path) -> None:
    program = f"""
        import os, time
        from pathlib import Path
        from xfm_fast.checkpoint import hold
        with hold(Path({str(tmp_path / "l")!r}), "it"):
            if not os.fork():
                print(os.getpid(), flush=True)
                time.sleep(60)
            os.kill(os.getpid(), 9)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.wait()
    try:
        with hold(tmp_path / "l", "it"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="cannot be written"), hold(tmp_path / "l", "it"):
        pass


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(StorageError, match="cannot be written"), hold(tmp_path / "run" / ".lock", "it"):
        pass
