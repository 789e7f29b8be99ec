"""`xfm-fast export`: export a model for other runtimes, verified against the model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from cyclopts import Parameter
from cyclopts import default_name_transform as dashes

from xfm_fast.cli.console import note, say, stdout, table
from xfm_fast.cli.options import Flat, command_group
from xfm_fast.errors import DataError, InputError, UnavailableError
from xfm_fast.export.request import (
    BUDGET,
    ExportRequest,
    ModelSource,
    OnnxRequest,
    Preset,
    RepositoryOptions,
    RuntimeChoice,
)
from xfm_fast.export.runtimes.aoti import PackageRequest
from xfm_fast.export.runtimes.tensorrt import EngineRequest, TensorRTRequest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from xfm_fast.benchmarks.material.photographs import Collection
    from xfm_fast.config import XFMConfig
    from xfm_fast.export.engines import BuildProgress
    from xfm_fast.export.expected import Examples
    from xfm_fast.export.manifest import Manifest, VerificationRecord
    from xfm_fast.models.xfm import XFM
    from xfm_fast.tokenizer import CaptionTokenizer

app = command_group("export")

_PHOTOS, _CAPTIONS = 4, 48
# Photographs to choose 8-bit products on, and how few of their own are too few.
_CALIBRATED, _LEAST_CALIBRATED = 16, 4

Run = Annotated[Path | None, Parameter(name="RUN", help="Run of xfm-fast finetune, instead of --checkpoint.")]
Out = Annotated[Path, Parameter(help="Folder that receives the files and manifest.json.")]
Verbose = Annotated[bool, Parameter(help="Show the builder's own messages.")]


# `for` is a Python keyword, so the option --for is called consumer here.
OnnxOptions = Annotated[
    OnnxRequest, Parameter(name="*", name_transform=lambda name: "for" if name == "consumer" else dashes(name))
]


@app.command
def onnx(
    run: Run = None,
    /,
    *,
    out: Out,
    source: Flat[ModelSource] = ModelSource(),
    request: OnnxOptions = OnnxRequest(),
) -> int:
    """Export to ONNX and verify the graphs against the model.

    An exported run answers `xfm-fast predict` as the run does.
    """
    from xfm_fast.export import onnx as library
    from xfm_fast.export import verification

    library.check_spelling(request)
    subject, examples = load(named(run, source), request)
    library.export_onnx(subject.model, out, request, **subject.facts, examples=examples, compared=False, progress=say)
    # The compared runtime holds a second copy of the weights.
    del subject
    return finish(verification.verify(out, check_files=False), out)


@app.command
def aoti(
    run: Run = None,
    /,
    *,
    out: Out,
    source: Flat[ModelSource] = ModelSource(),
    request: Flat[PackageRequest] = PackageRequest(),
) -> int:
    """Compile AOTInductor packages and verify them against the model.

    A package is native code that runs when it is loaded; commands that load one need `--runtime aoti`.
    """
    from xfm_fast.export import export_packages

    request.check()
    subject, examples = load(named(run, source), request)
    made = export_packages(subject.model, out, request, **subject.facts, examples=examples, progress=say)
    return finish(made, out)


@app.command
def tensorrt(
    run: Run = None,
    /,
    *,
    out: Out,
    source: Flat[ModelSource] = ModelSource(),
    request: Flat[TensorRTRequest] = TensorRTRequest(),
    verbose: Verbose = False,
) -> int:
    """Build TensorRT engines for the GPU of this machine."""
    return _engines("tensorrt", out, named(run, source), request, verbose)


@app.command
def tensorrt_rtx(
    run: Run = None,
    /,
    *,
    out: Out,
    source: Flat[ModelSource] = ModelSource(),
    request: Flat[EngineRequest] = EngineRequest(),
    verbose: Verbose = False,
) -> int:
    """Build engines of TensorRT for RTX, on any machine, for the GPUs given."""
    return _engines("tensorrt-rtx", out, named(run, source), request, verbose)


def _engines(consumer: str, out: Path, source: ModelSource, request: EngineRequest, verbose: bool) -> int:
    from xfm_fast.export import engines

    engines.check_request(consumer, request)
    subject, examples = load(source, request)
    calibration = None
    if request.quantize is not None:
        calibration = load_calibration(subject.model.config, subject.tokenizer, source.data)
    with (
        _show_progress(verbose) as progress,
        engines.engine_graphs(
            subject.model, out, consumer, request, **subject.facts, examples=examples, calibration=calibration
        ) as build_engines,
    ):
        # The builder holds several copies of a graph's weights.
        del subject
        made = build_engines(progress)
    return finish(made, out)


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
def int8(
    folder: Path, /, *, out: Path, budget: float = BUDGET, data: Path | None = None, tokenizer: Path | None = None
) -> int:
    """Quantise an fp32 export to int8 for the CPU, and measure the cost in accuracy.

    Args:
        folder: Folder of an fp32 export to ONNX.
        out: Folder that receives the int8 export.
        budget: Minimum cosine between any output row and the model's. GEMMs that cost more stay in fp32.
        data: Images with captions for calibration. [the examples of the export]
        tokenizer: RoBERTa's vocab.json and merges.txt (their folder), or a tokenizer.json, for the captions of --data.
            [the export's]
    """
    from xfm_fast.export.manifest import Manifest
    from xfm_fast.export.quantise import check_quantisation, quantize_int8
    from xfm_fast.models.processor import find_tokenizer
    from xfm_fast.tokenizer import CaptionTokenizer

    check_quantisation("int8", "fp32", budget)
    examples = None
    if data is not None:
        manifest = Manifest.load(folder, check_files=False)
        own = find_tokenizer(folder, manifest.xfm_config)
        vocabulary = own if tokenizer is None else CaptionTokenizer.from_files(tokenizer)
        if manifest.tokenizer_sha256 not in (None, None if vocabulary is None else vocabulary.sha256()):
            raise InputError(f"{folder} was exported with another vocabulary; name it with --tokenizer")
        examples = load_calibration(manifest.xfm_config, vocabulary, data)
    return finish(quantize_int8(folder, out, budget=budget, examples=examples, progress=say), out)


@app.command
def model_repository(
    folder: Path,
    /,
    *,
    out: Path,
    options: Flat[RepositoryOptions] = RepositoryOptions(),
    tokenizer: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server from an export.

    Args:
        folder: Folder of an export.
        out: The repository; must not exist without --overwrite.
        tokenizer: RoBERTa's vocab.json and merges.txt (their folder), or a tokenizer.json, for rank. [the export's]
        overwrite: Replace an existing repository.
    """
    from rich.markup import escape

    from xfm_fast.export.model_repository import check_free, write_model_repository
    from xfm_fast.tokenizer import CaptionTokenizer

    options.check()
    check_free(out, overwrite)
    vocabulary = None if tokenizer is None else CaptionTokenizer.from_files(tokenizer)
    receipt = write_model_repository(folder, out, options, tokenizer=vocabulary, overwrite=overwrite, progress=say)
    console = stdout()
    title = escape(f"{receipt.kind} {receipt.dtype}, {receipt.source} ({receipt.status})")
    # A table wraps its title to its width, and this one is narrow.
    console.print(f"[bold]{title}[/]", soft_wrap=True, highlight=False)
    shown = table("", "model", "platform", "most rows", "MB", right=("most rows", "MB"))
    for model in receipt.models:
        size = sum(file.bytes for file in receipt.files if file.name.startswith(f"{model.name}/"))
        shown.add_row(model.name, model.platform, str(model.max_batch_size or "as sent"), f"{size / 1e6:.1f}")
    console.print(shown)
    print(f"serve it with: tritonserver --model-repository={out}")


@dataclass(frozen=True)
class Subject:
    """A model to export."""

    model: XFM
    source: str  # origin of its weights, without local paths
    tokenizer: CaptionTokenizer | None  # tokenizer of its captions, if given
    # sidecar files that describe a fine-tuned model, by name
    companions: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """Manifest entries of an export, and its sidecar files."""
        sha256 = self.tokenizer.sha256() if self.tokenizer else None
        return {"source": self.source, "tokenizer_sha256": sha256, "companions": self.companions}


def named(run: Path | None, source: ModelSource) -> ModelSource:
    """The source with a run as its checkpoint; raises `InputError` if it names another one too."""
    if run is None:
        return source
    if source.checkpoint is not None or source.preset is not None:
        raise InputError(f"{run} is the run to export; omit --checkpoint and --preset")
    return replace(source, checkpoint=run)


def load(source: ModelSource, request: ExportRequest) -> tuple[Subject, Examples]:
    """Load the model to export and its examples; prints a note if these are not photographs."""
    if source.data is not None:
        # Validate before a checkpoint is read.
        from xfm_fast.benchmarks.material import photographs

        photographs.from_files(source.data, most=1)
    subject = load_subject(source)
    examples, message = load_examples(subject, source.data, request.sizes)
    if message:
        note(message)
    return subject, examples


def load_subject(source: ModelSource) -> Subject:
    """Load the model of the options: a checkpoint, or random weights of a preset; raises `InputError` for both or
    neither.
    """
    checkpoint, preset = source.checkpoint, source.preset
    if (checkpoint is None) == (preset is None):
        raise InputError("give exactly one of RUN or --checkpoint (its weights) and --preset (random weights)")
    if preset is not None and preset not in get_args(Preset):
        raise UnavailableError(f"preset {preset!r} is unknown; choose one of {', '.join(get_args(Preset))}")
    if source.config is not None and (checkpoint is None or checkpoint.is_dir()):
        raise InputError("--config gives the sizes of an official checkpoint file; leave it out here")
    if checkpoint is None:
        model, words = _random(preset, source.image_size), f"random weights of preset {preset}"
    elif checkpoint.is_dir():
        from xfm_fast.checkpoint.files import model_folder
        from xfm_fast.models.xfm import XFM
        from xfm_fast.tasks.task import task_of

        place = model_folder(checkpoint) or checkpoint
        if (options := task_of(place)) is not None:
            return _fine_tuned(checkpoint, options.kind, source)
        model, words = XFM.from_pretrained(place), f"checkpoint {checkpoint.resolve().name}"
        if source.image_size not in (None, model.config.image_size):
            model.set_image_size(source.image_size)
    else:
        model, words = _official(checkpoint, source.config, source.image_size), f"checkpoint {checkpoint.name}"
    if source.tokenizer is not None:
        from xfm_fast.models.processor import read_tokenizer

        model.tokenizer = read_tokenizer(source.tokenizer, model.config)
    return Subject(model.requires_grad_(False).eval(), words, model.tokenizer)


def _fine_tuned(run: Path, kind: str, source: ModelSource) -> Subject:
    """Load the model of a run, with the sidecar files that `xfm-fast predict` needs for an export."""
    from xfm_fast.finetuning.prediction import load as load_run
    from xfm_fast.models.xfm import XFM
    from xfm_fast.tasks.task import TASKS, explanation

    if TASKS[kind].Session is None:
        offered = ", ".join(name for name, task in TASKS.items() if task.Session is not None)
        raise UnavailableError(f"{run} is fine-tuned for {kind}, which needs gradients; export one of {offered}")
    if source.tokenizer is not None:
        raise InputError(f"{run} has a vocabulary of its own; leave out --tokenizer")
    predictor = load_run(run)
    model, task = predictor.model, predictor.task
    assert isinstance(model, XFM)
    if source.image_size not in (None, model.config.image_size):
        model.set_image_size(source.image_size)
    vocabulary = task.tokenizer if task.reads_text else None
    words = f"run {run.resolve().name} of the task {kind}"
    return Subject(model.requires_grad_(False).eval(), words, vocabulary, explanation(task))


def _random(preset: Any, image_size: int | None) -> XFM:
    import torch

    from xfm_fast.benchmarks.material.inputs import random_state
    from xfm_fast.config import XFMConfig
    from xfm_fast.models.xfm import XFM

    config = _resize(XFMConfig.preset(preset), image_size)
    heads = ("contrastive", "matching", "boxes")
    with torch.device("meta"):
        model = XFM(config, heads=heads)
    # No parameter is zero, unlike in a fresh model, so that a comparison covers every term.
    model.load_state_dict(random_state(config, heads, seed=0), assign=True)
    return model


def _official(file: Path, sizes: Path | None, image_size: int | None) -> XFM:
    from xfm_fast import checkpoint
    from xfm_fast.checkpoint.position_table import window_of
    from xfm_fast.config import XFMConfig
    from xfm_fast.models.xfm import XFM

    state = checkpoint.read_state_dict(file)
    config = XFMConfig.preset("base") if sizes is None else XFMConfig.from_official(sizes)
    tables = (value for name, value in state.items() if name.endswith(".relative_position_bias_table"))
    if image_size is None and (position := next(tables, None)) is not None:
        image_size = window_of(position) * config.patch_size
    config = _resize(config, image_size)
    ours, _ = checkpoint.to_ours(state, config)
    return XFM.from_official(state, config, heads=checkpoint.heads_in(ours))


def _resize(config: XFMConfig, image_size: int | None) -> XFMConfig:
    if image_size is None or image_size == config.image_size:
        return config
    # An export does not mask, and the number of masked patches need not fit every size.
    return config.replace(image_size=image_size, num_masking_patches=1, min_num_patches=1)


def load_examples(subject: Subject, data: Path | None, sizes: Mapping[str, int]) -> tuple[Examples, str]:
    """Load photographs and captions to compare on, and a note for the user ("" if there is none).

    By default the bundled photographs, or generated images if these are not installed. `sizes` are the fixed axes.
    """
    from xfm_fast.benchmarks.material import photographs
    from xfm_fast.export.expected import LONGEST, generated_examples

    longest = sizes.get("length", LONGEST)
    if data is not None:
        return _examples(photographs.from_files(data, most=_PHOTOS), subject, longest), ""
    try:
        collection = photographs.bundled()
    except DataError as error:
        message = f"compared on generated images, not photographs: {error}"
        return generated_examples(subject.model.config, longest=longest), message
    return _examples(collection, subject, longest), ""


def _examples(collection: Collection, subject: Subject, longest: int) -> Examples:
    from xfm_fast.export.expected import make_examples

    config = subject.model.config
    captions = collection.texts(min(_CAPTIONS, len(collection.captions)))
    rows = _ids(captions, collection, config, subject.tokenizer, longest)
    photos = range(min(_PHOTOS, len(collection.names)))
    origin = f"{len(photos)} photographs and {len(rows)} captions"
    return make_examples(collection.pixels(photos, config.image_size), rows, config, origin=origin, longest=longest)


def _ids(
    captions: list[str], collection: Collection, config: XFMConfig, tokenizer: CaptionTokenizer | None, longest: int
) -> list[list[int]]:
    from xfm_fast.tokenizer import CaptionTokenizer

    if tokenizer is None:
        # Any ids can compare an export with its model.
        tokenizer = CaptionTokenizer.train_on_texts(collection.captions, config.vocab_size)
    return tokenizer.encode_ids(captions, max(longest, 3))


def load_calibration(config: XFMConfig, tokenizer: CaptionTokenizer | None, data: Path | None) -> Examples:
    """Load photographs and captions for calibration, different from those that exports are compared on.

    With too few to divide, the same ones serve for both, and the origin notes it.
    """
    from xfm_fast.benchmarks.material import photographs
    from xfm_fast.export.expected import LONGEST, Examples, generated_examples, padded_texts

    try:
        found = photographs.bundled() if data is None else photographs.from_files(data, most=_PHOTOS + _CALIBRATED)
    except DataError:
        if data is not None:
            raise
        return generated_examples(config, images=_CALIBRATED, seed=1)
    if tokenizer is None:
        note("calibration uses random ids for captions; name the model's vocabulary with --tokenizer")
    shared = len(found.names) < _PHOTOS + _LEAST_CALIBRATED
    photos = range(0 if shared else _PHOTOS, min(len(found.names), _PHOTOS + _CALIBRATED))
    captions = found.texts(len(found.captions))
    captions = captions[_CAPTIONS:] if len(captions) >= _CAPTIONS + _LEAST_CALIBRATED else captions
    longest = min(LONGEST, config.max_text_length)
    rows = _ids(captions[:_CAPTIONS], found, config, tokenizer, longest)
    origin = f"{len(photos)} photographs and {len(rows)} captions"
    origin += ", with the same photographs as the comparison" if shared else ""
    return Examples(found.pixels(photos, config.image_size), *padded_texts(rows, config.pad_token_id), origin)


class Bars:
    """A progress bar for all graphs, and one per running phase of the builder."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._all: TaskID | None = None
        self._phases: dict[int, tuple[str, TaskID]] = {}

    def graph(self, name: str, number: int, count: int) -> None:
        if self._all is None:
            self._all = self._bars.add_task("", total=count)
        self._bars.update(self._all, description=f"graph {name}", completed=number - 1)
        for _, task in self._phases.values():
            self._bars.remove_task(task)
        self._phases.clear()

    def phase(self, name: str, done: int, steps: int, depth: int) -> None:
        known = self._phases.get(depth)
        if known is None or known[0] != name:
            if known is not None:
                self._bars.remove_task(known[1])
            known = (name, self._bars.add_task(f"{'  ' * (depth + 1)}{name}", total=max(steps, 1)))
            self._phases[depth] = known
        self._bars.update(known[1], completed=done)


@contextmanager
def _show_progress(verbose: bool) -> Iterator[BuildProgress]:
    """Progress bars on a terminal, or the builder's messages."""
    from rich.console import Console

    from xfm_fast.export.engines import Silent

    if verbose:
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, markup=False)
        logger = logging.getLogger("xfm_fast.export")
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            yield Silent()
        finally:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)
    elif sys.stderr.isatty():
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bars:
            yield Bars(bars)
    else:
        yield Silent()


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
        called = [", ".join(f"{t.name} {t.dims}" for t in tensors) for tensors in (graph.inputs, graph.outputs)]
        megabytes = sum(sizes[name] for name in graph.files) / 1e6
        files.add_row(graph.name, graph.file, f"{megabytes:.1f}", f"{graph.build_seconds:.1f}", *map(escape, called))
    console.print(files)
    if any(graph.quantisation is not None for graph in manifest.graphs):
        _print_quantisation(manifest, console)
    if (record := manifest.verification or manifest.graphs_verification) is not None:
        _print_verification(record, console)
    styles = {"verified": "green", "failed": "bold red", "graphs verified": "yellow", "unverified": "yellow"}
    reason = f": {escape(manifest.reason)}" if manifest.reason else ""
    verdict = f"[{styles[manifest.status]}]{manifest.status}[/]{reason} ({escape(str(folder))})"
    console.print(verdict, soft_wrap=True, highlight=False)
    return {"verified": 0, "failed": 1, "graphs verified": 3, "unverified": 4}[manifest.status]


def _print_quantisation(manifest: Manifest, console: Console) -> None:
    shown = table(
        f"products in 8 bits, chosen on {manifest.options['calibration']}",
        "graph", "in 8 bits", "smoothed", "least cosine", "budget", "ms in fp32", "ms", "not in 8 bits",
    )  # fmt: skip
    for graph in manifest.graphs:
        if (record := graph.quantisation) is not None:
            shown.add_row(
                graph.name, f"{record.products - len(record.kept)}/{record.products}", str(record.smoothed),
                f"{record.cosine:.5f}", str(record.budget), f"{record.wide_milliseconds:.1f}",
                f"{record.milliseconds:.1f}", ", ".join(record.kept),
            )  # fmt: skip
    console.print(shown)


def _print_verification(record: VerificationRecord, console: Console) -> None:
    def number(value: float | None) -> str:
        return "[red]not finite[/]" if value is None else f"{value:.1e}"

    shown = table(
        f"against the model, by {record.runtime}, on {record.examples}",
        "graph", "output", "shapes", "max error", "allowed", "mean error", "least cosine", "",
    )  # fmt: skip
    for check in record.checks:
        cosine = "" if check.least_cosine is None else ("nan" if check.cosine is None else f"{check.cosine:.6f}")
        shown.add_row(
            check.graph, check.output, str(len(check.shapes)), number(check.max_error), f"{check.allowed:.1e}",
            number(check.mean_error), cosine, "ok" if check.passed else "[bold red]differs[/]",
        )  # fmt: skip
    console.print(shown)
    for ranks in record.ranks:
        graph = "all graphs together" if ranks.graph == "all" else ranks.graph
        console.print(
            f"ranks by {graph}: {ranks.agreement:.1%} of {ranks.candidates} candidates agree "
            f"(at least {ranks.least:.0%}; scores within {ranks.tie:.1e} are ties; {ranks.identical:.1%} identical)"
            + ("" if ranks.passed else " [bold red]differs[/]"),
            highlight=False,
        )
