"""`xfm-fast export tensorrt` and `export tensorrt-rtx`: an engine of each graph, and how far its build is."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xfm_fast.cli import export
from xfm_fast.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from xfm_fast.export.engine_library import EngineConsumer, EngineOptions
    from xfm_fast.export.engine_progress import BuildProgress

SM = typer.Option(help="Compute capabilities to build for, such as 80,89,120. [this machine's GPU]")
PROFILE = typer.Option(
    help="Sizes that an engine accepts, name:axis=least..best..most, such as latency:batch=1,texts=1..8..64,"
    "length=1..16..40; may be repeated. [latency for batches of one, bulk for up to 64]"
)
DTYPE = typer.Option(help="bf16, fp16 or fp32.")
QUANTIZE = typer.Option(help="int8 or fp8: products in 8 bits, with scales from --data or the photographs.")
LEVEL = typer.Option("--level", min=0, max=5, help="How long the builder may search; by default its own.")
KEEP = typer.Option("--keep-onnx", help="Leave the graphs that the engines are built from in OUT/onnx.")
OPSET = typer.Option(help="Of ONNX, 20 to 24; by default what the builder profits from.")
VERBOSE = typer.Option("--verbose", help="Show the builder's own messages.")


def tensorrt(
    out: Annotated[Path, export.OUT],
    checkpoint: Annotated[Path | None, export.CHECKPOINT] = None,
    preset: Annotated[str | None, export.PRESET] = None,
    config: Annotated[Path | None, export.CONFIG] = None,
    dtype: Annotated[str, DTYPE] = "bf16",
    graphs: Annotated[str, export.GRAPHS] = "",
    opset: Annotated[int | None, OPSET] = None,
    image_size: Annotated[int | None, export.IMAGE_SIZE] = None,
    fixed: Annotated[str, export.FIXED] = "",
    all_tokens: Annotated[bool, export.ALL_TOKENS] = False,
    profile: Annotated[list[str] | None, PROFILE] = None,
    sm: Annotated[str, SM] = "",
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="File of kernel timings, read before and written after: later builds are faster."),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Later versions of TensorRT run the engine (tensorrt_lean).")
    ] = False,
    hardware_compatible: Annotated[
        str, typer.Option(help="ampere_plus, or same_compute_capability: more GPUs than this one run the engine.")
    ] = "",
    plugins: Annotated[
        bool, typer.Option("--plugins", help="Attention by this project's kernels, carried in the engine.")
    ] = False,
    quantize: Annotated[str, QUANTIZE] = "",
    level: Annotated[int | None, LEVEL] = None,
    keep_onnx: Annotated[bool, KEEP] = False,
    tokenizer: Annotated[Path | None, export.TOKENIZER] = None,
    data: Annotated[Path | None, export.DATA] = None,
    verbose: Annotated[bool, VERBOSE] = False,
) -> None:
    """Build TensorRT engines for the GPU of this machine."""
    from xfm_fast.export.engine_library import EngineOptions, parse_hardware_compatibility, parse_targets

    options = EngineOptions(
        targets=parse_targets(sm),
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        hardware_compatibility=parse_hardware_compatibility(hardware_compatible),
        optimization_level=level,
    )
    _export(
        "tensorrt", options, out, checkpoint=checkpoint, preset=preset, config=config, dtype=dtype, graphs=graphs,
        opset=opset, image_size=image_size, fixed=fixed, all_tokens=all_tokens, profiles=profile or [],
        plugins=plugins, quantize=quantize, keep_onnx=keep_onnx, tokenizer=tokenizer, data=data, verbose=verbose,
    )  # fmt: skip


def tensorrt_rtx(
    out: Annotated[Path, export.OUT],
    checkpoint: Annotated[Path | None, export.CHECKPOINT] = None,
    preset: Annotated[str | None, export.PRESET] = None,
    config: Annotated[Path | None, export.CONFIG] = None,
    dtype: Annotated[str, DTYPE] = "bf16",
    graphs: Annotated[str, export.GRAPHS] = "",
    opset: Annotated[int | None, OPSET] = None,
    image_size: Annotated[int | None, export.IMAGE_SIZE] = None,
    fixed: Annotated[str, export.FIXED] = "",
    all_tokens: Annotated[bool, export.ALL_TOKENS] = False,
    profile: Annotated[list[str] | None, PROFILE] = None,
    sm: Annotated[str, SM] = "",
    quantize: Annotated[str, QUANTIZE] = "",
    level: Annotated[int | None, LEVEL] = None,
    keep_onnx: Annotated[bool, KEEP] = False,
    tokenizer: Annotated[Path | None, export.TOKENIZER] = None,
    data: Annotated[Path | None, export.DATA] = None,
    verbose: Annotated[bool, VERBOSE] = False,
) -> None:
    """Build engines of TensorRT for RTX, on any machine, for the GPUs that are named."""
    from xfm_fast.export.engine_library import EngineOptions, parse_targets

    _export(
        "tensorrt-rtx", EngineOptions(targets=parse_targets(sm), optimization_level=level), out, checkpoint=checkpoint,
        preset=preset, config=config, dtype=dtype, graphs=graphs, opset=opset, image_size=image_size, fixed=fixed,
        all_tokens=all_tokens, profiles=profile or [], plugins=False, quantize=quantize, keep_onnx=keep_onnx,
        tokenizer=tokenizer, data=data, verbose=verbose,
    )  # fmt: skip


def _export(
    consumer: EngineConsumer,
    options: EngineOptions,
    out: Path,
    *,
    checkpoint: Path | None,
    preset: str | None,
    config: Path | None,
    dtype: str,
    graphs: str,
    opset: int | None,
    image_size: int | None,
    fixed: str,
    all_tokens: bool,
    profiles: list[str],
    plugins: bool,
    quantize: str,
    keep_onnx: bool,
    tokenizer: Path | None,
    data: Path | None,
    verbose: bool,
) -> None:
    from xfm_fast.cli import export_model
    from xfm_fast.export import consumers, engines, exporting, quantisation, verification
    from xfm_fast.export import plugins as plugin_library
    from xfm_fast.export.engine_library import load_library
    from xfm_fast.export.engine_profiles import parse_profiles
    from xfm_fast.export.engine_rewriting import with_plugins

    # What is wrong with the options shows before a checkpoint is read.
    names, sizes, shapes = exporting.parse_graphs(graphs), exporting.parse_fixed(fixed), parse_profiles(profiles)
    consumers.profile(consumer, dtype, opset)
    if plugins and quantize:
        raise InputError("--plugins and --quantize change the same products; choose one of them")
    exporting.require_onnx()
    library = load_library(consumer)
    targets = library.check(options, dtype)
    if quantize:
        if quantize in quantisation.QUANTISATIONS:
            library.check(options, quantize)
        quantisation.check_quantisation(quantize, dtype)  # pyright: ignore[reportArgumentType]
    if plugins:
        plugin_library.check_plugins(library)
    subject = export_model.load_subject(checkpoint, preset, config=config, image_size=image_size, tokenizer=tokenizer)
    examples = export_model.examples_for(subject, data, sizes)
    rewrite = None
    if quantize:
        rewrite = quantisation.quantising(subject.model, examples, quantize, dtype)  # pyright: ignore[reportArgumentType]
    if plugins:
        rewrite = with_plugins(library, targets[0], shapes)
    with _showing(verbose) as progress:
        engines.export_engines(
            subject.model, out, consumer, dtype=dtype, graphs=names or None, opset=opset, fixed=sizes,  # pyright: ignore[reportArgumentType]
            all_tokens=all_tokens, source=subject.source, tokenizer_sha256=subject.tokenizer_sha256, profiles=shapes,
            options=options, arithmetic=quantize or None, rewrite=rewrite, plugins=plugins, keep_onnx=keep_onnx,  # pyright: ignore[reportArgumentType]
            progress=progress,
        )  # fmt: skip
    export.finish(verification.verify_export(out, subject.model, examples), out)


class _Bars:
    """A bar for all graphs, and one for each phase of the builder that is under way."""

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
def _showing(verbose: bool) -> Iterator[BuildProgress]:
    """Bars where somebody watches, or the builder's messages."""
    from xfm_fast.export.engine_progress import Silent

    if verbose:
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, markup=False)
        logger = logging.getLogger("xfm_fast.export.engines")
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            yield Silent()
        finally:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bars:
            yield _Bars(bars)
    else:
        yield Silent()


def register(app: typer.Typer) -> None:
    """Add the commands to `export`."""
    app.command("tensorrt")(tensorrt)
    app.command("tensorrt-rtx")(tensorrt_rtx)
