"""Builds: from graphs of a model, or a folder of ONNX graphs, to a folder of engines.

Requests are validated before a builder starts, and Ctrl-C stops the builder cleanly.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from xfm_fast.checkpoint.files import write_bytes, write_files
from xfm_fast.errors import ExportError
from xfm_fast.models.xfm import XFM

from ..consumers import Profile, data_type, profile
from ..expected import Examples, Reference, generated_examples
from ..manifest import EngineTarget, GraphRecord, Manifest, ProfileRecord, record_files
from ..onnx import export_onnx, require_onnx
from ..pipeline import (
    build_graphs,
    companions_of,
    fill_folder,
    graph_bytes,
    graph_records,
    prepare_folder,
)
from ..quantise import (
    QUANTISATIONS,
    Calibration,
    check_quantisation,
    eight_bit_options,
    make_rewrite,
    require_eight_bits,
)
from ..request import EngineRequest, OnnxRequest, TensorRTRequest, with_changes
from ..verification import compare_with_reference, keep_reference
from .library import EngineConsumer, Library, first_error, load_library, message_logger, start
from .messages import describe_layers, explain, first_failing_layer, parser_errors
from .profiles import graph_profiles, parse_profiles

ONNX_FOLDER = "onnx"
"""In the folder of the engines: the graphs that they were built from, where they are kept."""

# An engine holds the weights again, and code for every target.
_ENGINE_PER_ONNX = 1.5
_ROOM_PER_ENGINE = 16 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltEngine:
    """An engine on disk."""

    path: Path
    bytes: int
    seconds: float


def export_engines(
    model: XFM,
    folder: str | Path,
    consumer: EngineConsumer,
    request: EngineRequest | None = None,
    *,
    progress: BuildProgress | None = None,
    **given: Any,
) -> Manifest:
    """Export graphs of a model and build an engine of each, `<graph>.engine`, with `manifest.json`."""
    with engine_graphs(model, folder, consumer, request, **given) as build:
        return build(progress)


@contextlib.contextmanager
def engine_graphs(
    model: XFM,
    folder: str | Path,
    consumer: EngineConsumer,
    request: EngineRequest | None = None,
    *,
    source: str = "a model in memory",
    tokenizer_sha256: str | None = None,
    examples: Examples | None = None,
    calibration: Examples | None = None,
    companions: Mapping[str, bytes] = {},
    **changes: Any,
) -> Iterator[Callable[[BuildProgress | None], Manifest]]:
    """Export the graphs of engines and yield the function that builds them, which no longer needs the model."""
    folder = Path(folder)
    wanted = with_changes(request, TensorRTRequest, changes).complete
    library, targets, spelling = check_request(consumer, wanted)
    profiles = parse_profiles(wanted.profile, packed=wanted.packed)
    dtype, fixed = data_type(wanted.dtype), wanted.sizes
    built = build_graphs(model, spelling, wanted.names, fixed=fixed, all_tokens=wanted.all_tokens, packed=wanted.packed)
    for record in graph_records(built, dtype, model, fixed):
        graph_profiles(record, profiles)
    weights = sum(graph_bytes(graph, model, dtype) for graph in built.values())
    prepare_folder(folder, int(weights * (1 + _ENGINE_PER_ONNX)) + _ROOM_PER_ENGINE * len(built))
    kind = wanted.quantize and check_quantisation(wanted.quantize, dtype, wanted.budget, [*built])
    # A graph joins weights into new ones.
    del built
    graphs = OnnxRequest(
        wanted.dtype, wanted.graphs, wanted.fixed, wanted.all_tokens, wanted.packed, consumer, wanted.opset
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as scratch:
        onnx = folder / ONNX_FOLDER if wanted.keep_onnx else Path(scratch)
        exported = export_onnx(
            model, onnx, graphs, source=source, tokenizer_sha256=tokenizer_sha256, companions=companions,
            examples=examples, compared=False,
        )  # fmt: skip
        if kind is not None:
            known = calibration or examples or generated_examples(model.config)
            # The memories of fusion come from `image_memory` as served, in 8 bits.
            inputs = Calibration.of_model(model, known, onnx, exported)
            exported.options |= eight_bit_options(kind, wanted.budget, inputs)
            rewrite = make_rewrite(inputs, kind, dtype, budget=wanted.budget)
            for record in exported.graphs:
                rewrite(record, onnx / record.file)
            exported.files = record_files(onnx, [record.name for record in exported.files])
            require_eight_bits(exported.graphs, wanted.budget)
            del inputs, rewrite
        reference = None if examples is None else Reference.load(onnx)

        def compare(content: Manifest) -> None:
            if reference is not None:
                keep_reference(content, folder, reference)
                compare_with_reference(content, folder, reference)

        def build(progress: BuildProgress | None) -> Manifest:
            if reference is not None:
                compare_with_reference(exported, onnx, reference)
            exported.save(onnx)
            return build_engines(
                exported, onnx, folder, library, targets, request=wanted, progress=progress, compare=compare
            )

        del model
        yield build


def check_request(consumer: EngineConsumer, request: EngineRequest) -> tuple[Library, tuple[int, ...], Profile]:
    """Check a request before a checkpoint is read; returns library, compute capabilities and attention form."""
    request = request.complete
    parse_profiles(request.profile, packed=request.packed)
    spelling = profile(consumer, request.dtype, request.opset)
    require_onnx()
    library = load_library(consumer)
    targets = library.check(request, request.dtype)
    if request.quantize:
        if request.quantize in QUANTISATIONS:
            library.check(request, request.quantize)
        check_quantisation(request.quantize, data_type(request.dtype), request.budget)
    return library, targets, spelling


def build_engines(
    exported: Manifest,
    onnx: Path,
    folder: Path,
    library: Library,
    targets: Sequence[int],
    *,
    request: EngineRequest | None = None,
    progress: BuildProgress | None = None,
    compare: Callable[[Manifest], None] = lambda content: None,
) -> Manifest:
    """Build an engine of every graph of the ONNX export in `onnx` into an existing folder."""
    wanted, progress = (request or EngineRequest()).complete, progress or Silent()
    profiles = parse_profiles(wanted.profile, packed=wanted.packed)
    shapes = {record.name: graph_profiles(record, profiles) for record in exported.graphs}
    numbers = {record.name: number for number, record in enumerate(exported.graphs, 1)}

    sources = {record.name: onnx / record.file for record in exported.graphs}

    def write(record: GraphRecord) -> list[str]:
        progress.graph(record.name, numbers[record.name], len(numbers))
        build_engine(
            library, sources[record.name], folder / record.file, wanted, targets, record.profiles, graph=record.name,
            progress=progress,
        )  # fmt: skip
        return [record.file]

    target = EngineTarget(
        library=library.consumer,
        version=library.version,
        compute_capabilities=list(targets),
        version_compatible=wanted.version_compatible,
        hardware_compatibility=wanted.hardware_compatible,
    )
    options = {
        "profiles": [str(profile) for profile in profiles],
        "optimization_level": wanted.level,
        "arithmetic": exported.options.get("arithmetic"),
    }
    content = exported.model_copy(
        update={
            "kind": library.consumer,
            "consumer": library.consumer,
            "versions": exported.versions | {library.consumer: library.version},
            "status": "unverified",
            "reason": "it was not compared with the model",
            "verification": None,
            "graphs_verification": exported.verification,
            "target": target,
            "options": {**exported.options, **options},
        }
    )
    records = [
        record.model_copy(
            update={
                "file": f"{record.name}.engine",
                "profiles": shapes[record.name],
            }
        )
        for record in exported.graphs
    ]
    return fill_folder(content, folder, records, write, compare, companions_of(onnx, exported))


def build_engine(
    library: Library,
    onnx: Path,
    engine: Path,
    request: EngineRequest,
    targets: Sequence[int],
    profiles: Sequence[ProfileRecord],
    *,
    graph: str = "",
    progress: BuildProgress | None = None,
) -> BuiltEngine:
    """Build one engine from one ONNX file; `targets` come from `library.check`, fixed shapes have no profiles."""
    wanted = request.complete
    return _Build(library, onnx, wanted, targets, profiles, graph or onnx.stem, progress or Silent()).run(engine)


@dataclass
class _Build:
    """One build, with the messages that the library logs for it."""

    library: Library
    onnx: Path
    request: TensorRTRequest
    targets: Sequence[int]
    profiles: Sequence[ProfileRecord]
    graph: str
    progress: BuildProgress

    def __post_init__(self) -> None:
        library = self.library
        self.errors: list[str] = []
        self.logger = message_logger(library.trt, self.errors, _log)
        self.builder: Any = start(library, library.trt.Builder, self.logger, self.errors)

    def run(self, engine: Path) -> BuiltEngine:
        started = time.perf_counter()
        network = self.library.create_network(self.builder)
        if network is None:
            raise ExportError(
                f"{self.library.label} {self.library.version} makes no network ({first_error(self.errors)}); see "
                "that the driver fits the library, or upgrade both"
            )
        parser = self.library.trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(self.onnx)):
            raise self._failure(parser_errors(parser) + self.errors, "read")
        self.errors.clear()
        state = Interruption()
        config: Any = None

        def write(file: BinaryIO) -> None:
            nonlocal config
            built, config = self._build(network, state, self.progress.phase, file)
            if state.raised is not None:
                raise state.raised
            if not built:
                raise self._failure(list(self.errors), "build", network)
            if not file.tell():
                raise ExportError(
                    f"{self.library.label} {self.library.version} built graph {self.graph!r} and wrote nothing of it; "
                    "its Python module and its libraries may be of different versions: install it again"
                )

        write_files({engine: write})
        timings = None if self.request.timing_cache is None else self.library.timing_cache(config)
        if self.request.timing_cache is not None and timings is not None:
            write_bytes({self.request.timing_cache: timings})
        return BuiltEngine(engine, engine.stat().st_size, time.perf_counter() - started)

    def _build(
        self, network: Any, state: Interruption, tell: Callable[[str, int, int, int], None], file: BinaryIO
    ) -> tuple[bool, Any]:
        """Build a network into a file chunk by chunk: a whole engine in memory is a second copy of all weights."""
        config = self.builder.create_builder_config()
        self.library.configure(config, self.request, self.targets)
        for record in self.profiles:
            shapes = self.builder.create_optimization_profile()
            for number in range(network.num_inputs):
                name = network.get_input(number).name
                shapes.set_shape(name, tuple(record.least[name]), tuple(record.best[name]), tuple(record.most[name]))
            if config.add_optimization_profile(shapes) < 0:
                raise self._failure(list(self.errors), "build")
        # The configuration does not keep the monitor alive.
        watching, observed = monitor(self.library.trt, tell)
        config.progress_monitor = watching
        built = self.builder.build_serialized_network_to_stream(
            network, config, writer(self.library.trt, file, observed)
        )
        state.raised, state.phase = observed.raised, observed.phase
        return built, config

    def _failure(self, messages: Sequence[str], verb: str, network: Any = None) -> ExportError:
        import onnx

        nodes = onnx.load(str(self.onnx), load_external_data=False).graph.node
        found = explain(messages, [(node.name, node.op_type, [*node.input, *node.output]) for node in nodes])
        layers = found.layers
        if not layers and not found.everywhere and network is not None:

            def builds(part: Any) -> bool:
                state = Interruption()
                with Path(os.devnull).open("wb") as nowhere:
                    built, _ = self._build(part, state, lambda *_: None, nowhere)
                if state.raised is not None:
                    raise state.raised
                return built

            layers = tuple(filter(None, [first_failing_layer(network, builds)]))
        where = f" at {describe_layers(layers)}" if layers else ""
        said = "" if found.said in found.meaning else f" ({self.library.label} says: {found.said})"
        return ExportError(
            f"{self.library.label} {self.library.version} cannot {verb} graph {self.graph!r}{where}: {found.meaning}; "
            f"{found.remedy}{said}"
        )


def check_engine_file(path: Path, library: Library, *, expected_bytes: int | None = None) -> None:
    """Raise `ExportError` for a missing, empty, truncated or foreign engine, before a runtime asserts on it."""
    again = f"copy the file again or build it with xfm-fast export {library.consumer}"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ExportError(f"engine {path} cannot be read ({error.strerror or error}); {again}") from None
    if not size:
        raise ExportError(f"engine {path} is empty; {again}")
    try:
        declared = library.declared_size(head)
    except ExportError as error:
        raise ExportError(f"{path} cannot be loaded: {error}") from None
    for wanted in (declared, expected_bytes):
        if wanted is not None and size != wanted:
            state = "truncated" if size < wanted else "damaged"
            raise ExportError(f"engine {path} is {state} ({size:,} of {wanted:,} bytes); {again}")


class BuildProgress(Protocol):
    """Progress of a build. Phases nest: `Building engine` contains the others."""

    def graph(self, name: str, number: int, count: int) -> None:
        """The build of graph `number` of `count`, from 1, begins."""

    def phase(self, name: str, done: int, steps: int, depth: int) -> None:
        """A phase of the builder with_changes `done` of its steps; depth 0 is the whole build."""


class Silent(BuildProgress):
    """No progress output."""


class Interruption:
    """The exception that interrupted a build (Ctrl-C, full disk), and its phase."""

    def __init__(self) -> None:
        self.raised: BaseException | None = None
        self.phase = ""


def monitor(trt: Any, tell: Callable[[str, int, int, int], None]) -> tuple[Any, Interruption]:
    """An `IProgressMonitor` that calls `tell`; an exception in it is stored in the state and stops the builder."""
    state = Interruption()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, tuple[int, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            depth = self._steps[parent_phase][1] + 1 if parent_phase in self._steps else 0
            self._steps[phase_name] = (num_steps, depth)
            state.phase = phase_name
            self._guarded(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self._steps:
                self._guarded(phase_name, self._steps[phase_name][0])

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                self._guarded(phase_name, min(step + 1, self._steps[phase_name][0]))
            return state.raised is None

        def _guarded(self, phase_name: str, done: int) -> None:
            try:
                tell(phase_name, done, *self._steps[phase_name])
            except BaseException as error:  # Ctrl-C too
                state.raised = state.raised or error

    return Monitor(), state


def writer(trt: Any, file: BinaryIO, state: Interruption) -> Any:
    """An `IStreamWriter` that fills a file; an exception in it is stored in the state and stops the builder."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except BaseException as error:  # Ctrl-C too
                state.raised = state.raised or error
                return 0

    return Writer()
