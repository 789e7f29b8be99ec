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
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from xfm_fast.errors import DataError

from ..record import OURS, Document, Result
from ..timing import ratio_interval
from .tables import Column, build, plain, print_line, print_table, span, work

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
    before, after = ({row.key: row for row in document.rows} for document in (a, b))
    if not before.keys() & after.keys():
        raise DataError(
            "no row of A is in B: they measured other work, sizes or types; repeat one with the options of the other"
        )
    pairs = {key: (one, after[key]) for key, one in before.items() if key in after}
    ratios: dict[tuple[str, ...], float | None] = {}
    for key, (one, other) in pairs.items():
        had, has = one.number("max_qps"), other.number("max_qps")
        if one.median_s and other.median_s:
            ratios[key] = one.median_s / other.median_s
        else:
            ratios[key] = has / had if had and has else None
    tested = [key for key, (one, other) in pairs.items() if not _untested(one, other)]
    from scipy import stats  # a second of loading, see `measure.bootstrap`

    tests = (stats.mannwhitneyu(before[key].seconds, after[key].seconds).pvalue for key in tested)
    adjusted = dict(
        zip(tested, stats.false_discovery_control(list(tests)) if tested else [], strict=True)
    )
    changes = []
    for key in dict.fromkeys([*before, *after]):
        one, other = before.get(key), after.get(key)
        had, has = (row is not None and row.measured for row in (one, other))
        row = other or one
        assert row is not None
        if had != has:
            gone = (
                f"B: {other.status}. {other.reason or ''}".strip()
                if other is not None
                else "not in B"
            )
            reason = gone if had else ""
            changes.append(
                Change(row.name, row.backend, row.dtype, "lost" if had else "new", reason=reason)
            )
        elif one is not None and other is not None and has:
            change = Change(
                work(row, unit=False), row.backend, row.dtype, "not tested", ratios[key]
            )
            # The samples are of different runs.
            change.low, change.high = ratio_interval(one.seconds, other.seconds, paired=False)
            if key in adjusted:
                change.p = float(adjusted[key])
                change.verdict = "no difference"
                if (
                    change.p < SIGNIFICANCE
                    and max(ratio := ratios[key] or 1, 1 / ratio) - 1 > SMALLEST_EFFECT
                ):
                    change.verdict = "faster" if ratio > 1 else "slower"
            else:
                change.verdict = _untested(one, other) or "not tested"
            reference = b.reference_row(other)
            if reference is not None and reference is not other:
                change.control = ratios.get(reference.key)
            if one.seconds or other.seconds:
                change.samples = f"{len(one.seconds)} + {len(other.seconds)}"
            changes.append(change)
    return Changes(changes, _flags(a, b))


def _untested(one: Result, other: Result) -> Verdict | None:
    """Why the samples of a row are not tested; None if they are."""
    m, n = len(one.seconds), len(other.seconds)
    if one.contended or other.contended:
        return "contended"
    if not m or not n:
        return "not tested"
    # Could any outcome be significant? The smallest two-sided p-value is 2 over the number of orders.
    return None if 2 / math.comb(m + n, m) < SIGNIFICANCE else "too few samples"


def _flags(a: Document, b: Document) -> list[str]:
    names = {"processor": "cpu", "threads": "threads", "cores": "cores_allowed", "GPUs": "gpus"}

    def facts(machine: dict[str, Any]) -> dict[str, Any]:
        found = {f"machine: {name}": machine.get(key) for name, key in names.items()}
        found |= {f"{key}:": machine.get(key) for key in ("torch", "python", "xfm_fast", "commit")}
        return found | {
            f"{package}:": version for package, version in machine.get("versions", {}).items()
        }

    one, other = facts(a.machine), facts(b.machine)
    flags = [
        f"other {name} {plain(one.get(name)) or 'none'} and {plain(other.get(name)) or 'none'}"
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]
    for name, document in (("A", a), ("B", b)):
        if document.machine.get("dirty"):
            flags.append(f"{name} was measured on a changed checkout")
        if document.interrupted:
            flags.append(f"{name} was interrupted: its last rows are partial or missing")
    return flags


def print_changes(found: Changes, console: Console) -> None:
    """Print every row, other differences, the rule, and a count of the verdicts of xfm-fast."""

    def times(ratio: float | None) -> str:
        return "" if ratio is None else f"{ratio:.2f}×"

    def chance(change: Change) -> str:
        return "" if change.p is None else f"{change.p:.3f}" if change.p >= 0.001 else "<0.001"

    columns = [
        Column("work", lambda change: change.name, number=False),
        Column("backend", lambda change: change.backend, number=False),
        Column("dtype", lambda change: change.dtype, number=False),
        Column("B is", lambda change: times(change.ratio)),
        Column("verdict", lambda change: change.verdict, number=False),
        Column("95% interval", span),
        Column("p", chance),
        Column("samples", lambda change: change.samples, detail=True),
        Column("reference", lambda change: times(change.control)),
        Column("beyond it", lambda change: times(change.relative), detail=True),
    ]
    print_table(build("", found.changes, columns), console)
    for change in found.changes:
        if change.reason:
            print_line(f"{change.name}, {change.dtype}: {change.reason}", "red", console)
    for flag in found.flags:
        print_line(flag, "yellow", console)
    rule = (
        f"B is: times as fast as A. faster, slower: Mann-Whitney U, p below {SIGNIFICANCE:g} after Benjamini-Hochberg, "
        f"and medians more than {SMALLEST_EFFECT:.0%} apart. reference: the same ratio of the official algorithm, the "
        "untouched model or the eager operation"
    )
    print_line(rule, "dim", console)
    verdicts = [change.verdict for change in found.changes if change.backend == OURS]
    counts = ", ".join(
        f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)
    )
    print_line(f"{OURS}: {counts or 'no row in both'}", "bold", console)
