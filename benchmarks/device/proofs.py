"""The kernels proved where they run: the Triton tests compiled, in every type, and the checks of compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import machine
from .compilation import cores
from .worker import Context

# "FILE::TEST WORD", or with several workers "[gw0] [ 3%] WORD FILE::TEST".
_ALONE = re.compile(r"^(\S+\.py)::(\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
_SHARED = re.compile(r"^\[gw\d+\].* (PASSED|FAILED|ERROR|SKIPPED|XFAIL) (\S+\.py)::(\S.*)$")
_TOOLS = ("memcheck", "racecheck")


def _root() -> Path | None:
    """The checkout, which holds the tests; None of an installation without them."""
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (folder / "tests" / "kernels" / "triton_testing.py").is_file():
            return folder
    return None


def run_tests(context: Context) -> None:
    """A row for each module of tests: how many passed, and which did not."""
    root = _root()
    if root is None:
        context.add("tests", "Triton tests", "pytest", status="absent", reason="this is no checkout: it has no tests")
        return
    folder = root / "tests" / "kernels"
    modules = sorted(path.relative_to(root).as_posix() for path in folder.glob("test_triton_*.py"))
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider", "--color=no"]
    if context.device == "cuda":
        # A module that lacks a package is an error of its own and keeps no other from running.
        command += ["-m", "gpu and not slow", "--continue-on-collection-errors", *modules, "tests/kernels/test_gpu.py"]
        if importlib.util.find_spec("xdist") is not None:
            # The compiler takes the time, and it takes one core a process.
            command += ["-n", str(cores())]
        way = "compiled"
    else:
        command += ["-m", "not gpu and not slow", *modules]
        if context.small:
            command = [*command[: -len(modules)], "tests/kernels/test_triton_gelu.py", "-k", "without_bias"]
        way = "interpreted"
    environment = os.environ | ({} if context.device == "cuda" else {"TRITON_INTERPRET": "1"})
    begun = time.monotonic()
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    outcomes: dict[str, dict[str, list[str]]] = {}
    errors: list[str] = []
    assert process.stdout is not None
    # A test that hangs prints nothing, and what the others did must be told all the same.
    timer = threading.Timer(max(0.1, context.left - 1), process.kill)
    timer.start()
    for line in process.stdout:
        print(line, end="")
        if (module := module_error(line)) is not None:
            errors.append(module)
        if (found := outcome(line)) is not None:
            module, test, word = found
            outcomes.setdefault(module, {}).setdefault(word, []).append(test)
    process.wait()
    timer.cancel()
    done = context.left > 1 or process.returncode >= 0
    seconds = time.monotonic() - begun
    for module in errors:
        context.add(
            "tests", module, way, status="failed", unit="tests", items=0, reason="it could not be loaded; see the log"
        )
    for module, words in outcomes.items():
        passed, wrong = len(words.get("PASSED", [])), [*words.get("FAILED", []), *words.get("ERROR", [])]
        left_out = len(words.get("SKIPPED", []))
        said = [f"{passed} passed", *([f"{len(wrong)} failed: {', '.join(wrong[:6])}"] if wrong else [])]
        said += [f"{left_out} skipped"] if left_out else []
        said += [] if done else ["the rest was not reached in time"]
        status = "failed" if wrong else "measured" if done else "partial"
        context.add("tests", module, way, status=status, unit="tests", items=passed, reason=", ".join(said))
    if not outcomes and not errors:
        reason = f"pytest ended with exit code {process.returncode}" if done else "no test ended in time"
        context.add("tests", "Triton tests", way, status="failed", unit="tests", items=0, reason=reason)
    passed = sum(len(words.get("PASSED", [])) for words in outcomes.values())
    context.add("tests", "all modules", way, unit="tests", items=passed, seconds=[seconds])


def outcome(line: str) -> tuple[str, str, str] | None:
    """(module, test, word) of a line that pytest prints about a test, alone or with several workers; else None."""
    if (found := _ALONE.match(line)) is not None:
        return Path(found[1]).name, found[2], found[3]
    if (found := _SHARED.match(line)) is not None:
        return Path(found[2]).name, found[3].strip(), found[1]
    return None


def module_error(line: str) -> str | None:
    """The module of which pytest says that it could not be collected."""
    found = re.match(r"ERROR (\S+\.py)(?: - .*)?$", line.strip())
    return None if found is None else Path(found[1]).name


def run_sanitizer(context: Context) -> None:
    """A row for each check: its errors on small launches of every operation, forward and backward."""
    for tool in _TOOLS:
        if context.left < 3:
            context.out_of_time("sanitizer", tool, "compute-sanitizer")
            continue
        command = [
            "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m",
            f"{__package__}.worker", context.stage, "--program", "proofs:launch", "--device", context.device,
            "--out", str(context.out), "--small",
        ]  # fmt: skip
        context.add("sanitizer", tool, "compute-sanitizer", **_checked(command, context.left - 1))


def _checked(command: Sequence[str], seconds: float) -> dict[str, object]:
    begun = time.monotonic()
    # PyTorch's allocator hands out parts of large blocks, in which no access beyond a tensor is noticed.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"status": "partial", "reason": f"not done in {seconds:.0f} s"}
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", done.stdout)
    if done.returncode == 0 and summary:
        return {"seconds": [time.monotonic() - begun], "reason": summary[-1].strip()}
    said = summary or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return {"status": "failed", "reason": said[-1].strip()[:300]}


def launch(context: Context) -> None:
    """Every operation of ours once, forward and backward, at small shapes."""
    from ..work.kernel_cases import OURS, cases, entrants

    device = machine.choose_device(context.device)
    for case in cases(device, torch.bfloat16 if device.type == "cuda" else torch.float32, small=True):
        entrant = entrants(case, only={OURS})[OURS]
        if entrant.status is not None or entrant.lost:
            raise RuntimeError(f"{case.name}: {entrant.reason or entrant.lost}")
        for prepare in entrant.runs.values():
            prepare()()
    if device.type == "cuda":
        torch.cuda.synchronize()
