"""`xfm-fast info`, `audit` and `tune`: the machine, machine code, and launch configurations."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xfm_fast.cli.console import stdout, table
from xfm_fast.cli.options import Flat, Json
from xfm_fast.errors import InputError, StorageError, UnavailableError

if TYPE_CHECKING:
    from rich.console import Console

    from xfm_fast.kernels.audit.compiling import Row
    from xfm_fast.kernels.triton.launch import KernelSpec


_MOST_LINES = 200  # of a list of differences


@dataclass(frozen=True)
class KernelOptions:
    """The kernels to compile.

    Attributes:
        kernel: Kernel, by name; may be repeated. [all]
    """

    kernel: tuple[str, ...] = ()


@dataclass(frozen=True)
class AuditOptions(KernelOptions):
    """The compile targets, and the baseline to compare with.

    Attributes:
        arch: Architecture, such as 90; may be repeated. [all four]
        json: File that receives the rows.
        all: Every form of every kernel, not a quarter of them.
        changed: Only forms whose source, compiler or audit changed since the baseline.
        accept: Update the baseline with these figures.
        execute: Run the compiled kernels in emulation instead, and check results, gradients and
            every access.
    """

    arch: tuple[int, ...] = ()
    json: Path | None = None
    all: bool = False
    changed: bool = False
    accept: bool = False
    execute: bool = False


@dataclass(frozen=True)
class TuneOptions(KernelOptions):
    """The kernels whose launch configurations are tuned.

    Attributes:
        head_dim: Of the attention kernels; may be repeated.
        out: Folder of the table, with --cpu the file. [the kernels' folder; cpu-choices.json]
        cpu: Time the implementations for this CPU instead, and write a file for XFM_CPU_CHOICES.
    """

    head_dim: tuple[int, ...] = (64,)
    out: Path | None = None
    cpu: bool = False


def info(*, as_json: Json = False) -> None:
    """Show what this machine offers and which code paths xfm-fast takes on it."""
    from rich.markup import escape

    from xfm_fast.benchmarks import machine
    from xfm_fast.benchmarks.machine import choose_paths
    from xfm_fast.benchmarks.report.tables import plain
    from xfm_fast.kernels.backend import hopper_fault
    from xfm_fast.kernels.cpu import int8, llvm
    from xfm_fast.kernels.cpu.selection import RULE

    facts, packages, paths = machine.describe(), machine.optional_packages(), choose_paths()
    if as_json:
        print(json.dumps({"machine": facts, "packages": packages, "paths": paths}, indent=1))
        return
    console, hardware, versions = stdout(120), table("machine", "", ""), facts["versions"]
    for name, value in facts.items():
        if name != "cpu_flags" and plain(value):
            hardware.add_row(name.replace("_", " "), escape(plain(value)))
    if versions["ptxas"] and (fault := hopper_fault(versions["triton"] or "", versions["ptxas"])):
        hardware.add_row("ptxas", escape(f"not for attention on Hopper: {fault}"))
    optional = table("optional packages", "package", "version", "")
    for package in packages:
        version = package["version"]
        remark = escape((package["detail"] if version else package["remedy"]) or "")
        style = None if version else "dim"
        optional.add_row(package["name"], escape(version or "absent"), remark, style=style)
    operations: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        operations.setdefault((path["chosen"], path["dtype"]), []).append(path["operation"])
    fastest = table("fastest on this CPU", "path", "dtype", "operations")
    for (path, dtype), names in sorted(operations.items()):
        fastest.add_row(escape(path), dtype, ", ".join(names))
    for grid in (hardware, optional, fastest):
        # Names stay on one line; remarks wrap between words.
        for column in grid.columns[:-1]:
            column.no_wrap = True
        console.print(grid)
    console.print(
        f"{RULE} Settled for all processes: xfm-fast tune --cpu; every time: xfm-fast info --json",
        soft_wrap=True,
    )
    reasons = {"llvm": llvm.why_not(), "AMX": llvm.why_no_tiles(), "int8": int8.why_not()}
    for path, reason in reasons.items():
        if reason is not None:
            console.print(f"{path} is left out here: {escape(reason)}", soft_wrap=True)
    if not facts["native_bf16"]:
        console.print("bf16 is not native to this CPU and slower than fp32")


def audit(*, options: Flat[AuditOptions] = AuditOptions()) -> int:
    """Compile the Triton kernels without a GPU and measure their machine code: registers, spills, occupancy, hazards.

    Exit code 1: a figure is worse than the baseline in kernels/audit_baseline.json. Kernels that
    changed since the last audit are compiled, the rest comes from the cache.
    """
    specs = _kernels(options.kernel)
    from xfm_fast.io import write_bytes
    from xfm_fast.kernels.audit import baseline
    from xfm_fast.kernels.audit import compiling as library
    from xfm_fast.kernels.audit.machine_code import ARCHITECTURES, LIMITS

    if unknown := set(options.arch) - set(LIMITS):
        supported = ", ".join(map(str, LIMITS))
        raise InputError(
            f"unknown architecture: {', '.join(map(str, sorted(unknown)))}; known: {supported}"
        )
    arches = options.arch or ARCHITECTURES
    if options.execute:
        if options != AuditOptions(arch=options.arch, execute=True):
            raise InputError(
                "--execute runs the kernels of every operation and writes no figures; give only --arch with it"
            )
        return _execute(arches)
    begun = time.perf_counter()
    shipped_forms = library.shipped_forms(specs, arches)
    forms = shipped_forms if options.all else library.representative(shipped_forms)
    path, shipped = baseline.BASELINE, {form.key for form in shipped_forms}
    try:
        accepted = baseline.read(path, kernels=options.kernel, arches=arches)
    except ValueError as error:
        raise InputError(str(error)) from error
    if options.changed:
        forms = library.changed(forms, accepted.rows)
    compiled = 0

    def progress(done: int, of: int) -> None:
        nonlocal compiled
        compiled = done
        if done % 20 == 0 or done == of:
            print(f"compiled {done} of {of}", file=sys.stderr)

    rows = library.compile_rows(forms, progress=progress)
    seconds = time.perf_counter() - begun
    if options.json is not None:
        content = json.dumps([row.as_dict() for row in rows], indent=1) + "\n"
        write_bytes({options.json: content.encode()})
    console = stdout(220)
    if rows:
        _print_rows(rows, console)
    console.print(
        f"{len(rows)} of {len(shipped_forms)} shipped forms in {seconds:.0f} s ({compiled} compiled, the rest cached),"
        f" {library.compiler()}"
    )
    try:
        if options.accept:
            baseline.accept(
                rows, compiler=library.compiler(), forget=set(accepted.rows) - shipped, path=path
            )
            console.print(f"accepted {len(rows)} rows in {path}", soft_wrap=True)
            return 0
    except ValueError as error:
        raise InputError(str(error)) from error
    comparison = baseline.compare(rows, accepted, compiler=library.compiler(), shipped=shipped)
    if comparison.note:
        console.print(f"note: {comparison.note}", soft_wrap=True)
    better = "better than accepted; xfm-fast audit --accept keeps it so"
    for title, lines in ((better, comparison.better), ("worse than accepted", comparison.worse)):
        if lines:
            console.print(title, style="bold")
        for line in lines[:_MOST_LINES]:
            console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)
        if len(lines) > _MOST_LINES:
            console.print(f"  … and {len(lines) - _MOST_LINES} more")
    if comparison.worse:
        command = "xfm-fast audit --accept" + (" --all" if options.all else "")
        console.print(
            f"{len(comparison.worse)} figures are worse, new or missing. If that is meant: {command}"
        )
        return 1
    return 0


def _execute(arches: Sequence[int]) -> int:
    """Run the kernels in emulation; returns 1 for a wrong result or a hazard."""
    from xfm_fast.benchmarks.work.kernels import execute
    from xfm_fast.kernels.emulation import LATE_WAIT

    failed = False
    for arch in arches:
        kernels: dict[str, list[Any]] = {}
        checks: Counter[str] = Counter()
        for case in execute(f"sm_{arch}"):
            for message in case.wrong:
                print(f"sm_{arch} {case.name} {case.dtype}: {message}")
            failed = failed or bool(case.wrong)
            checks.update(dict.fromkeys({launch.kernel for launch in case.launches}, case.checks))
            for launch in case.launches:
                kernels.setdefault(launch.kernel, []).append(launch)
        for name, launches in sorted(kernels.items()):
            hazards: dict[str, set[str]] = {}
            for launch in launches:
                for hazard in launch.hazards:
                    hazards.setdefault(hazard.kind, set()).add(hazard.location)
            seconds = sum(launch.seconds for launch in launches)
            count = sum(map(len, hazards.values()))
            counts = f"{checks[name]} checks, {len(launches)} launches, {count} hazards"
            print(f"sm_{arch} {name}: {counts}, {seconds:.1f} s", flush=True)
            for hazard, lines in sorted(hazards.items()):
                print(f"  {hazard}: {', '.join(sorted(lines))}")
                failed = failed or hazard != LATE_WAIT
    return int(failed)


def tune(*, options: Flat[TuneOptions] = TuneOptions()) -> None:
    """Tune the attention kernels' launch configurations for bf16 on this machine's GPU, in kernels/tuning.

    Configurations that spill are rejected by the audit before any is timed. Every result is saved
    immediately.

    With --cpu the fastest implementations on this processor are written to a file; processes that
    find its name in the environment variable XFM_CPU_CHOICES use them without timing.
    """
    import torch

    if options.cpu:
        return _tune_cpu(options)

    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise UnavailableError(
            "PyTorch finds no NVIDIA GPU to tune on; without one, run xfm-fast audit"
        )
    specs = _kernels(options.kernel)
    from xfm_fast.io import storing
    from xfm_fast.kernels import tune as library
    from xfm_fast.kernels.audit.compiling import describe
    from xfm_fast.kernels.triton.launch import architecture

    arch = architecture(torch.device("cuda"))
    name = torch.cuda.get_device_name()
    if arch < 80:
        raise UnavailableError(
            f"{name} has compute capability {arch / 10}; the kernels need 8.0 or newer"
        )
    path, folder = None, options.out or library.TUNING
    for spec in specs:
        for size in library.sizes(spec, options.head_dim, arch):
            try:
                choice = library.search(spec, size, "bf16", arch)
            except ValueError as error:
                print(f"not tuned: {error}", file=sys.stderr)
                continue
            with storing(folder, "name another folder with --out"):
                path = library.write([choice], arch, name, folder)
            times = f"{choice.before * 1e6:.1f} → {choice.seconds * 1e6:.1f} µs with {describe(choice.config)}"
            if choice.flash is not None:
                times += f" (flash-attn {choice.flash * 1e6:.1f} µs)"
            print(f"{spec.name} {size}: {times}; {choice.timed} timed, {choice.rejected} rejected")
    if path is None:
        raise InputError(
            "none of these kernels has a tunable configuration at these head dimensions"
        )
    print(f"saved: {path}")


def _tune_cpu(options: TuneOptions) -> None:
    from xfm_fast.benchmarks.machine import choose_paths
    from xfm_fast.io import write_bytes
    from xfm_fast.kernels.cpu.selection import CHOICES, RULE, choices

    if os.environ.get(CHOICES):
        raise InputError(
            f"{CHOICES}={os.environ[CHOICES]} fixes the choices that --cpu measures; unset it first"
        )
    path = options.out or Path("cpu-choices.json")
    # Fail before a minute of comparisons.
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise StorageError(f"{path} cannot be written; name another file with --out")
    for choice in choose_paths():
        print(f"{choice['operation']} {choice['dtype']}: {choice['reason']}")
    write_bytes({path: (json.dumps(choices(), indent=1) + "\n").encode()})
    print(RULE)
    print(f"saved: {path}; export {CHOICES}={path.resolve()}")


def _kernels(names: tuple[str, ...]) -> list[KernelSpec]:
    """Return the shipped kernels, or the named ones, with Triton's interpreter off."""
    os.environ.pop("TRITON_INTERPRET", None)
    from importlib.util import find_spec

    if find_spec("triton") is None:
        raise UnavailableError("Triton is not installed; pip install '.[triton]' (Linux)")
    from xfm_fast.kernels.audit.compiling import shipped_kernels

    specs = shipped_kernels()
    shipped = [spec.name for spec in specs]
    if unknown := sorted(set(names) - set(shipped)):
        near = get_close_matches(unknown[0], shipped, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"unknown kernel: {', '.join(unknown)}{hint}; known: {', '.join(shipped)}")
    return [spec for spec in specs if not names or spec.name in names]


def _print_rows(rows: list[Row], console: Console) -> None:
    """Print one table per kernel; dtypes with equal figures share a line."""
    heads = {
        "variant": lambda row: row.variant,
        "configuration": lambda row: row.config,
        "sm": lambda row: str(row.arch),
        "registers": lambda row: f"{row.registers}/{row.register_limit}",
        "stack": lambda row: f"[red]{row.stack_bytes}[/]" if row.stack_bytes else "0",
        "shared": lambda row: f"{row.shared_bytes / 1024:.1f}/{row.shared_limit // 1024} K",
        "blocks": lambda row: str(row.occupancy),
        "tensor core": _tensor_core,
        "loop": lambda row: str(row.loop_instructions or "–"),
        "waits": _waits,
        "per t.c.": _per_tensor_core,
    }
    for name, group in groupby(rows, key=lambda row: row.kernel):
        figures = table(name, *heads, "dtype")
        merged: dict[tuple[str, ...], list[str]] = {}
        for row in group:
            if row.error:
                console.print(f"[red]{row.key}: {row.error}[/]", soft_wrap=True, markup=True)
            else:
                merged.setdefault(tuple(show(row) for show in heads.values()), []).append(row.dtype)
        for cells, dtypes in merged.items():
            figures.add_row(*cells, " ".join(dtypes))
        console.print(figures)


def _tensor_core(row: Row) -> str:
    return " ".join(f"{n} {name}" for name, n in (row.tensor_core or {}).items()) or "–"


def _per_tensor_core(row: Row) -> str:
    return f"{row.instructions_per_tensor_core:.1f}" if row.loop_tensor_core else "–"


def _waits(row: Row) -> str:
    """Format the waits per HGMMA, and the assembler's warnings about them."""
    waits, warnings = row.waits_per_tensor_core, " ".join(row.warnings or ())
    if waits is None:
        return "–"
    return f"[yellow]{waits:.2f} {warnings}[/]" if warnings else f"{waits:.2f}"
