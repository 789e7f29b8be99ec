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
from xfm_fast.encoders import Encoder, EncoderSource, is_library_model, open_encoder
from xfm_fast.errors import DataError, InputError
from xfm_fast.export.request import (
    BUDGET,
    OnnxRequest,
    Pipeline,
    Quantisation,
    RepositoryOptions,
    RuntimeChoice,
)
from xfm_fast.export.runtimes import RUNTIMES, Exporter, Runtime, find_runtime
from xfm_fast.io import staged
from xfm_fast.loading import Source, open_model

if TYPE_CHECKING:
    from rich.console import Console

    from xfm_fast.config import XFMConfig
    from xfm_fast.export.expected import Examples
    from xfm_fast.export.library import Samples
    from xfm_fast.export.manifest import Manifest, QuantisationRecord, VerificationRecord
    from xfm_fast.tokenizer import CaptionTokenizer

app = command_group("export")

_PHOTOS, _CAPTIONS = 4, 48
_TEXTS = 500

Out = Annotated[Path, Parameter(help="Folder that receives the files and manifest.json.")]


def _targets() -> dict[str, str]:
    """Return the choices of `--to` with their help: `onnx`, whose consumer is `--for`, and every runtime."""
    targets = {"onnx": "ONNX graphs for --for"}
    for name, runtime in RUNTIMES.items():
        targets[name] = f"{runtime.title}, {runtime.artefact}"
    return targets


def _targets_help() -> str:
    return "; ".join(f"{name}: {text}" for name, text in _targets().items()) + "."


@dataclass(frozen=True)
class ExportOptions:
    """The form of the export.

    Attributes:
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
        budget: Minimum cosine of any output row with the model's. GEMMs that cost more stay in --dtype. [0.99]
        data: Images with captions to verify on, instead of the photographs: a folder, CSV, JSON lines or shard.
    """

    # cyclopts evaluates the hint at every use, so that choices and help have all runtimes of the registry.
    to: Annotated[
        Literal[*_targets()],  # pyright: ignore[reportInvalidTypeForm]
        Parameter(help=_targets_help()),
    ] = "onnx"
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

    @property
    def runtime(self) -> type[Runtime]:
        """The runtime that exports: that of `to`, or any that reads ONNX files."""
        return find_runtime(OnnxRequest.consumer if self.to == "onnx" else self.to)

    def request(self, source: Source) -> Any:
        """Build the library's request; raises `InputError` for an option that its form does not have."""
        request = self.runtime.request
        supported = {field.name for field in fields(request)}
        values: dict[str, Any] = {}
        for field in fields(self):
            if field.name not in ("to", "data") and getattr(self, field.name) != field.default:
                values[field.name] = getattr(self, field.name)
        if self.to != "onnx" and self.consumer is None and "consumer" in supported:
            values["consumer"] = self.to
        elif self.to != "onnx" and self.consumer is not None:
            supported.discard("consumer")
        if source.dtype is not None:
            values["dtype"] = source.dtype
        if "device" in supported and source.device != "auto":
            values["device"] = source.device
        elif self.runtime.kind == "onnx" and source.device == "cuda":
            raise InputError(
                f"--device cuda does not apply to --to {self.to}, which traces on the CPU; leave it out"
            )
        if unsupported := sorted(values.keys() - supported):
            option = "for" if unsupported[0] == "consumer" else dashes(unsupported[0])
            raise InputError(f"--{option} does not apply to --to {self.to}; leave it out")
        if source.dtype in ("int8", "fp8"):
            raise InputError(
                f"--dtype {source.dtype}: use fp32, fp16 or bf16; 8 bits: --quantize, or export int8"
            )
        return request(**values)


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
    from xfm_fast.export.onnx import exporter_of
    from xfm_fast.tasks.task import TASKS, explanation

    request, source = options.request(source), named(model, source)
    exporter = exporter_of(options.runtime)
    exporter.check(request)
    if os.environ.get("XFM_DEBUG", "0") not in ("", "0"):
        # The builder's own messages.
        logging.basicConfig(format="%(message)s")
        logging.getLogger("xfm_fast.export").setLevel(logging.DEBUG)
    if is_library_model(source) and not source.is_export:
        return _export_library(source, out, request, exporter, options.data)
    if options.data is not None:
        # Validate before a checkpoint is read.
        testing.from_files(options.data, limit=1)
    exported = [name for name, task in TASKS.items() if task.Session is not None]
    opened = open_model(replace(source, dtype=None), tasks=exported, device="cpu")
    tokenizer = opened.model.tokenizer
    reads_text = opened.task is None or opened.task.reads_text
    with exporter.start(
        opened.model,
        out,
        request,
        source=opened.origin,
        tokenizer_sha256=tokenizer.sha256() if tokenizer is not None and reads_text else None,
        companions={} if opened.task is None else explanation(opened.task),
        examples=load_examples(opened.model.config, tokenizer, options.data, request.sizes),
        progress=say,
    ) as finish_export:
        # The model is released before a runtime or a builder holds its weights once more.
        del opened
        return finish(finish_export(), out)


@app.command
def verify(folder: Path, /, *, runtime: RuntimeChoice = "auto") -> int:
    """Check the files of an export and compare it again with the model's recorded results.

    Args:
        folder: Folder of an export.
        runtime: Library that runs the graphs. Packages are code that runs when it is loaded: name their runtime, for
            packages that you trust.
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
    summary = table("", "model", "platform", "most rows", right=("most rows",))
    for model in models:
        rows = model.config["max_batch_size"]
        summary.add_row(model.name, model.config.get("platform", "python"), str(rows or "as sent"))
    stdout().print(summary)
    print(f"serve it with: tritonserver --model-repository={out}")


def _export_library(
    source: Source, out: Path, request: Any, exporter: Exporter, data: Path | None
) -> int:
    """Export a model of sentence-transformers as a folder of its layout."""
    if request.packed:
        raise InputError(f"--packed applies to X-FM, and {source} is another model; leave it out")
    options = vars(source) | {"dtype": None, "device": "cpu", "plain": True}
    encoder: Any = open_encoder(EncoderSource(**options))
    samples = load_samples(encoder, data)
    with (
        staged(out) as scratch,
        exporter.start(
            encoder.model, scratch, request, source=source.label, examples=samples, progress=say
        ) as finish_export,
    ):
        del encoder
        manifest = finish_export()
    return finish(manifest, out)


def load_samples(encoder: Encoder, data: Path | None) -> Samples:
    """Load texts and images to compare an encoder on: from `data`, or bundled."""
    from xfm_fast import testing
    from xfm_fast.export.library import Samples

    if data is not None:
        pictures = testing.from_files(data)
        texts, images = pictures.texts(len(pictures.captions)), pictures.images
    else:
        photos = testing.captions_table()["photos"]
        texts = [caption for photo in photos for caption in photo["captions"]]
        images = testing.bundled().images if "image" in encoder.modalities else []
    return Samples.of(texts[:_TEXTS], images[:_PHOTOS], encoder.use, "captions")


def load_examples(
    config: XFMConfig,
    tokenizer: CaptionTokenizer | None,
    data: Path | None,
    sizes: Mapping[str, int] = {},
) -> Examples:
    """Load images and captions to compare on: from `data`, bundled, or generated with a note."""
    from xfm_fast import testing
    from xfm_fast.export.expected import LONGEST, generated_examples, make_examples
    from xfm_fast.tokenizer import CaptionTokenizer

    longest = min(sizes.get("length", LONGEST), config.max_text_length)
    try:
        images = testing.bundled() if data is None else testing.from_files(data, limit=_PHOTOS)
    except DataError as error:
        if data is not None:
            raise
        note(f"compared on generated images, not photographs: {error}")
        return generated_examples(config, longest=longest)
    if tokenizer is None:
        # Any ids can compare an export with its model.
        tokenizer = CaptionTokenizer.train_on_texts(images.captions, config.vocab_size)
    captions = images.texts(len(images.captions))[:_CAPTIONS]
    rows = tokenizer.encode_ids(captions, max(longest, 3))
    photos = range(min(len(images.names), _PHOTOS))
    origin = f"{len(photos)} photographs and {len(rows)} captions"
    pixels = images.pixels(photos, config.image_size)
    return make_examples(pixels, rows, config, origin=origin, longest=longest)


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
        inputs, outputs = (
            escape(", ".join(f"{tensor.name} {tensor.dims}" for tensor in tensors))
            for tensors in (graph.inputs, graph.outputs)
        )
        megabytes = f"{sum(sizes[name] for name in graph.files) / 1e6:.1f}"
        seconds = f"{graph.build_seconds:.1f}"
        files.add_row(graph.name, graph.file, megabytes, seconds, inputs, outputs)
    console.print(files)
    for graph in manifest.graphs:
        if (record := graph.quantisation) is not None:
            count = f"{record.products - len(record.kept)} of {record.products} GEMMs"
            wide = f"; not {', '.join(record.kept)}" if record.kept else ""
            print(
                f"{graph.name}: {count} in {record.kind}, cosine {record.cosine:.5f}, budget {record.budget}{wide}"
            )
            for line in _costs(record):
                print(f"  {line}")
    if (verification := manifest.verification or manifest.graphs_verification) is not None:
        _print_verification(verification, console)
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


def _costs(record: QuantisationRecord) -> Iterator[str]:
    """Yield what 8 bits gain and cost where it was measured."""
    if record.milliseconds:
        ratio = record.wide_milliseconds / record.milliseconds
        times = f"{record.wide_milliseconds:.1f} → {record.milliseconds:.1f} ms, run in turn"
        speed = f"{ratio:.2f}x the speed here" if ratio > 1 else f"not faster here: {ratio:.2f}x"
        yield f"{speed} ({times})"
    if record.launches:
        narrow = " and ".join(map(str, record.launches))
        wide = " and ".join(map(str, record.wide_launches))
        yield f"launches of the engine's profiles: {narrow}, without 8 bits {wide}"


def _print_verification(record: VerificationRecord, console: Console) -> None:
    def error(value: float | None) -> str:
        return "[red]not finite[/]" if value is None else f"{value:.1e}"

    title = f"against the model, by {record.runtime}, on {record.examples}"
    columns = [
        "graph",
        "output",
        "shapes",
        "max error",
        "allowed",
        "mean error",
        "least cosine",
        "",
    ]
    summary = table(title, *columns)
    for check in record.checks:
        cosine = "" if check.least_cosine is None else "nan"
        if check.cosine is not None:
            cosine = f"{check.cosine:.6f}"
        verdict = "pooled" if check.allowed is None else "ok"
        verdict = verdict if check.passed else "[bold red]differs[/]"
        summary.add_row(
            check.graph,
            check.output,
            str(len(check.shapes)),
            error(check.max_error),
            "-" if check.allowed is None else f"{check.allowed:.1e}",
            error(check.mean_error),
            cosine,
            verdict,
        )
    console.print(summary)
    embedded = {f"{check.graph} {check.output}" for check in record.checks}
    for ranks in record.ranks:
        graph = "all graphs together" if ranks.graph == "all" else ranks.graph
        verdict = "" if ranks.passed else " [bold red]differs[/]"
        agreement = f"{ranks.agreement:.1%} of {ranks.candidates} candidates agree"
        subject = "ranks"
        if f"{graph} sentence_embedding" in embedded:
            subject = "nearest neighbours"
            agreement = (
                f"{ranks.identical:.1%} of {ranks.candidates} kept, {ranks.agreement:.1%} with ties"
            )
        console.print(
            f"{subject} by {graph}: {agreement}, at least {ranks.least:.0%}; scores within {ranks.tie:.1e} are ties"
            f"{verdict}",
            highlight=False,
        )
