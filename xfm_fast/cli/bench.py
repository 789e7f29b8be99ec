"""`xfm-fast bench`: benchmarks of xfm-fast against the official algorithm and other installed libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from xfm_fast.benchmarks.options import (
    CocoOptions,
    DropInOptions,
    KernelOptions,
    ScenarioOptions,
    ServeOptions,
    StepOptions,
    SuiteOptions,
)
from xfm_fast.cli.console import stdout, table
from xfm_fast.cli.options import Flat, command_group
from xfm_fast.errors import InputError

if TYPE_CHECKING:
    from xfm_fast.benchmarks.measure import Progress
    from xfm_fast.benchmarks.record import Document

app = command_group("bench")

JsonFile = Annotated[Path | None, Parameter(name="--json", help="File that receives the rows.")]
_RESULTS = Path("bench-results")
_MEANINGS = {
    "embed-image": "photographs to embeddings",
    "embed-text": "captions to embeddings",
    "rerank": "match scores of an image with candidate captions",
    "retrieve": "a caption to the best images of an index: embedded, ranked, the first k re-ranked",
    "vqa": "questions to an image, 128 of 3,129 answers ranked",
    "vqa-best": "the best of these 128",
    "vqa-all": "the best of all answers",
    "vqa-list": "all answers ranked",
    "nlvr2": "whether a sentence describes two images",
    "grounding": "boxes of expressions in an image",
    "captioning": "images to captions by three beams",
}


@app.default
def bench(*, options: Flat[SuiteOptions] = SuiteOptions(), out: Path = _RESULTS) -> int:
    """Benchmark this machine: xfm-fast against the official algorithm, in one process, on real photographs.

    Without a sub-command the whole suite runs: image and text embedding, re-ranking, end-to-end retrieval, and the
    fine-tuned tasks VQA, NLVR2, grounding and captioning. It takes about five minutes on two cores; with --quick, which
    leaves out the tasks, about one (a minute and a half of processor time). Results go to a JSON file and a
    self-contained HTML page.

    Args:
        out: Folder that receives the results.
    """
    from xfm_fast.benchmarks.work import suite

    return _finish(_measure(suite.run, options), out)


@app.command(name="scenario")
def bench_scenario(
    scenario: str, /, *, options: Flat[ScenarioOptions] = ScenarioOptions(), out: Path | None = None
) -> int:
    """Measure latency, throughput, and maximum QPS under a latency SLO (Poisson arrivals).

    Every backend answers the same requests with the same weights; results are compared first, then timed in interleaved
    rounds. A backend that fails becomes a failed row and the others continue. Ctrl-C saves what was measured, marked as
    interrupted. Results go to a JSON file and a self-contained HTML page.

    Args:
        scenario: embed-image, embed-text, rerank, retrieve, or a task; see xfm-fast bench list.
        out: Folder that receives the results. [bench-results/SCENARIO]
    """
    from xfm_fast.benchmarks.work import scenario as scenarios

    return _finish(_measure(scenarios.run, options, scenario=scenario), out or _RESULTS / scenario)


@app.command(name="coco")
def bench_coco(*, options: Flat[CocoOptions] = CocoOptions(), out: Path = _RESULTS / "coco") -> int:
    """Estimate the cost of COCO's 5k retrieval evaluation on this machine, official and xfm-fast, part by part.

    Projected from the times of its parts.

    Args:
        out: Folder that receives the results.
    """
    from xfm_fast.benchmarks.work import coco

    return _finish(_measure(coco.run, options), out)


@app.command(name="serve")
def bench_serve(*, options: Flat[ServeOptions] = ServeOptions(), out: Path = _RESULTS / "serve") -> int:
    """Load the HTTP service with re-ranking clients, against the same service with one request at a time.

    Every backend is a process of its own, and its answers are compared with the model's first. Results go to a JSON
    file and a self-contained HTML page. Exit code 1: an answer differed, a request failed, or memory grew.

    Args:
        out: Folder that receives the results.
    """
    from xfm_fast.benchmarks.work import serving

    return _finish(_measure(serving.run, options), out)


@app.command(name="train-step")
def bench_train_step(*, options: Flat[StepOptions] = StepOptions(), out: Path = _RESULTS / "train-step") -> int:
    """Time forward and backward pass of ITC, ITM, IMLM and MIM, or of a task, against the official procedure.

    The gradients are compared first. The base model takes several minutes on two cores and 9 GB of memory. Results go
    to a JSON file and a self-contained HTML page; pretraining results on a GPU, in a checkout, also to
    benchmarks/results, to be committed.

    Args:
        out: Folder that receives the results.
    """
    from xfm_fast.benchmarks import files
    from xfm_fast.benchmarks.work import finetuning
    from xfm_fast.kernels.cpu.workspace import keep_freed_memory

    # Both procedures use the heap settings of `pretrain` and `finetune`.
    keep_freed_memory()
    document = _measure(finetuning.run, options)
    # The file of a GPU's pretraining step holds no task rows.
    code, folder = _finish(document, out), files.reference_folder() if options.task is None else None
    if folder is not None and document.device == "cuda" and code == 0:
        stdout().print(f"to be committed: {files.save_reference(document, folder)}", soft_wrap=True)
    return code


@app.command(name="drop-in")
def bench_drop_in(*, options: Flat[DropInOptions] = DropInOptions(), json: JsonFile = None) -> int:
    """Time models with random weights before and after accelerate(model).

    At most three minutes for each of the first models on two idle cores; --only selects some of them. A model with
    different outputs is not timed. Includes int8 where this CPU has it, compared within the tolerance of 8 bits.
    """
    from xfm_fast.benchmarks.work import drop_in

    document = _measure(drop_in.run, options)
    return _save(document, json) or int(not document.ok)


@app.command(name="kernels")
def bench_kernels(*, options: Flat[KernelOptions] = KernelOptions(), json: JsonFile = None) -> int:
    """Time every operation against eager PyTorch, SDPA, FlexAttention, flash-attn and Liger, if installed.

    A backend that is less accurate than its precision allows is not timed. Rows are saved as they are measured, also on
    Ctrl-C.
    """
    from xfm_fast.benchmarks import files
    from xfm_fast.benchmarks.work import kernels

    def keep(document: Document) -> None:
        if json is not None:
            files.save_as(document, json)

    return _save(_measure(kernels.run, options, keep=keep), json)


@app.command(name="list")
def bench_list() -> None:
    """List the scenarios, and the baselines with the reason if one is not available here."""
    from rich.markup import escape

    from xfm_fast.benchmarks.contenders.registry import ALL, SCENARIOS
    from xfm_fast.benchmarks.machine import choose_device
    from xfm_fast.benchmarks.work.scenario import ELSEWHERE

    scenarios = table("scenarios", "name", "measures")
    for name, meaning in (_MEANINGS | ELSEWHERE).items():
        scenarios.add_row(name, meaning)
    baselines = table("baselines", "name", "what", "scenarios", "types", "version", "")
    for shown in (scenarios, baselines):
        shown.columns[0].no_wrap = True
    device = choose_device(None)
    for contender in ALL:
        why = contender.why_absent(device)
        works = [work for work in contender.works if work in SCENARIOS]
        baselines.add_row(
            contender.name, escape(contender.label), "all" if len(works) == len(SCENARIOS) else ", ".join(works),
            ", ".join(contender.dtypes), contender.version or "", escape(f"absent: {why}") if why else "",
            style="dim" if why else None,
        )  # fmt: skip
    stdout().print(scenarios, baselines)


@app.command(name="report")
def bench_report(
    results: Path, /, *, markdown: bool = False, gains: bool = False, html: Path | None = None,
    png: Path | None = None,
) -> None:  # fmt: skip
    """Show saved results: a table here, Markdown, a page, or a picture.

    Args:
        results: JSON file written by xfm-fast bench.
        markdown: Print Markdown, for a README or an issue.
        gains: Print Markdown with one line and speed-up per model, for bench drop-in.
        html: File that receives a self-contained page with charts.
        png: File that receives a picture of 1200 by 630 to share.
    """
    from xfm_fast.benchmarks import files, report
    from xfm_fast.io import write_bytes

    document = files.load(results)
    for name, path in (("--html", html), ("--png", png)):
        if path is not None and path.is_dir():
            raise InputError(f"{name} {path} is a folder; name a file")
    if png is not None:
        report.png(document, png)
        print(f"saved: {png}")
    if html is not None:
        picture = png.name if png is not None and png.parent.resolve() == html.parent.resolve() else None
        write_bytes({html: report.html(document, image=picture).encode()})
        print(f"saved: {html}")
    if markdown or gains:
        print(report.gains(document) if gains else report.markdown(document), end="")
    elif html is None and png is None:
        report.terminal(document, stdout(160))


@app.command(name="compare")
def bench_compare(a: Path, b: Path, /) -> int:
    """Compare two results files row by row: the speed-up of B, and whether it is significant.

    Faster and slower need p < 0.05 in a Mann-Whitney U test of the samples, after Benjamini-Hochberg over all rows,
    medians that differ by more than 2%, and no contention in either row. Different machines and versions are listed.

    Exit codes: 0, no row of xfm-fast is slower; 1, at least one is, or lost its numbers; 2, the files cannot be read or
    compared.

    Args:
        a: Results before.
        b: Results after, of the same benchmark.
    """
    from xfm_fast.benchmarks import files, report

    found = report.compare(files.load(a), files.load(b))
    report.print_changes(found, stdout(160))
    return int(bool(found.worse))


@contextmanager
def progress() -> Iterator[Progress]:
    """Show the stage, the backend and the time left in one line on a terminal; print nothing elsewhere."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    from xfm_fast.benchmarks.measure import Progress

    words = TextColumn("{task.description}[dim]{task.fields[step]}")
    columns = (SpinnerColumn(), TimeElapsedColumn(), MofNCompleteColumn(), words)
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("starting", total=None, step="")
        begun = False

        def stage(name: str) -> None:
            nonlocal begun
            bars.update(task, description=escape(name), step="", advance=1 if begun else 0)
            begun = True

        yield Progress(
            begin=lambda stages: bars.update(task, total=stages, completed=0),
            stage=stage,
            step=lambda what: bars.update(task, step=f": {escape(what)}"),
        )


def _measure(run: Callable[..., Document], options: Any, **given: Any) -> Document:
    """Run a measurement with a progress display, and print its results."""
    from xfm_fast.benchmarks import report

    with progress() as display:
        document = run(options, display, ["xfm-fast", *sys.argv[1:]], **given)
    report.terminal(document, stdout())
    return document


def _finish(document: Document, out: Path) -> int:
    """Save the document with its page, and return the exit code."""
    from xfm_fast.benchmarks import files, report

    saved = files.save(document, out, report.html(document))
    stdout().print(f"saved: {saved.document} and {saved.page}", soft_wrap=True, highlight=False)
    return 130 if document.interrupted else int(not document.ok)


def _save(document: Document, file: Path | None) -> int:
    """Save the document only, if a file is given."""
    from xfm_fast.benchmarks import files

    if file is not None:
        files.save_as(document, file)
        stdout().print(f"saved: {file}", soft_wrap=True)
    return 130 if document.interrupted else 0
