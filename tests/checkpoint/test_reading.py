"""Files of every form are read; damaged and foreign ones are refused, and code in them does not run."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.checkpoint.states import STATE, assert_same, written
from xfm_fast.checkpoint import read_state_dict
from xfm_fast.errors import CheckpointError


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
        ("x.safetensors", b"\x10\x00", "truncated safetensors"),
        ("x.safetensors", b"\xff" * 8 + b"{}", "truncated safetensors"),
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
        ("x.th", pickle.dumps([1, 2, 3], protocol=2), "not a PyTorch checkpoint"),
        ("x.th", b"PK\x03\x04 and then nothing", "truncated PyTorch checkpoint"),
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
    with pytest.raises(CheckpointError, match="not a PyTorch checkpoint"):
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
    with pytest.raises(CheckpointError, match=r"posix\.mkdir|nt\.mkdir") as error:
        read_state_dict(path)
    assert "nothing was run" in str(error.value)
    assert not trap.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(1), "epoch": 3}, "int under 'epoch'"),
        ({"model": {"a": torch.zeros(1), "b": None}}, r"\['model'\] holds a NoneType under 'b'"),
        ({1: torch.zeros(1)}, "under 1"),
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(1), "holds a Tensor"),
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
