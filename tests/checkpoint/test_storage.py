"""Folders are written whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tests.checkpoint.states import STATE, assert_same, written
from tests.conftest import CASES, config, load_tensors
from xfm_fast.checkpoint import load_pretrained_files, save_pretrained, storage, to_official, to_ours, write_files
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, StorageError


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
        assert file.metadata() == {"xfm_fast_format": "1", "xfm_fast": storage._package_version()}


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
    with pytest.raises(CheckpointError, match="no folder"):
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
    where = storage if call == "write" else os
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
    with pytest.raises(
        StorageError, match=r"config\.json could not be written .* model\.safetensors is already the new one"
    ):
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
    with pytest.raises(StorageError, match="cannot be made"):
        save_pretrained(STATE, XFMConfig.preset("tiny"), tmp_path / "file")


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_files({tmp_path / "a": interrupted})
    assert list(tmp_path.iterdir()) == []


def test_saving_over_the_file_that_is_being_read(tmp_path: Path) -> None:
    save_pretrained(STATE, XFMConfig.preset("tiny"), tmp_path)
    loaded = load_pretrained_files(tmp_path)
    save_pretrained(loaded.state, loaded.config, tmp_path)
    assert_same(load_pretrained_files(tmp_path).state, STATE)
