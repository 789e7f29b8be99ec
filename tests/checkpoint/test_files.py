"""Files of every form are read, damaged and foreign ones refused, code in them not run; folders are read back."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.checkpoint.conftest import STATE, assert_same, written
from tests.conftest import CASES, config, load_tensors
from xfm_fast.checkpoint import (
    load_pretrained_files,
    read_state_dict,
    save_pretrained,
    to_official,
    to_ours,
)
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError
from xfm_fast.models.xfm import XFM


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nesting", [(), ("module", "model")])
def test_torch_files(tmp_path: Path, zipped: bool, nesting: tuple[str, ...]) -> None:
    content: Any = {**STATE, "parameter": nn.Parameter(torch.ones(2))}
    for name in nesting:
        content = {name: content, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
    torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    state = read_state_dict(tmp_path / "x.bin")
    assert_same(state, STATE | {"parameter": torch.ones(2)})
    assert type(state["parameter"]) is Tensor


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod."])
def test_wrapper_prefixes(tmp_path: Path, prefix: str) -> None:
    torch.save(
        {"model": {prefix + name: value for name, value in STATE.items()}}, tmp_path / "x.th"
    )
    assert_same(read_state_dict(tmp_path / "x.th"), STATE)
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save(mixed, tmp_path / "y.th")
    assert_same(read_state_dict(tmp_path / "y.th"), mixed)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_safetensors_files(tmp_path: Path, name: str) -> None:
    save_file(STATE, tmp_path / name)
    assert_same(read_state_dict(str(tmp_path / name)), STATE)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.th", b"", "empty"),
        ("x.safetensors", b"\x10\x00", "safetensors"),
        ("x.safetensors", b"\x08" + b"\0" * 7 + b"{}      ", "no tensors"),
        ("x.th", b"\xff\xd8\xff\xe0\x00\x10JFIF", "JPEG"),
        ("x.json", b'{"abcd":{"e": 1}}', "JSON"),
        ("x.th", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("x.th", pickle.dumps([1, 2, 3], protocol=2), "PyTorch checkpoint"),
        ("x.th", b"PK\x03\x04 and then nothing", "truncated"),
    ],
)
def test_foreign_and_empty_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read_state_dict(written(tmp_path / name, data))
    assert name in str(error.value)


def _cyclic(path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, path)


def _bomb(path: Path) -> None:
    torch.save({"w": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path) as archive:
        names = [entry.filename for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, bytes(1 << 24))


def _flipped(path: Path) -> None:
    torch.save({"w": torch.full((1000,), 1.5)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((4,), 1.5).numpy().tobytes()) + 40] ^= 1
    path.write_bytes(data)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "holds itself": (_cyclic, "dict under 'model'"),
    "a bomb": (_bomb, "compressed"),
    "a flipped bit": (_flipped, "damaged"),
    "expanded": (lambda path: torch.save({"w": torch.zeros(1).expand(1 << 50)}, path), "4 bytes"),
    "fp8": (lambda path: torch.save({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, path), "float8"),
    "a module": (lambda path: torch.save(nn.Linear(2, 2), path), "torch.nn.modules.linear.Linear"),
    "a number": (
        lambda path: torch.save({"a": torch.zeros(1), "epoch": 3}, path),
        "int under 'epoch'",
    ),
    "nothing": (lambda path: torch.save({"model": {}}, path), "no tensors"),
}


@pytest.mark.parametrize(("make", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_torch_files(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "x.th")
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "x.th")


@pytest.mark.parametrize("share", [0.7])
@pytest.mark.parametrize("file_format", ["zip", "legacy", "safetensors"])
def test_truncated_files(tmp_path: Path, file_format: str, share: float) -> None:
    path = tmp_path / ("x.safetensors" if file_format == "safetensors" else "x.th")
    state = {f"layer.{i}.weight": torch.randn(40, 40) for i in range(4)}
    if file_format == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=file_format == "zip")
    data = path.read_bytes()
    with pytest.raises(CheckpointError, match="truncated"):
        read_state_dict(written(path, data[: int(len(data) * share)]))


class Payload:
    """Unpickling this makes the folder that it names."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("file_format", ["zip", "pickle"])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, file_format: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / "x.th"
    content = {"model": {"a": torch.zeros(1)}, "extra": Payload(trap)}
    if file_format == "pickle":
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=file_format == "zip")
    with pytest.raises(CheckpointError, match=r"posix\.mkdir|nt\.mkdir"):
        read_state_dict(path)
    assert not trap.exists()


@pytest.mark.parametrize("case", CASES)
def test_save_and_load(tmp_path: Path, case: str) -> None:
    official, cfg = load_tensors(f"{case}/weights"), config(case)
    state, report = to_ours(official, cfg)
    folder = tmp_path / "new" / "model"
    save_pretrained(state, cfg, folder, unused=report.unused)
    loaded = load_pretrained_files(folder)
    assert loaded.config == cfg
    assert_same(loaded.state, state)
    assert_same(to_official(loaded.state, loaded.config, unused=loaded.unused), official)
    files = {"config.json", "model.safetensors", "unused.safetensors"}
    assert {path.name for path in folder.iterdir()} == files
    # A save over the file that is being read, without dead weights: those of the earlier one go.
    save_pretrained(loaded.state, cfg, folder)
    assert load_pretrained_files(folder).unused is None
    assert_same(load_pretrained_files(folder).state, state)


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    state = {
        "empty": torch.empty(0, 3),
        "strided": torch.arange(12.0).view(3, 4).t(),
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
        assert file.metadata() == {
            "format": "pt",
            "xfm_fast_format": "1",
            "xfm_fast": version("xfm-fast"),
        }


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse()]
)
def test_tensors_that_safetensors_lacks(tensor: Tensor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'w'"):
        save_pretrained({"w": tensor}, XFMConfig.preset("tiny"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_pretrained_files(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_pretrained_files(tmp_path)
    (tmp_path / "config.json").write_text(XFMConfig.preset("tiny").to_json())
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_pretrained_files(tmp_path)
    for version_of_format in ("2", "²"):
        save_file(
            STATE, tmp_path / "model.safetensors", metadata={"xfm_fast_format": version_of_format}
        )
        with pytest.raises(CheckpointError, match="upgrade xfm-fast"):
            load_pretrained_files(tmp_path)
    save_file(STATE, tmp_path / "model.safetensors")
    assert_same(load_pretrained_files(tmp_path).state, STATE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"text_layers": 20_000}, "text_layers=3"), ({"vocab_size": 10**6}, "vocab_size=512")],
)
def test_a_false_config_is_refused_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    XFM(XFMConfig.preset("tiny")).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(XFMConfig.preset("tiny", **changes).to_json())
    monkeypatch.setattr(nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    with pytest.raises(CheckpointError, match=message):
        XFM.from_pretrained(tmp_path)
