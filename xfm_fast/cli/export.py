"""`xfm-fast export`: export a model to other runtimes, verified against the model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts import default_name_transform as dashes

from xfm_fast.cli.console import note, say, stdout, table
from xfm_fast.cli.options import Flat, Model, command_group, named
from xfm_fast.errors import DataError, InputError
from xfm_fast.export.request import (
    BUDGET,
    ExportRequest,
    OnnxRequest,
    Pipeline,
    Quantisation,
    RepositoryOptions,
    RuntimeChoice,
)
from xfm_fast.export.runtimes.aoti import PackageRequest
from xfm_fast.export.runtimes.tensorrt import EngineRequest
from xfm_fast.loading import Source, open_model

if TYPE_CHECKING:
    from rich.console import Console

    from xfm_fast.config import XFMConfig
    from xfm_fast.export.expected import Examples
    from xfm_fast.export.manifest import Manifest, QuantisationRecord, VerificationRecord
    from xfm_fast.tokenizer import CaptionTokenizer

app = command_group("export")

_PHOTOS, _CAPTIONS = 4, 48

Out = Annotated[Path, Parameter(help="Folder that receives the files and manifest.json.")]
Form = Literal["onnx", "aoti", "tensorrt", "tensorrt-rtx"]
_REQUESTS: dict[Form, type[ExportRequest]] = {
    "onnx": OnnxRequest,
    "aoti": PackageRequest,
    "tensorrt": EngineRequest,
    "tensorrt-rtx": EngineRequest,
}


@dataclass(frozen=True)
class ExportOptions:
    """The form of the export.

    Attributes:
        to: ONNX graphs; AOTInductor packages, native code that runs when it is loaded; or engines of TensorRT for the
            GPU here, or of TensorRT for RTX for the GPUs given, built on any machine.
        consumer: Library that reads the ONNX files. [onnxruntime]
        graphs: Names of vision,text,image_memory,fusion,match. [all but match, or the task's]
        fixed: Axes of one size, for example batch=1,length=40. [all dynamic]
        packed: text and fusion take captions packed into rows, so that their cost follows the real tokens; by default
            captions are padded to the longest.
        opset: ONNX opset, 20 to 24. [20 for fp32, 23, which has attention, for 16 bits; the best for the builder]
        profile: Sizes that an engine accepts, name:axis=least..best..most, for example
            latency:batch=1,length=1..16..40; may be repeated. [latency for batches of one, bulk for up to 32]
        sm: Compute capabilities to build engines for, for example 80,89,120. [this machine's GPU]
        quantize: 8-bit GEMMs of engines, with scales from the images and captions that are compared.
        budget: Least cosine of any output row with the model's. GEMMs that cost more stay in --dtype. [0.99]
        data: Images with captions to verify on, instead of the photographs: a folder, CSV, JSON lines or shard.
    """

    to: Form = "onnx"
    consumer: Annotated[str | None, Parameter(name="--for")] = None
    graphs: Sequence[str] | None = None
    fixed: Sequence[str] = ()
    packed: bool = False
    opset: int | None = None
    profile: Sequence[str] = ()
    sm: Sequence[str] = ()
    quantize: Quantisation | None = None
    budget: float | None = None
    data: Path | None = None

    def request(self, source: Source) -> Any:
        """The library's request; raises `InputError` for an option that its form does not have."""
        kind = _REQUESTS[self.to]
        given = {
            each.name: value
            for each in fields(self)
            if (value := getattr(self, each.name)) != each.default
        }
        known = {each.name for each in fields(kind)}
        if source.dtype is not None:
            given["dtype"] = source.dtype
        if "device" in known and source.device != "auto":
            given["device"] = source.device
        elif self.to == "onnx" and source.device == "cuda":
            raise InputError(
                "--device cuda does not apply to --to onnx, which traces on the CPU; leave it out"
            )
        for name in ("to", "data"):
            given.pop(name, None)
        if unknown := sorted(given.keys() - known):
            option = "for" if unknown[0] == "consumer" else dashes(unknown[0])
            raise InputError(f"--{option} does not apply to --to {self.to}; leave it out")
        if source.dtype in ("int8", "fp8"):
            raise InputError(
                f"--dtype {source.dtype}: use fp32, fp16 or bf16; 8 bits: --quantize, or export int8"
            )
        return kind(**given)


@app.default
def export(
    model: Model = None,
    /,
    *,
    out: Out,
    source: Flat[Source] = Source(),
    options: Flat[ExportOptions] = ExportOptions(),
) -> int:
    """Export a model; the help is in `app`."""
    from xfm_fast import testing
    from xfm_fast.export import engines, export_packages, onnx, verification
    from xfm_fast.tasks.task import TASKS, explanation

    request, source = options.request(source), named(model, source)
    if options.to == "onnx":
        onnx.check_spelling(request)
    elif options.to == "aoti":
        request.check()
    else:
        engines.check_request(options.to, request)
    if os.environ.get("XFM_DEBUG", "0") not in ("", "0"):
        # The builder's own messages.
        logging.basicConfig(format="%(message)s")
        logging.getLogger("xfm_fast.export").setLevel(logging.DEBUG)
    if options.data is not None:
        # Validate before a checkpoint is read.
        testing.from_files(options.data, limit=1)
    exported = [name for name, task in TASKS.items() if task.Session is not None]
    opened = open_model(replace(source, dtype=None), tasks=exported, device="cpu")
    vocabulary = opened.model.tokenizer if opened.task is None or opened.task.reads_text else None
    facts: dict[str, Any] = {
        "source": opened.origin,
        "tokenizer_sha256": vocabulary and vocabulary.sha256(),
        "companions": {} if opened.task is None else explanation(opened.task),
        "examples": load_examples(
            opened.model.config, opened.model.tokenizer, options.data, request.sizes
        ),
    }
    # The model is released before a runtime or a builder holds its weights once more.
    if options.to == "onnx":
        onnx.export_onnx(opened.model, out, request, **facts, compared=False, progress=say)
        del opened
        return finish(verification.verify(out, check_files=False), out)
    if options.to == "aoti":
        return finish(export_packages(opened.model, out, request, **facts, progress=say), out)
    with engines.engine_graphs(opened.model, out, options.to, request, **facts) as build_engines:
        del opened
        return finish(build_engines(say), out)


@app.command
def verify(folder: Path, /, *, runtime: RuntimeChoice = "auto") -> int:
    """Check the files of an export and compare it again with the model's recorded results.

    Args:
        folder: Folder of an export.
        runtime: Library that runs the graphs. AOTInductor packages are code that runs when it is loaded: they need
            aoti, for packages that you trust.
    """
    from xfm_fast.export import verification

    return finish(verification.verify(folder, runtime), folder)


@app.command
def int8(folder: Path, /, *, out: Path, budget: float = BUDGET) -> int:
    """Quantise an fp32 export to int8 for the CPU, and measure the cost in accuracy.

    Args:
        folder: Folder of an fp32 export to ONNX. Its images and captions (--data of xfm-fast export) decide.
        out: Folder that receives the int8 export.
        budget: Minimum cosine between any output row and the model's. GEMMs that cost more stay in fp32.
    """
    from xfm_fast.export.quantise import quantize_int8

    return finish(quantize_int8(folder, out, budget=budget, progress=say), out)


@app.command
def model_repository(
    folder: Path,
    /,
    *,
    out: Path,
    pipeline: Pipeline = "rank",
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server from an export.

    Args:
        folder: Folder of an export.
        out: The repository; must not exist.
        pipeline: rank adds a model from image files and captions to scores; graphs adds none.
    """
    from xfm_fast.export.model_repository import write_model_repository

    models = write_model_repository(folder, out, RepositoryOptions(pipeline), progress=say)
    shown = table("", "model", "platform", "most rows", right=("most rows",))
    for model in models:
        rows = model.config["max_batch_size"]
        shown.add_row(model.name, model.config.get("platform", "python"), str(rows or "as sent"))
    stdout().print(shown)
    print(f"serve it with: tritonserver --model-repository={out}")


def load_examples(
    config: XFMConfig,
    tokenizer: CaptionTokenizer | None,
    data: Path | None,
    sizes: Mapping[str, int] = {},
) -> Examples:
    """Photographs and captions to compare on, within fixed axes: given, bundled, or generated with a note."""
    from xfm_fast import testing
    from xfm_fast.export.expected import LONGEST, generated_examples, make_examples
    from xfm_fast.tokenizer import CaptionTokenizer

    longest = min(sizes.get("length", LONGEST), config.max_text_length)
    try:
        found = testing.bundled() if data is None else testing.from_files(data, limit=_PHOTOS)
    except DataError as error:
        if data is not None:
            raise
        note(f"compared on generated images, not photographs: {error}")
        return generated_examples(config, longest=longest)
    if tokenizer is None:
        # Any ids can compare an export with its model.
        tokenizer = CaptionTokenizer.train_on_texts(found.captions, config.vocab_size)
    rows = tokenizer.encode_ids(found.texts(len(found.captions))[:_CAPTIONS], max(longest, 3))
    photos = range(min(len(found.names), _PHOTOS))
    origin = f"{len(photos)} photographs and {len(rows)} captions"
    return make_examples(
        found.pixels(photos, config.image_size), rows, config, origin=origin, longest=longest
    )


def finish(manifest: Manifest, folder: Path) -> int:
    """Print an export with its comparison and verdict, and return the exit code.

    0: verified; 1: differs from the model; 3: the graphs agree and the engines could not run here; 4: not compared.
    """
    from rich.markup import escape

    console = stdout()
    sizes = {record.name: record.bytes for record in manifest.files}
    title = f"{manifest.kind} {manifest.dtype} for {manifest.consumer}, {manifest.source}"
    files = table(title, "graph", "file", "MB", "s", "inputs", "outputs")
    for graph in manifest.graphs:
        called = [
            ", ".join(f"{t.name} {t.dims}" for t in tensors)
            for tensors in (graph.inputs, graph.outputs)
        ]
        megabytes = sum(sizes[name] for name in graph.files) / 1e6
        files.add_row(
            graph.name,
            graph.file,
            f"{megabytes:.1f}",
            f"{graph.build_seconds:.1f}",
            *map(escape, called),
        )
    console.print(files)
    for graph in manifest.graphs:
        if (chosen := graph.quantisation) is not None:
            count = f"{chosen.products - len(chosen.kept)} of {chosen.products} GEMMs"
            wide = f"; not {', '.join(chosen.kept)}" if chosen.kept else ""
            print(
                f"{graph.name}: {count} in {chosen.kind}, cosine {chosen.cosine:.5f}, budget {chosen.budget}{wide}"
            )
            for line in _costs(chosen):
                print(f"  {line}")
    if (record := manifest.verification or manifest.graphs_verification) is not None:
        _print_verification(record, console)
    styles = {
        "verified": "green",
        "failed": "bold red",
        "graphs verified": "yellow",
        "unverified": "yellow",
    }
    reason = f": {escape(manifest.reason)}" if manifest.reason else ""
    verdict = f"[{styles[manifest.status]}]{manifest.status}[/]{reason} ({escape(str(folder))})"
    console.print(verdict, soft_wrap=True, highlight=False)
    return {"verified": 0, "failed": 1, "graphs verified": 3, "unverified": 4}[manifest.status]


def _costs(chosen: QuantisationRecord) -> Iterator[str]:
    """Yield what 8 bits gain and cost where it was measured."""
    if chosen.milliseconds:
        ratio = chosen.wide_milliseconds / chosen.milliseconds
        times = f"{chosen.wide_milliseconds:.1f} → {chosen.milliseconds:.1f} ms, run in turn"
        yield (
            f"{ratio:.2f}x the speed here ({times})"
            if ratio > 1
            else f"not faster here: {ratio:.2f}x ({times})"
        )
    if chosen.launches:
        wide, narrow = (
            " and ".join(map(str, counts)) for counts in (chosen.wide_launches, chosen.launches)
        )
        yield f"launches of the engine's profiles: {narrow}, without 8 bits {wide}"


def _print_verification(record: VerificationRecord, console: Console) -> None:
    def number(value: float | None) -> str:
        return "[red]not finite[/]" if value is None else f"{value:.1e}"

    shown = table(
        f"against the model, by {record.runtime}, on {record.examples}",
        "graph", "output", "shapes", "max error", "allowed", "mean error", "least cosine", "",
    )  # fmt: skip
    for check in record.checks:
        cosine = (
            ""
            if check.least_cosine is None
            else ("nan" if check.cosine is None else f"{check.cosine:.6f}")
        )
        shown.add_row(
            check.graph, check.output, str(len(check.shapes)), number(check.max_error), f"{check.allowed:.1e}",
            number(check.mean_error), cosine, "ok" if check.passed else "[bold red]differs[/]",
        )  # fmt: skip
    console.print(shown)
    for ranks in record.ranks:
        graph = "all graphs together" if ranks.graph == "all" else ranks.graph
        verdict = "" if ranks.passed else " [bold red]differs[/]"
        console.print(
            f"ranks by {graph}: {ranks.agreement:.1%} of {ranks.candidates} candidates agree, at least "
            f"{ranks.least:.0%}; scores within {ranks.tie:.1e} are ties{verdict}",
            highlight=False,
        )
