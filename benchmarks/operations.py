"""Where a run spends its time, by kind of operation, as PyTorch's profiler sees it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from xfm_fast.benchmarks.rows import Share

# The first kind with a fragment that a name holds takes it.
_KINDS = (
    ("attention", ("attention", "attn", "softmax", "bmm", "baddbmm")),
    ("matrix products", ("linear", "addmm", "mm", "mlp", "conv", "gemm", "cutlass", "nvjet")),
    ("norms", ("norm",)),
    ("GELU", ("gelu",)),
    ("copies and lookups", ("copy", "cat", "index", "embedding", "gather", "contiguous", "pad", "fill", "clone")),
)


def kind_of(operation: str) -> str:
    """The kind of an operator or kernel, by its name."""
    name = operation.lower()
    return next((kind for kind, fragments in _KINDS if any(f in name for f in fragments)), "everything else")


@contextmanager
def _silence() -> Iterator[None]:
    """Some builds of the profiler write a line to the process's own streams whenever it starts and stops."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for number, stream in zip((1, 2), kept, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        os.close(nowhere)


def operation_shares(run: Callable[[], object], device: torch.device) -> list[Share]:
    """Profile one run; an operator's time is without that of those it calls. Empty for what PyTorch cannot see."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with _silence(), profile(activities=activities) as profiler:
        run()
    seconds: dict[str, float] = {}
    for event in profiler.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own > 0:
            kind = kind_of(event.key)
            seconds[kind] = seconds.get(kind, 0.0) + own / 1e6
    return shares(seconds)


def shares(seconds: dict[str, float]) -> list[Share]:
    """Times with their shares of the sum, the longest first."""
    whole = sum(seconds.values())
    if whole <= 0:
        return []
    ranked = sorted(seconds.items(), key=lambda item: -item[1])
    return [Share(name=name, seconds=value, share=value / whole) for name, value in ranked]
