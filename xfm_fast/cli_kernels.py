"""`xfm-fast audit` and `xfm-fast tune`: the quality of the kernels' machine code, and their launch configurations."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xfm_fast.errors import InputError, StorageError, UnavailableError

if TYPE_CHECKING:
    from rich.console import Console

    from xfm_fast.kernels.audit import Row
    from xfm_fast.kernels.audit.targets import Verdict
    from xfm_fast.kernels.triton.launch import KernelSpec
    from xfm_fast.kernels.tune import Choice


def audit(
    arch: Annotated[
        list[int] | None, typer.Option(help="Architecture, such as 90; may be repeated. [all four]")
    ] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Kernel, by name; may be repeated. [all]")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File that receives the rows.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every form of every kernel, not a third of them.")] = False,
    accept: Annotated[bool, typer.Option("--accept", help="Make these figures the accepted ones.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compiling processes; by default one for each core.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of cached figures. [~/.cache/xfm-fast/audit]")] = None,
    accepted_file: Annotated[
        Path | None, typer.Option("--ratchet", help="File of accepted figures. [kernels/audit_ratchet.json]")
    ] = None,
) -> None:
    """Compile the Triton kernels without a GPU and read their machine code: spills, occupancy, tensor cores, loads.

    Exit code 1: a figure is worse than the accepted one in kernels/audit_ratchet.json. What changed since the last
    audit is compiled, the rest comes from the cache.
    """
    specs = _kernels(kernel)
    from xfm_fast.kernels import audit as library
    from xfm_fast.kernels.audit import ratchet, targets
    from xfm_fast.kernels.audit.architectures import LIMITS

    if unknown := set(arch or ()) - set(LIMITS):
        raise InputError(
            f"unknown architecture: {', '.join(map(str, sorted(unknown)))}; known: {', '.join(map(str, LIMITS))}"
        )
    arches = tuple(arch or library.ARCHITECTURES)
    begun = time.perf_counter()
    forms = library.shipped_forms(specs, arches)
    chosen = forms if everything else library.representative(forms)
    compiled = 0

    def progress(done: int, of: int) -> None:
        nonlocal compiled
        compiled = done
        if done % 20 == 0 or done == of:
            typer.echo(f"compiled {done} of {of}", err=True)

    rows = library.compile_rows(chosen, jobs=jobs, cache_dir=cache, progress=progress)
    seconds = time.perf_counter() - begun
    if json_file is not None:
        _save(json_file, json.dumps([row.as_dict() for row in rows], indent=1) + "\n")

    console = _console()
    _print_rows(rows, console)
    _print_floors(console)
    _print_targets(targets.verdicts(rows), console)
    console.print(
        f"{len(rows)} of {len(forms)} shipped forms in {seconds:.0f} s ({compiled} compiled, the rest cached),"
        f" {library.compiler()}"
    )
    path = accepted_file or ratchet.RATCHET
    shipped = {form.key for form in forms}
    try:
        accepted = ratchet.in_scope(ratchet.read(path), kernels=kernel or (), arches=arches)
        if accept:
            ratchet.accept(rows, compiler=library.compiler(), forget=set(accepted.rows) - shipped, path=path)
            console.print(f"accepted {len(rows)} rows in {path}", soft_wrap=True)
            return
    except ValueError as error:
        raise InputError(str(error)) from error
    comparison = ratchet.compare(rows, accepted, compiler=library.compiler(), shipped=shipped)
    if comparison.note:
        console.print(f"note: {comparison.note}", soft_wrap=True)
    _print_lines("better than accepted; xfm-fast audit --accept keeps it so", comparison.better, console)
    _print_lines("worse than accepted", comparison.worse, console)
    if comparison.worse:
        command = " ".join(["xfm-fast audit --accept", *(["--all"] if everything else [])])
        console.print(f"{len(comparison.worse)} figures are worse, new or missing. If that is meant: {command}")
        raise typer.Exit(1)


def tune(
    kernel: Annotated[list[str] | None, typer.Option(help="Kernel, by name; may be repeated. [all]")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16 or fp16; may be repeated. [bf16]")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="Of the attention kernels; may be repeated. [64]")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compiling processes; by default one for each core.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the table. [that of the kernels]")] = None,
) -> None:
    """Search the kernels' launch configurations on this machine's GPU and write them to kernels/tuning.

    Configurations that spill are rejected by the audit before any is timed. Every result is saved as it is found.
    """
    if unknown := set(dtype or ()) - {"bf16", "fp16"}:
        raise InputError(f"--dtype {', '.join(sorted(unknown))} is unknown; choose bf16 or fp16")
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise UnavailableError(
            "tuning times the kernels and needs an NVIDIA GPU, of which PyTorch finds none here. What the compiler can"
            " tell without one: xfm-fast audit"
        )
    specs = _kernels(kernel)
    from xfm_fast.kernels import tune as library
    from xfm_fast.kernels.audit import describe
    from xfm_fast.kernels.triton.launch import architecture

    number = architecture(torch.device("cuda"))
    name = torch.cuda.get_device_name()
    if number < 80:
        raise UnavailableError(f"{name} has compute capability {number / 10}; the kernels need 8.0 or newer")
    path = None
    for spec in specs:
        for kind in dtype or ["bf16"]:
            for size in library.sizes(spec, head_dim or [64]):
                try:
                    choice = library.search(
                        spec, size, kind, number,
                        timer=library.gpu_timer, workload=library.model_workload, jobs=jobs,
                    )  # fmt: skip
                except ValueError as error:
                    typer.echo(f"not tuned: {error}", err=True)
                    continue
                path = _written(choice, number, name, out or library.TUNING)
                times = f"{choice.before * 1e6:.1f} → {choice.seconds * 1e6:.1f} µs with {describe(choice.config)}"
                tried = f"{choice.timed} timed, {choice.rejected} rejected"
                typer.echo(f"{spec.name} {kind} {size}: {times}; {tried}")
    if path is None:
        raise InputError("none of these kernels has a configuration to tune at these head dimensions")
    typer.echo(f"saved: {path}")


def _written(choice: Choice, arch: int, gpu: str, folder: Path) -> Path:
    from xfm_fast.kernels import tune as library

    try:
        return library.write([choice], arch, gpu, folder)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}; name another folder with --out") from error


def _kernels(names: list[str] | None) -> list[KernelSpec]:
    """The shipped kernels, or those of these names, compiled and not interpreted whatever the environment says."""
    os.environ.pop("TRITON_INTERPRET", None)
    from importlib.util import find_spec

    if find_spec("triton") is None:
        raise UnavailableError("the kernels are written in Triton, which is not installed: pip install triton (Linux)")
    from xfm_fast.kernels.audit import shipped_kernels

    specs = shipped_kernels()
    if unknown := set(names or ()) - {spec.name for spec in specs}:
        raise InputError(
            f"unknown kernel: {', '.join(sorted(unknown))}; known: {', '.join(spec.name for spec in specs)}"
        )
    return [spec for spec in specs if not names or spec.name in names]


def _console() -> Console:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=220)


def _print_rows(rows: list[Row], console: Console) -> None:
    """One table a kernel; types whose figures agree share a line."""
    from rich import box
    from rich.table import Table

    heads = {
        "variant": lambda row: row.form,
        "configuration": lambda row: row.config,
        "sm": lambda row: str(row.arch),
        "registers": lambda row: str(row.registers),
        "stack": lambda row: f"[red]{row.stack_bytes}[/]" if row.stack_bytes else "0",
        "shared": lambda row: f"{row.shared_bytes / 1024:.1f}/{row.shared_limit // 1024} K",
        "blocks": lambda row: str(row.occupancy),
        "tensor core": lambda row: " ".join(f"{n} {name}" for name, n in row.tensor_core.items()) or "–",
        "loop": lambda row: str(row.loop_instructions or "–"),
        "per t.c.": lambda row: f"{row.instructions_per_tensor_core:.1f}" if row.loop_tensor_core else "–",
        "loads (of inner loops, if any)": _loads,
    }  # fmt: skip
    for name, group in groupby(rows, key=lambda row: row.kernel):
        table = Table(title=name, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for head in (*heads, "dtype"):
            table.add_column(head, overflow="fold")
        merged: dict[tuple[str, ...], list[str]] = {}
        for row in group:
            if row.error:
                console.print(f"[red]{row.key}: {row.error}[/]", soft_wrap=True, markup=True)
            else:
                merged.setdefault(tuple(show(row) for show in heads.values()), []).append(row.dtype)
        for cells, dtypes in merged.items():
            table.add_row(*cells, " ".join(dtypes))
        console.print(table)


def _loads(row: Row) -> str:
    text = " ".join(f"{n} {load}" for load, n in sorted((row.inner_loads or row.loads).items()))
    return f"[yellow]{text}[/]" if row.wide_loads is False else text


def _print_floors(console: Console) -> None:
    from rich import box
    from rich.table import Table

    from xfm_fast.kernels.roofline import A100, H100, model_shapes

    table = Table(
        title="floors, bf16: the least time that the arithmetic and the traffic of an operation take",
        title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for head in ("operation", "shape", "GFLOP", "MB", f"{H100.name}, µs", f"{A100.name}, µs", "kernels"):
        table.add_column(head, justify="right" if head[0] in "GMHA" else "left")
    for work in model_shapes():
        floors = [f"{work.floor(gpu) * 1e6:.1f} {work.bound(gpu)}" for gpu in (H100, A100)]
        kernels = " ".join(f"{prefix}*" if prefix.endswith("_") else prefix for prefix in work.kernels)
        table.add_row(work.op, work.shape, f"{work.flops / 1e9:.2f}", f"{work.bytes / 1e6:.1f}", *floors, kernels)
    console.print(table)


def _print_targets(verdicts: list[Verdict], console: Console) -> None:
    for verdict in verdicts:
        if not verdict.checked:
            console.print(f"[dim]target not tested[/]  {verdict.target}")
            continue
        good = verdict.checked - len(verdict.missed)
        word = "[green]target met[/]   " if verdict.met else "[yellow]target missed[/]"
        console.print(f"{word}  {verdict.target}: {good} of {verdict.checked}")
        _print_lines("", verdict.missed, console, most=40)
    console.print()


def _print_lines(title: str, lines: list[str], console: Console, most: int = 200) -> None:
    if title and lines:
        console.print(title, style="bold")
    for line in lines[:most]:
        console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)
    if len(lines) > most:
        console.print(f"  … and {len(lines) - most} more")


def _save(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def register(parent: typer.Typer) -> None:
    """Adds the commands to the one command line."""
    commands: list[Callable[..., None]] = [audit, tune]
    for command in commands:
        parent.command()(command)
