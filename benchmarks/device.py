"""The first hour on a GPU in one command: everything measured within a budget, each row on the disk when it is there.

    python3 -m xfm_fast.benchmarks.device --budget 540 --out DIR

Where the machine's compilers make attention wrong, `--prepare FOLDER`, elsewhere and before, makes its kernels for
`--kernels FOLDER` here. This module needs only the standard library. Every stage is a process with a limit of its own,
so that one that hangs, dies or lacks a package is a row with the reason, and the next one begins.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from xfm_fast.kernels.files import write_whole

from .record import SCHEMA_VERSION, Document, Result, Status, parse, plain

ROWS, LOG, TABLE, DOCUMENT = "rows.jsonl", "log.txt", "table.txt", "device.json"
# Reserved for the table and the document, and for a process to end after SIGTERM.
_END_S, _GRACE_S = 2.0, 3.0
# A stage with less than this, or than a tenth of its share, would only load its packages.
_LEAST_S = 4.0
# The exit code of a stage whose kernels may not run.
_NOT_PREPARED = 3


@dataclass(frozen=True)
class Stage:
    """A part of the program.

    `seconds` is its share of a budget of 540 (what it leaves goes to later stages), `program` a function of
    `device_stages` or `module:function`, which takes a `Context`. It needs packages, a tool on the PATH
    or a GPU, and is a row `absent` without them, as it is without trustworthy kernels of attention if it is nothing
    but a measurement of them.
    """

    name: str
    seconds: float
    program: str
    needs: tuple[str, ...] = ("torch",)
    tool: str | None = None
    gpu: bool = False
    attends: bool = False


_KERNELS, _MODEL = ("torch", "triton"), ("torch", "pydantic")
# What decides whether times are worth anything comes first, the longest last.
STAGES = (
    Stage("check", 20, "check_stages"),
    Stage("machine", 10, "describe_machine", ("torch", "psutil")),
    Stage("ceilings", 20, "measure_ceilings"),
    Stage("precompile", 50, "compile_launches", _KERNELS, gpu=True),
    Stage("tests", 150, "run_tests", (*_KERNELS, "pytest")),
    Stage("sanitizer", 25, "run_sanitizer", _KERNELS, "compute-sanitizer", gpu=True, attends=True),
    Stage("operations", 95, "measure_ops"),
    Stage("encoder", 50, "measure_encoder", _MODEL, attends=True),
    Stage("step", 30, "measure_training_step", _MODEL, attends=True),
    Stage("coco", 50, "rerank_coco", _MODEL, attends=True),
    Stage("tune", 40, "tune_kernels", _KERNELS, gpu=True, attends=True),
)


@dataclass(frozen=True)
class Context:
    """The arguments of a stage: its name, the folder of results, and `time.monotonic` at which it should end."""

    stage: str
    device_name: str
    small: bool
    out: Path
    deadline: float
    dtype_name: str = ""

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def device(self) -> Any:
        """The `torch.device`."""
        from . import machine

        return machine.choose_device(self.device_name)

    @property
    def dtype(self) -> str:
        """The dtype of the model: bf16 on a GPU, unless one is given."""
        return self.dtype_name or ("bf16" if self.device_name == "cuda" else "fp32")

    def add(self, work: str, name: str, backend: str, **fields: Any) -> None:
        """Append a row; see `make_row`."""
        self.append(row=plain(make_row(work, name, backend, **fields)))

    def add_out_of_time(self, work: str, name: str, backend: str, **fields: Any) -> None:
        """Append a row of work that there was no time for."""
        self.add(
            work,
            name,
            backend,
            status="absent",
            reason="no time was left for it in this stage",
            **fields,
        )

    def append(self, **content: Any) -> None:
        """Append a `row`, facts about the `machine`, or reasons why stages are `absent`, by name."""
        append_entry(self.out / ROWS, self.stage, **content)

    def command(self, program: str, *, small: bool) -> list[str]:
        """The command of another process with the arguments of this one."""
        return stage_command(
            program, self.stage, self.device_name, small, self.out, max(1.0, self.left)
        )


def stage_command(
    program: str, stage: str, device: str, small: bool, out: Path, seconds: float
) -> list[str]:
    """The command that runs a function of `device_stages`, or `module:function`."""
    settings = {
        "program": program, "stage": stage, "device": device, "small": small, "out": str(out), "seconds": seconds,
    }  # fmt: skip
    return [sys.executable, "-m", "xfm_fast.benchmarks.device", "stage", json.dumps(settings)]


def run_stage(settings: str) -> int:
    """Run the stage of a `stage_command` in this process."""
    given = json.loads(settings)
    module, _, function = given["program"].rpartition(":")
    program = getattr(
        importlib.import_module(module or "xfm_fast.benchmarks.device_stages"), function
    )
    deadline = time.monotonic() + given["seconds"]
    try:
        program(
            Context(given["stage"], given["device"], given["small"], Path(given["out"]), deadline)
        )
    except Exception as error:
        prepared = sys.modules.get("xfm_fast.kernels.prepared")
        if prepared is None or not isinstance(error, prepared.NotPreparedError):
            raise
        print(error)
        return _NOT_PREPARED
    return 0


@dataclass(frozen=True)
class Plan:
    """The stages to run in `budget` seconds; `commit` is that of the source (default: the environment's XFM_COMMIT)."""

    stages: Sequence[Stage]
    out: Path
    budget: float
    device: str
    small: bool
    commit: str | None = None
    command: list[str] = field(default_factory=list)


def make_row(
    work: str, name: str, backend: str, *, dtype: str = "-", status: Status = "measured", reason: str | None = None,
    unit: str = "calls", items: int = 1, seconds: Sequence[float] = (), **extra: Any,
) -> Result:  # fmt: skip
    """A result of a stage; `extra` without those that are None."""
    return Result(
        work=work, name=name, backend=backend, label=backend, dtype=dtype, status=status, reason=reason, unit=unit,
        items=items, seconds=list(seconds), extra={name: value for name, value in extra.items() if value is not None},
    )  # fmt: skip


def append_entry(path: Path, stage: str, **content: Any) -> None:
    """Append a line of JSON (`row=` or `machine=`) durably; a line torn by a killed process is closed first."""
    line = json.dumps({"stage": stage, **content}, ensure_ascii=False) + "\n"
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Every complete line."""
    entries = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and "stage" in entry]


def run(plan: Plan) -> int:
    """Run every stage, then write the table and the document.

    Returns 0 if each ended by itself, 1 if one failed or ran out of time, 130 after Ctrl-C, which ends the stage that
    runs and starts no other.
    """
    begun, rows = time.monotonic(), plan.out / ROWS
    end = begun + plan.budget - _END_S
    # Rows of an earlier run do not belong to this one.
    rows.unlink(missing_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    interrupted, fine, absent = False, True, dict[str, str]()
    status: Status
    with (plan.out / LOG).open("wb") as log:
        for number, stage in enumerate(plan.stages):
            started = time.monotonic()
            remaining = end - started
            allowed = (
                remaining * stage.seconds / sum(other.seconds for other in plan.stages[number:])
            )
            if interrupted:
                status, reason = "absent", "the run was interrupted"
            elif (missing := why_absent(stage, plan.device) or absent.get(stage.name)) is not None:
                status, reason = "absent", missing
            elif allowed < min(_LEAST_S, stage.seconds / 10):
                status, reason = "absent", f"{max(0, remaining):.0f} s of the budget are left"
            else:
                print(f"{stage.name}: at most {allowed:.0f} s", flush=True)
                try:
                    status, reason = _run_stage(stage, plan, log, allowed)
                except KeyboardInterrupt:
                    interrupted, status, reason = True, "partial", "interrupted"
            spent = time.monotonic() - started
            fine = fine and status in ("measured", "absent")
            seconds = [spent] if status != "absent" else []
            row = make_row(
                "stage",
                f"stage {stage.name}",
                "device",
                status=status,
                reason=reason,
                unit="stages",
                seconds=seconds,
            )
            append_entry(rows, stage.name, row=plain(row))
            for entry in read_entries(rows):
                absent |= entry.get("absent", {})
            print(
                f"{stage.name}: {status} in {spent:.0f} s{f', {reason}' if reason else ''}",
                flush=True,
            )
    document = _document(plan, date, time.monotonic() - begun, interrupted)
    table = format_table(document)
    write_whole(plan.out / DOCUMENT, document.encoded())
    write_whole(plan.out / TABLE, table.encode())
    print(table, end="", flush=True)
    print(f"saved: {plan.out / DOCUMENT} (xfm-fast bench report shows it), {ROWS}, {TABLE}, {LOG}")
    return 130 if interrupted else int(not fine)


def why_absent(stage: Stage, device: str) -> str | None:
    """What a stage lacks on this machine, or None."""
    if stage.gpu and device != "cuda":
        return "has nothing to do without a GPU"
    missing = [name for name in stage.needs if find_spec(name) is None]
    if missing:
        return f"the package {', '.join(missing)} is not installed"
    if stage.tool is not None and shutil.which(stage.tool) is None:
        return f"the program {stage.tool} is not installed"
    return None


def _run_stage(
    stage: Stage, plan: Plan, log: IO[bytes], allowed: float
) -> tuple[Status, str | None]:
    """Status and reason of a stage; its process and all that it started have ended afterwards."""
    log.write(f"\n--- {stage.name}, at most {allowed:.0f} s\n".encode())
    log.flush()
    # The process has a few seconds less, to end by itself.
    own = max(1.0, allowed - min(_GRACE_S, allowed / 4))
    command = stage_command(
        stage.program, stage.name, plan.device, plan.small, plan.out.resolve(), own
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Later stages find what earlier ones compiled; a folder named by the user may come from another machine.
    prepared = Path(environment.get("XFM_PREPARED_KERNELS", ""), "manifest.json")
    # A kernel that Triton finds in its cache is not replaced by a prepared one.
    cache = (
        f"triton-{hashlib.sha256(prepared.read_bytes()).hexdigest()[:8]}"
        if prepared.is_file()
        else "triton"
    )
    environment.setdefault("TRITON_CACHE_DIR", str((plan.out / cache).resolve()))
    # The stage imports this package from where this process did, installed or not.
    environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment["PYTHONUNBUFFERED"] = "1"
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = process.wait(allowed)
    except subprocess.TimeoutExpired:
        return "partial", f"ended after {allowed:.0f} s, its limit; its rows until then are kept"
    finally:
        if process.returncode is None:
            _signal(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S / 3)
        # Nothing that a stage started may run beside the next one.
        _signal(process.pid, signal.SIGKILL)
        process.wait()
    if code == 0:
        return "measured", None
    lines = [
        line for line in Path(log.name).read_text(errors="replace").splitlines() if line.strip()
    ]
    if code == _NOT_PREPARED:
        return "absent", lines[-1].strip()[:300]
    return "failed", f"exit code {code}: {lines[-1].strip()[:300]}"


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _document(plan: Plan, date: str, duration: float, interrupted: bool) -> Document:
    entries = read_entries(plan.out / ROWS)
    machine: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(), "system": platform.platform(), "gpus": [],
        "python": platform.python_version(), "torch": _version("torch"), "xfm_fast": _version("xfm-fast"), "threads": 1,
    }  # fmt: skip
    for entry in entries:
        machine |= entry.get("machine") or {}
    machine["commit"] = plan.commit or os.environ.get("XFM_COMMIT") or machine.get("commit")
    return Document(
        schema_version=SCHEMA_VERSION, benchmark="device", title="The first hour on a GPU", reference="eager",
        date=date, command=plan.command, interrupted=interrupted, device=plan.device, machine=machine,
        options={"budget": plan.budget, "small": plan.small, "stages": [stage.name for stage in plan.stages]},
        rows=[parse(Result, entry["row"]) for entry in entries if entry.get("row")], duration_s=duration,
    )  # fmt: skip


_TABLE = "{:<64.64}  {:<32.32}  {:<5} {:>8} {:>8} {:>18} {:>7}  {}"


def format_table(document: Document) -> str:
    """A line per row: times, rates, and the share of the card's peak; a row without numbers shows the reason."""
    machine = document.machine
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or machine["cpu"]
    versions = machine.get("versions") or {}
    lines = [
        f"{gpus}, PyTorch {machine['torch']}, Triton {versions.get('triton')}, ptxas {versions.get('ptxas')}",
        f"{document.duration_s:.0f} s of {document.options['budget']:g} s\n",
        _TABLE.format("work", "backend", "dtype", "time", "host", "rate", "of peak", ""),
    ]
    for row in document.rows:
        rate, share = "", row.number("mfu_data_sheet") or row.number("share_of_floor")
        if row.rate and row.unit not in ("calls", "stages", "tests"):
            rate = f"{row.rate:,.4g} {row.unit}/s"
        elif flops := row.per_second("needed_flops"):
            rate = f"{flops / 1e12:.3g} TFLOP/s"
        elif moved := row.per_second("bytes"):
            rate = f"{moved / 1e9:,.4g} GB/s"
        by = "by events" if row.text("timed_by") == "events" else ""
        status = "" if row.status == "measured" else row.status
        name = row.name if row.mode == "offline" else f"{row.name}, {row.mode}"
        lines.append(
            _TABLE.format(
                name, row.backend, row.dtype, _format_duration(row.median_s), _format_duration(row.number("host_s")),
                rate, f"{share:.0%}" if share else "", ": ".join(filter(None, (by, status, row.reason))),
            ).rstrip()
        )  # fmt: skip
    return "\n".join([*lines, ""])


def _format_duration(seconds: float | None) -> str:
    """Seconds, milliseconds or microseconds."""
    if seconds is None:
        return ""
    return next(
        (
            f"{seconds / size:.3g} {unit}"
            for unit, size in (("s", 1.0), ("ms", 1e-3))
            if seconds >= size
        ),
        f"{seconds * 1e6:.3g} µs",
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the program; 2 for bad arguments, else as `run`."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="python3 -m xfm_fast.benchmarks.device",
        description="Measure a bare GPU machine within a budget. Rows are appended to DIR/rows.jsonl as they are "
        "measured; a table and a document for xfm-fast bench report end the run.",
    )
    parser.add_argument(
        "--budget", type=float, default=540.0, metavar="SECONDS", help="for everything [540]"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="receives rows, log, table and document"
    )
    parser.add_argument(
        "--kernels",
        type=Path,
        metavar="FOLDER",
        help="that --prepare wrote [$XFM_PREPARED_KERNELS]",
    )
    parser.add_argument(
        "--prepare",
        type=Path,
        metavar="FOLDER",
        help="only compile the kernels of all stages into FOLDER, without a GPU, for a machine with an older Triton",
    )
    parser.add_argument(
        "--arch", type=int, default=90, help="to prepare for: ten times the compute capability [90]"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the program [cuda]"
    )
    parser.add_argument(
        "--small", action="store_true", help="shapes of milliseconds, to see that everything runs"
    )
    parser.add_argument(
        "--stages", default=",".join(names), metavar="NAMES", help=f"only these: {', '.join(names)}"
    )
    parser.add_argument("--commit", help="of the source, if git is missing [$XFM_COMMIT]")
    options = parser.parse_args(arguments)
    if options.prepare is not None:
        preparation = importlib.import_module("xfm_fast.benchmarks.device_kernels")
        return preparation.prepare(options.prepare, options.arch)
    if options.out is None:
        parser.error("name a folder for the results with --out, or for kernels with --prepare")
    if options.kernels is not None:
        os.environ["XFM_PREPARED_KERNELS"] = str(options.kernels.resolve())
    chosen = [name.strip() for name in options.stages.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in names]:
        print(
            f"--stages {', '.join(unknown)} is unknown; choose from {', '.join(names)}",
            file=sys.stderr,
        )
        return 2
    if not options.budget > 0:
        print(
            f"--budget {options.budget:g} leaves no time; give seconds, such as 540",
            file=sys.stderr,
        )
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(
            f"--out {options.out} cannot be made ({error.strerror}); name another folder",
            file=sys.stderr,
        )
        return 2
    stages = tuple(stage for stage in STAGES if stage.name in chosen or stage.name == "check")
    command = [
        "python3",
        "-m",
        "xfm_fast.benchmarks.device",
        *(sys.argv[1:] if arguments is None else arguments),
    ]
    return run(
        Plan(
            stages,
            options.out,
            options.budget,
            options.device,
            options.small,
            options.commit,
            command,
        )
    )


if __name__ == "__main__":
    sys.exit(run_stage(sys.argv[2]) if sys.argv[1:2] == ["stage"] else main())
