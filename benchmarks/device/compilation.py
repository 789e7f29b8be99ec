"""Kernels compiled ahead of the measurements, by as many processes as the machine has cores; and their configurations.

On a GPU every contender of every operation runs once, so that later stages find what Triton and PyTorch compiled in
their caches. Without one the shipped forms are compiled for sm_90, which proves that the compiler is whole.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .. import machine
from ..timing import one_line
from .worker import Context

_MODEL_KERNELS = ("relpos_forward", "relpos_forward_fragments", "relpos_dkdv", "relpos_dq", "varlen_forward")


def compile_launches(context: Context) -> None:
    """A row with the time that compiling took."""
    begun = time.monotonic()
    if context.device == "cpu":
        from xfm_fast.kernels import audit

        forms = audit.representative(audit.shipped_forms(audit.shipped_kernels(), (90,)))
        forms = [form for form in forms if form.dtype == "bf16"][: 1 if context.small else None]
        failed = [row.error for row in audit.compile_rows(forms) if row.error]
        names = [form.key for form in forms]
    else:
        names = list(_case_names(context.small))
        failed = _in_processes(context, len(names))
    context.add(
        "precompile", f"{len(names)} launches", "xfm-fast", unit="launches", items=len(names),
        seconds=[time.monotonic() - begun], status="failed" if failed else "measured",
        reason="; ".join(failed)[:600] or None,
    )  # fmt: skip


def _case_names(small: bool) -> list[tuple[str, int]]:
    """(type, number of the case): bf16 with everybody, the other types for ours alone."""
    from ..work.kernel_cases import cases

    # Counting them needs no GPU and no memory of one.
    count = len(cases(torch.device("cpu"), torch.float32, small=True)) if small else _CASES
    return [("bf16", n) for n in range(count)] + [("fp16", n) for n in range(count)]


_CASES = 8
"""Cases at the model's shapes: three windows, two packings, norm, product and vocabulary."""


def _in_processes(context: Context, launches: int) -> list[str]:
    """Failures of the processes that shared the launches, each of which runs every n-th."""
    count = min(cores(), launches)
    command = [
        sys.executable, "-m", f"{__package__}.worker", context.stage, "--program", "compilation:compile_share",
        "--device", context.device, "--seconds", f"{max(1.0, context.left):.1f}", "--out", str(context.out),
        *(["--small"] if context.small else []),
    ]  # fmt: skip
    # In the process group of this stage: they end when it is ended.
    running = [
        subprocess.Popen(command, env=os.environ | {"XFM_SHARE": f"{number}/{count}"}) for number in range(count)
    ]
    failed = []
    for number, process in enumerate(running):
        try:
            code = process.wait(max(0.1, context.left))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            failed.append(f"process {number} of {count} was not done in time")
            continue
        if code:
            failed.append(f"process {number} of {count} ended with exit code {code}")
    return failed


def cores() -> int:
    """Cores that this process may use: the compiler takes one a process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_share(context: Context) -> None:
    """Run the share of the launches that `XFM_SHARE` (`number/count`) names; errors are told where they are timed."""
    from ..work.kernel_cases import OURS, cases, entrants

    number, count = map(int, os.environ["XFM_SHARE"].split("/"))
    device = machine.choose_device(context.device)
    for place, (dtype, case) in enumerate(_case_names(context.small)):
        if place % count != number or context.left < 1:
            continue
        made = cases(device, torch.bfloat16 if dtype == "bf16" else torch.float16, small=context.small)[case]
        for name, entrant in entrants(made, only=None if dtype == "bf16" else {OURS}).items():
            if entrant.status == "failed" or entrant.lost:
                print(f"{made.name}, {name}, {dtype}: {entrant.reason or entrant.lost}")
            for prepare in entrant.runs.values():
                prepare()()
        torch.cuda.synchronize()


def tune_kernels(context: Context) -> None:
    """Rows of the model's kernels before and after the search of their configurations, whose table is kept in `out`."""
    from xfm_fast.kernels import tune
    from xfm_fast.kernels.audit import describe, shipped_kernels
    from xfm_fast.kernels.triton.launch import architecture

    device = machine.choose_device(context.device)
    arch, gpu = architecture(device), torch.cuda.get_device_name(device)
    specs = {spec.name: spec for spec in shipped_kernels()}
    folder: Path = context.out
    for name in _MODEL_KERNELS:
        if name in specs and not tune.sizes(specs[name], [64], arch):
            continue
        if name not in specs or context.left < 5:
            context.out_of_time("tune", name, "searched", dtype="bf16")
            continue
        try:
            choice: Any = tune.search(
                specs[name], 64, "bf16", arch, timer=tune.gpu_timer, workload=tune.model_workload,
                rival=tune.flash_workload,
            )  # fmt: skip
        except Exception as error:  # the search of one kernel may fail in any way; the next one goes on
            context.add("tune", name, "searched", dtype="bf16", status="failed", reason=one_line(error))
            continue
        tune.write([choice], arch, gpu, folder)
        context.add("tune", name, "in use", dtype="bf16", seconds=[choice.before])
        context.add("tune", name, "searched", dtype="bf16", seconds=[choice.seconds], reason=describe(choice.config))
        if choice.flash is not None:
            context.add("tune", name, "flash-attn", dtype="bf16", seconds=[choice.flash])
