"""AOTInductor packages: compiled, compared with the model, run in a fresh process, and bound to their machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cli.runner import invoke
from xfm_fast import XFM, Retriever
from xfm_fast.errors import ExportError, StorageError, UnavailableError
from xfm_fast.export import aoti
from xfm_fast.export.aoti import check_compiling, check_package, export_packages, instructions, local_target, trace
from xfm_fast.export.manifest import Manifest, PackageTarget
from xfm_fast.export.pipeline import build_graphs
from xfm_fast.export.request import GRAPHS, ModelSource
from xfm_fast.export.session import Session
from xfm_fast.export.verification import verify, verify_export

try:
    check_compiling("cpu", "fp32")
except ExportError as error:
    pytest.skip(str(error), allow_module_level=True)

_FRESH = """
import sys, torch
from xfm_fast.export.session import Session
session = Session.load(sys.argv[1], "aoti")
torch.save(session.run("image_memory", {"image_embeds": torch.load(sys.argv[2], weights_only=True)}), sys.argv[3])
"""


@pytest.fixture(scope="module")
def memory_package(small_model: XFM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the graph that compiles fastest, made by the command."""
    folder = tmp_path_factory.mktemp("packages")
    small_model.save_pretrained(folder / "model")
    given = ["--checkpoint", str(folder / "model"), "--out", str(folder / "memory"), "--graphs", "image_memory"]
    done = invoke(["export", "aoti", *given])
    assert done.exit_code == 0, done.output
    assert "verified" in done.output
    return folder / "memory"


def _embeds(model: XFM, images: int) -> torch.Tensor:
    shape = (images, model.config.num_image_tokens, model.config.vision_width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(images))


def test_a_package_is_verified_like_every_export(memory_package: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(memory_package)
    assert (manifest.kind, manifest.status, manifest.reason) == ("aoti", "verified", "")
    assert (manifest.source, manifest.opset) == ("checkpoint model", None)
    assert manifest.package == local_target("cpu")
    files = {"image_memory.pt2", "preprocessor_config.json", "README.md", "reference.safetensors"}
    assert {record.name for record in manifest.files} == files
    assert {path.name for path in memory_package.iterdir()} == {*files, "manifest.json"}
    (check,) = [check for check in manifest.verification.checks if check.output == "memory"]
    assert [shape[0] for shape in check.shapes] == [1, 2, 4]
    copied = Path(shutil.copytree(memory_package, tmp_path / "copied"))
    assert verify(copied, "aoti").status == "verified"
    assert "verified" in invoke(["export", "verify", str(copied), "--runtime", "aoti"]).output


def test_a_package_is_loaded_by_pytorch_alone(memory_package: Path, small_model: XFM, tmp_path: Path) -> None:
    embeds = _embeds(small_model, 3)
    torch.save(embeds, tmp_path / "given.pt")
    program = """
import sys, torch
from torch._inductor import aoti_load_package
torch.save(aoti_load_package(sys.argv[1])(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
assert "xfm_fast" not in sys.modules
"""
    arguments = [str(memory_package / "image_memory.pt2"), *(str(tmp_path / name) for name in ("given.pt", "found.pt"))]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (graph,) = build_graphs(small_model, aoti._SPELLING, ("image_memory",)).values()
    with torch.no_grad():
        torch.testing.assert_close(
            tuple(torch.load(tmp_path / "found.pt", weights_only=True)), graph(embeds), rtol=0, atol=1e-5
        )


@pytest.mark.slow
def test_any_batch_runs_in_a_fresh_process(memory_package: Path, small_model: XFM, tmp_path: Path) -> None:
    session = Session.load(memory_package, "aoti")
    embeds = _embeds(small_model, 3)
    torch.save(embeds, tmp_path / "given.pt")
    arguments = [str(memory_package), str(tmp_path / "given.pt"), str(tmp_path / "found.pt")]
    done = subprocess.run([sys.executable, "-c", _FRESH, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    (graph,) = build_graphs(small_model, aoti._SPELLING, ("image_memory",)).values()
    with torch.no_grad():
        expected = dict(zip((spec.name for spec in graph.outputs), graph(embeds), strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(session.image_memory(embeds).layers, expected, rtol=0, atol=1e-5)


def test_weights_are_joined_once(small_model: XFM) -> None:
    """Of all projections one is made before the graph is compiled: a call has one product, and joins nothing."""
    (graph,) = build_graphs(small_model, aoti._SPELLING, ("image_memory",)).values()
    called = [node.target for node in trace(graph, "fp32", "cpu", {}).graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.aten.linear.default) == 1
    assert torch.ops.aten.cat.default not in called


def test_packages_are_bound_to_their_machine() -> None:
    here = PackageTarget(torch="2.9.0", device="cpu", architecture="x86_64", instructions=["avx2", "avx512f"])
    check_package(here.model_copy(update={"instructions": ["avx2"]}), here)
    for changes, message in (
        ({"torch": "2.10.0"}, r"torch 2\.10\.0"),
        ({"architecture": "aarch64"}, "aarch64"),
        ({"instructions": ["amx_bf16", "avx2"]}, "amx_bf16"),
        ({"device": "cuda", "compute_capability": 90}, "90"),
    ):
        with pytest.raises(ExportError, match=message):
            check_package(here.model_copy(update=changes), here)


def test_a_package_from_elsewhere_is_not_loaded(memory_package: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(memory_package, tmp_path / "copied"))
    manifest = Manifest.load(copied)
    assert manifest.package is not None
    manifest.package.torch = "1.0.0"
    manifest.save(copied)
    with pytest.raises(ExportError, match=r"torch 1\.0\.0"):
        Session.load(copied, "aoti")
    with pytest.raises(UnavailableError, match="cuda"):
        Session.load(memory_package, "aoti", device="cuda")
    with pytest.raises(ExportError, match="runtime 'onnxruntime'"):
        Session.load(memory_package, "onnxruntime")
    (copied / "image_memory.pt2").write_bytes(b"short")
    with pytest.raises(ExportError, match=r"image_memory\.pt2 is truncated"):
        Session.load(copied, "aoti")


def test_a_package_runs_only_where_it_is_named(
    memory_package: Path, small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is native code: a folder that came from elsewhere must not run by being looked at."""
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda *_, **__: pytest.fail("a package was loaded"))
    folder = Path(shutil.copytree(memory_package, tmp_path / "copied"))
    before = (folder / "manifest.json").read_bytes()
    said = rf"{folder} .*native code.*runtime='aoti'"
    for load in (Session, Session.load, verify):
        with pytest.raises(ExportError, match=said):
            load(folder)
    done = invoke(["export", "verify", str(folder)])
    assert done.exit_code == 2
    assert "or --runtime aoti on the command line" in done.stderr
    assert "code that runs when it is loaded" in " ".join(invoke(["export", "verify", "--help"]).output.split())
    assert (folder / "manifest.json").read_bytes() == before
    with pytest.raises(ExportError, match=said):
        verify_export(folder, small_model)


def test_instructions_come_from_the_system(tmp_path: Path) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor : 0\nflags : fpu avx2 sse4_2 nx avx512f\n\nprocessor : 1\nflags : avx2\n")
    assert instructions(listing) == ["avx2", "avx512f", "sse4_2"]
    listing.write_text("processor : 0\nFeatures : fp asimd sve\n")
    assert instructions(listing) == ["asimd", "fp", "sve"]
    assert instructions(tmp_path / "absent") == []


def _run(*arguments: str) -> str:
    done = invoke(["export", "aoti", *arguments])
    assert done.exit_code == 2, done.output
    return done.stderr


def test_errors_come_before_a_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--preset", "tiny", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("xfm_fast.cli.export.load_subject", lambda *_, **__: pytest.fail("a model was read"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs an NVIDIA GPU and PyTorch finds none here" in _run(*given, "--device", "cuda")
    assert 'Invalid value "tpu" for --device. Choose from: "cpu", "cuda"' in _run(*given, "--device", "tpu")
    assert 'Invalid value "fp8" for --dtype' in _run(*given, "--dtype", "fp8")
    with pytest.raises(UnavailableError, match="device 'tpu'"):
        check_compiling("tpu", "fp32")
    with pytest.raises(UnavailableError, match="dtype 'fp8'"):
        check_compiling("cpu", "fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "this GPU (SM75) has no bf16 arithmetic; use --dtype fp16" in _run(
        *given, "--device", "cuda", "--dtype", "bf16"
    )
    monkeypatch.setattr(aoti, "_computes", lambda dtype: dtype == "bf16")
    assert "no fp16 arithmetic and would emulate it; use --dtype fp32 or bf16" in _run(*given, "--dtype", "fp16")

    def absent() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", absent)
    assert "needs a C++ compiler and none is found here; install g++" in _run(*given)
    assert not (tmp_path / "out").exists()


def test_what_the_compiler_refuses_is_an_error(
    small_model: XFM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("cannot lower\nthis")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", broken)
    with pytest.raises(ExportError, match="image_memory for cpu in fp32"):
        export_packages(small_model, tmp_path, graphs=("image_memory",))
    assert not [path for path in tmp_path.iterdir() if path.is_file()]

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("C++ compile error\nas: fatal error: a.o: No space left on device")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", full)
    with pytest.raises(StorageError, match=r"image_memory\.pt2"):
        export_packages(small_model, tmp_path, graphs=("image_memory",))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "packed"), [("fp32", False), ("fp32", True), ("bf16", False)])
def test_retrieval_runs_on_packages(make_model: Callable[..., XFM], tmp_path: Path, dtype: str, packed: bool) -> None:
    """All graphs, of any sizes; re-ranking through the session gives what the model gives."""
    try:
        check_compiling("cpu", dtype)
    except UnavailableError as error:
        pytest.skip(str(error))
    model = make_model()
    export_packages(model, tmp_path, dtype=dtype, graphs=GRAPHS, packed=packed)
    manifest = verify_export(tmp_path, model, runner="aoti")
    assert (manifest.status, manifest.reason) == ("verified", "")
    session = Session.load(tmp_path, "aoti")
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (7, 1), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    ids = torch.randint(4, 200, (7, 12), generator=generator).masked_fill(mask == 0, 1)
    pixels = torch.randn(3, 3, model.config.image_size, model.config.image_size, generator=generator)
    scores = []
    for subject in (session, model.to(session.dtype)):
        retriever = Retriever(subject)
        index = retriever.embed_images([pixels.to(session.dtype)])
        # Every text: which ones their features choose is a matter of the last digits.
        scores.append(retriever.rerank(index, retriever.embed_texts([(ids, mask)]), len(ids)).score_i2t.float())
    band = 1e-4 if dtype == "fp32" else 0.05 * float(scores[1][scores[1] > -100].abs().max())
    assert float((scores[0] - scores[1]).abs().max()) <= band


@pytest.mark.slow
def test_base_model_in_bf16(tmp_path: Path) -> None:
    """The one runtime that computes in bf16 on a CPU and gives it back, at base size: within the band of rounding."""
    from xfm_fast.cli.export import load_subject

    try:
        check_compiling("cpu", "bf16")
    except UnavailableError as error:
        pytest.skip(str(error))
    model = load_subject(ModelSource(preset="base")).model
    export_packages(model, tmp_path, dtype="bf16")
    manifest = verify_export(tmp_path, model, runner="aoti")
    assert (manifest.status, manifest.reason) == ("verified", "")
    assert manifest.verification is not None
    assert all(ranks.agreement >= 0.99 for ranks in manifest.verification.ranks)
