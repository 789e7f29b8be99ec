"""The one command, `xfm-fast`. Heavy imports happen inside the commands, so that help and errors come at once."""

from __future__ import annotations

import atexit
import json
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xfm_fast import (
    cli_bench_drop_in,
    cli_bench_kernels,
    cli_bench_reports,
    cli_bench_scenario,
    cli_bench_training,
    cli_data,
    cli_export,
    cli_kernels,
    cli_reproduce,
    cli_training,
)
from xfm_fast.cli_choices import PRESETS, choice
from xfm_fast.errors import XFMError

if TYPE_CHECKING:
    from rich.console import Console

    from xfm_fast.benchmarks.machine import Package
    from xfm_fast.config import XFMConfig

app = typer.Typer(
    help="X-FM, exact and fast: measure it, see what this machine offers, convert checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(invoke_without_command=True)
app.add_typer(bench_app, name="bench")
cli_kernels.register(app)
cli_data.register(app)
cli_export.register(app)
cli_training.register(app)
cli_reproduce.register(app)
bench_app.command("kernels")(cli_bench_kernels.bench_kernels)
bench_app.command("drop-in")(cli_bench_drop_in.bench_drop_in)
bench_app.command("train-step")(cli_bench_training.bench_train_step)
cli_bench_reports.register(bench_app)
cli_bench_scenario.register(bench_app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from xfm_fast import __version__

        typer.echo(f"xfm-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@bench_app.callback()
def bench(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Less work and fewer samples: under a minute.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Official .th/.pth, .safetensors, or a folder that save_pretrained wrote.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of images with captions, instead of the photographs.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="RoBERTa's vocab.json and merges.txt (their folder), or a tokenizer.json.")
    ] = None,
    official: Annotated[
        Path | None, typer.Option(help="Clone of the official repository, measured as one more baseline.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16, or both with a comma; auto leaves out what the CPU lacks.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default those that PyTorch takes.")] = None,
    out: Annotated[Path, typer.Option(help="Folder that receives the results.")] = Path("bench-results"),
    preset: Annotated[str, typer.Option(help="Size of the model: base or tiny.")] = "base",
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights.")] = 0,
) -> None:
    """Measure this machine: fast against official, in one process, on real photographs.

    Without a sub-command the whole suite runs. Results go to a JSON file and a self-contained HTML page.
    """
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console

    # A pipe or a log file has no width; the table needs some.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    raise typer.Exit(
        _bench(
            console,
            out,
            preset=choice("preset", preset, PRESETS),
            quick=quick,
            checkpoint=checkpoint,
            data=data,
            tokenizer=tokenizer,
            official=official,
            dtypes=None if dtype == "auto" else tuple(part.strip() for part in dtype.split(",")),
            threads=threads,
            seed=seed,
        )
    )


def _bench(console: Console, out: Path, **settings: Any) -> int:
    from rich.console import Console

    from xfm_fast.benchmarks import results, suite, terminal

    with terminal.progress(Console(stderr=True)) as progress:
        document = suite.run(suite.Options(**settings), progress, command=["xfm-fast", *sys.argv[1:]])
    terminal.print_report(document.content, console)
    try:
        saved = results.save(document.content, out)
    except XFMError as error:
        typer.echo(_one_line(error), err=True)
        return 2
    console.print(f"saved: {saved.document} and {saved.page}", soft_wrap=True, highlight=False)
    if document.interrupted:
        return 130
    return 0 if document.ok else 1


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Say what this machine offers and which paths xfm-fast will take on it."""
    from xfm_fast.benchmarks import machine
    from xfm_fast.benchmarks.paths import choose_paths

    facts = machine.describe()
    packages = machine.optional_packages()
    paths = choose_paths()
    if as_json:
        typer.echo(json.dumps({"machine": facts, "packages": machine.as_dict(packages), "paths": paths}, indent=1))
        return
    _print_info(facts, packages, paths)


def _print_info(facts: dict[str, Any], packages: list[Package], paths: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=120)

    def table(title: str, *heads: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for head in heads:
            made.add_column(head, overflow="fold")
        return made

    from xfm_fast.benchmarks.machine import cpu_features

    features = ", ".join(
        f"{name} {'[green]yes[/]' if there else '[dim]no[/]'}" for name, there in cpu_features().items()
    )
    hardware = table("machine", "", "")
    hardware.add_row("processor", f"{escape(facts['cpu'])} ({facts['architecture']})")
    hardware.add_row("features", features)
    hardware.add_row(
        "cores",
        f"{facts['cores_physical']} physical, {facts['cores_logical']} logical; PyTorch takes {facts['threads']}",
    )
    hardware.add_row("memory", f"{facts['memory_gb']} GB, {facts['memory_available_gb']} GB available")
    gpus = [f"{g['name']}, {g['memory_gb']} GB, compute capability {g['compute_capability']}" for g in facts["gpus"]]
    hardware.add_row("GPU", escape("; ".join(gpus)) or "[dim]none that PyTorch can use[/]")
    hardware.add_row(
        "PyTorch",
        f"{facts['torch']}, MKL {'yes' if facts['mkl'] else 'no'}, oneDNN {'yes' if facts['onednn'] else 'no'}, "
        f"CPU capability {facts['torch_cpu_capability']}, Python {facts['python']}",
    )
    console.print(hardware)
    optional = table("optional packages", "package", "version", "")
    for package in packages:
        there = package.version is not None
        optional.add_row(
            package.name,
            escape(package.version or "absent"),
            escape(package.detail if there else package.remedy),
            style=None if there else "dim",
        )
    console.print(optional)
    chosen = table("paths on this CPU", "operation", "dtype", "path", "measured")
    for path in paths:
        rates = ", ".join(
            f"{name} {rate / 1e9:,.0f}" for name, rate in sorted(path["flops_per_s"].items(), key=lambda item: -item[1])
        )
        left_out = "; ".join(f"{name} left out: {why}" for name, why in path["rejected"].items())
        measured = f"GFLOP/s: {rates}" if rates else "no alternative to compare with"
        detail = escape(f"{measured}; {left_out}" if left_out else measured)
        chosen.add_row(path["operation"], path["dtype"], escape(path["chosen"]), detail)
    console.print(chosen)
    if not facts["native_bf16"]:
        console.print("bf16 is not native to this CPU: xfm-fast runs it when asked, slower than fp32")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Official checkpoint file, or a folder that xfm-fast wrote.")],
    destination: Annotated[Path, typer.Argument(help="Folder (to xfm) or .safetensors/.th/.pth file (to official).")],
    to: Annotated[str, typer.Option(help="official or xfm; by default the other one than the source.")] = "",
    image_size: Annotated[int | None, typer.Option(min=1, help="Interpolate position tables to this size.")] = None,
    config: Annotated[Path | None, typer.Option(help="Official YAML, or a JSON of sizes, of the checkpoint.")] = None,
    preset: Annotated[str, typer.Option(help="Sizes of the checkpoint when no --config is given.")] = "base",
    keep_unused: Annotated[
        bool, typer.Option("--keep-unused/--drop-unused", help="Keep weights that no output depends on.")
    ] = True,
) -> None:
    """Convert a checkpoint between the official form and ours; there and back is the identity."""
    from xfm_fast.convert import to_official_file, to_xfm_folder

    target = choice("target", to or ("official" if source.is_dir() else "xfm"), ("official", "xfm"))
    if target == "official":
        report = to_official_file(source, destination, image_size=image_size, keep_unused=keep_unused)
    else:
        sizes = _sizes(config, choice("preset", preset, PRESETS))
        report = to_xfm_folder(source, destination, sizes, image_size=image_size, keep_unused=keep_unused)
    for line in report:
        typer.echo(line)


def _sizes(config: Path | None, preset: Any) -> XFMConfig:
    from xfm_fast.config import XFMConfig

    return XFMConfig.preset(preset) if config is None else XFMConfig.from_official(config)


def _one_line(error: XFMError) -> str:
    text = str(error)
    # Reports of checkpoints list what does not fit; everything else is one line.
    return "xfm-fast: " + (text if "\n" in text else " ".join(text.split()))


def main() -> None:
    """Entry point: errors that a user can mend are one message on standard error and exit code 2."""
    code: str | int | None = 0
    try:
        app()
    except XFMError as error:
        typer.echo(_one_line(error), err=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code
    except Exception:
        traceback.print_exc()
        code = 1
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # One of several processes, whose threads may wait for the interpreter while it is taken down: it ends at once,
        # when all is written and the modules have had their say.
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


if __name__ == "__main__":
    main()
