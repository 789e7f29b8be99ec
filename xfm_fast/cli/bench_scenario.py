"""`xfm-fast bench scenario`, `sweep`, `coco` and `list`: MLPerf's scenarios against whatever else is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xfm_fast.cli.options import PRESETS, choice
from xfm_fast.errors import UnavailableError

if TYPE_CHECKING:
    from xfm_fast.benchmarks.rows import Document
    from xfm_fast.benchmarks.scenario_setting import ScenarioOptions

_SCENARIOS = ("embed-image", "embed-text", "rerank", "retrieve")
_ELSEWHERE = {
    "train-step": "a step of pretraining, forward and backward: xfm-fast bench train-step",
    "kernels": "every operation against its alternatives: xfm-fast bench kernels",
}
_MEANINGS = {
    "embed-image": "photographs to embeddings",
    "embed-text": "captions to embeddings",
    "rerank": "match scores of an image with candidate captions",
    "retrieve": "a caption to the best images of an index: embedded, ranked, the first k re-ranked",
}

SCENARIO = typer.Argument(help=f"{', '.join(_SCENARIOS)}; see xfm-fast bench list.")
QUICK = typer.Option("--quick", help="Less work and fewer samples, no baselines that take a minute to build.")
PRESET = typer.Option(help="Size of the model: base or tiny.")
BASELINES = typer.Option(help="Names with commas, see xfm-fast bench list. [all that are installed]")
DTYPE = typer.Option(help="fp32, bf16, or both with a comma; auto leaves out what the processor lacks.")
DEVICE = typer.Option(help="cpu or cuda. [a GPU where there is one]")
CHECKPOINT = typer.Option(help="Official .th/.pth, .safetensors, or a folder that save_pretrained wrote.")
DATA = typer.Option(help="Folder of images with captions, instead of the photographs.")
TOKENIZER = typer.Option(help="RoBERTa's vocab.json and merges.txt (their folder), or a tokenizer.json.")
OFFICIAL = typer.Option(help="Clone of the official repository, measured as one more baseline.")
THREADS = typer.Option(min=1, help="Threads; by default those that PyTorch takes.")
IMAGE_SIZE = typer.Option(min=1, help="Pixels along a side. [384; tiny 48]")
BATCH = typer.Option(min=1, help="Requests of an offline run, and the most that a server answers together.")
TEXTS = typer.Option(min=1, help="Captions of a rerank request. [64; quick 8]")
LENGTHS = typer.Option(help="Of texts: captions, or a mean with a shape, such as fixed-16, uniform-16, bimodal-16.")
INDEX = typer.Option(min=1, help="Images that retrieve searches. [18; quick 8]")
TOP = typer.Option("--k", min=1, help="Images that retrieve re-ranks. [8; quick 4]")
SEED = typer.Option(min=0, help="Of random weights, synthetic texts and arrivals.")


def bench_scenario(
    scenario: Annotated[str, SCENARIO],
    mode: Annotated[
        list[str] | None, typer.Option(help="single-stream, offline or server; may be repeated. [all three]")
    ] = None,
    p99_ms: Annotated[
        float | None,
        typer.Option(
            help="Bound of the server on the 99th percentile. [4 times one request of the official algorithm]"
        ),
    ] = None,
    quick: Annotated[bool, QUICK] = False,
    preset: Annotated[str, PRESET] = "base",
    baselines: Annotated[str, BASELINES] = "",
    dtype: Annotated[str, DTYPE] = "auto",
    device: Annotated[str, DEVICE] = "",
    checkpoint: Annotated[Path | None, CHECKPOINT] = None,
    data: Annotated[Path | None, DATA] = None,
    tokenizer: Annotated[Path | None, TOKENIZER] = None,
    official: Annotated[Path | None, OFFICIAL] = None,
    threads: Annotated[int | None, THREADS] = None,
    image_size: Annotated[int | None, IMAGE_SIZE] = None,
    batch: Annotated[int | None, BATCH] = None,
    texts: Annotated[int | None, TEXTS] = None,
    lengths: Annotated[str, LENGTHS] = "captions",
    index: Annotated[int | None, INDEX] = None,
    k: Annotated[int | None, TOP] = None,
    seed: Annotated[int, SEED] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder that receives the results. [bench-results/SCENARIO]")] = None,
) -> None:
    """Latency of one request, throughput of many, and the rate of random arrivals that a server can bear.

    Every contender answers the same requests from the same weights, compared first, then interleaved. One that raises
    an error becomes a failed row and the others go on. Ctrl-C keeps what was measured and marks it. Results go to a
    JSON file and a self-contained HTML page.
    """
    from xfm_fast.benchmarks import scenario_run
    from xfm_fast.benchmarks.rows import MODES

    options = _options(
        scenario, preset=preset, quick=quick, baselines=baselines, dtype=dtype, device=device, checkpoint=checkpoint,
        data=data, tokenizer=tokenizer, official=official, threads=threads, image_size=image_size, batch=batch,
        texts=texts, lengths=lengths, index=index, k=k, seed=seed,
    )  # fmt: skip
    _measure(
        lambda progress, command: scenario_run.run(
            options, mode or MODES, p99_s=None if p99_ms is None else p99_ms / 1e3, progress=progress, command=command
        ),
        out or Path("bench-results") / scenario,
    )


def bench_sweep(
    scenario: Annotated[str, SCENARIO],
    over: Annotated[str, typer.Option(help="batch, resolution, texts or lengths, as far as the scenario has it.")],
    values: Annotated[
        str, typer.Option(help="With commas: numbers, or for lengths captions and shapes such as fixed-16. [about 5]")
    ] = "",
    quick: Annotated[bool, QUICK] = False,
    preset: Annotated[str, PRESET] = "base",
    baselines: Annotated[str, BASELINES] = "",
    dtype: Annotated[str, DTYPE] = "auto",
    device: Annotated[str, DEVICE] = "",
    checkpoint: Annotated[Path | None, CHECKPOINT] = None,
    data: Annotated[Path | None, DATA] = None,
    tokenizer: Annotated[Path | None, TOKENIZER] = None,
    official: Annotated[Path | None, OFFICIAL] = None,
    threads: Annotated[int | None, THREADS] = None,
    image_size: Annotated[int | None, IMAGE_SIZE] = None,
    batch: Annotated[int | None, BATCH] = None,
    texts: Annotated[int | None, TEXTS] = None,
    seed: Annotated[int, SEED] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder that receives the results. [bench-results/sweep-SCENARIO-OVER]")
    ] = None,
) -> None:
    """Cost as work grows: a scenario at several sizes, with the fitted exponent and its interval."""
    from xfm_fast.benchmarks import sweep_run

    options = _options(
        scenario, preset=preset, quick=quick, baselines=baselines, dtype=dtype, device=device, checkpoint=checkpoint,
        data=data, tokenizer=tokenizer, official=official, threads=threads, image_size=image_size, batch=batch,
        texts=texts, seed=seed,
    )  # fmt: skip
    chosen = [part.strip() for part in values.split(",")] if values else None
    _measure(
        lambda progress, command: sweep_run.run(options, over, chosen, progress=progress, command=command),
        out or Path("bench-results") / f"sweep-{scenario}-{over}",
    )


def bench_coco(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples of every part.")] = False,
    preset: Annotated[str, PRESET] = "base",
    dtype: Annotated[str, DTYPE] = "auto",
    device: Annotated[str, DEVICE] = "",
    checkpoint: Annotated[Path | None, CHECKPOINT] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of images with captions: the evaluation of these is run, not projected.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Of --data, read into memory: 5000 of COCO take 5 GB.")] = 64,
    tokenizer: Annotated[Path | None, TOKENIZER] = None,
    threads: Annotated[int | None, THREADS] = None,
    image_size: Annotated[int | None, IMAGE_SIZE] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Candidates of every query. [256]")] = None,
    seed: Annotated[int, SEED] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder that receives the results. [bench-results/coco]")] = None,
) -> None:
    """What the retrieval evaluation of COCO's 5k test split costs on this machine: officially, with xfm-fast, and why.

    Projected from the times of all its parts; with --data run on your own images and captions.
    """
    from xfm_fast.benchmarks import coco

    options = _options(
        "retrieve", preset=preset, quick=quick, baselines="", dtype=dtype, device=device, checkpoint=checkpoint,
        data=data, tokenizer=tokenizer, threads=threads, image_size=image_size, k=k, seed=seed, most_photos=images,
    )  # fmt: skip
    _measure(
        lambda progress, command: coco.run(options, progress=progress, command=command),
        out or Path("bench-results") / "coco",
    )


def bench_list() -> None:
    """List the scenarios, and the baselines with the reason where one is absent here."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from xfm_fast.benchmarks.contenders.registry import ALL
    from xfm_fast.benchmarks.training_step import choose_device

    console = Console() if sys.stdout.isatty() else Console(width=140)
    scenarios = Table(title="scenarios", title_justify="left", box=box.SIMPLE_HEAD)
    scenarios.add_column("name", no_wrap=True)
    scenarios.add_column("what is asked")
    for name, meaning in (_MEANINGS | _ELSEWHERE).items():
        scenarios.add_row(name, meaning)
    console.print(scenarios)
    baselines = Table(title="baselines", title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("name", "what", "scenarios", "types", "version", ""):
        baselines.add_column(head, no_wrap=head == "name")
    device = choose_device(None)
    for contender in ALL:
        why = contender.why_absent(device)
        kinds = "all" if contender.scenarios == _SCENARIOS else ", ".join(contender.scenarios)
        baselines.add_row(
            contender.name, escape(contender.label), kinds, ", ".join(contender.dtypes), contender.version or "",
            escape(f"absent: {why}") if why else "", style="dim" if why else None,
        )  # fmt: skip
    console.print(baselines)


def _options(
    scenario: str, *, preset: str, baselines: str, dtype: str, device: str, **settings: Any
) -> ScenarioOptions:
    from xfm_fast.benchmarks.scenario_setting import ScenarioOptions

    if scenario not in _SCENARIOS:
        if scenario in _ELSEWHERE:
            raise UnavailableError(f"scenario {scenario!r} is a command of its own: xfm-fast bench {scenario}")
        raise UnavailableError(f"scenario {scenario!r} is unknown; choose from {', '.join(_SCENARIOS)}")
    return ScenarioOptions(
        scenario,
        preset=choice("preset", preset, PRESETS),
        baselines=_parts(baselines) if baselines else None,
        dtypes=None if dtype == "auto" else _parts(dtype),
        device=device or None,
        **settings,
    )


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _measure(run: Any, out: Path) -> None:
    """Measure under a progress display, print, save, and end with what a script wants to know."""
    from rich.console import Console

    from xfm_fast.benchmarks import results, terminal

    with terminal.progress(Console(stderr=True)) as progress:
        document: Document = run(progress, ["xfm-fast", *sys.argv[1:]])
    # A pipe or a log file has no width; the table needs some.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    content = document.as_content()
    terminal.print_scenarios(content, console)
    saved = results.save(content, out)
    console.print(f"results: {saved.document}, {saved.page}", soft_wrap=True)
    if document.interrupted:
        raise typer.Exit(130)
    raise typer.Exit(0 if document.ok else 1)


def register(bench_app: typer.Typer) -> None:
    """Add the commands to `bench`."""
    bench_app.command("scenario")(bench_scenario)
    bench_app.command("sweep")(bench_sweep)
    bench_app.command("coco")(bench_coco)
    bench_app.command("list")(bench_list)
