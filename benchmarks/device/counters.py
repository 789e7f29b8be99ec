"""Nsight Compute on six kernels of the model: their times and counters."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import torch

from .worker import Context

_METRICS = (
    "gpu__time_duration.sum",
    "sm__cycles_elapsed.max",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "lts__t_bytes.sum",
    "dram__bytes.sum",
)
# Kernel, and the head dimension or width of rows that it is launched at.
KERNELS = {
    "relpos_forward": 64, "relpos_dkdv": 64, "varlen_forward": 64, "varlen_forward_short": 64,
    "add_layer_norm_forward": 768, "bias_gelu_forward": 3072,
}  # fmt: skip
_SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0}


def profile(context: Context) -> None:
    """A row for each launch that was profiled; the counters themselves are in `ncu.csv`."""
    file = context.out / "ncu.csv"
    command = [
        "ncu", "--csv", "--page", "raw", "--metrics", ",".join(_METRICS), "--clock-control", "none",
        "--profile-from-start", "off", "--log-file", str(file), sys.executable, "-m", f"{__package__}.worker",
        context.stage, "--program", "counters:launch", "--out", str(context.out), *(["--small"] * context.small),
    ]  # fmt: skip
    try:
        code = subprocess.run(command, timeout=max(1.0, context.left - 1), check=False).returncode
        why = f"ncu ended with exit code {code}"
    except subprocess.TimeoutExpired:
        why = "ncu was not done in time"
    launches = read(file)
    for name, seconds in launches:
        context.add("counters", name, "ncu", dtype="bf16", seconds=[seconds])
    if not launches:
        context.add("counters", "six kernels", "ncu", dtype="bf16", status="failed", reason=why)


def read(file: Path) -> list[tuple[str, float]]:
    """(kernel function, seconds) of every launch in what `ncu --csv --page raw` wrote; nothing where there is none."""
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    first = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    rows = list(csv.DictReader(lines[first:]))
    unit = _SECONDS.get(rows[0].get(_METRICS[0]) or "", 1e-9) if rows else 1e-9
    found = []
    for row in rows:
        # The first line has the units.
        if (row.get("ID") or "").isdigit():
            try:
                found.append((row["Kernel Name"], float((row.get(_METRICS[0]) or "").replace(",", "")) * unit))
            except ValueError:
                continue
    return found


def launch(context: Context) -> None:
    """Each kernel at the model's shape, once unseen and once between the marks that the profiler waits for."""
    from xfm_fast.kernels import tune

    for kernel, size in KERNELS.items():
        try:
            run = tune.model_workload(kernel, size, "bf16")
            run()
        except Exception as error:  # a kernel of another name or form: the others are profiled
            print(f"{kernel}: {error}")
            continue
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
