"""`xfm-fast bench kernels`: every operation at the model's shapes against its alternatives. Correctness, then time.

On a GPU times are those of graph replay, so that they are the kernels' own; the host's part is told apart. Results are
handed over as soon as they are there, and an error of one contender, of whatever library, costs its own rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from xfm_fast.errors import InputError
from xfm_fast.kernels import roofline

from .. import machine
from ..measure import DTYPES, Progress, filled, interleave
from ..options import KernelOptions
from ..record import OURS, Document, Efficiency, Parity, Row, finite
from ..timing import Clocked, one_line
from .kernel_cases import Case, Direction, Entrant, cases, directions, entrants

_ROUNDS = 7
_TYPES = DTYPES | {"fp16": torch.float16}

Keep = Callable[[Document], None]
"""Told of a document whenever it has new rows."""


def run(
    options: KernelOptions, progress: Progress | None = None, command: Sequence[str] = (), keep: Keep = lambda _: None
) -> Document:
    """Measure every case on the GPU, or on the CPU without one. Ctrl-C keeps the rows that are complete.

    Args:
        keep: told of the document after every operation and direction.

    Raises:
        InputError: an unknown type.
    """
    progress, device = progress or Progress(), machine.choose_device(None)
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    if dtype not in _TYPES:
        raise InputError(f"--dtype {dtype!r} is unknown; choose one of {', '.join(_TYPES)}")
    document = Document.begun("kernels", vars(options), command, device.type)
    made = cases(device, _TYPES[dtype], small=options.small)
    progress.begin(len(made))

    def add(rows: list[Row]) -> None:
        document.rows += rows
        keep(document)

    try:
        for case in made:
            progress.stage(case.name)
            try:
                measure(case, device, machine.data_sheet(device), dtype, progress, add)
            except Exception as error:  # of the definition or the inputs: there is nothing to compare with
                failed = _row(case, directions(case)[0][0], OURS, Entrant(), dtype)
                add([failed.model_copy(update={"status": "failed", "reason": one_line(error)})])
    except KeyboardInterrupt:
        document.interrupted = True
    return document


def measure(
    case: Case, device: torch.device, gpu: roofline.GPU | None, dtype: str = "fp32", progress: Progress | None = None,
    add: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:  # fmt: skip
    """Rows of both directions of one case, all contenders interleaved.

    Args:
        add: takes the rows of a direction as soon as they are there.
    """
    found, rows = entrants(case), []
    for direction, work in directions(case):
        blocks = {
            f"{name} {dtype}": Clocked(entrant.runs[direction], device)
            for name, entrant in found.items()
            if direction in entrant.runs
        }
        samples = interleave(
            blocks, rounds=_ROUNDS, budget_s=0, warmups=1, on_step=(progress or Progress()).step,
            grad=direction != "forward",
        )  # fmt: skip
        made = []
        for name, entrant in found.items():
            row, key = _row(case, direction, name, entrant, dtype), f"{name} {dtype}"
            if key in blocks:
                clocked = blocks[key]
                row = filled(row, key, samples).model_copy(
                    update={"host_s": clocked.host_s, "timed_by": clocked.by if samples.seconds(key) else None}
                )
            if row.median_s:
                row.efficiency = Efficiency(
                    needed_flops=round(work.flops), bytes=round(work.bytes), intensity=work.flops / work.bytes,
                    share_of_floor=None if gpu is None else work.floor(gpu) / row.median_s,
                )  # fmt: skip
            made.append(row)
        add(made)
        rows += made
        if samples.interrupted:
            raise KeyboardInterrupt
    return rows


def _row(case: Case, direction: Direction, name: str, entrant: Entrant, dtype: str) -> Row:
    """A row without times, which says why it has none."""
    parity = None
    if entrant.error is not None and entrant.band is not None:
        passed = entrant.error <= entrant.band
        parity = Parity(error=finite(entrant.error), band=entrant.band, passed=passed, against="the definition in fp64")
    lacking = entrant.without_times(direction)
    return Row(
        work=case.name.split()[0], name=case.name, direction=direction, contender=name, label=name, dtype=dtype,
        status="measured" if lacking is None else lacking[0], reason=None if lacking is None else lacking[1],
        unit="calls", items=1, parity=parity, bounds=name in case.bounds,
    )  # fmt: skip
