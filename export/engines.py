"""Builds of TensorRT engines: from graphs of a model, or a folder of ONNX graphs, to a folder of engines.

Requests are validated before a builder starts, and Ctrl-C stops the builder cleanly. An engine accepts the sizes of its
profiles, on the command line `name:axis=size` or `name:axis=least..best..most` with commas:

    latency:batch=1,texts=1..8..64,length=1..16..40
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from xfm_fast.errors import ExportError
from xfm_fast.io import write_bytes, write_files
from xfm_fast.models.xfm import XFM

from .expected import Examples, Reference, generated_examples
from .manifest import EngineTarget, GraphRecord, Manifest, ProfileRecord, record_files
from .onnx import export_onnx, require_onnx
from .pipeline import build_graphs, fill_folder, graph_bytes, graph_records, prepare_folder, sidecar_files
from .quantise import Calibration, check_quantisation, eight_bit_options, make_rewrite, require_eight_bits
from .request import OnnxRequest
from .runtimes import Spelling, data_type, find_runtime
from .runtimes.tensorrt import (
    EngineRequest,
    Library,
    TensorRTRequest,
    first_error,
    load_library,
    message_logger,
    start,
)
from .slots import graph_profiles, parse_profiles
from .verification import compare_with_reference, keep_reference

ONNX_FOLDER = "onnx"
"""In the folder of the engines: the graphs that they were built from, where they are kept."""

# An engine holds the weights again, and code for every target.
_ENGINE_PER_ONNX = 1.5
_ROOM_PER_ENGINE = 16 << 20


class BuildProgress(Protocol):
    """Progress of a build. Phases nest: `Building engine` contains the others."""

    def graph(self, name: str, number: int, count: int) -> None:
        """The build of graph `number` of `count`, from 1, begins."""

    def phase(self, name: str, done: int, steps: int, depth: int) -> None:
        """A phase of the builder has done some of its steps; depth 0 is the whole build."""


class Silent(BuildProgress):
    """No progress output."""


def export_engines(
    model: XFM,
    folder: str | Path,
    consumer: str,
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
    consumer: str,
    request: EngineRequest | None = None,
    *,
    examples: Examples | None = None,
    calibration: Examples | None = None,
    source: str = "a model in memory",
    tokenizer_sha256: str | None = None,
    companions: Mapping[str, bytes] = {},
    **changes: Any,
) -> Iterator[Callable[[BuildProgress | None], Manifest]]:
    """Export the graphs of engines and yield the function that builds them, which no longer needs the model."""
    folder = Path(folder)
    request = replace(request or TensorRTRequest(), **changes).complete
    library, targets, spelling = check_request(consumer, request)
    profiles = parse_profiles(request.profile, packed=request.packed)
    dtype = data_type(request.dtype)
    built = build_graphs(model, spelling, request)
    for record in graph_records(built, dtype, model, request.sizes):
        graph_profiles(record, profiles)
    weights = sum(graph_bytes(graph, model, dtype) for graph in built.values())
    prepare_folder(folder, int(weights * (1 + _ENGINE_PER_ONNX)) + _ROOM_PER_ENGINE * len(built))
    kind = request.quantize and check_quantisation(request.quantize, dtype, request.budget, [*built])
    # A graph joins weights into new ones.
    del built
    graphs = OnnxRequest(
        request.dtype, request.graphs, request.fixed, request.all_tokens, request.packed, consumer, request.opset
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as scratch:
        onnx = folder / ONNX_FOLDER if request.keep_onnx else Path(scratch)
        exported = export_onnx(
            model, onnx, graphs, source=source, tokenizer_sha256=tokenizer_sha256, companions=companions,
            examples=examples, compared=False,
        )  # fmt: skip
        if kind is not None:
            # The memories of fusion come from `image_memory` as served, in 8 bits.
            inputs = Calibration.of_model(
                model, calibration or examples or generated_examples(model.config), onnx, exported
            )
            exported.options |= eight_bit_options(kind, request.budget, inputs)
            rewrite = make_rewrite(inputs, kind, dtype, budget=request.budget)
            for record in exported.graphs:
                rewrite(record, onnx / record.file)
            exported.files = record_files(onnx, [record.name for record in exported.files])
            require_eight_bits(exported.graphs, request.budget)
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
                exported, onnx, folder, library, targets, request=request, progress=progress, compare=compare
            )

        del model
        yield build


def check_request(consumer: str, request: EngineRequest) -> tuple[Library, tuple[int, ...], Spelling]:
    """Check a request before a checkpoint is read; returns library, compute capabilities and attention form."""
    request = request.complete
    parse_profiles(request.profile, packed=request.packed)
    spelling = find_runtime(consumer).spelling(request.dtype, request.opset)
    require_onnx()
    library = load_library(consumer)
    targets = library.check(request, request.dtype)
    if request.quantize:
        library.check(request, check_quantisation(request.quantize, data_type(request.dtype), request.budget))
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
    request, progress = (request or EngineRequest()).complete, progress or Silent()
    profiles = parse_profiles(request.profile, packed=request.packed)
    records = [
        record.model_copy(update={"file": f"{record.name}.engine", "profiles": graph_profiles(record, profiles)})
        for record in exported.graphs
    ]

    def write(record: GraphRecord) -> list[str]:
        progress.graph(record.name, records.index(record) + 1, len(records))
        source = onnx / exported.graph(record.name).file
        build_engine(
            library, source, folder / record.file, request, targets, record.profiles, graph=record.name,
            progress=progress,
        )  # fmt: skip
        return [record.file]

    target = EngineTarget(
        library=library.name,
        version=library.version,
        compute_capabilities=list(targets),
        version_compatible=request.version_compatible,
        hardware_compatibility=request.hardware_compatible,
    )
    options = {
        "profiles": [str(profile) for profile in profiles],
        "optimization_level": request.level,
        "arithmetic": exported.options.get("arithmetic"),
    }
    content = exported.unverified(
        kind=library.name,
        consumer=library.name,
        versions=exported.versions | {library.name: library.version},
        graphs_verification=exported.verification,
        target=target,
        options={**exported.options, **options},
    )
    return fill_folder(content, folder, records, write, compare, sidecar_files(onnx, exported))


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
) -> None:
    """Build one engine from one ONNX file; `targets` come from `library.check`, fixed shapes have no profiles."""
    build = _Build(library, onnx, request.complete, targets, profiles, graph or onnx.stem, progress or Silent())
    build.run(engine)


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
        self.logger = message_logger(library.trt, self.errors)
        self.builder: Any = start(library, library.trt.Builder, self.logger, self.errors)
        # What stopped the builder: Ctrl-C, a full disk.
        self.raised: BaseException | None = None

    def run(self, engine: Path) -> None:
        library = self.library
        network = library.create_network(self.builder)
        if network is None:
            raise ExportError(
                f"{library.title} {library.version} makes no network ({first_error(self.errors)}); see that the driver "
                "fits the library, or upgrade both"
            )
        parser = library.trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(self.onnx)):
            errors = [parser.get_error(number) for number in range(parser.num_errors)]
            named = [f"node {each.node_name()} ({each.node_operator()}): {each.desc()}" for each in errors]
            raise self._failure(named + self.errors, "read")
        self.errors.clear()
        config: Any = None

        def write(file: BinaryIO) -> None:
            nonlocal config
            built, config = self._build(network, file)
            if not built:
                raise self._failure(list(self.errors), "build", network)
            if not file.tell():
                raise ExportError(
                    f"{library.title} {library.version} built graph {self.graph!r} and wrote nothing of it; its Python "
                    "module and its libraries may be of different versions: install it again"
                )

        write_files({engine: write})
        timings = None if self.request.timing_cache is None else library.timing_cache(config)
        if self.request.timing_cache is not None and timings is not None:
            write_bytes({self.request.timing_cache: timings})

    def _build(self, network: Any, file: BinaryIO) -> tuple[bool, Any]:
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
        monitor = self._monitor()
        config.progress_monitor = monitor
        built = self.builder.build_serialized_network_to_stream(network, config, self._writer(file))
        if self.raised is not None:
            raise self.raised
        return built, config

    def _monitor(self) -> Any:
        """An `IProgressMonitor`; an exception in it is stored and stops the builder."""
        build, trt = self, self.library.trt

        class Monitor(trt.IProgressMonitor):
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)
                self._steps: dict[str, tuple[int, int]] = {}

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                depth = self._steps[parent_phase][1] + 1 if parent_phase in self._steps else 0
                self._steps[phase_name] = (num_steps, depth)
                self._report(phase_name, 0)

            def phase_finish(self, phase_name: str) -> None:
                if phase_name in self._steps:
                    self._report(phase_name, self._steps[phase_name][0])

            def step_complete(self, phase_name: str, step: int) -> bool:
                if phase_name in self._steps:
                    self._report(phase_name, min(step + 1, self._steps[phase_name][0]))
                return build.raised is None

            def _report(self, phase_name: str, done: int) -> None:
                try:
                    build.progress.phase(phase_name, done, *self._steps[phase_name])
                except BaseException as error:  # Ctrl-C too
                    build.raised = build.raised or error

        return Monitor()

    def _writer(self, file: BinaryIO) -> Any:
        """An `IStreamWriter` that fills a file; an exception in it is stored and stops the builder."""
        build, trt = self, self.library.trt

        class Writer(trt.IStreamWriter):
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: bytes) -> int:
                try:
                    return file.write(data)
                except BaseException as error:  # Ctrl-C too
                    build.raised = build.raised or error
                    return 0

        return Writer()

    def _failure(self, messages: Sequence[str], verb: str, network: Any = None) -> ExportError:
        import onnx

        nodes = onnx.load(str(self.onnx), load_external_data=False).graph.node
        layers, rule, message = explain(messages, [(n.name, n.op_type, [*n.input, *n.output]) for n in nodes])
        if not layers and not rule.everywhere and network is not None:
            layers = tuple(filter(None, [first_failing_layer(network, self._builds)]))
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        where = f" at {', '.join(layers[:3])}{more}" if layers else ""
        return ExportError(
            f"{self.library.title} {self.library.version} cannot {verb} graph {self.graph!r}{where}: {rule.meaning}; "
            f"{rule.remedy} ({self.library.title}: {message or 'no message'})"
        )

    def _builds(self, part: Any) -> bool:
        with Path(os.devnull).open("wb") as nowhere:
            return self._build(part, nowhere)[0]


class Rule(NamedTuple):
    """A known message: its pattern, its meaning as a clause, the remedy as an imperative, and operators to blame."""

    pattern: str
    meaning: str
    remedy: str
    operators: tuple[str, ...] = ()
    everywhere: bool = False


RULES = (
    Rule(
        r"Attention operation was not supported by a dedicated kernel|is_decomposable",
        "there is no kernel for attention of this type and shape",
        "use --dtype bf16 or fp16, or spell attention as primitives with --opset 22",
        ("Attention",),
    ),
    Rule(
        r"HW-specific datatypes: b16",
        "a target has no bf16",
        "use --dtype fp16, or leave out targets below SM80",
        everywhere=True,
    ),
    Rule(
        r"HW-specific datatypes: (fp?8|f8|e4m3)",
        "a target has no fp8",
        "use --quantize int8, or leave out targets below SM89",
        everywhere=True,
    ),
    Rule(
        r"element type \(\w+\) differs from input 1's element type|must have (the )?same input types",
        "its operands have different types, and a strongly typed engine converts nothing by itself",
        "export the whole graph in one type: --dtype bf16 or --dtype fp16",
    ),
    Rule(
        r"libnvinfer_lean",
        "version compatibility needs the lean runtime, libnvinfer_lean, which is not installed",
        "leave out --version-compatible, or install tensorrt_lean",
        everywhere=True,
    ),
    Rule(
        r"no optimization profile has been defined|Invalid optimization profiles|profile->isValid",
        "the optimisation profile does not describe every dynamic input",
        "give --profile name:axis=least..best..most for every axis",
        everywhere=True,
    ),
    Rule(
        r"out of memory|MEM_ALLOC|OutOfMemory|cudaErrorMemoryAllocation|bad_alloc",
        "the builder ran out of memory",
        "narrow the profiles, or build on a machine with more memory",
        everywhere=True,
    ),
    Rule(
        r"insufficient for CUDA runtime version|CUDA initialization failure|no CUDA-capable device",
        "there is no usable GPU on this machine",
        "name the targets with --sm (TensorRT for RTX), or build on a machine with a GPU and a current driver",
        everywhere=True,
    ),
    Rule(
        r"Could not find any implementation for node",
        "no kernel of this version of TensorRT fits it",
        "try the other of --dtype bf16 and fp16, or a newer TensorRT",
    ),
    Rule(
        r"No importer registered|[Uu]nsupported operator|UNSUPPORTED_NODE|Plugin not found",
        "this version of TensorRT does not know the operator in this form",
        "export with a lower --opset, or use a newer TensorRT",
    ),
)
_UNKNOWN = Rule(
    "",
    "it gives a reason that this project does not know",
    "build with --verbose for the builder's own messages, or try the other of --dtype bf16 and fp16",
)

# Follows every message on a machine without a driver and is unrelated to the network.
_NOISE = re.compile(r"^\[?checkMacros\.cpp::catchCudaError.*cudaError 35", re.DOTALL)

_Node = tuple[str, str, Sequence[str]]


def explain(messages: Sequence[str], nodes: Sequence[_Node]) -> tuple[tuple[str, ...], Rule, str]:
    """ONNX nodes behind a failure (most likely first), the rule that explains it, and the message on one line.

    `nodes` are (name, operator, tensor names). Some messages name layers, some tensors, and some neither: then the
    operators of the rule lead to the nodes.
    """
    relevant = [message for message in messages if not _NOISE.match(message)] or [*messages, ""][:1]
    matches = ((rule, message) for rule in RULES for message in relevant if re.search(rule.pattern, message))
    rule, message = next(matches, (_UNKNOWN, relevant[0]))
    line = " ".join(message.split())
    line = line if len(line) <= 300 else f"{line[:299]}…"
    if rule.everywhere:
        return (), rule, line
    words = set(re.findall(r"[\w./:-]+", message))
    # The compiler numbers copies of a tensor: bias.1 is bias.
    words |= {word.rstrip(".:") for word in words} | {re.sub(r"\.\d+$", "", word) for word in words}
    named = [name for name, _, _ in nodes if name in words]
    readers = [name for name, _, tensors in nodes if words & {*tensors}]
    return tuple(named or readers or (n for n, operator, _ in nodes if operator in rule.operators)), rule, line


def first_failing_layer(network: Any, builds: Callable[[Any], bool]) -> str:
    """The first layer that does not build with all layers before it, by bisection; empty where all parts build."""
    low, high = 0, network.num_layers - 1
    _cut(network, high)
    if builds(network):
        return ""
    while low < high:
        middle = (low + high) // 2
        _cut(network, middle)
        if builds(network):
            low = middle + 1
        else:
            high = middle
    layer = network.get_layer(low)
    # The ONNX node of a layer, or the layer's own name where the parser added it.
    node = re.search(r"\[ONNX Layer: ([^\]|]+?)\s*[\]|]", layer.metadata or "")
    return node[1] if node else layer.name


def _cut(network: Any, last: int) -> None:
    """Mark the results of the layers up to `last` as the outputs."""
    for output in [network.get_output(number) for number in range(network.num_outputs)]:
        network.unmark_output(output)
    results: dict[str, Any] = {}
    for number in range(last + 1):
        layer = network.get_layer(number)
        for place in range(layer.num_inputs):
            tensor = layer.get_input(place)
            if tensor is not None:
                results.pop(tensor.name, None)
        for place in range(layer.num_outputs):
            tensor = layer.get_output(place)
            results[tensor.name] = tensor
    for tensor in results.values():
        network.mark_output(tensor)
