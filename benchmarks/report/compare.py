"""Two results documents, row by row: how many times as fast the second is, and whether that is more than chance.

The rule. Times of the same contender at the same work are compared by a two-sided Mann-Whitney U test, which asks for
no distribution. Its p-values over all rows are adjusted by Benjamini and Hochberg, so that at most 5% of the reported
differences are expected to be chance. A row is *faster* or *slower* when the adjusted p-value is below 0.05 and the
medians differ by more than 2%. Where so few samples were taken that no outcome could be significant, the row says
*too few samples*; where the machine was disturbed, *contended*; a rate under a bound (Server) is the outcome of one
search and *not tested*. None of these is ever called faster or slower.

Samples of one run share its circumstances. Two runs may differ because the machine does: that is why the ratio of the
reference, measured beside xfm-fast in both, is given too.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, Literal

from xfm_fast.errors import DataError

from ..measure import ratio_interval
from ..record import OURS, Document, Result
from .table import Column, Table, build, span, work

SIGNIFICANCE = 0.05
SMALLEST_EFFECT = 0.02

Verdict = Literal["faster", "slower", "no difference", "too few samples", "not tested", "contended", "lost", "new"]


@dataclass(frozen=True)
class Change:
    """One row in both documents, A and B.

    Attributes:
        ratio: how many times as fast B is: median time of A over that of B, or requests a second of B over A's.
        low, high: bootstrap interval of 95% of the ratio; None without samples.
        p: adjusted p-value; None where no test was made.
        control: ratio of the reference at the same work, if both documents have it.
        verdict: `lost` where only A has numbers, `new` where only B has.
        reason: why there are no numbers.
    """

    key: tuple[str, ...]
    name: str
    contender: str
    dtype: str
    verdict: Verdict
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    control: float | None = None
    samples: tuple[int, int] = (0, 0)
    reason: str = ""

    @property
    def relative(self) -> float | None:
        """The ratio over that of the reference: what is left when the machine's own change is taken out."""
        return None if self.ratio is None or not self.control else self.ratio / self.control


@dataclass(frozen=True)
class Changes:
    """Two documents compared.

    Attributes:
        flags: what else differs between them, in words.
    """

    benchmark: str
    changes: list[Change]
    flags: list[str]

    @property
    def worse(self) -> list[Change]:
        """Rows of xfm-fast that became slower or lost their numbers."""
        return [c for c in self.changes if c.contender == OURS and c.verdict in ("slower", "lost")]

    @property
    def rule(self) -> str:
        """How to read the table."""
        return (
            "B is: times as fast as A. faster, slower: Mann-Whitney U, p below "
            f"{SIGNIFICANCE:g} after Benjamini-Hochberg, and medians more than {SMALLEST_EFFECT:.0%} apart. reference: "
            "the same ratio of the official algorithm, the untouched model or the eager operation"
        )

    @property
    def summary(self) -> str:
        """How many rows of xfm-fast came to which verdict."""
        ours = [change.verdict for change in self.changes if change.contender == OURS]
        counts = ", ".join(f"{ours.count(verdict)} {verdict}" for verdict in dict.fromkeys(ours))
        return f"{OURS}: {counts or 'no row in both'}"

    def table(self) -> Table:
        """Every row; those of baselines are the machine's own change."""

        def times(ratio: float | None) -> str:
            return "" if ratio is None else f"{ratio:.2f}×"

        def chance(change: Change) -> str:
            return "" if change.p is None else f"{change.p:.3f}" if change.p >= 0.001 else "<0.001"

        columns = [
            Column("work", lambda change: change.name, number=False),
            Column("contender", lambda change: change.contender, number=False),
            Column("dtype", lambda change: change.dtype, number=False),
            Column("B is", lambda change: times(change.ratio)),
            Column("verdict", lambda change: change.verdict, number=False),
            Column("95% interval", lambda change: span(change.low, change.high)),
            Column("p", chance),
            Column("samples", lambda c: f"{c.samples[0]} + {c.samples[1]}" if any(c.samples) else "", detail=True),
            Column("reference", lambda change: times(change.control)),
            Column("beyond it", lambda change: times(change.relative), detail=True),
        ]
        return build("", self.changes, columns)


def compare(a: Document, b: Document) -> Changes:
    """Compare two documents of the same benchmark.

    Raises:
        DataError: they are of different benchmarks, or no row is in both.
    """
    if a.benchmark != b.benchmark:
        raise DataError(f"A is a document of {a.benchmark} and B of {b.benchmark}; compare two of the same benchmark")
    before, after = ({row.key: row for row in document.rows} for document in (a, b))
    if not before.keys() & after.keys():
        raise DataError(
            "no row of A is in B: they measured other work, sizes or types; repeat one with the options of the other"
        )
    ratios: dict[tuple[str, ...], float | None] = {}
    tested = []
    for key, one in before.items():
        if key not in after:
            continue
        ratios[key], other = None, after[key]
        m, n = len(one.seconds), len(other.seconds)
        if m and n:
            ratios[key] = statistics.median(one.seconds) / statistics.median(other.seconds)
            # Could any outcome be significant? The smallest two-sided p-value is 2 over the number of orders.
            if not one.contended and not other.contended and 2 / math.comb(m + n, m) < SIGNIFICANCE:
                tested.append(key)
        elif (had := one.number("max_qps")) and (has := other.number("max_qps")):
            ratios[key] = has / had
    from scipy import stats  # a second of loading, see `measure.bootstrap`

    tests = (stats.mannwhitneyu(before[key].seconds, after[key].seconds).pvalue for key in tested)
    adjusted = dict(zip(tested, stats.false_discovery_control(list(tests)) if tested else [], strict=True))
    changes = []
    for key in dict.fromkeys([*before, *after]):
        one, other = before.get(key), after.get(key)
        had, has = (row is not None and row.measured for row in (one, other))
        row = other or one
        if row is not None and had != has:
            gone = f"B: {other.status}. {other.reason or ''}".strip() if other is not None else "not in B"
            verdict = "lost" if had else "new"
            changes.append(Change(key, row.name, row.backend, row.dtype, verdict, reason=gone if had else ""))
        if one is None or other is None or not (had and has):
            continue
        ratio = ratios[key]
        # The samples are of different runs.
        low, high = ratio_interval(one.seconds, other.seconds, paired=False)
        p = float(adjusted[key]) if key in adjusted else None
        reference = b.reference_row(other)
        changes.append(
            Change(
                key,
                work(other).rpartition(", ")[0],
                other.backend,
                other.dtype,
                _verdict(one, other, ratio, p),
                ratio,
                low,
                high,
                p,
                ratios.get(reference.key) if reference is not None and reference is not other else None,
                (len(one.seconds), len(other.seconds)),
            )
        )
    return Changes(a.benchmark, changes, _flags(a, b))


def _verdict(one: Result, other: Result, ratio: float | None, p: float | None) -> Verdict:
    if one.contended or other.contended:
        return "contended"
    if not one.seconds or not other.seconds:
        return "not tested"
    if p is None or ratio is None:
        return "too few samples"
    if p >= SIGNIFICANCE or max(ratio, 1 / ratio) - 1 <= SMALLEST_EFFECT:
        return "no difference"
    return "faster" if ratio > 1 else "slower"


def _flags(a: Document, b: Document) -> list[str]:
    one, other = a.machine, b.machine
    names = {"processor": "cpu", "threads": "threads", "cores": "cores_allowed", "GPUs": "gpus"}
    pairs = [(f"machine: {name}", one.get(key), other.get(key)) for name, key in names.items()]
    pairs += [(f"{key}:", one.get(key), other.get(key)) for key in ("torch", "python", "xfm_fast", "commit")]
    versions = (one.get("versions", {}), other.get("versions", {}))
    packages = sorted({*versions[0], *versions[1]})
    pairs += [(f"{package}:", versions[0].get(package), versions[1].get(package)) for package in packages]
    found = [f"other {name} {_plain(was)} and {_plain(became)}" for name, was, became in pairs if was != became]
    for name, document in (("A", a), ("B", b)):
        if document.machine.get("dirty"):
            found.append(f"{name} was measured on a changed checkout")
        if document.interrupted:
            found.append(f"{name} was interrupted: its last rows are partial or missing")
    return found


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(one.get("name", one) if isinstance(one, dict) else one) for one in value) or "none"
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 40 else text
