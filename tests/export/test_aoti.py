"""AOTInductor packages: loaded by PyTorch without this project, bound to their machine, and run only by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.runner import invoke
from tests.export.conftest import write_export
from xfm_fast import XFM
from xfm_fast.errors import ExportError, UnavailableError
from xfm_fast.export import export_packages
from xfm_fast.export.expected import generated_examples, keep_reference, make_reference
from xfm_fast.export.graphs import build
from xfm_fast.export.manifest import Manifest, record_files
from xfm_fast.export.pipeline import trace
from xfm_fast.export.request import GRAPHS, GraphName
from xfm_fast.export.runtimes import open_runtime
from xfm_fast.export.runtimes.aoti import local_target
from xfm_fast.export.session import Session
from xfm_fast.export.verification import verify, verify_export

BARE = """
import sys, torch
from torch._inductor import aoti_load_package
torch.save(aoti_load_package(sys.argv[1])(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
assert "xfm_fast" not in sys.modules
"""


@pytest.fixture(scope="module")
def memory_package(small_model: XFM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile a package of the graph that compiles fastest, by the command."""
    if not {shutil.which(name) for name in ("g++", "clang++")} - {None}:
        pytest.skip("a package needs a C++ compiler")
    folder = tmp_path_factory.mktemp("packages")
    small_model.save_pretrained(folder / "model")
    arguments = [str(folder / "model"), "--out", str(folder / "memory"), "--graphs", "image_memory"]
    done = invoke(["export", "--to", "aoti", *arguments])
    assert done.exit_code == 0, done.output
    return folder / "memory"


@pytest.fixture(scope="module")
def foreign(small_model: XFM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an export like `memory_package` with a file that must not be loaded."""
    folder = write_export(tmp_path_factory.mktemp("foreign"), small_model, graphs=("image_memory",))
    (folder / "image_memory.pt2").write_bytes(b"native code")
    manifest = Manifest.load(folder)
    record = manifest.graph("image_memory").model_copy(
        update={"file": "image_memory.pt2", "files": ["image_memory.pt2"]}
    )
    changes = {
        "kind": "aoti",
        "consumer": "aoti",
        "package": local_target("cpu"),
        "graphs": [record],
    }
    changed = manifest.model_copy(update=changes | {"files": record_files(folder, record.files)})
    examples = generated_examples(small_model.config, images=1, texts=1)
    keep_reference(
        changed, folder, make_reference(small_model, examples, ("image_memory",), "fp32")
    )
    changed.save(folder)
    return folder


@pytest.mark.slow
def test_a_package_is_verified(memory_package: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(memory_package)
    assert (manifest.kind, manifest.status, manifest.reason) == ("aoti", "verified", "")
    assert manifest.package == local_target("cpu")
    assert manifest.verification is not None
    assert [shape[0] for shape in manifest.verification.checks[0].shapes] == [1, 2, 4]
    copied = Path(shutil.copytree(memory_package, tmp_path / "copied"))
    assert verify(copied, "aoti").status == "verified"


@pytest.mark.slow
def test_a_package_is_loaded_by_pytorch_without_this_project(
    memory_package: Path, small_model: XFM, tmp_path: Path
) -> None:
    embeds = torch.randn(3, small_model.config.num_image_tokens, small_model.config.vision_width)
    torch.save(embeds, tmp_path / "given.pt")
    arguments = [
        str(memory_package / "image_memory.pt2"),
        *(str(tmp_path / name) for name in ("given.pt", "found.pt")),
    ]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    graph = build("image_memory", small_model, "primitives")
    with torch.no_grad():
        expected = graph(embeds)
    torch.testing.assert_close(
        tuple(torch.load(tmp_path / "found.pt", weights_only=True)), expected, rtol=0, atol=1e-5
    )
    layers = Session.load(memory_package, "aoti").image_memory(embeds).layers
    torch.testing.assert_close(tuple(layers.values()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vision", pytest.param("fusion", marks=pytest.mark.slow)])
def test_a_program_has_no_operator_of_this_project(small_model: XFM, name: GraphName) -> None:
    program = trace(build(name, small_model, "primitives"), "fp32", {})
    assert not [node.target for node in program.graph.nodes if "xfm_fast" in str(node.target)]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("torch", "1.0.0", r"torch 1\.0\.0"),
        ("instructions", ["avx9"], "avx9"),
        ("compute_capability", 90, "90"),
    ],
)
def test_packages_are_bound_to_their_machine(
    foreign: Path, field: str, value: Any, reason: str
) -> None:
    manifest = Manifest.load(foreign)
    assert manifest.package is not None
    setattr(manifest.package, field, value)
    with pytest.raises(ExportError, match=reason):
        open_runtime("aoti", manifest)


def test_devices_and_runtimes_that_do_not_fit(foreign: Path) -> None:
    with pytest.raises(UnavailableError, match="cuda"):
        Session.load(foreign, "aoti", device="cuda")
    with pytest.raises(ExportError, match="'onnxruntime'"):
        Session.load(foreign, "onnxruntime")


def test_a_package_runs_only_by_name(
    foreign: Path, small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is native code: a folder that came from elsewhere must not run by being looked at."""
    monkeypatch.setattr(
        "torch._inductor.aoti_load_package", lambda *_, **__: pytest.fail("a package was loaded")
    )
    folder = Path(shutil.copytree(foreign, tmp_path / "copied"))
    before = (folder / "manifest.json").read_bytes()
    for load in (Session, Session.load, verify):
        with pytest.raises(ExportError, match="runtime='aoti'"):
            load(folder)
    done = invoke(["export", "verify", str(folder)])
    assert done.exit_code == 2
    assert "--runtime aoti" in done.stderr
    assert (folder / "manifest.json").read_bytes() == before
    with pytest.raises(ExportError, match="runtime='aoti'"):
        verify_export(folder, small_model)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "packed"), [("fp32", False), ("fp32", True), ("bf16", False)])
def test_packages_of_all_graphs(small_model: XFM, tmp_path: Path, dtype: str, packed: bool) -> None:
    export_packages(small_model, tmp_path, dtype=dtype, graphs=GRAPHS, packed=packed)
    manifest = verify_export(tmp_path, small_model, runtime="aoti")
    assert (manifest.status, manifest.reason) == ("verified", "")
