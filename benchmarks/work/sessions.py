"""Exports on the CPU: sessions, their libraries by themselves on the same files, and xfm-fast, in one process.

A session sorts texts, divides them into passes, pads and checks, and may not be slower for it than the library that it
calls. `tokens` is the cost of texts as they grow: padded to the longest, in groups of like length, and in rows.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from xfm_fast.errors import DataError

from ..contenders.registry import ALL, ALONE
from ..files import load
from ..measure import Progress, compared
from ..options import SessionOptions
from ..record import OFFICIAL, OURS, Document, Row
from .entrants import Entrant
from .requests import EmbedImage, EmbedText, Rerank, Workload
from .setting import Setting, opened

_INT8 = "xfm-fast-int8"
_MEANS = (6, 12, 20, 30, 40)
"""Tokens of a text on average, the longest always being 40."""


def run(options: SessionOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Document:
    """Measure this machine's CPU. An interruption (Ctrl-C) ends the run early and keeps the rows measured so far.

    Raises:
        XFMError: an option, the checkpoint or the data cannot be used.
    """
    progress, tiny = progress or Progress(), options.preset == "tiny"
    size = options.image_size or (32 if tiny else 224)
    progress.begin(2 + len(options.work))
    with opened(options, "sessions", torch.device("cpu"), progress, command) as setting:
        setting.prepare(size)
        if options.exports is not None:
            options.exports.mkdir(parents=True, exist_ok=True)
            setting.scratch = options.exports
        for work in dict.fromkeys(options.work):
            if work == "tokens":
                _tokens(setting, options, size)
                continue
            names = options.baselines or (_INT8, *_forms())
            entrants = _entrants(setting, work, size, names)
            _measure(setting, options, entrants, _workload(setting, work, size, options.quick))
    return setting.finish()


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
    # What another work needed is let go first: weights of a dozen contenders.
    gc.collect()
    asked = [name for name in names if any(c.name == name and work in c.works for c in ALL)]
    found = setting.entrants(work, size, (OURS, *asked))
    return [entrant for entrant in found if entrant.contender.name != OFFICIAL]


def _measure(
    setting: Setting, options: SessionOptions, entrants: list[Entrant], workload: Workload, *, x: float | None = None
) -> None:
    batch = workload.requests
    setting.progress.stage(workload.name(batch))
    # Whole batches: texts that lie in one row with others are what may go wrong.
    setting.check(entrants, workload, batch)
    quick, known = options.quick, len(setting.document.rows)
    try:
        setting.measure(
            workload, entrants, batch=batch, rounds=2 if quick else 5, budget_s=0 if quick else 20.0, most_rounds=9,
            warmups=1, deadline=time.perf_counter() + 120, x=x,
        )  # fmt: skip
    finally:
        rows = setting.document.rows[known:]
        for row in rows:
            _beside_library(row, rows)


def _tokens(setting: Setting, options: SessionOptions, size: int) -> None:
    """One set of contenders in fp32 over texts of more and more tokens, their number and the longest being the same."""
    names = [name for name in options.baselines or _forms() if "int8" not in name and not name.startswith("aoti")]
    entrants = [entrant for entrant in _entrants(setting, "embed-text", size, names) if entrant.dtype == "fp32"]
    count = 4 if options.quick else 32
    for mean in _MEANS[-2:] if options.quick else _MEANS:
        workload = EmbedText(setting.material, count, f"mixed-{mean}")
        known = len(setting.document.rows)
        _measure(setting, options, entrants, workload, x=float(sum(workload.lengths(range(count)))))
        for row in setting.document.rows[known:]:
            row.over = "tokens"


def _beside_library(row: Row, rows: Sequence[Row]) -> None:
    """Tell a session's row how it compares with the row of its library."""
    own = next((r for r in rows if (r.contender, r.dtype) == (ALONE.get(row.contender), row.dtype)), None)
    if own is not None and own.seconds and row.seconds:
        row.against = [compared(own.contender, own.dtype, row.dtype, own.seconds, row.seconds)]


def added_to(path: Path, document: Document) -> Document:
    """A document with those rows of an earlier one, in a file that may not be there, that it has not measured anew.

    Raises:
        DataError: the file is of another benchmark, processor or number of threads, or cannot be read.
    """
    if not path.exists():
        return document
    earlier = load(path)
    for what, find in {
        "benchmark": lambda d: d.benchmark,
        "processor": lambda d: d.machine.get("cpu"),
        "number of threads": lambda d: d.machine.get("threads"),
        "model": lambda d: d.model and (d.model.preset, d.model.origin),
    }.items():
        if find(earlier) != find(document):
            raise DataError(f"{path} is of another {what} ({find(earlier)}, now {find(document)}); name another file")
    anew = {(row.work, row.over) for row in document.rows}
    kept = [row for row in earlier.rows if (row.work, row.over) not in anew]
    return document.model_copy(update={"rows": [*kept, *document.rows]})
