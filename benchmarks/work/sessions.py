"""Exports on the CPU: sessions, their libraries by themselves on the same files, and xfm-fast, in one process.

A session sorts texts, divides them into passes, pads and checks, and may not be slower for it than the library that it
calls. `tokens` is the cost of texts as they grow: padded to the longest, in groups of like length, and in rows.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from xfm_fast.errors import DataError, StorageError

from ..contenders.registry import ALL, ALONE, choose
from ..files import load
from ..measure import Progress, compared
from ..options import SessionOptions, SessionWork
from ..record import OFFICIAL, OURS, Document, Row
from .entrants import Entrant
from .requests import EmbedImage, EmbedText, Rerank, Workload
from .setting import Setting, opened
from .sweep import fits

_INT8 = "xfm-fast-int8"
# Those that share their contenders stand side by side.
_ORDER: tuple[SessionWork, ...] = get_args(SessionWork)
_MEANS = (6, 12, 20, 30, 40)
"""Tokens of a text on average, the longest always being 40."""


def run(
    options: SessionOptions, progress: Progress | None = None, command: Sequence[str] = (), into: Path | None = None
) -> Document:  # fmt: skip
    """Measure this machine's CPU. An interruption (Ctrl-C) ends the run early and keeps the rows measured so far.

    Args:
        into: file of an earlier run, if it is there: its rows of other work are kept.

    Raises:
        XFMError: an option, the checkpoint, the data or the earlier run cannot be used.
    """
    progress, cpu = progress or Progress(), torch.device("cpu")
    size = options.image_size or (32 if options.preset == "tiny" else 224)
    choose(options.baselines, "embed-text", cpu, quick=options.quick)
    earlier = load(into) if into is not None and into.exists() else None
    if options.exports is not None:
        try:
            options.exports.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{options.exports} cannot be made ({error.strerror}); choose another folder with --exports"
            ) from error
    progress.begin(2 + len(options.work))
    with opened(options, "sessions", cpu, progress, command) as setting:
        setting.scratch = options.exports or setting.scratch
        setting.prepare(size)
        if earlier is not None:
            _require_alike(earlier, setting.document, f"{into}")
        group, entrants = "", []
        for work in sorted(dict.fromkeys(options.work), key=_ORDER.index):
            needed = "embed-text" if work == "tokens" else work
            if needed != group:
                # What another work needed is let go first: weights of a dozen contenders.
                entrants.clear()
                gc.collect()
                group, entrants = needed, _entrants(setting, needed, size, options.baselines or (_INT8, *_forms()))
            if work == "tokens":
                _tokens(setting, options, entrants)
            else:
                workload = _workload(setting, work, size, options.quick)
                _measure(setting, workload, entrants, rounds=2 if options.quick else 5, budget_s=20.0)
    document = setting.finish()
    anew = {(row.work, row.over) for row in document.rows}
    kept = [] if earlier is None else [row for row in earlier.rows if (row.work, row.over) not in anew]
    document = document.model_copy(update={"rows": [*kept, *document.rows]})
    document.fits = fits(document)
    return document


def _workload(setting: Setting, work: str, size: int, quick: bool) -> Workload:
    if work == "embed-image":
        return EmbedImage(setting.material, size, 2 if quick else 8)
    if work == "embed-text":
        return EmbedText(setting.material, 4 if quick else 32, "mixed-12")
    return Rerank(setting.material, size, 8 if quick else 64, 1, "mixed-12")


def _forms() -> list[str]:
    return [contender.name for contender in ALL if contender.name in ALONE or contender.name in ALONE.values()]


def _entrants(setting: Setting, work: str, size: int, names: Sequence[str]) -> list[Entrant]:
    """Those asked for, with xfm-fast; the official algorithm is what they are compared with, and takes no time."""
    setting.progress.stage(f"{work}: building")
    asked = [contender.name for contender in ALL if contender.name in names and work in contender.works]
    found = setting.entrants(work, size, (OURS, *asked))
    return [entrant for entrant in found if entrant.contender.name != OFFICIAL]


def _measure(
    setting: Setting, workload: Workload, entrants: list[Entrant], *, rounds: int, budget_s: float,
    x: float | None = None,
) -> None:  # fmt: skip
    batch = workload.requests
    setting.progress.stage(workload.name(batch))
    # Whole batches: texts that lie in one row with others are what may go wrong.
    setting.check(entrants, workload, batch)
    known = len(setting.document.rows)
    try:
        setting.measure(
            workload, entrants, batch=batch, rounds=rounds, budget_s=budget_s if rounds > 2 else 0.0, most_rounds=9,
            warmups=1, deadline=time.perf_counter() + 2 * budget_s, x=x,
        )  # fmt: skip
    finally:
        rows = setting.document.rows[known:]
        for row in rows:
            _beside_library(row, rows)


def _tokens(setting: Setting, options: SessionOptions, entrants: list[Entrant]) -> None:
    """Those in fp32 over texts of more and more tokens, whose number and longest stay the same."""
    entrants = [each for each in entrants if each.dtype == "fp32" and "int8" not in each.contender.name]
    count = 4 if options.quick else 32
    for mean in _MEANS[-2:] if options.quick else _MEANS:
        workload = EmbedText(setting.material, count, f"mixed-{mean}")
        known = len(setting.document.rows)
        tokens = float(sum(workload.lengths(range(count))))
        _measure(setting, workload, entrants, rounds=2 if options.quick else 3, budget_s=6.0, x=tokens)
        for row in setting.document.rows[known:]:
            row.over, row.name = "tokens", f"{row.name}, {tokens:.0f} in all"


def _beside_library(row: Row, rows: Sequence[Row]) -> None:
    """Tell a session's row how it compares with the row of its library."""
    own = next((r for r in rows if (r.contender, r.dtype) == (ALONE.get(row.contender), row.dtype)), None)
    if own is not None and own.seconds and row.seconds:
        row.against = [compared(own.contender, own.dtype, row.dtype, own.seconds, row.seconds)]


def _require_alike(earlier: Document, document: Document, name: str) -> None:
    """Raise `DataError` where an earlier run is none whose rows may stand beside those of this one."""
    for what, find in {
        "benchmark": lambda d: d.benchmark,
        "processor": lambda d: d.machine.get("cpu"),
        "number of threads": lambda d: d.machine.get("threads"),
        "model": lambda d: d.model and (d.model.preset, d.model.origin),
    }.items():
        if find(earlier) != find(document):
            raise DataError(f"{name} is of another {what} ({find(earlier)}, now {find(document)}); name another file")
