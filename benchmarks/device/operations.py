"""Operations by graph replay beside their alternatives: right first, then timed in turns, the host's part apart."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from xfm_fast.kernels import roofline

from .. import machine
from ..timing import Clocked, one_line, rotated
from ..work.kernel_cases import OURS, Case, Direction, Entrant, cases, directions, entrants, json_number
from .journal import efficiency
from .worker import Context

_ROUNDS = 7


def measure(context: Context) -> None:
    """Rows of every case in bf16 (on a CPU fp32); a direction is kept when its contenders have taken their turns."""
    device = machine.choose_device(context.device)
    dtype = "bf16" if device.type == "cuda" else "fp32"
    kind, sheet = (torch.bfloat16 if dtype == "bf16" else torch.float32), machine.data_sheet(device)
    for case in cases(device, kind, small=context.small):
        if context.left < 1:
            context.out_of_time(case.name.split()[0], case.name, OURS, dtype=dtype)
            continue
        try:
            found = entrants(case)
        except Exception as error:  # of the definition: there is nothing to compare with
            context.add(
                case.name.split()[0], case.name, OURS, dtype=dtype, status="failed", reason=one_line(error)
            )  # fmt: skip
            continue
        for direction, work in directions(case):
            _measure(context, case, direction, work, found, dtype, device, sheet)


def _measure(
    context: Context, case: Case, direction: Direction, work: roofline.Work, found: dict[str, Entrant], dtype: str,
    device: torch.device, sheet: roofline.GPU | None,
) -> None:  # fmt: skip
    clocks = {name: Clocked(one.runs[direction], device) for name, one in found.items() if direction in one.runs}
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    failures: dict[str, str] = {}
    # The first turn of each compiles, warms up and records, and is not counted.
    for turn in range(_ROUNDS + 1):
        if turn > 2 and context.left < 0:
            break
        for name in rotated(list(clocks), turn):
            if name in failures:
                continue
            try:
                taken = clocks[name]()
            except Exception as error:  # of any library; the others go on
                failures[name] = one_line(error)
                continue
            if turn:
                seconds[name] += taken
    ours = seconds.get(OURS) or None
    for name, entrant in found.items():
        fields: dict[str, Any] = {"dtype": dtype, "direction": direction, "bounds": name in case.bounds}
        if entrant.error is not None and entrant.band is not None:
            fields["parity"] = {
                "error": json_number(entrant.error), "band": entrant.band, "passed": entrant.error <= entrant.band,
                "against": "the definition in fp64",
            }  # fmt: skip
        times = seconds.get(name, [])
        lacking = entrant.without_times(direction)
        if lacking is not None:
            fields |= {"status": lacking[0], "reason": lacking[1]}
        elif name in failures:
            fields |= {"status": "failed", "reason": failures[name]}
        else:
            median, clocked = statistics.median(times), clocks[name]
            floor = None if sheet is None else work.floor(sheet)
            fields |= {
                "seconds": times, "host_s": clocked.host_s, "timed_by": clocked.by, "reason": clocked.reason,
                "efficiency": efficiency(work.flops, work.bytes, median, None, floor),
            }  # fmt: skip
        if name == OURS and ours:
            fields["against"] = [
                {
                    "contender": other, "dtype": dtype, "like_for_like": True,
                    "ratio": statistics.median(theirs) / statistics.median(ours),
                }
                for other, theirs in seconds.items()
                if other != OURS and theirs
            ]  # fmt: skip
        context.add(case.name.split()[0], case.name, name, **fields)
