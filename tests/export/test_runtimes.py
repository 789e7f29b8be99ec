"""Every runtime gives what the model gives; TensorRT's is driven through a stand-in that behaves as its API says."""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor

from xfm_fast import XFM, Retriever
from xfm_fast.errors import ExportError, InputError, UnavailableError
from xfm_fast.export.expected import Reference
from xfm_fast.export.manifest import EngineTarget, Manifest, record_files
from xfm_fast.export.onnx import export_onnx
from xfm_fast.export.quantise import quantize_int8
from xfm_fast.export.request import DEFAULT_GRAPHS
from xfm_fast.export.runtimes import choose_runtime, open_runtime, runtimes
from xfm_fast.export.runtimes import tensorrt as engine_library
from xfm_fast.export.runtimes.onnx_runtime import OnnxRuntime, session_options
from xfm_fast.export.runtimes.tensorrt import Library, TensorRT
from xfm_fast.export.session import Session
from xfm_fast.export.slots import graph_profiles, graph_slots, parse_profiles
from xfm_fast.export.verification import verify

onnxruntime = pytest.importorskip("onnxruntime", reason="the stand-in for engines computes with onnxruntime")

PROFILES = ("latency:batch=1,texts=1..8..16,length=1..8..24", "bulk:batch=1..4..6,texts=1..4..6,length=1..8..24")
TYPES = {"float32": ctypes.c_float, "int64": ctypes.c_int64}


class FakeCuda:
    """As much of `torch.cuda` as the runtime uses, on CPU tensors. `log` holds what streams were told."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.capturing: Any = None
        cuda = self

        class Stream:
            def __init__(self, device: Any = None, name: str = "engine") -> None:
                self.name, self.cuda_stream = name, id(self)

            def wait_stream(self, other: Any) -> None:
                cuda.log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event: Any) -> None:
                cuda.log.append(f"{self.name} waits for an event")

            def synchronize(self) -> None:
                cuda.log.append(f"{self.name} synchronized")

        class CUDAGraph:
            def __init__(self) -> None:
                self.work: list[Any] = []

            def replay(self) -> None:
                cuda.log.append("replay")
                for work in self.work:
                    work()

        class Event:
            def record(self, stream: Any) -> None:
                pass

        self.Stream, self.CUDAGraph, self.Event = Stream, CUDAGraph, Event
        self.caller = Stream(name="caller")

    def current_stream(self, device: torch.device) -> Any:
        return self.caller

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.capturing = graph
        yield
        self.capturing = None

    def get_device_name(self, device: torch.device) -> str:
        return "a stand-in"

    def get_device_capability(self, device: torch.device) -> tuple[int, int]:
        return (8, 9)


class FakeContext:
    """Runs an ONNX file on the memory that it was told of, if all that a context has to be told was said."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None
        self.told = 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        self.memory = address, size
        self.told += 1

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        profile = self.engine.record.profiles[self.profile or 0]
        self.shapes[name] = shape
        limits = zip(profile.least[name], shape, profile.most[name], strict=True)
        return all(least <= size <= most for least, size, most in limits)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.broken:
            self.engine.logger.log(1, "Cask convolution failed")
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if self.engine.cuda.capturing is not None:
            self.engine.cuda.capturing.work.append(lambda: self._run(shapes, addresses))
        else:
            self._run(shapes, addresses)
        return True

    def _need(self) -> int:
        return self.engine.get_device_memory_size_for_profile_v2(self.profile or 0)

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        self.engine.runs.append((self.profile, shapes))
        assert self.memory is not None
        assert self.memory[1] >= self._need(), "activations do not fit"
        record = self.engine.record
        feeds = {t.name: _memory(addresses[t.name], shapes[t.name], t.dtype) for t in record.inputs}
        results = self.engine.session.run([output.name for output in record.outputs], feeds)
        for output, result in zip(record.outputs, results, strict=True):
            _memory(addresses[output.name], result.shape, output.dtype)[...] = result


class FakeEngine:
    # Larger for those that are loaded later, so that the memory that all share has to grow.
    NEEDS: ClassVar = {"vision": 1 << 20, "text": 1 << 19, "image_memory": 1 << 21, "fusion": 1 << 22, "match": 1 << 21}

    @property
    def device_memory_size_v2(self) -> int:
        return self.NEEDS[self.record.name]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return self.device_memory_size_v2 if profile else 1 << 10

    def __init__(self, cuda: FakeCuda, logger: Any, record: Any, onnx: str) -> None:
        self.cuda, self.logger, self.record = cuda, logger, record
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.runs: list[tuple[int | None, dict[str, tuple[int, ...]]]] = []
        self.contexts: list[FakeContext] = []
        self.broken = False

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "user managed"
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


def _memory(address: int, shape: tuple[int, ...], dtype: str) -> Any:
    kind = TYPES[dtype] * int(np.prod(shape))
    return np.frombuffer(kind.from_address(address), dtype=dtype).reshape(shape)


@pytest.fixture(scope="module")
def engines(exported_fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose engines name the ONNX files that the stand-in runs."""
    folder = tmp_path_factory.mktemp("engines")
    manifest = Manifest.load(exported_fp32)
    records = []
    for record in manifest.graphs:
        (folder / f"{record.name}.engine").write_text(json.dumps([record.name, str(exported_fp32 / record.file)]))
        profiles = graph_profiles(record, parse_profiles(PROFILES))
        files = {"file": f"{record.name}.engine", "files": [f"{record.name}.engine"]}
        records.append(record.model_copy(update=files | {"profiles": profiles}))
    target = EngineTarget(library="tensorrt", version="10.14.1", compute_capabilities=[89])
    names = [record.file for record in records]
    (folder / "reference.safetensors").write_bytes((exported_fp32 / "reference.safetensors").read_bytes())
    changes = {"kind": "tensorrt", "consumer": "tensorrt", "graphs": records, "target": target}
    manifest.model_copy(update=changes | {"files": record_files(folder, names)}).save(folder)
    return folder


class Fakes:
    """The stand-ins of one session."""

    def __init__(self, manifest: Manifest) -> None:
        self.cuda, self.engines = FakeCuda(), {}
        fakes, trt = self, types.ModuleType("tensorrt")

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, content: bytes) -> FakeEngine | None:
                if not content.startswith(b"["):
                    self.logger.log(1, "Magic tag does not match")
                    return None
                name, onnx = json.loads(content)
                fakes.engines[name] = FakeEngine(fakes.cuda, self.logger, manifest.graph(name), onnx)
                return fakes.engines[name]

        trt.ILogger, trt.Runtime = ILogger, Runtime  # pyright: ignore[reportAttributeAccessIssue]
        strategies = types.SimpleNamespace(USER_MANAGED="user managed")
        trt.ExecutionContextAllocationStrategy = strategies  # pyright: ignore[reportAttributeAccessIssue]
        self.library = Library.__new__(Library)
        self.library.trt, self.library.version = trt, "10.14.1"


@pytest.fixture
def fakes(engines: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes(Manifest.load(engines))

    class StandIn(TensorRT):
        def __init__(self, manifest: Manifest, device: Any = None) -> None:
            super().__init__(manifest, torch.device("cpu"), library=made.library, cuda=made.cuda)

    monkeypatch.setitem(runtimes(), "tensorrt", StandIn)
    return made


def _texts(count: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    mask = (torch.arange(width) < torch.randint(1, width + 1, (count, 1), generator=generator)).long()
    return torch.randint(4, 200, (count, width), generator=generator).masked_fill(mask == 0, 1), mask


def _pixels(model: XFM, count: int) -> Tensor:
    size = model.config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def _same_retrieval(model: XFM, session: Session, tolerance: float = 1e-4) -> None:
    """More images and texts than any profile takes at once."""
    pixels, (ids, mask) = _pixels(model, 7), _texts(41, 20)
    found = []
    for subject in (model, session):
        retriever = Retriever(subject)
        images, texts = retriever.embed_images([pixels]), retriever.embed_texts([(ids, mask)])
        found.append(
            (images.embeds, images.features, texts.tokens, texts.features, retriever.rerank(images, texts).scores)
        )
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() < tolerance


@pytest.mark.parametrize("form", ["padded", "packed", "fixed"])
@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_every_runtime_gives_what_the_model_gives(
    runtime: str, form: str, small_model: XFM, exported_fp32: Path, exported_packed: Path, tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    folder = {"padded": exported_fp32, "packed": exported_packed}.get(form, tmp_path)
    if form == "fixed":
        export_onnx(small_model, folder, graphs=DEFAULT_GRAPHS, fixed={"batch": 2, "texts": 4, "length": 20})
    session = Session.load(folder, runtime)
    assert session.description.startswith(runtime)
    _same_retrieval(small_model, session)
    with pytest.raises(InputError, match=r"pixels is \[1, 3, 8, 8\]"):
        session.run("vision", {"pixels": torch.zeros(1, 3, 8, 8)})
    if form == "fixed":
        with pytest.raises(InputError, match="length is 21"):
            session.encode_text(torch.full((1, 21), 5))
    with pytest.raises(InputError, match="attention_mask" if form != "packed" else "firsts"):
        session.run("text", {})
    for device in ("mps", "cuda") if runtime == "openvino" else ("mps",):
        with pytest.raises(UnavailableError, match=device):
            Session(folder, runtime, device=device)
    with pytest.raises(UnavailableError, match="fp8"):
        Session(folder, runtime, precision="fp8")  # pyright: ignore[reportArgumentType]


def test_engines_give_what_the_model_gives(engines: Path, small_model: XFM, fakes: Fakes) -> None:
    session = Session.load(engines)
    assert session.description == "tensorrt 10.14.1, a stand-in"
    _same_retrieval(small_model, session)
    used = {profile for profile, _ in fakes.engines["fusion"].runs}
    assert used == {0, 1}


def test_a_context_for_each_profile_and_each_captured_shape(engines: Path, small_model: XFM, fakes: Fakes) -> None:
    session = Session.load(engines)
    vision = fakes.engines["vision"]
    assert [context.profile for context in vision.contexts] == [0, 1, 0]
    # A captured graph has memory of its own, of its size.
    _, shared, captured = (context.memory for context in vision.contexts)
    assert captured[1] == 1 << 10
    assert not shared[0] <= captured[0] < shared[0] + shared[1]
    fakes.cuda.log.clear()
    one = session.encode_image(_pixels(small_model, 1))
    assert fakes.cuda.log == ["replay"] or fakes.cuda.log == ["caller waits for an event", "replay"]
    kept = one.clone()
    other = session.encode_image(-_pixels(small_model, 1))
    # The memory of a captured graph is used again; what was handed out is not.
    assert torch.equal(one, kept)
    assert not torch.equal(other, kept)
    fakes.cuda.log.clear()
    session.encode_image(_pixels(small_model, 3))
    assert fakes.cuda.log == ["engine waits for caller", "caller waits for engine"]
    assert vision.runs[-1] == (1, {"pixels": (3, 3, *[small_model.config.image_size] * 2)})


def test_all_engines_share_one_memory(engines: Path, small_model: XFM, fakes: Fakes) -> None:
    """One context runs at a time, so all share the memory of activations, which the largest engine decides."""
    session = Session.load(engines)
    images = session.encode_image(_pixels(small_model, 4))
    texts = session.encode_text(*_texts(4, 20))
    session.fuse(texts, _texts(4, 20)[1], session.image_memory(images), first_token_only=True)
    ran = {name: fakes.engines[name].contexts[1] for name in ("vision", "text", "image_memory", "fusion")}
    assert len({context.memory for context in ran.values()}) == 1
    assert ran["vision"].memory[1] == max(FakeEngine.NEEDS.values())
    # Told once while its engine was loaded, where there was none yet, and again because others need more.
    assert [context.told for context in ran.values()] == [2, 2, 2, 1]
    session.encode_image(_pixels(small_model, 4))
    assert ran["vision"].told == 2, "what does not change is not told again"


def test_requests_between_captured_shapes_are_padded(engines: Path, small_model: XFM, fakes: Fakes) -> None:
    """Shapes around the tuned one are captured; what lies between two is padded to the larger, and hidden."""
    session = Session.load(engines)
    text = fakes.engines["text"]
    # Of the profile for single texts: half of 8 tokens, 8, 16, and the greatest.
    tuned = [context for context in text.contexts[2:] if context.profile == 0]
    assert [context.shapes["input_ids"][1] for context in tuned] == [4, 8, 16, 24]
    assert len({context.memory for context in tuned}) == 1, "they run in turn, in one memory"
    record = session.manifest.graph("text")
    slot = graph_slots(record)[0]
    for length, ran in ((24, 24), (9, 16), (5, 8), (4, 4), (2, 4), (1, 1)):
        ids, mask = torch.arange(5, 5 + length)[None], torch.ones(1, length, dtype=torch.long)
        fakes.cuda.log.clear()
        made = session._graphs["text"].run(
            {"input_ids": ids, "attention_mask": mask}, slot, {"batch": 1, "length": length}
        )
        assert text.runs[-1][1]["input_ids"] == (1, ran)
        assert ("replay" in fakes.cuda.log) == (ran != 1), "a captured shape of four times the work is not run"
        with torch.no_grad():
            expected = small_model.encode_text(ids, mask)
        assert made["text_embeds"].shape == expected.shape
        assert (made["text_embeds"] - expected).abs().max() < 1e-4
    # Two axes: 5 texts of 3 tokens run as 8 of 4.
    fusion, slot = fakes.engines["fusion"], graph_slots(session.manifest.graph("fusion"))[0]
    inputs = session.example_inputs("fusion", slot, {"batch": 1, "texts": 5, "length": 4})
    session._graphs["fusion"].run(inputs, slot, {"batch": 1, "texts": 5, "length": 4})
    assert fusion.runs[-1][1]["attention_mask"] == (1, 8, 4)


def test_a_request_outside_every_profile_is_named(engines: Path, small_model: XFM, fakes: Fakes) -> None:
    session = Session.load(engines)
    with pytest.raises(InputError, match="batch is 7"):
        session.run("vision", {"pixels": _pixels(small_model, 7)})
    ids, mask = torch.full((1, 30), 5), torch.ones(1, 30)
    with pytest.raises(InputError, match="length is 30"):
        session.encode_text(ids, mask)
    whole = {"pixels": _pixels(small_model, 2), "input_ids": ids[None, :, :4].expand(2, 9, 4)}
    with pytest.raises(InputError, match="batch 2, texts 9, length 4"):
        session.run("match", whole | {"attention_mask": torch.ones(2, 9, 4)})


def test_failures_of_the_library_are_told(engines: Path, small_model: XFM, fakes: Fakes, tmp_path: Path) -> None:
    session = Session.load(engines)
    fakes.engines["vision"].broken = True
    with pytest.raises(ExportError, match="Cask convolution failed"):
        session.encode_image(_pixels(small_model, 2))
    runtime = session.runtime
    (tmp_path / "vision.engine").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="truncated"):
        runtime.load(session.manifest.graph("vision"), tmp_path / "vision.engine")
    (tmp_path / "other.engine").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match=r"other\.engine"):
        runtime.load(session.manifest.graph("vision"), tmp_path / "other.engine")


def test_engines_are_verified_through_a_session(engines: Path, fakes: Fakes, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(engines, tmp_path / "copy"))
    assert Reference.load(folder).texts > 16, "more than a profile takes at once"
    manifest = verify(folder)
    assert (manifest.status, manifest.reason) == ("verified", "")
    record = manifest.verification
    assert record is not None
    assert record.runtime == "tensorrt 10.14.1, a stand-in"
    texts = {tuple(shape[:3]) for check in record.checks if check.graph == "fusion" for shape in check.shapes}
    assert {shape[:2] for shape in texts} >= {(1, 1), (1, 16), (4, 1), (4, 6)}
    assert max(shape[2] for shape in texts) == 21
    assert all(ranks.agreement >= 0.99 for ranks in record.ranks)


def test_engines_of_another_version_or_machine_are_refused(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library.__new__(Library)
    library.trt, library.version = None, "10.15.0"
    monkeypatch.setattr(engine_library, "load_library", lambda name: library)
    with pytest.raises(ExportError, match=r"10\.15\.0"):
        Session(engines)
    library.version = "10.14.1"
    with pytest.raises(UnavailableError, match="cpu"):
        Session(engines, device="cpu")
    monkeypatch.setattr(engine_library, "local_capability", lambda: None)
    with pytest.raises(UnavailableError, match="NVIDIA GPU"):
        Session(engines)
    monkeypatch.setattr(engine_library, "local_capability", lambda: 75)
    with pytest.raises(ExportError, match="SM75"):
        Session(engines)


def test_a_missing_library_says_what_to_install(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(engine_library.importlib, "import_module", missing)
    with pytest.raises(UnavailableError, match=r"xfm-fast\[tensorrt\]"):
        open_runtime("tensorrt", Manifest.load(engines))


def test_kernels_that_rtx_compiled_are_kept(tmp_path: Path) -> None:
    class Cache:
        content = b""

        def deserialize(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> bytes:
            return self.content + b"+kernel"

    config: Any = types.SimpleNamespace(
        create_runtime_cache=Cache,
        set_runtime_cache=lambda cache: None,
        set_execution_context_allocation_strategy=lambda strategy: setattr(config, "allocation", strategy),
    )
    engine: Any = types.SimpleNamespace(
        create_runtime_config=lambda: config, create_execution_context=lambda given: (given, "context")
    )
    rtx = pytest.importorskip("tensorrt_rtx", reason="the names of its strategies")
    library: Any = types.SimpleNamespace(name="tensorrt-rtx", version="1.7.1", trt=rtx)
    for expected in (b"+kernel", b"+kernel+kernel"):
        kernels = engine_library._KernelCache(library, engine, tmp_path / "text.engine", (12, 0))
        assert kernels.context() == (config, "context")
        # Its own capture knows when a kernel is still being compiled, and activations are shared between profiles.
        assert kernels.captures
        assert config.cuda_graph_strategy == rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        assert config.allocation == rtx.ExecutionContextAllocationStrategy.USER_MANAGED
        kernels.save()
        assert (tmp_path / "text.sm120.1.7.1.kernels").read_bytes() == expected
    # A folder that cannot be written is no failure.
    engine_library._KernelCache(library, engine, tmp_path / "absent" / "text.engine", (12, 0)).save()


def test_attention_that_openvino_does_not_read(
    exported_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("openvino", reason="optional")
    folder = Path(shutil.copytree(exported_fp32, tmp_path / "attention"))
    Manifest.load(folder).model_copy(update={"attention": "function"}).save(folder)
    with pytest.raises(ExportError, match="attention as function"):
        Session.load(folder, "openvino")
    Manifest.load(folder).model_copy(update={"attention": "opset23"}).save(folder)
    monkeypatch.setattr(openvino, "__version__", "2026.3.1-20000-abcdef")
    with pytest.raises(ExportError, match=r"attention as opset23, which OpenVINO 2026\.3"):
        Session.load(folder, "openvino")


def test_onnxruntime_says_what_it_lacks(exported_fp32: Path) -> None:
    manifest = Manifest.load(exported_fp32)
    assert choose_runtime(manifest, exported_fp32) == "onnxruntime"
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(UnavailableError, match="cuda:0"):
            Session(exported_fp32, device="cuda:0")


def test_gemms_on_a_gpu_are_not_rounded_to_tf32(exported_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default of ONNX Runtime's CUDA provider, with an error a hundred times that of fp32."""
    manifest, given = Manifest.load(exported_fp32), []
    runtime = OnnxRuntime(manifest, torch.device("cpu"))
    runtime.device = torch.device("cuda", 1)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, providers: given.extend(providers) or MagicMock())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    runtime.load(manifest.graph("text"), exported_fp32 / "text.onnx")
    options = {"device_id": 1, "use_tf32": 0, "user_compute_stream": "77"}
    assert given == [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


@pytest.mark.parametrize("supported", [False, True])
def test_only_processors_that_need_it_multiply_bytes_the_slow_way(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: supported, raising=False)
    options = session_options()
    if supported:
        with pytest.raises(RuntimeError, match="does not have"):
            options.get_session_config_entry("session.x64quantprecision")
    else:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"


def test_int8_is_made_of_fp32_exports_alone(
    exported_fp32: Path, exported_fp16: Path, engines: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="fp16"):
        quantize_int8(exported_fp16, tmp_path / "out")
    with pytest.raises(ExportError, match="tensorrt"):
        quantize_int8(engines, tmp_path / "out")
    with pytest.raises(InputError, match="another folder"):
        quantize_int8(exported_fp32, exported_fp32)
    assert not (tmp_path / "out").exists()
