"""Kernels that were compiled elsewhere: what Triton loads in their place, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.triton_testing import HAS_TRITON, compiling_environment
from xfm_fast.errors import InputError
from xfm_fast.kernels import backend, prepared

if not HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)


def preparing(action: str, folder: Path, *head_dims: int, cache: Path) -> list[dict[str, Any]]:
    """What `tests.kernels.preparing` prints; lines of Triton are not of JSON."""
    command = [
        sys.executable,
        "-m",
        "tests.kernels.preparing",
        action,
        str(folder),
        *map(str, head_dims),
    ]
    environment = compiling_environment() | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention with heads of 64, prepared for Hopper."""
    if backend.compiler_fault(90):
        pytest.skip("this machine's compilers cannot prepare kernels for Hopper")
    folder = tmp_path_factory.mktemp("prepared")
    preparing("write", folder, 64, cache=folder.parent / "cache")
    return folder


def edited(folder: Path, to: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose manifest is changed."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    content = json.loads((to / "manifest.json").read_text())
    edit(content)
    (to / "manifest.json").write_text(json.dumps(content))
    return to


def test_triton_loads_the_prepared_binary_or_nothing(folder: Path, tmp_path: Path) -> None:
    """A binary that no compiler makes: the one of the folder, with a byte more."""
    (name,) = (path.name for path in folder.glob("*.cubin"))
    other = (folder / name).read_bytes() + b"\0"
    digest = hashlib.sha256(other).hexdigest()
    changed = edited(
        folder, tmp_path / "changed", lambda content: content["launches"][0].update(sha256=digest)
    )
    (changed / name).write_bytes(other)
    loaded, refused = preparing("run", changed, 64, 96, cache=tmp_path / "cache")
    assert loaded == {"hashes": [digest], "refusals": []}
    # A refused kernel is refused again: it is not in Triton's cache of the process.
    assert refused["hashes"] == []
    assert len(refused["refusals"]) == 2
    assert all(
        "forward_kernel is not among the prepared kernels" in text for text in refused["refusals"]
    )

    # What another process compiled without the folder lies in the cache of files.
    (stale,) = preparing("run", folder, 64, cache=tmp_path / "cache")
    assert "TRITON_CACHE_DIR" in stale["refusals"][0]


LAUNCH = prepared.Launch(
    "module", "kernel", {"x": "*fp16", "N": "constexpr"}, [[[1], 64]], [[[0], [["a", 16]]]], {}
)
PTX = ".visible .entry kernel(\n .param .u64 .ptr .global .align 1 kernel_param_0,\n .param .u32 kernel_param_1\n)\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"shared": 513}, "513 B of shared memory and this Triton gives 512"),
        (
            {"parameters": (64, 64)},
            r"\(64, 64\) bits of parameters, and this Triton passes \(64, 32\)",
        ),
        (
            {"options": {"num_warps": 8}},
            "was prepared with {'num_warps': 8} and is launched with {'num_warps': 4}",
        ),
        ({"sha256": "of what was in the cache"}, "TRITON_CACHE_DIR"),
    ],
)
def test_a_launch_that_differs_is_refused(change: dict[str, Any], message: str | None) -> None:
    metadata = SimpleNamespace(num_warps=4, shared=512)
    compiled = SimpleNamespace(asm={"ptx": PTX, "cubin": b"code"}, metadata=metadata)
    digest = hashlib.sha256(b"code").hexdigest()
    launch = replace(
        LAUNCH, options={"num_warps": 4}, sha256=digest, shared=512, parameters=(64, 32)
    )
    why = prepared._why_refused(compiled, replace(launch, **change))
    assert (why is None) if message is None else re.search(message, str(why))


def test_only_kernels_that_run_beside_the_program_need_a_binary() -> None:
    compiled = SimpleNamespace(asm={"ptx": PTX})
    assert prepared._why_refused(compiled, None) is None
    for instruction in ("wgmma.mma_async.sync", "tcgen05.mma"):
        compiled.asm["ptx"] = PTX + instruction
        assert "not among the prepared kernels" in str(prepared._why_refused(compiled, None))


def test_a_folder_that_does_not_belong_here_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(prepared.read(folder, 90)).startswith("1 kernels for sm_90")
    with pytest.raises(InputError, match=r"for sm_90 and the GPU is sm_100; prepare it again"):
        prepared.read(folder, 100)
    with pytest.raises(InputError, match="cannot be read"):
        prepared.read(tmp_path, 90)
    for number, (edit, message) in enumerate(
        [
            (lambda content: content.pop("launches"), "damaged"),
            (lambda content: content.update(version=0), "version 0"),
            (lambda content: content["launches"][0].update(sha256="0"), "missing or damaged"),
            (
                lambda content: content["launches"][0].update(file="../../etc/passwd"),
                "missing or damaged",
            ),
        ]
    ):
        with pytest.raises(InputError, match=message):
            prepared.read(edited(folder, tmp_path / str(number), edit), 90)
    monkeypatch.setattr(prepared, "_sources", lambda: "of an edited file")
    with pytest.raises(InputError, match="differ from those that"):
        prepared.read(folder, 90)


def test_kernels_cannot_be_prepared_with_faulty_compilers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "compiler_versions", lambda arch=90: ("3.6.0", "12.8"))
    with pytest.raises(InputError, match=r"Triton 3\.6\.0"):
        prepared.write(tmp_path / "new", {}, 90)
    assert not (tmp_path / "new").exists()


def test_the_same_launch_in_two_versions_of_triton() -> None:
    """Some have an empty attribute for each constant."""
    newer = replace(LAUNCH, attrs=[[[0], [["a", 16]]], [[1], []]])
    assert newer.key == LAUNCH.key
    for other in ({"constants": [[[1], 32]]}, {"attrs": []}, {"kernel": "other"}):
        assert replace(LAUNCH, **other).key != LAUNCH.key
    # An override does not know the options.
    assert replace(LAUNCH, options={"num_warps": 8}).key == LAUNCH.key


def test_launches_that_share_a_key_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "compiler_fault", lambda arch: None)
    with pytest.raises(InputError, match="'num_warps': 8"):
        prepared.write(
            tmp_path / "new", {"a": [LAUNCH], "b": [replace(LAUNCH, options={"num_warps": 8})]}, 90
        )
    assert not (tmp_path / "new").exists()


def test_attention_on_hopper_runs_with_prepared_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "compiler_versions", lambda arch=90: ("3.6.0", "12.8"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.delenv(prepared.ENVIRONMENT, raising=False)
    assert "Triton 3.6.0" in str(backend._compiler_fault("cuda", 0))
    monkeypatch.setenv(prepared.ENVIRONMENT, "gpu-kernels")
    monkeypatch.setattr(prepared, "why_not", lambda arch: None if arch == 90 else "another GPU")
    assert backend._compiler_fault("cuda", 0) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (10, 0))
    assert "another GPU" in str(backend._compiler_fault("cuda", 0))
