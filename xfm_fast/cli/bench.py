"""`xfm-fast bench` and `try`: benchmarks against the official algorithm and other libraries, and of your own model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from xfm_fast.benchmarks.options import (
    DropInOptions,
    KernelOptions,
    ScenarioOptions,
    StepOptions,
    TryOptions,
)
from xfm_fast.cli.console import stdout, table
from xfm_fast.cli.options import MEASURE, Flat, Json, command_group
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.io import make_folder

if TYPE_CHECKING:
    from xfm_fast.benchmarks.measure import Progress
    from xfm_fast.benchmarks.record import Document

app = command_group("bench", group=MEASURE)
Out = Annotated[
    Path, Parameter(help="Folder for a JSON file and a self-contained HTML page; or a JSON file.")
]
_RESULTS = Path("bench-results")


@app.default
def bench(
    scenario: str | None = None,
    /,
    *,
    options: Flat[ScenarioOptions] = ScenarioOptions(),
    out: Path | None = None,
) -> int:
    """Benchmark this machine against the official algorithm and other libraries, on real photographs.

    Without a SCENARIO the whole suite runs on the CPU: image and text embedding, re-ranking, end-to-end retrieval, and
    the fine-tuned tasks. It takes about five minutes on two cores; with --quick, which leaves out the tasks, about one
    (a minute and a half of processor time). OMP_NUM_THREADS sets the threads.

    A scenario measures latency, throughput, and maximum QPS under a latency SLO (Poisson arrivals). Every backend
    answers the same requests with the same weights; results are compared first, then timed in interleaved rounds. A
    backend that fails becomes a failed row and the others continue. Ctrl-C saves what was measured, marked as
    interrupted. Exit code 1: a result differed, or a backend failed.

    Args:
        scenario: embed-image, embed-text, rerank, retrieve, a task, coco, serve (the HTTP service under load), or any
            other registered benchmark; see xfm-fast bench list. [suite]
        out: Folder for a JSON file and a self-contained HTML page; or a JSON file. [bench-results/SCENARIO]
    """
    name = scenario or "suite"
    options.check_scenario(name)
    if name == "suite" and options.device == "auto":
        options = replace(options, device="cpu")
    return _run(name, options, out or _RESULTS / (scenario or ""))


@app.command(name="train-step")
def bench_train_step(
    *, options: Flat[StepOptions] = StepOptions(), out: Out = _RESULTS / "train-step"
) -> int:
    """Time forward and backward pass of ITC, ITM, IMLM and MIM, or of a task, against the official procedure.

    The gradients are compared first. The base model takes several minutes on two cores and 9 GB of memory.
    """
    from xfm_fast.kernels.cpu.workspace import keep_freed_memory

    # Both procedures use the heap settings of `pretrain` and `finetune`.
    keep_freed_memory()
    return _run("train-step", options, out)


@app.command(name="drop-in")
def bench_drop_in(
    *, options: Flat[DropInOptions] = DropInOptions(), out: Out = _RESULTS / "drop-in"
) -> int:
    """Time models with random weights before and after accelerate(model).

    At most three minutes for each of the first models on two idle cores; --only selects some of them. A model with
    different outputs is not timed. Includes int8 where this CPU has it, compared within the tolerance of 8 bits.
    """
    return _run("drop-in", options, out)


@app.command(name="kernels")
def bench_kernels(
    *, options: Flat[KernelOptions] = KernelOptions(), out: Out = _RESULTS / "kernels"
) -> int:
    """Time every operation against eager PyTorch, SDPA, FlexAttention, flash-attn and Liger, if installed.

    A backend that is less accurate than its precision allows is not timed.
    """
    return _run("kernels", options, out)


def try_model(
    model: str, /, *, options: Flat[TryOptions] = TryOptions(), as_json: Json = False
) -> int:
    """Measure the speed-up of accelerate(model) for your model: verified, timed in interleaved rounds, with the code.

    A model of sentence-transformers is measured in whole calls of encode or predict first, then in its forward pass.
    Weights are read from safetensors or as plain values, never executed. An X-FM is measured by xfm-fast bench --model.

    Exit code 1: an accelerated form differs from the model, and is not timed.

    Args:
        model: A folder written by save_pretrained, a name on the Hugging Face Hub, or timm:NAME.
    """
    from xfm_fast.benchmarks import record, report
    from xfm_fast.benchmarks.work import trial

    with progress() as display:
        result = trial.run(model, options, display, ["xfm-fast", *sys.argv[1:]])
    document = result.document
    if as_json:
        lines = [asdict(line) for line in result.lines]
        content = {"lines": lines, "notes": result.notes, "document": record.plain(document)}
        print(json.dumps(content))
    else:
        report.terminal(document, stdout())
        for chart in result.charts:
            report.print_chart(*chart, stdout())
        for note in result.notes:
            stdout().print(note, soft_wrap=True, highlight=False, markup=False)
        for line in result.lines:
            text = f"\n{line.outputs}: {line.speedup:.1f}× the untouched model; paste\n\n    {line.code}"
            stdout().print(text, soft_wrap=True, highlight=False, markup=False)
    return _exit_code(document)


@app.command(name="list")
def bench_list() -> None:
    """List the benchmarks, and the baselines of scenarios with the reason if one is not available here."""
    from rich.markup import escape

    from xfm_fast.benchmarks.backends.registry import BACKENDS
    from xfm_fast.benchmarks.machine import choose_device
    from xfm_fast.benchmarks.work import registered

    benchmarks = table("benchmarks", "name", "measures")
    for name, benchmark in registered().items():
        benchmarks.add_row(name, escape(benchmark.about))
    baselines = table("baselines", "name", "what", "scenarios", "types", "version", "")
    for columns in (benchmarks.columns, baselines.columns):
        columns[0].no_wrap = True
    device = choose_device(None)
    for backend in BACKENDS:
        why = backend.why_absent(device)
        baselines.add_row(
            backend.name,
            escape(backend.label),
            "all" if backend.works is None else ", ".join(backend.works),
            ", ".join(backend.dtypes),
            backend.version or "",
            escape(f"absent: {why}") if why else "",
            style="dim" if why else None,
        )
    stdout().print(benchmarks, baselines)


@app.command(name="report")
def bench_report(results: Path, /, *, out: Path | None = None) -> None:
    """Show saved results: tables here, or a file in the form that its name ends with.

    Args:
        results: JSON file written by xfm-fast bench.
        out: A self-contained page with charts (.html), or tables for a README or an issue (.md).
    """
    from xfm_fast.benchmarks import record, report
    from xfm_fast.io import write_bytes

    document = record.load(results)
    if out is None:
        report.terminal(document, stdout(160))
        return
    forms = {".html": report.html, ".md": report.markdown}
    if out.suffix not in forms or out.is_dir():
        raise InputError(f"--out {out} names neither .html nor .md; end the file's name with one")
    write_bytes({out: forms[out.suffix](document).encode()})
    print(f"saved: {out}")


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
    from xfm_fast.benchmarks import record, report

    changes = report.compare(record.load(a), record.load(b))
    report.print_changes(changes, stdout(160))
    return int(bool(changes.worse))


@contextmanager
def progress() -> Iterator[Progress]:
    """Show the stage and what runs next in one line on a terminal; print nothing elsewhere."""
    from rich.console import Console
    from rich.markup import escape

    from xfm_fast.benchmarks.measure import Progress

    stages, done, stage = 0, 0, ""

    def begin(count: int) -> None:
        nonlocal stages
        stages = count

    def next_stage(name: str) -> None:
        nonlocal done, stage
        done, stage = done + 1, escape(name)
        step("")

    def step(what: str) -> None:
        status.update(f"{done}/{stages} {stage}[dim]{': ' if what else ''}{escape(what)}")

    with Console(stderr=True).status("starting") as status:
        yield Progress(begin, next_stage, step)


def _run(name: str, options: Any, out: Path) -> int:
    """Run a registered benchmark, print and save its results, and return the exit code.

    They are saved in a folder with a page, or as one JSON file.
    """
    from xfm_fast.benchmarks import record, report
    from xfm_fast.benchmarks.work import registered

    benchmarks = registered()
    if name not in benchmarks:
        near = get_close_matches(name, benchmarks, n=1)
        choice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(benchmarks)}"
        raise UnavailableError(f"benchmark {name!r} is unknown; {choice}")
    if out.suffix == ".json":
        # A missing folder is no reason to lose what was measured.
        make_folder(out.parent)
    with progress() as display:
        document = benchmarks[name](options, display, ["xfm-fast", *sys.argv[1:]])
    report.terminal(document, stdout())
    if out.suffix == ".json":
        record.save_as(document, out)
        files = str(out)
    else:
        saved = record.save(document, out, report.html(document))
        files = f"{saved} and {saved.with_suffix('.html')}"
    stdout().print(f"saved: {files}", soft_wrap=True, highlight=False)
    return _exit_code(document)


def _exit_code(document: Document) -> int:
    return 130 if document.interrupted else int(not document.ok)
