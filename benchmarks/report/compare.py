"""Two results documents compared row by row: the speed-up of the second, and whether it is more than chance.

Samples of the same backend at the same work are compared by a two-sided Mann-Whitney U test, which assumes no
distribution. Its p-values over all rows are adjusted by Benjamini and Hochberg, so that at most 5% of the reported
differences are expected to be chance. A row is *faster* or *slower* if the adjusted p-value is below 0.05 and the
medians differ by more than 2%. Rows with too few samples for any significant outcome, contended rows, and rates under
a latency bound (the outcome of one search) are never called faster or slower.

Two runs may differ because the machine does: the ratio of the reference, measured in both, is given too.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from xfm_fast.errors import DataError

from ..record import OURS, Document, Result
from ..timing import ratio_interval
from .tables import Column, build, plain, print_line, print_table, span, text_column, work

SIGNIFICANCE = 0.05
SMALLEST_EFFECT = 0.02

Verdict = Literal[
    "faster", "slower", "no difference", "too few samples", "not tested", "contended", "lost", "new"
]


@dataclass
class Change:
    """One row of A and B: `ratio` is how many times as fast B is, with its interval of 95% and adjusted p-value.

    `control` is the ratio of the reference at the same work. A row is `lost` if only A has numbers, `new` if only B.
    """

    name: str
    backend: str
    dtype: str
    verdict: Verdict
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    control: float | None = None
    samples: str = ""
    reason: str = ""

    @property
    def relative(self) -> float | None:
        """The ratio over that of the reference, which removes the change of the machine itself."""
        return None if self.ratio is None or not self.control else self.ratio / self.control


@dataclass(frozen=True)
class Changes:
    """Two documents compared; `flags` are other differences between them, in words."""

    changes: list[Change]
    flags: list[str]

    @property
    def worse(self) -> list[Change]:
        """Rows of xfm-fast that became slower or lost their numbers."""
        return [c for c in self.changes if c.backend == OURS and c.verdict in ("slower", "lost")]


def compare(a: Document, b: Document) -> Changes:
    """Compare two documents; raises `DataError` if they are of different benchmarks or share no row."""
    if a.benchmark != b.benchmark:
        raise DataError(
            f"A is a document of {a.benchmark} and B of {b.benchmark}; compare two of the same benchmark"
        )
    before = {row.key: row for row in a.rows}
    after = {row.key: row for row in b.rows}
    shared = [key for key in before if key in after]
    if not shared:
        raise DataError(
            "no row of A is in B: they measured other work, sizes or types; repeat one with the options of the other"
        )
    ratios = {key: _ratio(before[key], after[key]) for key in shared}
    p_values = _p_values({key: (before[key], after[key]) for key in shared})
    changes = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        old_measured, new_measured = (row is not None and row.measured for row in (old, new))
        row = new or old
        assert row is not None
        if old_measured and not new_measured:
            reason = "not in B" if new is None else f"B: {new.status}. {new.reason or ''}".strip()
            changes.append(Change(row.name, row.backend, row.dtype, "lost", reason=reason))
        elif new_measured and not old_measured:
            changes.append(Change(row.name, row.backend, row.dtype, "new"))
        elif old is not None and new is not None and new_measured:
            change = _change(old, new, ratios[key], p_values.get(key))
            reference = b.reference_row(new)
            if reference is not None and reference is not new:
                change.control = ratios.get(reference.key)
            changes.append(change)
    return Changes(changes, _flags(a, b))


def _ratio(old: Result, new: Result) -> float | None:
    """Return how many times as fast a row became."""
    if old.median_s and new.median_s:
        return old.median_s / new.median_s
    old_rate, new_rate = old.number("max_qps"), new.number("max_qps")
    return new_rate / old_rate if old_rate and new_rate else None


def _p_values(
    pairs: dict[tuple[str, ...], tuple[Result, Result]],
) -> dict[tuple[str, ...], float]:
    """Return the adjusted p-values of the pairs that can be tested."""
    tested = {key: pair for key, pair in pairs.items() if not _untested(*pair)}
    if not tested:
        return {}
    # Imported here, since SciPy takes a second to load.
    from scipy import stats

    values = [stats.mannwhitneyu(old.seconds, new.seconds).pvalue for old, new in tested.values()]
    adjusted = stats.false_discovery_control(values)
    return {key: float(value) for key, value in zip(tested, adjusted, strict=True)}


def _change(old: Result, new: Result, ratio: float | None, p: float | None) -> Change:
    """Return the change of a row that both documents measured."""
    change = Change(work(new, unit=False), new.backend, new.dtype, "no difference", ratio, p=p)
    # The samples are of different runs.
    change.low, change.high = ratio_interval(old.seconds, new.seconds, paired=False)
    if old.seconds or new.seconds:
        change.samples = f"{len(old.seconds)} + {len(new.seconds)}"
    if p is None:
        change.verdict = _untested(old, new) or "not tested"
    elif p < SIGNIFICANCE and ratio is not None and max(ratio, 1 / ratio) - 1 > SMALLEST_EFFECT:
        change.verdict = "faster" if ratio > 1 else "slower"
    return change


def _untested(old: Result, new: Result) -> Verdict | None:
    """Return why the samples of a row are not tested, or None."""
    m, n = len(old.seconds), len(new.seconds)
    if old.contended or new.contended:
        return "contended"
    if not m or not n:
        return "not tested"
    # The smallest two-sided p-value is 2 over the number of orders: can any outcome be significant?
    return None if 2 / math.comb(m + n, m) < SIGNIFICANCE else "too few samples"


def _flags(a: Document, b: Document) -> list[str]:
    """Return differences of machine, versions and circumstances, in words."""
    old, new = _facts(a.machine), _facts(b.machine)
    flags = [
        f"other {name} {plain(old.get(name)) or 'none'} and {plain(new.get(name)) or 'none'}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
    for name, document in (("A", a), ("B", b)):
        if document.machine.get("dirty"):
            flags.append(f"{name} was measured on a changed checkout")
        if document.interrupted:
            flags.append(f"{name} was interrupted: its last rows are partial or missing")
    return flags


def _facts(machine: dict[str, Any]) -> dict[str, Any]:
    names = {"processor": "cpu", "threads": "threads", "cores": "cores_allowed", "GPUs": "gpus"}
    facts = {f"machine: {name}": machine.get(key) for name, key in names.items()}
    for key in ("torch", "python", "xfm_fast", "commit"):
        facts[f"{key}:"] = machine.get(key)
    for package, version in machine.get("versions", {}).items():
        facts[f"{package}:"] = version
    return facts


def print_changes(changes: Changes, console: Console) -> None:
    """Print every row, other differences, the rule, and a count of the verdicts of xfm-fast."""

    def times(ratio: float | None) -> str:
        return "" if ratio is None else f"{ratio:.2f}×"

    def p_value(change: Change) -> str:
        if change.p is None:
            return ""
        return f"{change.p:.3f}" if change.p >= 0.001 else "<0.001"

    columns = [
        text_column("work", lambda change: change.name),
        text_column("backend", lambda change: change.backend),
        text_column("dtype", lambda change: change.dtype),
        Column("B is", lambda change: times(change.ratio)),
        text_column("verdict", lambda change: change.verdict),
        Column("95% interval", span),
        Column("p", p_value),
        Column("samples", lambda change: change.samples, detail=True),
        Column("reference", lambda change: times(change.control)),
        Column("beyond it", lambda change: times(change.relative), detail=True),
    ]
    print_table(build("", changes.changes, columns), console)
    for change in changes.changes:
        if change.reason:
            print_line(f"{change.name}, {change.dtype}: {change.reason}", "red", console)
    for flag in changes.flags:
        print_line(flag, "yellow", console)
    rule = (
        f"B is: times as fast as A. faster, slower: Mann-Whitney U, p below {SIGNIFICANCE:g} after Benjamini-Hochberg, "
        f"and medians more than {SMALLEST_EFFECT:.0%} apart. reference: the same ratio of the official algorithm, the "
        "untouched model or the eager operation"
    )
    print_line(rule, "dim", console)
    verdicts = Counter(change.verdict for change in changes.changes if change.backend == OURS)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    print_line(f"{OURS}: {counts or 'no row in both'}", "bold", console)
