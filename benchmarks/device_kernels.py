"""`benchmarks.device --prepare`: the kernels that the stages launch, compiled here for a GPU that is elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import torch

from xfm_fast.errors import InputError
from xfm_fast.kernels import ops, prepared

from .device import Context
from .device_stages import ENCODER, encoder, run_case, training_step
from .timing import one_line

_CPU = torch.device("cpu")
_PAIRS = 16  # as 96 a multiple of 16, which is all that their launches depend on


def _context(stage: str) -> Context:
    return Context(stage, "cpu", False, Path(), time.monotonic() + 3600, "bf16")


def _operations() -> None:
    from .work.kernels import case_names

    for dtype in ("bf16", "fp16"):
        for name in case_names(torch.device("cuda"), torch.bfloat16):
            run_case(name, dtype, _CPU, small=False, alone=True)


def _small_operations() -> None:
    from .work.kernels import case_names

    for name in case_names(torch.device("cuda"), torch.float16):
        run_case(name, "fp16", _CPU, small=True, alone=True)


def _encoder() -> None:
    sizes, batches = ENCODER
    for size in sizes:
        model = encoder(_context("encoder"), size)
        for batch in batches:
            # Larger batches are multiples of 16 as this one is.
            pixels = torch.zeros(min(batch, 16), 3, size, size, dtype=torch.bfloat16)
            for eight_bits in (nullcontext(), ops.use_fp8()):
                with torch.no_grad(), eight_bits:
                    model.encode_image(pixels)


def _training_step() -> None:
    run, _ = training_step(_context("step"), _PAIRS)
    run()


PURPOSES: dict[str, Callable[[], None]] = {
    "operations": _operations,
    "sanitizer": _small_operations,
    "encoder": _encoder,
    "step": _training_step,
}
"""What launches what a stage does, by the stage's name."""


def _record(purpose: str, arch: int) -> list[prepared.Launch] | str:
    try:
        return prepared.record(PURPOSES[purpose], arch)
    except Exception as error:  # the other stages go on
        return one_line(error)


def prepare(folder: Path, arch: int) -> int:
    """Write a folder of kernels for `--kernels`; 0 if every stage is in it, 1 if some are not, 2 for an error."""
    begun, failed = time.perf_counter(), False
    purposes: dict[str, list[prepared.Launch]] = {}
    for purpose in PURPOSES:
        # A process that has recorded is of no other use.
        with get_context("spawn").Pool(1) as pool:
            launches = pool.apply(_record, (purpose, arch))
        if isinstance(launches, str):
            failed = True
            print(f"{purpose}: left out, {launches}", file=sys.stderr)
            continue
        purposes[purpose] = launches
        print(f"{purpose}: {len(launches)} kernels", flush=True)
    try:
        manifest = prepared.write(
            folder, purposes, arch, progress=lambda line: print(line, flush=True)
        )
    except (InputError, OSError) as error:
        print(f"--prepare {folder}: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in folder.iterdir())
    seconds = time.perf_counter() - begun
    print(
        f"{folder}: {manifest}, {size / 2**20:.1f} MiB, in {seconds:.0f} s; there: --kernels {folder.name}"
    )
    return int(failed)
