"""What the machine itself can do: copies, and products of matrices in every type that it multiplies."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import machine
from ..timing import Clocked, one_line
from .journal import efficiency
from .worker import Context

_ROUNDS = 7
# The tensor cores multiply fp8 at twice the rate of 16 bits, fp32 (as TF32) at half of it.
_PEAK = {"fp16": 1.0, "bf16": 1.0, "fp8": 2.0, "tf32": 0.5}


def measure(context: Context) -> None:
    """Rows of the copy and of the products."""
    device = machine.choose_device(context.device)
    sheet = machine.data_sheet(device)
    size = 512 if context.small else 8192 if device.type == "cuda" else 2048
    moved = 2 * (64 << 20 if context.small or device.type == "cpu" else 2 << 30)
    source = torch.ones(moved // 8, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    name = f"copy of {moved // 2 >> 20} MiB"
    floor = None if sheet is None else moved / sheet.bytes_per_s
    copy = partial(target.copy_, source)
    _row(context, name, "torch", "fp32", device, copy, 0.0, float(moved), None, floor)
    flops, shape = 2.0 * size**3, f"product {size} × {size} × {size}"
    for dtype, made in _products(size, device).items():
        peak = None if sheet is None else _PEAK.get(dtype, 0.0) * sheet.flops_per_s or None
        try:
            run = made()
        except Exception as error:  # of a type that this card or this PyTorch does not multiply
            context.add("ceiling", shape, "torch", dtype=dtype, status="not offered", reason=one_line(error))
            continue
        _row(context, shape, "torch", dtype, device, run, flops, None, peak, None)


def _row(
    context: Context, name: str, contender: str, dtype: str, device: torch.device, run: Callable[[], object],
    flops: float, moved: float | None, peak: float | None, floor: float | None,
) -> None:  # fmt: skip
    clocked = Clocked(lambda: run, device)
    clocked()
    seconds = [clocked()[0] for _ in range(_ROUNDS)]
    context.add(
        "ceiling", name, contender, dtype=dtype, seconds=seconds, host_s=clocked.host_s, timed_by=clocked.by,
        efficiency=efficiency(flops, moved, statistics.median(seconds), peak, floor),
    )  # fmt: skip


def _products(size: int, device: torch.device) -> dict[str, Callable[[], Callable[[], object]]]:
    generator = torch.Generator().manual_seed(0)
    # Random numbers: a GPU multiplies zeros faster than what anybody has.
    x, y = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))

    def plain(dtype: torch.dtype) -> Callable[[], object]:
        a, b = x.to(dtype), y.to(dtype)
        run = partial(torch.mm, a, b.t())
        run()
        return run

    def tf32() -> Callable[[], object]:
        def run() -> Tensor:
            torch.backends.cuda.matmul.allow_tf32 = True
            try:
                return torch.mm(x, y.t())
            finally:
                torch.backends.cuda.matmul.allow_tf32 = False

        run()
        return run

    def fp8() -> Callable[[], object]:
        a, b = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn)
        scale = torch.ones(size, 1, device=device)
        run = partial(torch._scaled_mm, a, b.t(), scale, scale.t(), out_dtype=torch.bfloat16)
        run()
        return run

    if device.type == "cpu":
        return {"fp32": partial(plain, torch.float32), "bf16": partial(plain, torch.bfloat16)}
    return {
        "bf16": partial(plain, torch.bfloat16), "fp16": partial(plain, torch.float16), "tf32": tf32, "fp8": fp8,
    }  # fmt: skip
