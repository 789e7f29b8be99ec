"""Results as tables: rows to columns, units beside the work. Terminal, Markdown and page show the same ones.

Speed is told in one unit for each kind of work, so that numbers in a column compare: items a second of batches, ms of
single requests and operations, requests a second under a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from xfm_fast.errors import DataError

from ..record import OURS, UNTOUCHED, Coco, Comparison, Document, Row, Share


@dataclass(frozen=True)
class Column:
    """One column: its head, what it says of a row, and where it is shown.

    Attributes:
        number: right-aligned, never broken.
        detail: shown where there is room: on the page, and in a wide terminal.
    """

    head: str
    cell: Callable[[Any], str]
    number: bool = True
    detail: bool = False


@dataclass(frozen=True)
class Table:
    """Lines of text under columns.

    Attributes:
        about: how to read it.
        detail: the page and the terminal show it, Markdown does not.
        weak: places of lines that are of baselines and not of xfm-fast.
    """

    title: str
    columns: list[Column]
    lines: list[list[str]]
    about: str = ""
    detail: bool = False
    weak: frozenset[int] = frozenset()


def build(
    title: str, rows: Iterable[Any], columns: Iterable[Column], about: str = "", *, detail: bool = False
) -> Table:
    """A table of rows; columns that say nothing of any row are left out."""
    rows = list(rows)
    filled = [(column, cells) for column in columns if any(cells := [column.cell(row) for row in rows])]
    lines = [list(line) for line in zip(*(cells for _, cells in filled), strict=True)]
    weak = frozenset(place for place, row in enumerate(rows) if isinstance(row, Row) and not row.ours)
    return Table(title, [column for column, _ in filled], lines, about, detail, weak)


def tables(document: Document) -> list[Table]:
    """Every table of a document, the most important first; without empty ones.

    In that of all rows one line is a contender at its work; a baseline that is alone stands beside xfm-fast.
    """
    rows = document.measured
    alone = {row.contender for row in rows if not row.ours} == {document.reference}
    about = "† something else ran on the machine meanwhile. * interrupted."
    about += " Errors are the largest difference from the reference, over its largest value."
    size = f" ({document.model.preset} size)" if document.model else ""
    columns = [Column(f"work{size}", work, number=False), *(_beside if alone else _among)(document), *_MEASURES]
    skipped = document.data.skipped if document.data else []
    reasons = [
        Column("skipped", lambda skip: skip.what, number=False),
        Column("reason", lambda skip: skip.reason, number=False),
    ]
    found = [
        build("All rows", [row for row in rows if row.ours or not alone], columns, about),
        *_evaluation(document.coco), *_shares(rows), _missing(document),
        build(f"Skipped ({len(skipped)})", skipped, reasons, "Data that could not be used.", detail=True),
    ]  # fmt: skip
    return [table for table in found if table.lines]


def seconds(value: float) -> str:
    """A time with the unit that suits it."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def duration(value: float) -> str:
    """A time that may be days."""
    if value >= 2 * 86400:
        return f"{value / 86400:.1f} days"
    return f"{value / 3600:.1f} h" if value >= 2 * 3600 else f"{value / 60:.0f} min" if value >= 120 else seconds(value)


def number(value: float) -> str:
    """Three digits, with separators instead of an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def si(value: float, unit: str = "") -> str:
    """A number with its SI prefix: `si(3e9, "FLOP/s")` is `3 GFLOP/s`."""
    sizes = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: "", 1e-3: "m", 1e-6: "µ"}
    size = next((size for size in sizes if abs(value) >= size * 0.9995), 1)
    return f"{value / size:.3g} {sizes[size]}{unit}".strip()


def times(ratio: float) -> str:
    """A factor; near 1 with two digits, because there they decide."""
    return f"{ratio:.2f}×" if ratio < 2 else f"{ratio:.1f}×"


def span(low: float | None, high: float | None) -> str:
    """An interval of factors; nothing where there is none."""
    return "" if low is None or high is None else f"{low:.2f} to {high:.2f}"


def speed(row: Row) -> tuple[float, str, bool]:
    """The number that a row is measured for, its unit, and whether more is better."""
    if row.server is not None:
        return row.server.max_qps, "requests/s", True
    if row.latency is not None:
        return row.latency.p50.value * 1e3, "ms", False
    if row.throughput is not None and row.direction is None:
        return row.throughput.value, f"{row.unit}/s", True
    return (row.median_s or 0.0) * 1e3, "ms", False


def pace(row: Row) -> float:
    """Speed as a number of which more is better."""
    value, _, more = speed(row)
    return value if more else 1 / value if value else 0.0


def marks(row: Row) -> str:
    """The signs behind a number: † something else ran on the machine, * interrupted."""
    return ("†" if row.contended else "") + ("*" if row.status == "partial" else "")


def work(row: Row) -> str:
    """The work of a row, with the unit that its speed is told in."""
    how = [row.direction] if row.direction else [row.mode] if row.mode != "offline" else []
    return ", ".join([row.name, *how, *([speed(row)[1]] if row.measured else [])])


def _speed(row: Row) -> str:
    return f"{number(speed(row)[0])} {marks(row)}".rstrip()


def _of(part: str, say: Callable[[Any], str | None]) -> Callable[[Row], str]:
    """A cell that says something of one part of a row, and nothing where the row has none."""

    def cell(row: Row) -> str:
        found = getattr(row, part)
        return "" if found is None else say(found) or ""

    return cell


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _floor(row: Row) -> str:
    """The time of a run whose arithmetic is all done at the rate of matrix products that was seen beside it."""
    share = None if row.efficiency is None else row.efficiency.mfu
    return "" if share is None or row.median_s is None else seconds(row.median_s * share)


# Everything that is told of a contender at its work beyond how fast it is.
_MEASURES = [
    Column("error", _of("parity", lambda p: "not finite" if p.error is None else f"{p.error:.0e}")),
    Column("of matrix rate", _of("efficiency", lambda e: _percent(e.mfu))),
    Column("floor of a run", lambda row: _floor(row), detail=True),
    Column("of the floor", _of("efficiency", lambda e: _percent(e.share_of_floor))),
    Column("peak GB", _of("memory", lambda m: f"{m.peak_bytes / 1e9:.2f}"), detail=True),
    Column("grown GB", _of("memory", lambda m: f"{m.grown_bytes / 1e9:.2f}"), detail=True),
    Column("tokens/s", _of("tokens", lambda t: f"{t.useful_per_s:,.0f}"), detail=True),
    Column("with padding", _of("tokens", lambda t: f"{t.padded_per_s:,.0f}"), detail=True),
    Column("TFLOP/s", lambda row: f"{row.flops_per_s / 1e12:.3g}" if row.flops_per_s else "", detail=True),
    Column(
        "GB/s", lambda row: f"{row.bytes_per_s / 1e9:.3g}" if row.direction and row.bytes_per_s else "", detail=True
    ),
    Column("of the roof", _of("efficiency", lambda e: _percent(e.share_of_roof)), detail=True),
    Column("of data sheet", _of("efficiency", lambda e: _percent(e.mfu_data_sheet)), detail=True),
    Column("error allowed", _of("parity", lambda p: f"{p.band:.0e}" if p.band is not None else ""), detail=True),
    Column("p50 ms of clients", _of("clients", lambda c: number(c.p50.value * 1e3))),
    Column("p99 ms of clients", _of("clients", lambda c: number(c.p99.value * 1e3))),
    Column("CPU ms of a request", _of("clients", lambda c: number(c.cpu_s.value * 1e3) if c.cpu_s else "")),
    Column("samples", lambda row: str(len(row.samples) or ""), detail=True),
    Column(
        "build / load / first call",
        _of("cost", lambda c: " / ".join(seconds(v) if v else "0" for v in (c.build_s, c.load_s, c.first_call_s))),
        detail=True,
    ),
    Column("J/item", _of("energy", lambda e: f"{e.joules_per_item:.3g}"), detail=True),
]


def _beside(document: Document) -> list[Column]:
    """Columns of documents of two contenders."""
    reference = next((row.label for row in document.rows if row.contender == document.reference), "")

    def other(row: Row, dtype: str) -> str:
        found = document.beside(row, document.reference, dtype)
        return _speed(found) if found is not None and found.measured else ""

    def over_fp32(row: Row) -> str:
        found = document.headline(row)
        # Without the reference in fp32 the headline is like for like, and stands there.
        return "" if found is None or found.dtype != "fp32" else f"{times(found.ratio)} {marks(row)}".rstrip()

    def interval(row: Row) -> str:
        found = document.headline(row)
        return "" if found is None else span(found.low, found.high)

    def like(row: Row) -> str:
        found = document.like_for_like(row)
        return "" if found is None else times(found.ratio)

    def peak(row: Row) -> str:
        found = document.reference_row(row)
        return "" if found is None or found.memory is None else f"{found.memory.peak_bytes / 1e9:.2f}"

    name = reference.split(",")[0]
    in_fp32 = any(row.contender == document.reference and row.dtype == "fp32" for row in document.measured)
    ours = next((row.label for row in document.rows if row.ours), OURS)
    return [
        Column("dtype", lambda row: row.dtype, number=False),
        Column(ours, _speed),
        Column(f"{name} fp32", lambda row: other(row, "fp32")),
        Column("over fp32", over_fp32),
        Column(f"{name}, same dtype", lambda row: other(row, row.dtype) if row.dtype != "fp32" else "", detail=in_fp32),
        Column("like for like", like),
        Column("95% interval", interval, detail=True),
        Column(f"{name} peak GB", peak, detail=True),
    ]


def _among(document: Document) -> list[Column]:
    """Columns of documents of several contenders: how many times as fast xfm-fast is, in each of its types."""

    def compared(row: Row, dtype: str) -> Comparison | None:
        ours = document.beside(row, OURS, dtype)
        found = (c for c in (ours.against if ours else []) if (c.contender, c.dtype) == (row.contender, row.dtype))
        return None if row.ours else next(found, None)

    def ratio(dtype: str) -> Callable[[Row], str]:
        return lambda row: times(found.ratio) if (found := compared(row, dtype)) else ""

    def interval(dtype: str) -> Callable[[Row], str]:
        return lambda row: span(found.low, found.high) if (found := compared(row, dtype)) else ""

    def quantile(name: str) -> Callable[[Row], str]:
        return _of("latency", lambda latency: number(getattr(latency, name).value * 1e3))

    def alone(row: Row) -> Comparison | None:
        return None if row.ours else next(iter(row.against), None)

    dtypes = dict.fromkeys(row.dtype for row in document.measured if row.ours)
    return [
        Column("contender", lambda row: row.label, number=False),
        Column("dtype", lambda row: row.dtype, number=False),
        Column("speed", _speed),
        # The speed of single requests is their p50.
        Column("p50 ms", lambda row: quantile("p50")(row) if row.server else "", detail=True),
        Column("p90 ms", quantile("p90"), detail=True),
        Column("p99 ms", quantile("p99")),
        Column("over the library", lambda row: times(found.ratio) if (found := alone(row)) else ""),
        Column("95% interval, library", lambda row: span(f.low, f.high) if (f := alone(row)) else "", detail=True),
        *(Column(f"{OURS} {dtype} is", ratio(dtype)) for dtype in dtypes),
        *(Column(f"95% interval, {dtype}", interval(dtype), detail=True) for dtype in dtypes),
    ]


def _evaluation(coco: Coco | None) -> list[Table]:
    if coco is None:
        return []
    stages = dict.fromkeys(name for run in coco.evaluations for name in run.seconds)
    runs = [
        Column("procedure", lambda run: run.procedure, number=False),
        Column("dtype", lambda run: run.dtype, number=False),
        Column("kind", lambda run: run.kind, number=False),
        Column("pairs", lambda run: f"{run.pairs:,}"),
        Column("arithmetic", lambda run: si(run.flops, "FLOP")),
        Column("rate", lambda run: si(run.flops_per_s, "FLOP/s"), detail=True),
        Column("time", lambda run: duration(run.total_s.value)),
        *(
            Column(name, lambda run, name=name: duration(run.seconds[name]) if name in run.seconds else "", detail=True)
            for name in stages
        ),
    ]
    receipt = [
        Column("why it costs less", lambda step: step.saving, number=False),
        Column("arithmetic left", lambda step: si(step.flops, "FLOP")),
        Column("factor", lambda step: times(step.factor)),
    ]
    interval = span(coco.speed_up.low, coco.speed_up.high)
    about = (
        f"{coco.images:,} images of {coco.image_size} px, {coco.texts:,} texts of {coco.mean_length:.1f} tokens on "
        f"average, k = {coco.k}: {coco.origin}. {times(coco.speed_up.value)} as fast"
        f"{f' (95% interval {interval})' if interval else ''}. {coco.note}"
    )
    return [
        build("Whole evaluation", coco.evaluations, runs, about.strip()),
        build("Receipt", coco.receipt, receipt, detail=True),
    ]


def _shares(rows: list[Row]) -> list[Table]:
    """Shares of one run's time: by stage of the procedure and by kind of operation, each part a column."""
    found = []
    for part, title in (("stages", "by stage"), ("operations", "by kind of operation")):
        split = [row for row in rows if getattr(row, part) and row.x is None]

        def share(row: Row, name: str, part: str = part) -> str:
            parts: list[Share] = getattr(row, part)
            return next((f"{one.share:.0%}" for one in parts if one.name == name), "")

        names = dict.fromkeys(one.name for row in split for one in getattr(row, part))
        columns = [
            Column("work", lambda row: work(row).rpartition(", ")[0], number=False),
            Column("contender", lambda row: row.title, number=False),
            *(Column(name, lambda row, name=name: share(row, name)) for name in names),
        ]
        found.append(build(f"Where the time goes, {title}", split, columns, "Shares of one run's time.", detail=True))
    return found


def _missing(document: Document) -> Table:
    """Rows without numbers, and interrupted ones, each with its reason."""
    rows = [
        (work(row), row.title, row.status, row.reason or "") for row in document.rows if not row.measured or row.reason
    ]
    # A type that the processor lacks is said once, not at every row.
    lacking = {(title, reason) for _, title, status, reason in rows if status == "not offered"}
    rows = [row for row in rows if row[2] != "not offered"]
    rows += [("all", title, "not offered", reason) for title, reason in sorted(lacking)]
    heads = ("work", "contender", "status", "reason")
    columns = [Column(head, lambda row, place=place: row[place], number=False) for place, head in enumerate(heads)]
    return build("Not measured", rows, columns, "Rows without numbers, and why.", detail=True)


def cells(table: Table, columns: Sequence[int]) -> list[list[str]]:
    """The lines of a table with some of its columns."""
    return [[line[place] for place in columns] for line in table.lines]


def markdown(document: Document) -> str:
    """The main tables of a document for a README or an issue; ends with a line break."""
    drawn = []
    for table in tables(document):
        if table.detail:
            continue
        places = [place for place, column in enumerate(table.columns) if not column.detail]
        head, *lines = [[table.columns[place].head for place in places], *cells(table, places)]
        rule = "".join("---:|" if table.columns[place].number else "---|" for place in places)
        rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (head, *lines)]
        drawn.append("\n".join([rows[0], f"|{rule}", *rows[1:]]) + "\n")
    return "\n".join(drawn)


def gains(*documents: Document) -> str:
    """A Markdown table of `drop-in`: each model's gain over the untouched model in the same dtype.

    One document has a column per dtype; several have one each, in fp32.

    Raises:
        DataError: a document is not of `drop-in`.
    """
    found: dict[str, dict[str, str]] = {}
    for document in documents:
        for row in _drop_in_rows(document):
            # No model runs in int8 untouched.
            if row.dtype == "int8" or (len(documents) > 1 and row.dtype != "fp32"):
                continue
            like = document.like_for_like(row) if row.measured else None
            column = row.dtype if len(documents) == 1 else f"{processor(document)}, {document.date[:10]}"
            found.setdefault(row.name.split(", ")[0], {})[column] = "" if like is None else times(like.ratio)
    columns = list(dict.fromkeys(column for gained in found.values() for column in gained))
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(gained.get(c, "") for c in columns) + " |" for name, gained in found.items()]
    return "\n".join(lines) + "\n"


def processor(document: Document) -> str:
    """The processor with what tells its generation."""
    flags = document.machine.get("cpu_flags", ())
    name = document.machine["cpu"].replace("(R)", "").removesuffix(" Processor")
    if "AMD" in name and "avx512f" in flags:
        return f"{name} ({'Zen 5' if 'avx512_vp2intersect' in flags else 'Zen 4'})"
    return f"{name} (AMX)" if "amx_tile" in flags else name


def int8_gains(document: Document) -> str:
    """A Markdown table of `drop-in`: int8 against the untouched model in fp32, with the cosine of the outputs.

    Raises:
        DataError: the document is not of `drop-in`.
    """
    lines = ["| model | int8 against untouched fp32 | cosine |", "|---|---:|---:|"]
    for row in _drop_in_rows(document):
        against = next((c for c in row.against if (c.contender, c.dtype) == (UNTOUCHED, "fp32")), None)
        if row.dtype == "int8" and against is not None and row.parity is not None:
            cosine = "" if row.parity.cosine is None else f"{row.parity.cosine:.4f}"
            lines.append(f"| {row.name.split(', ')[0]} | {times(against.ratio)} | {cosine} |")
    return "\n".join(lines) + "\n"


def _drop_in_rows(document: Document) -> list[Row]:
    if document.benchmark != "drop-in":
        raise DataError(f"gains are of bench drop-in, and these are results of {document.benchmark}")
    return [row for row in document.rows if row.ours]


def contenders(document: Document) -> str:
    """A line of Markdown a work and type, with a column for each contender; behind a session how many times as fast as
    its library it is.
    """
    rows = document.measured
    labels = list(dict.fromkeys(row.label for row in rows))
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        over = next(iter(row.against), None)
        ratio = "" if row.ours or over is None else f" ({times(over.ratio)})"
        found.setdefault((work(row), row.dtype), {})[row.label] = f"{_speed(row)}{ratio}"
    lines = ["| work | dtype | " + " | ".join(labels) + " |", "|---|---|" + "---:|" * len(labels)]
    lines += [
        f"| {name} | {dtype} | " + " | ".join(said.get(label, "") for label in labels) + " |"
        for (name, dtype), said in found.items()
    ]
    return "\n".join(lines) + "\n"
