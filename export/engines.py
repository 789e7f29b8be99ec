"""Build TensorRT engines: from graphs of a model, or a folder of ONNX graphs, to a folder of engines.

Requests are validated before a builder starts, and Ctrl-C stops the builder cleanly. An engine accepts the sizes of its
profiles, on the command line `name:axis=size` or `name:axis=least..best..most` with commas:

    latency:batch=1,texts=1..8..64,length=1..16..40
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from xfm_fast.errors import ExportError, UnavailableError
from xfm_fast.io import write_bytes, write_files
from xfm_fast.models.xfm import XFM

from .expected import LONGEST, Examples, Reference, generated_examples, keep_reference
from .manifest import EngineTarget, GraphRecord, Manifest, ProfileRecord, record_files
from .onnx import export_onnx, require_onnx
from .pipeline import (
    Progress,
    build_graphs,
    fill_folder,
    graph_bytes,
    graph_records,
    prepare_folder,
    sidecar_files,
    silent,
)
from .qdq import Scheme
from .quantise import check_quantisation, quantise_graphs
from .request import EngineRequest, OnnxRequest, TensorRTRequest, joined
from .runtimes import Spelling, check_dtype, find_runtime
from .slots import graph_profiles, parse_profiles
from .tensorrt import first_error, local_capability, message_logger, start
from .verification import compare_with_reference, open_comparison

ONNX_FOLDER = "onnx"
"""Folder of the graphs, in that of the engines, if the request keeps them."""

LEAST_CAPABILITY = {"fp32": 75, "fp16": 75, "bf16": 80, "int8": 75, "fp8": 89}
"""The oldest compute capability with arithmetic in a type, as 10 · major + minor."""

# The first version whose parser reads `Attention`.
_OLDEST_TENSORRT = (10, 14)
# An engine holds the weights again, and code for every target.
_ENGINE_PER_ONNX = 1.5
_ROOM_PER_ENGINE = 16 << 20

_log = logging.getLogger(__name__)


class Builder:
    """The builder of TensorRT: its module, the GPUs that it builds for, and its configuration."""

    name: ClassVar[str] = "tensorrt"
    newest: ClassVar[int] = 11
    """The last major version that was tested."""
    minimum: ClassVar[Mapping[str, int]] = LEAST_CAPABILITY

    def __init__(self) -> None:
        runtime = find_runtime(self.name)
        self.trt: Any = runtime.import_library()
        self.version: str = self.trt.__version__
        self.title = f"{runtime.title} {self.version}"

    def check(self, request: EngineRequest, dtype: str) -> tuple[int, ...]:
        """Validate a request and return its compute capabilities; `UnavailableError` if the library lacks something."""
        if int(self.version.split(".", 1)[0]) > self.newest:
            # Python prints it once, however often a request is checked.
            warnings.warn(
                f"{self.title} is newer than version {self.newest}, the last that was tested; its engines are compared "
                f"with the model as ever; should it fail, pip install '{self.name}<{self.newest + 1}'",
                stacklevel=1,
            )
        targets = self.targets(request, parse_targets(joined(request.sm)), local_capability())
        minimum = self.minimum[dtype]
        if lacking := [target for target in targets if target < minimum]:
            verb, option = "has" if len(lacking) == 1 else "have", "--dtype fp16"
            if dtype == "fp8":
                option = "--quantize int8"
            raise UnavailableError(
                f"{_names(lacking)} {verb} no {dtype} in {self.title}; leave out targets below SM{minimum}, or use "
                f"{option}"
            )
        return targets

    def targets(
        self, request: EngineRequest, requested: Sequence[int], present: int | None
    ) -> tuple[int, ...]:
        """Return the compute capabilities to build for: those requested, or this machine's."""
        if tuple(map(int, re.findall(r"\d+", self.version)[:3])) < _OLDEST_TENSORRT:
            oldest = ".".join(map(str, _OLDEST_TENSORRT))
            raise UnavailableError(
                f"{self.title} is too old to read attention; pip install 'tensorrt>={oldest}'"
            )
        if present is None:
            raise UnavailableError(
                "TensorRT times kernels on the GPU that it builds for, and PyTorch finds no NVIDIA GPU here; build on "
                "a machine with one, or use xfm-fast export --to tensorrt-rtx, which needs none"
            )
        if requested and set(requested) != {present}:
            raise UnavailableError(
                f"TensorRT builds for the GPU of this machine, SM{present}, and not for {_names(requested)}; "
                "leave out --sm, or use xfm-fast export --to tensorrt-rtx"
            )
        level = getattr(request, "hardware_compatible", None)
        if level not in (None, "ampere_plus", "same_compute_capability"):
            raise UnavailableError(
                f"hardware_compatible={level!r} is unknown; use ampere_plus or same_compute_capability"
            )
        if level == "ampere_plus" and present < 80:
            raise UnavailableError(
                f"hardware_compatible={level!r} needs SM80 or newer, and this GPU is SM{present}"
            )
        return (present,)

    def network(self, builder: Any) -> Any:
        """Create an empty, strongly typed network; later versions have no flag for it."""
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return builder.create_network(0 if flag is None else 1 << int(flag))

    def configure(self, config: Any, request: EngineRequest, targets: Sequence[int]) -> None:
        """Set the options on an `IBuilderConfig`."""
        # On by default, it rounds the operands of fp32 GEMMs to 10 bits: an error a hundred times that of fp32.
        config.clear_flag(self.trt.BuilderFlag.TF32)
        if request.level is not None:
            config.builder_optimization_level = request.level
        if not isinstance(request, TensorRTRequest):
            return
        if request.version_compatible:
            config.set_flag(self.trt.BuilderFlag.VERSION_COMPATIBLE)
        if request.hardware_compatible:
            level = request.hardware_compatible.upper()
            config.hardware_compatibility_level = getattr(
                self.trt.HardwareCompatibilityLevel, level
            )
        if request.timing_cache is not None:
            stored = request.timing_cache.read_bytes() if request.timing_cache.is_file() else b""
            # TensorRT rejects timings of another GPU or version; the build then starts with an empty cache.
            if not config.set_timing_cache(config.create_timing_cache(stored), False):
                config.set_timing_cache(config.create_timing_cache(b""), False)


class BuilderForRTX(Builder):
    """The builder of TensorRT for RTX."""

    name = "tensorrt-rtx"
    newest = 1
    # It has no fp32 GEMMs for Turing.
    minimum = LEAST_CAPABILITY | {"fp32": 80}

    def targets(
        self, request: EngineRequest, requested: Sequence[int], present: int | None
    ) -> tuple[int, ...]:
        """See `Builder.targets`."""
        if isinstance(request, TensorRTRequest):
            raise UnavailableError(
                f"{self.title} has no options of TensorRTRequest; use EngineRequest, with sm="
            )
        matches = (re.fullmatch(r"SM(\d+)", name) for name in dir(self.trt.ComputeCapability))
        supported = sorted(int(match[1]) for match in matches if match)
        targets = tuple(sorted(set(requested))) or (() if present is None else (present,))
        if not targets:
            raise UnavailableError(
                "there is no NVIDIA GPU here to build for; name the targets with --sm, such as --sm 80,89,120"
            )
        if unknown := [target for target in targets if target not in supported]:
            raise UnavailableError(
                f"{self.title} builds for {_names(supported)}, not for {_names(unknown)}; change --sm, or use --to "
                "tensorrt on such a GPU"
            )
        return targets

    def network(self, builder: Any) -> Any:
        """See `Builder.network`."""
        return builder.create_network(0)

    def configure(self, config: Any, request: EngineRequest, targets: Sequence[int]) -> None:
        """See `Builder.configure`."""
        super().configure(config, request, targets)
        # An engine that allocates for itself while it runs cannot be captured as a CUDA graph.
        config.set_flag(self.trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            capability = getattr(self.trt.ComputeCapability, f"SM{target}")
            config.set_compute_capability(capability, index)


def find_builder(name: str) -> Builder:
    """Return the builder of a runtime; raises `UnavailableError` with the extra to install."""
    builders = {builder.name: builder for builder in (Builder, BuilderForRTX)}
    if name not in builders:
        raise UnavailableError(
            f"engine library {name!r} is unknown; choose from {', '.join(builders)}"
        )
    return builders[name]()


def parse_targets(text: str) -> tuple[int, ...]:
    """Parse a list of compute capabilities: `80,89,120` or `8.9,12.0`."""
    targets = []
    for word in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(r"(?:sm_?)?(?:(\d{2,3})|(\d{1,2})\.(\d))", word, re.IGNORECASE)
        target = 0 if match is None else int(match[1] or match[2] + match[3])
        if not 50 <= target < 200:
            raise UnavailableError(
                f"--sm {word!r} is not a compute capability; write numbers with commas, such as 80,89,120"
            )
        targets.append(target)
    return tuple(dict.fromkeys(targets))


def _names(targets: Sequence[int]) -> str:
    return ", ".join(f"SM{target}" for target in targets)


def export_engines(
    model: XFM,
    folder: str | Path,
    consumer: str,
    request: EngineRequest | None = None,
    **options: Any,
) -> Manifest:
    """Export graphs of a model and build an engine of each, `<graph>.engine`, with `manifest.json`."""
    with engine_graphs(model, folder, consumer, request, **options) as build:
        return build()


@contextlib.contextmanager
def engine_graphs(
    model: XFM,
    folder: str | Path,
    consumer: str,
    request: EngineRequest | None = None,
    *,
    examples: Examples | None = None,
    source: str = "a model in memory",
    tokenizer_sha256: str | None = None,
    companions: Mapping[str, bytes] = {},
    progress: Progress = silent,
    **changes: Any,
) -> Iterator[Callable[[], Manifest]]:
    """Export the graphs of engines and yield the function that builds them, which no longer needs the model."""
    folder = Path(folder)
    if request is None:
        request = TensorRTRequest() if consumer == "tensorrt" else EngineRequest()
    request = replace(request, **changes)
    library, targets, spelling = check_request(consumer, request)
    profiles = parse_profiles(request.profile, packed=request.packed)
    dtype = check_dtype(request.dtype)
    built = build_graphs(model, spelling, request)
    for record in graph_records(built, dtype, request.sizes):
        graph_profiles(record, profiles)
    weights = sum(graph_bytes(graph, dtype) for graph in built.values())
    prepare_folder(folder, int(weights * (1 + _ENGINE_PER_ONNX)) + _ROOM_PER_ENGINE * len(built))
    scheme = None
    if request.quantize:
        scheme = Scheme(check_quantisation(request.quantize, dtype, request.budget, [*built]))
        longest = request.sizes.get("length", LONGEST)
        examples = examples or generated_examples(model.config, longest=longest)
    # A graph joins weights into new ones.
    del built
    graphs = OnnxRequest(
        request.dtype,
        request.graphs,
        request.fixed,
        request.all_tokens,
        request.packed,
        consumer,
        request.opset,
    )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as scratch:
        onnx = folder / ONNX_FOLDER if request.keep_onnx else Path(scratch)
        exported = export_onnx(
            model,
            onnx,
            graphs,
            source=source,
            tokenizer_sha256=tokenizer_sha256,
            companions=companions,
            examples=examples,
            compared=False,
        )
        reference = None if examples is None else Reference.load(onnx)

        def compare(content: Manifest) -> None:
            if reference is not None:
                keep_reference(content, folder, reference)
                compare_with_reference(content, folder, reference)

        def build() -> Manifest:
            if reference is not None and scheme is None:
                compare_with_reference(exported, onnx, reference)
            elif reference is not None and scheme is not None:
                wide = _count_launches(exported, onnx, library, targets, request, progress)
                _quantise_in_place(exported, onnx, reference, scheme, request.budget, progress)
                for record in exported.graphs:
                    if record.quantisation is not None:
                        record.quantisation.wide_launches = wide[record.name]
            exported.save(onnx)
            return build_engines(
                exported, onnx, folder, library, targets, request, progress, compare
            )

        del model
        yield build


def _quantise_in_place(
    exported: Manifest,
    onnx: Path,
    reference: Reference,
    scheme: Scheme,
    budget: float,
    progress: Progress,
) -> None:
    """Replace the ONNX files of an export by their 8-bit forms."""
    wide_files = {name for record in exported.graphs for name in record.files}
    with tempfile.TemporaryDirectory(dir=onnx, prefix=".quantised-") as scratch:
        comparison = open_comparison(exported, onnx, reference)
        quantise_graphs(exported, comparison, Path(scratch), scheme, budget, progress)
        for name in wide_files:
            (onnx / name).unlink()
        for record in exported.graphs:
            for name in record.files:
                Path(scratch, name).replace(onnx / name)
    # Smaller weights may no longer need a file of their own.
    names = [record.name for record in exported.files if (onnx / record.name).exists()]
    exported.files = record_files(onnx, names)


def _count_launches(
    exported: Manifest,
    onnx: Path,
    library: Builder,
    targets: Sequence[int],
    request: EngineRequest,
    progress: Progress,
) -> dict[str, list[int]]:
    """Count the launches of every profile of the engines without 8 bits; none where the library does not tell."""
    counts: dict[str, list[int]] = {record.name: [] for record in exported.graphs}
    profiles = parse_profiles(request.profile, packed=request.packed)
    for record in exported.graphs if isinstance(library, BuilderForRTX) else ():
        progress(f"building {record.name} in {exported.dtype} to count its launches")
        shapes = graph_profiles(record, profiles)
        with tempfile.TemporaryDirectory(dir=onnx, prefix=".engine-") as scratch:
            engine = Path(scratch, f"{record.name}.engine")
            build_engine(library, onnx / record.file, engine, request, targets, shapes)
            counts[record.name] = [len(steps) for steps in schedules(engine)]
    return counts


def schedules(engine: Path) -> list[list[tuple[str, str]]]:
    """Read type and name of the steps that compute, by profile; only engines of TensorRT for RTX have them as text."""
    text = engine.read_bytes().decode("latin1")
    profiles = []
    for match in re.finditer("\nmain {", text):
        begin = match.start()
        # GEMMs have schedules of their own, which say how each is compiled when the engine is loaded.
        if "region=runtime-fusion-consts" in text[begin - 300 : begin]:
            continue
        schedule = text[begin : text.index("\n}\n", begin)]
        steps = re.findall(r'^  (\w+)=\{ name="?(\w+)', schedule, re.MULTILINE)
        profiles.append([step for step in steps if step[0] not in ("shape_call", "signal", "wait")])
    return profiles


def check_request(
    consumer: str, request: EngineRequest
) -> tuple[Builder, tuple[int, ...], Spelling]:
    """Check a request before a checkpoint is read; returns builder, compute capabilities and attention form."""
    parse_profiles(request.profile, packed=request.packed)
    spelling = find_runtime(consumer).spelling(request.dtype, request.opset)
    require_onnx()
    library = find_builder(consumer)
    targets = library.check(request, request.dtype)
    if request.quantize:
        dtype = check_dtype(request.dtype)
        library.check(request, check_quantisation(request.quantize, dtype, request.budget))
    return library, targets, spelling


def build_engines(
    exported: Manifest,
    onnx: Path,
    folder: Path,
    library: Builder,
    targets: Sequence[int],
    request: EngineRequest,
    progress: Progress = silent,
    compare: Callable[[Manifest], None] = lambda content: None,
) -> Manifest:
    """Build an engine of every graph of the ONNX export in `onnx` into an existing folder."""
    profiles = parse_profiles(request.profile, packed=request.packed)
    records = []
    for record in exported.graphs:
        shapes = graph_profiles(record, profiles)
        changes = {"file": f"{record.name}.engine", "profiles": shapes}
        records.append(record.model_copy(update=changes))

    def write(record: GraphRecord) -> list[str]:
        progress(f"building {record.name} ({records.index(record) + 1} of {len(records)})")
        source = onnx / exported.graph(record.name).file
        build_engine(library, source, folder / record.file, request, targets, record.profiles)
        if record.quantisation is not None and isinstance(library, BuilderForRTX):
            record.quantisation.launches = [len(steps) for steps in schedules(folder / record.file)]
        return [record.file]

    target = EngineTarget(
        library=library.name,
        version=library.version,
        compute_capabilities=list(targets),
        version_compatible=getattr(request, "version_compatible", False),
        hardware_compatibility=getattr(request, "hardware_compatible", None),
    )
    options = {"profiles": [*request.profile], "optimization_level": request.level}
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
    library: Builder,
    onnx: Path,
    engine: Path,
    request: EngineRequest,
    targets: Sequence[int],
    profiles: Sequence[ProfileRecord],
    *,
    progress: Progress = lambda phase: _log.debug("%s", phase),
) -> None:
    """Build one engine from one ONNX file, `targets` as `library.check` returns them; fixed shapes have no profiles.

    `progress` is called with the names of the builder's phases; an exception in it stops the builder.
    """
    trt, errors = library.trt, list[str]()
    logger = message_logger(trt, errors)
    builder: Any = start(library.title, trt.Builder, logger, errors)
    network = library.network(builder)
    if network is None:
        raise ExportError(
            f"{library.title} makes no network ({first_error(errors)}); see that the driver fits the library, or "
            "upgrade both"
        )
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        messages = []
        for error in map(parser.get_error, range(parser.num_errors)):
            node = f"{error.node_name()} ({error.node_operator()})"
            messages.append(f"node {node}: {error.desc()}")
        raise _failure(library, "read", onnx, messages + errors)
    errors.clear()
    config = builder.create_builder_config()
    library.configure(config, request, targets)
    for record in profiles:
        shapes = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            bounds = (record.least, record.best, record.most)
            shapes.set_shape(name, *(tuple(bound[name]) for bound in bounds))
        if config.add_optimization_profile(shapes) < 0:
            raise _failure(library, "build", onnx, errors)
    # What stopped the builder, in a callback: Ctrl-C, a full disk.
    raised: list[BaseException] = []

    def attempt(function: Callable[..., Any], argument: Any) -> Any:
        try:
            return function(argument)
        except BaseException as error:  # Ctrl-C too
            raised.append(error)
            return 0

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            attempt(progress, phase_name)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not raised

    class Writer(trt.IStreamWriter):
        def __init__(self, file: BinaryIO) -> None:
            trt.IStreamWriter.__init__(self)
            self.file = file

        def write(self, data: bytes) -> int:
            return attempt(self.file.write, data)

    def write(file: BinaryIO) -> None:
        # In chunks: an engine in memory is a second copy of all weights. The configuration does not keep the monitor
        # alive.
        monitor, writer = Monitor(), Writer(file)
        config.progress_monitor = monitor
        built = builder.build_serialized_network_to_stream(network, config, writer)
        if raised:
            raise raised[0]
        if not built:
            raise _failure(library, "build", onnx, errors)
        if not file.tell():
            raise ExportError(
                f"{library.title} built graph {onnx.stem!r} and wrote nothing of it; its Python module and its "
                "libraries may be of different versions: install it again"
            )

    write_files({engine: write})
    if isinstance(request, TensorRTRequest) and request.timing_cache is not None:
        write_bytes(
            {request.timing_cache: bytes(memoryview(config.get_timing_cache().serialize()))}
        )


RULES = {
    r"Attention operation was not supported by a dedicated kernel|is_decomposable": (
        "there is no kernel for attention of this type and shape; use --dtype bf16 or fp16, or --opset 22"
    ),
    r"HW-specific datatypes: b16": (
        "a target has no bf16; use --dtype fp16, or leave out targets below SM80"
    ),
    r"HW-specific datatypes: (fp?8|f8|e4m3)": (
        "a target has no fp8; use --quantize int8, or leave out targets below SM89"
    ),
    r"element type \(\w+\) differs from input 1's element type|must have (the )?same input types": (
        "its operands have different types; export the whole graph in one type: --dtype bf16 or --dtype fp16"
    ),
    r"no optimization profile has been defined|Invalid optimization profiles|profile->isValid": (
        "the profile lacks a dynamic input; give --profile name:axis=least..best..most for every axis"
    ),
    r"out of memory|MEM_ALLOC|OutOfMemory|cudaErrorMemoryAllocation|bad_alloc": (
        "the builder ran out of memory; narrow the profiles, or build on a machine with more memory"
    ),
    r"insufficient for CUDA runtime version|CUDA initialization failure|no CUDA-capable device": (
        "there is no usable GPU here; name the targets with --sm (TensorRT for RTX), or build on a machine with one"
    ),
    r"Could not find any implementation for node": (
        "no kernel of this version fits; try the other of --dtype bf16 and fp16, or a newer TensorRT"
    ),
    r"No importer registered|[Uu]nsupported operator|UNSUPPORTED_NODE|Plugin not found": (
        "this version does not know the operator; export with a lower --opset, or use a newer TensorRT"
    ),
}
"""What to do about known messages of builders, by pattern."""

# Follows every message on a machine without a driver and is unrelated to the network.
_NOISE = re.compile(r"^\[?checkMacros\.cpp::catchCudaError.*cudaError 35", re.DOTALL)


def _failure(library: Builder, verb: str, path: Path, messages: Sequence[str]) -> ExportError:
    """Return the error of a build; it names the ONNX nodes of its message, or those that read a tensor of it."""
    import onnx

    relevant = [message for message in messages if not _NOISE.match(message)]
    relevant = relevant or [*messages, "no message"][:1]
    message = relevant[0]
    text = (
        "see the builder's own messages with XFM_DEBUG=1, or try the other of --dtype bf16 and fp16"
    )
    for (pattern, advice), candidate in product(RULES.items(), relevant):
        if re.search(pattern, candidate):
            text, message = advice, candidate
            break
    words = set(re.findall(r"[\w./:-]+", message))
    # The compiler numbers copies of a tensor: bias.1 is bias.
    words |= {word.rstrip(".:") for word in words} | {re.sub(r"\.\d+$", "", word) for word in words}
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    layers = [node.name for node in nodes if node.name in words]
    layers = layers or [node.name for node in nodes if words & {*node.input, *node.output}]
    where = f" at {', '.join(layers[:3])}" if layers else ""
    return ExportError(
        f"{library.title} cannot {verb} graph {path.stem!r}{where}: {text} "
        f"({find_runtime(library.name).title}: {' '.join(message.split())[:300]})"
    )
