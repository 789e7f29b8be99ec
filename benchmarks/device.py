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

from .record import SCHEMA_VERSION, Document, Result, Status, format_seconds, parse, plain

ROWS, LOG, TABLE, DOCUMENT = "rows.jsonl", "log.txt", "table.txt", "device.json"
# Reserved for the table and the document, and for a process to end after SIGTERM.
_END_S, _GRACE_S = 2.0, 3.0
# A stage with less than this, or than a tenth of its share, would only load its packages.
_MIN_S = 4.0
# The exit code of a stage whose kernels may not run.
_NOT_PREPARED = 3


@dataclass(frozen=True)
class Stage:
    """A stage of the run; without what it needs it is a row `absent`.

    Attributes:
        seconds: its share of a budget of 540; what it leaves goes to later stages.
        program: a function of `device_stages`, or `module:function`, that takes a `Context`.
        needs: packages; `tool` is a program on the PATH.
        gpu: it needs a GPU.
        attends: it measures attention alone, and needs trustworthy kernels of it.
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
        """The dtype of the model."""
        return "bf16" if self.device_name == "cuda" else "fp32"

    def add(self, work: str, name: str, backend: str, **fields: Any) -> None:
        """Append a row; see `make_row`."""
        self.append(row=plain(make_row(work, name, backend, **fields)))

    def add_out_of_time(self, work: str, name: str, backend: str, **fields: Any) -> None:
        """Append a row of work that there was no time for."""
        reason = "no time was left for it in this stage"
        self.add(work, name, backend, status="absent", reason=reason, **fields)

    def append(self, **content: Any) -> None:
        """Append a `row`, facts about the `machine`, or reasons why stages are `absent`, by name."""
        append_entry(self.out / ROWS, self.stage, **content)

    def command(self, program: str, *, small: bool) -> list[str]:
        """Return the command of another process with the arguments of this one."""
        seconds = max(1.0, self.left)
        return stage_command(program, self.stage, self.device_name, small, self.out, seconds)


def stage_command(
    program: str, stage: str, device: str, small: bool, out: Path, seconds: float
) -> list[str]:
    """Return the command that runs a function of `device_stages`, or `module:function`."""
    settings = {
        "program": program,
        "stage": stage,
        "device": device,
        "small": small,
        "out": str(out),
        "seconds": seconds,
    }
    return [sys.executable, "-m", "xfm_fast.benchmarks.device", "stage", json.dumps(settings)]


def run_stage(settings: str) -> int:
    """Run the stage of a `stage_command` in this process."""
    args = json.loads(settings)
    module, _, function = args["program"].rpartition(":")
    module = importlib.import_module(module or "xfm_fast.benchmarks.device_stages")
    deadline = time.monotonic() + args["seconds"]
    context = Context(args["stage"], args["device"], args["small"], Path(args["out"]), deadline)
    try:
        getattr(module, function)(context)
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
    work: str,
    name: str,
    backend: str,
    *,
    dtype: str = "-",
    status: Status = "measured",
    reason: str | None = None,
    unit: str = "calls",
    items: int = 1,
    seconds: Sequence[float] = (),
    **extra: Any,
) -> Result:
    """Return a result of a stage; `extra` without values that are None."""
    return Result(
        work=work,
        name=name,
        backend=backend,
        label=backend,
        dtype=dtype,
        status=status,
        reason=reason,
        unit=unit,
        items=items,
        seconds=list(seconds),
        extra={name: value for name, value in extra.items() if value is not None},
    )


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
    """Read every complete line."""
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
    start, rows = time.monotonic(), plan.out / ROWS
    end = start + plan.budget - _END_S
    # Rows of an earlier run do not belong to this one.
    rows.unlink(missing_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    interrupted, ok, absent = False, True, dict[str, str]()
    status: Status
    with (plan.out / LOG).open("wb") as log:
        for index, stage in enumerate(plan.stages):
            stage_start = time.monotonic()
            remaining = end - stage_start
            share = stage.seconds / sum(later.seconds for later in plan.stages[index:])
            limit = remaining * share
            if interrupted:
                status, reason = "absent", "the run was interrupted"
            elif (missing := why_absent(stage, plan.device) or absent.get(stage.name)) is not None:
                status, reason = "absent", missing
            elif limit < min(_MIN_S, stage.seconds / 10):
                status, reason = "absent", f"{max(0, remaining):.0f} s of the budget are left"
            else:
                print(f"{stage.name}: at most {limit:.0f} s", flush=True)
                try:
                    status, reason = _run_stage(stage, plan, log, limit)
                except KeyboardInterrupt:
                    interrupted, status, reason = True, "partial", "interrupted"
            seconds = time.monotonic() - stage_start
            ok = ok and status in ("measured", "absent")
            row = make_row("stage", f"stage {stage.name}", "device", status=status, unit="stages")
            row.reason = reason
            row.seconds = [seconds] if status != "absent" else []
            append_entry(rows, stage.name, row=plain(row))
            for entry in read_entries(rows):
                absent |= entry.get("absent", {})
            remark = f", {reason}" if reason else ""
            print(f"{stage.name}: {status} in {seconds:.0f} s{remark}", flush=True)
    document = _document(plan, date, time.monotonic() - start, interrupted)
    table = format_table(document)
    write_whole(plan.out / DOCUMENT, document.encoded())
    write_whole(plan.out / TABLE, table.encode())
    print(table, end="", flush=True)
    print(f"saved: {plan.out / DOCUMENT} (xfm-fast bench report shows it), {ROWS}, {TABLE}, {LOG}")
    return 130 if interrupted else int(not ok)


def why_absent(stage: Stage, device: str) -> str | None:
    """Return what a stage lacks on this machine, or None."""
    if stage.gpu and device != "cuda":
        return "has nothing to do without a GPU"
    missing = [name for name in stage.needs if find_spec(name) is None]
    if missing:
        return f"the package {', '.join(missing)} is not installed"
    if stage.tool is not None and shutil.which(stage.tool) is None:
        return f"the program {stage.tool} is not installed"
    return None


def _run_stage(stage: Stage, plan: Plan, log: IO[bytes], limit: float) -> tuple[Status, str | None]:
    """Run a stage and return its status and reason; its process and all that it started have ended afterwards."""
    log.write(f"\n--- {stage.name}, at most {limit:.0f} s\n".encode())
    log.flush()
    # The process has a few seconds less, to end by itself.
    process_limit = max(1.0, limit - min(_GRACE_S, limit / 4))
    out = plan.out.resolve()
    process = subprocess.Popen(
        stage_command(stage.program, stage.name, plan.device, plan.small, out, process_limit),
        stdout=log,
        stderr=subprocess.STDOUT,
        env=_environment(out),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return "partial", f"ended after {limit:.0f} s, its limit; its rows until then are kept"
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
    lines = Path(log.name).read_text(errors="replace").split("\n")
    last = next(line.strip()[:300] for line in reversed(lines) if line.strip())
    return ("absent", last) if code == _NOT_PREPARED else ("failed", f"exit code {code}: {last}")


def _environment(out: Path) -> dict[str, str]:
    """Return the environment of a stage."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Later stages find what earlier ones compiled; a folder named by the user may come from another machine.
    cache, prepared = "triton", Path(environment.get("XFM_PREPARED_KERNELS", ""), "manifest.json")
    if prepared.is_file():
        # A kernel that Triton finds in its cache is not replaced by a prepared one.
        cache += f"-{hashlib.sha256(prepared.read_bytes()).hexdigest()[:8]}"
    environment.setdefault("TRITON_CACHE_DIR", str(out / cache))
    # The stage imports this package from where this process did, installed or not.
    environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _signal(group: int, signal_: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal_)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _document(plan: Plan, date: str, duration: float, interrupted: bool) -> Document:
    entries = read_entries(plan.out / ROWS)
    machine: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "system": platform.platform(),
        "gpus": [],
        "python": platform.python_version(),
        "torch": _version("torch"),
        "xfm_fast": _version("xfm-fast"),
        "threads": 1,
    }
    for entry in entries:
        machine |= entry.get("machine") or {}
    machine["commit"] = plan.commit or os.environ.get("XFM_COMMIT") or machine.get("commit")
    stages = [stage.name for stage in plan.stages]
    return Document(
        schema_version=SCHEMA_VERSION,
        benchmark="device",
        title="The first hour on a GPU",
        reference="eager",
        date=date,
        command=plan.command,
        interrupted=interrupted,
        device=plan.device,
        machine=machine,
        options={"budget": plan.budget, "small": plan.small, "stages": stages},
        rows=[parse(Result, entry["row"]) for entry in entries if entry.get("row")],
        duration_s=duration,
    )


_TABLE = "{:<64.64}  {:<32.32}  {:<5} {:>8} {:>8} {:>18} {:>7}  {}"


def format_table(document: Document) -> str:
    """Format a line per row: times, rates, and the share of the card's peak, or the reason."""
    machine = document.machine
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or machine["cpu"]
    versions = machine.get("versions") or {}
    lines = [
        f"{gpus}, PyTorch {machine['torch']}, Triton {versions.get('triton')}, ptxas {versions.get('ptxas')}",
        f"{document.duration_s:.0f} s of {document.options['budget']:g} s\n",
        _TABLE.format("work", "backend", "dtype", "time", "host", "rate", "of peak", ""),
    ]
    for row in document.rows:
        share = row.number("mfu_data_sheet") or row.number("share_of_floor")
        host_s = row.number("host_s")
        remarks = [
            "by events" if row.text("timed_by") == "events" else "",
            "" if row.status == "measured" else row.status,
            row.reason or "",
        ]
        cells = (
            row.name if row.mode == "offline" else f"{row.name}, {row.mode}",
            row.backend,
            row.dtype,
            "" if row.median_s is None else format_seconds(row.median_s),
            "" if host_s is None else format_seconds(host_s),
            _format_rate(row),
            f"{share:.0%}" if share else "",
            ": ".join(filter(None, remarks)),
        )
        lines.append(_TABLE.format(*cells).rstrip())
    return "\n".join([*lines, ""])


def _format_rate(row: Result) -> str:
    if row.rate and row.unit not in ("calls", "stages", "tests"):
        return f"{row.rate:,.4g} {row.unit}/s"
    if flops := row.per_second("needed_flops"):
        return f"{flops / 1e12:.3g} TFLOP/s"
    if traffic := row.per_second("bytes"):
        return f"{traffic / 1e9:,.4g} GB/s"
    return ""


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(stage.name for stage in STAGES)
    parser = argparse.ArgumentParser(
        prog="python3 -m xfm_fast.benchmarks.device",
        description="Measure a bare GPU machine within a budget. Rows are appended to DIR/rows.jsonl as they are "
        "measured; a table and a document for xfm-fast bench report end the run.",
    )
    add = parser.add_argument
    add("--budget", type=float, default=540.0, metavar="SECONDS", help="for everything [540]")
    add("--out", type=Path, metavar="DIR", help="receives rows, log, table and document")
    add(
        "--kernels",
        type=Path,
        metavar="FOLDER",
        help="that --prepare wrote [$XFM_PREPARED_KERNELS]",
    )
    add(
        "--prepare",
        type=Path,
        metavar="FOLDER",
        help="only compile the kernels of all stages into FOLDER, without a GPU, for a machine with an older Triton",
    )
    add(
        "--arch", type=int, default=90, help="to prepare for: ten times the compute capability [90]"
    )
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the run [cuda]")
    add("--small", action="store_true", help="shapes of milliseconds, to see that everything runs")
    add("--stages", metavar="NAMES", help=f"only these: {names}")
    add("--commit", help="of the source, if git is missing [$XFM_COMMIT]")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the program; 2 for bad arguments, else as `run`."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.prepare is not None:
        stages = importlib.import_module("xfm_fast.benchmarks.device_stages")
        return stages.prepare_kernels(options.prepare, options.arch)
    if options.out is None:
        parser.error("name a folder for the results with --out, or for kernels with --prepare")
    if options.kernels is not None:
        os.environ["XFM_PREPARED_KERNELS"] = str(options.kernels.resolve())
    every_stage = [stage.name for stage in STAGES]
    names = every_stage
    if options.stages is not None:
        names = [name.strip() for name in options.stages.split(",") if name.strip()]
    if unknown := [name for name in names if name not in every_stage]:
        choices = ", ".join(every_stage)
        parser.error(f"--stages {', '.join(unknown)} is unknown; choose from {choices}")
    if not options.budget > 0:
        parser.error(f"--budget {options.budget:g} leaves no time; give seconds, such as 540")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out} cannot be made ({error.strerror}); name another folder")
    words = sys.argv[1:] if arguments is None else arguments
    plan = Plan(
        [stage for stage in STAGES if stage.name in names or stage.name == "check"],
        options.out,
        options.budget,
        options.device,
        options.small,
        options.commit,
        ["python3", "-m", "xfm_fast.benchmarks.device", *words],
    )
    return run(plan)


if __name__ == "__main__":
    sys.exit(run_stage(sys.argv[2]) if sys.argv[1:2] == ["stage"] else main())
