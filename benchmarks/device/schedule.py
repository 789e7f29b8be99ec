"""The stages one after the other, each a process with a limit, never longer in all than the budget."""

from __future__ import annotations

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

from .journal import Journal, row
from .stages import Stage
from .table import table

ROWS, LOG, TABLE, DOCUMENT = "rows.jsonl", "log.txt", "table.txt", "device.json"
# Kept back for the table and the document, and for a process to end after it was told to.
_END_S, _GRACE_S = 2.0, 3.0
# A stage that has less than this, or than a tenth of what it is worth, would only load its packages.
_LEAST_S = 4.0


@dataclass(frozen=True)
class Plan:
    """What is to be run, and where.

    Attributes:
        budget: seconds for everything.
        commit: of the source; None for the environment's XFM_COMMIT.
    """

    stages: Sequence[Stage]
    out: Path
    budget: float
    device: str
    small: bool
    commit: str | None = None
    command: list[str] = field(default_factory=list)


def run(plan: Plan) -> int:
    """Run every stage, and end with the table and the document; 0 if each ended by itself.

    An interruption (Ctrl-C) ends the stage that runs, and the rest is not begun.
    """
    begun = time.monotonic()
    end = begun + plan.budget - _END_S
    journal = Journal(plan.out / ROWS)
    # Rows of an earlier run are not this one's.
    journal.path.unlink(missing_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    left, interrupted, fine = list(plan.stages), False, True
    with (plan.out / LOG).open("wb") as log:
        while left:
            stage = left[0]
            remaining = end - time.monotonic()
            allowed = remaining * stage.seconds / sum(other.seconds for other in left)
            left.pop(0)
            started = time.monotonic()
            if interrupted:
                status, reason = "absent", "the run was interrupted"
            elif (lacking := why_absent(stage, plan.device)) is not None:
                status, reason = "absent", lacking
            elif allowed < min(_LEAST_S, stage.seconds / 10):
                status, reason = "absent", f"{max(0, remaining):.0f} s of the budget are left"
            else:
                print(f"{stage.name}: at most {allowed:.0f} s", flush=True)
                try:
                    status, reason = _run_stage(stage, plan, journal, log, allowed)
                except KeyboardInterrupt:
                    interrupted, status, reason = True, "partial", "interrupted"
            journal.end_line()
            spent = time.monotonic() - started
            fine = fine and status in ("measured", "absent")
            journal.add(
                stage.name,
                row=row(
                    "stage", f"stage {stage.name}", "device", status=status, reason=reason, unit="stages",
                    seconds=[spent] if status != "absent" else [],
                ),
            )  # fmt: skip
            print(f"{stage.name}: {status} in {spent:.0f} s{f', {reason}' if reason else ''}", flush=True)
    document = _document(plan, journal, date, time.monotonic() - begun, interrupted)
    shown = table(document)
    write_whole(plan.out / DOCUMENT, f"{json.dumps(document, ensure_ascii=False, indent=1)}\n".encode())
    write_whole(plan.out / TABLE, shown.encode())
    print(shown, end="", flush=True)
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


def _run_stage(stage: Stage, plan: Plan, journal: Journal, log: IO[bytes], allowed: float) -> tuple[str, str | None]:
    """Status and reason of a stage, whose process and all that it started are gone afterwards."""
    log.write(f"\n--- {stage.name}, at most {allowed:.0f} s\n".encode())
    log.flush()
    # The process is to end by itself before it is ended: a few seconds are kept for that.
    own = max(1.0, allowed - min(_GRACE_S, allowed / 4))
    command = [
        sys.executable, "-m", f"{__package__}.worker", stage.name, "--program", stage.program, "--device", plan.device,
        "--seconds", f"{own:.1f}", "--out", str(plan.out.resolve()), *(["--small"] if plan.small else []),
    ]  # fmt: skip
    # What one stage compiles the next ones find; named in the environment, the folder travels to another machine.
    compiled = {"TRITON_CACHE_DIR": str((plan.out / "triton").resolve())}
    environment = (
        compiled
        | {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {
            # An import of this package must find it where this process did, with or without an installation.
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
            "PYTHONUNBUFFERED": "1",
        }
    )
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        code = process.wait(allowed)
    except subprocess.TimeoutExpired:
        _end(process)
        return "partial", f"ended after {allowed:.0f} s, its limit; its rows until then are kept"
    except BaseException:
        _end(process)
        raise
    # What a stage started and did not wait for must not run beside the next one.
    _signal(process.pid, signal.SIGKILL)
    if code == 0:
        return "measured", None
    said = [line for line in Path(log.name).read_text(errors="replace").splitlines() if line.strip()]
    return "failed", f"exit code {code}: {said[-1].strip()[:300] if said else 'nothing was said'}"


def _end(process: subprocess.Popen[bytes]) -> None:
    _signal(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S / 3)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _document(plan: Plan, journal: Journal, date: str, duration: float, interrupted: bool) -> dict[str, Any]:
    """The common document as plain values: what its schema validates need not be installed here."""
    machine: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(), "system": platform.platform(), "gpus": [],
        "python": platform.python_version(), "torch": _version("torch"), "xfm_fast": _version("xfm-fast"), "threads": 1,
    }  # fmt: skip
    rows = []
    for entry in journal.entries():
        machine |= entry.get("machine") or {}
        if entry.get("row"):
            rows.append(entry["row"])
    commit = plan.commit or os.environ.get("XFM_COMMIT") or machine.get("commit")
    return {
        "schema_version": 3, "benchmark": "device", "date": date, "command": plan.command,
        "options": {
            "budget": plan.budget, "small": plan.small, "stages": [stage.name for stage in plan.stages],
        },
        "interrupted": interrupted, "device": plan.device, "machine": machine | {"commit": commit}, "rows": rows,
        "duration_s": duration,
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
