"""Results as tables: rows to columns, units beside the work. Terminal, Markdown and page show the same ones.

Speed is told in one unit for each kind of work, so that numbers in a column compare: items a second of batches, ms of
single requests and operations, requests a second under a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from xfm_fast.errors import DataError

from ..measure import percentile
from ..record import OURS, UNTOUCHED, Comparison, Direction, Document, Result


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
    """A table of rows; empty columns are left out."""
    rows = list(rows)
    filled = [(column, cells) for column in columns if any(cells := [column.cell(row) for row in rows])]
    lines = [list(line) for line in zip(*(cells for _, cells in filled), strict=True)]
    weak = frozenset(place for place, row in enumerate(rows) if isinstance(row, Result) and not row.ours)
    return Table(title, [column for column, _ in filled], lines, about, detail, weak)


def tables(document: Document) -> list[Table]:
    """Every table of a document, the most important first; without empty ones.

    In that of all rows one line is a backend at its case; a single baseline stands beside xfm-fast.
    """
    rows = document.measured
    alone = {row.backend for row in rows if not row.ours} == {document.reference}
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
        _shares(rows, "stages", "Where the time goes, by stage"),
        _shares(rows, "operations", "Where the time goes, by kind of operation"),
        *(_receipt(row) for row in rows),
        _missing(document),
        build(f"Skipped ({len(skipped)})", skipped, reasons, "Data that could not be used.", detail=True),
    ]
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


def speed(row: Result) -> tuple[float, str, bool]:
    """The number that a row is measured for, its unit, and whether more is better."""
    capacity = row.number("max_qps")
    if capacity is not None:
        return capacity, "requests/s", True
    if row.unit == "evaluations":
        return (row.median_s or 0.0) / 3600, "h", False
    if row.mode == "single-stream" or row.mode in get_args(Direction):
        return (row.median_s or 0.0) * 1e3, "ms", False
    return row.rate or 0.0, f"{row.unit}/s", True


def pace(row: Result) -> float:
    """Speed as a number of which more is better."""
    value, _, more = speed(row)
    return value if more else 1 / value if value else 0.0


def marks(row: Result) -> str:
    """The signs behind a number: † something else ran on the machine, * interrupted."""
    return ("†" if row.contended else "") + ("*" if row.status == "partial" else "")


def work(row: Result) -> str:
    """The work of a row, with the unit of its speed."""
    how = [row.mode] if row.mode != "offline" else []
    return ", ".join([row.name, *how, *([speed(row)[1]] if row.measured else [])])


def _speed(row: Result) -> str:
    return f"{number(speed(row)[0])} {marks(row)}".rstrip()


def _cell(find: Callable[[Result], float | None], form: str | Callable[[float], str]) -> Callable[[Result], str]:
    """A cell with a number in a format; empty without the number."""

    def cell(row: Result) -> str:
        value = find(row)
        if value is None:
            return ""
        return form(value) if callable(form) else format(value, form)

    return cell


def _extra(name: str, form: str | Callable[[float], str], scale: float = 1.0) -> Callable[[Result], str]:
    return _cell(lambda row: None if (value := row.number(name)) is None else value * scale, form)


def _product(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value * other


def _error(row: Result) -> str:
    if row.parity is None:
        return ""
    return "not finite" if row.parity.error is None else f"{row.parity.error:.0e}"


def _cold_start(row: Result) -> str:
    values = [row.number(name) for name in ("build_s", "load_s", "first_call_s")]
    return " / ".join(seconds(value) if value else "0" for value in values) if any(values) else ""


def quantile(row: Result, share: float) -> float | None:
    """A percentile of the latency of requests, in seconds."""
    if row.mode == "single-stream" and row.seconds:
        return percentile(row.seconds, share)
    return row.number(f"p{share * 100:.0f}_s")


def _share_of_roof(row: Result) -> float | None:
    rate, roof = row.per_second("needed_flops"), row.number("roof")
    return rate / roof if rate and roof else None


# Everything about a backend at its case beyond its speed.
_MEASURES = [
    Column("error", _error),
    Column("of matrix rate", _extra("mfu", ".0%")),
    Column("floor of a run", _cell(lambda row: _product(row.median_s, row.number("mfu")), seconds), detail=True),
    Column("of the floor", _extra("share_of_floor", ".0%")),
    Column("peak GB", _extra("peak_bytes", ".2f", 1e-9), detail=True),
    Column("grown GB", _extra("grown_bytes", ".2f", 1e-9), detail=True),
    Column("tokens/s", _cell(lambda row: row.per_second("tokens"), ",.0f"), detail=True),
    Column("with padding", _cell(lambda row: row.per_second("padded_tokens"), ",.0f"), detail=True),
    Column("TFLOP/s", _cell(lambda row: _product(row.per_second("needed_flops"), 1e-12), ".3g"), detail=True),
    Column(
        "GB/s",
        _cell(lambda r: _product(r.per_second("bytes"), 1e-9) if r.mode in get_args(Direction) else None, ".3g"),
        detail=True,
    ),
    Column("of the roof", _cell(_share_of_roof, ".0%"), detail=True),
    Column("of data sheet", _extra("mfu_data_sheet", ".0%"), detail=True),
    Column("error allowed", _cell(lambda row: row.parity.band if row.parity else None, ".0e"), detail=True),
    Column("p50 ms of clients", _extra("clients_p50_s", number, 1e3)),
    Column("p99 ms of clients", _extra("clients_p99_s", number, 1e3)),
    Column("CPU ms of a request", _extra("cpu_s", number, 1e3)),
    Column("samples", lambda row: str(len(row.seconds) or ""), detail=True),
    Column("build / load / first call", _cold_start, detail=True),
    Column("J/item", _extra("joules_per_item", ".3g"), detail=True),
]


def _beside(document: Document) -> list[Column]:
    """Columns of documents of two backends."""
    reference = next((row.label for row in document.rows if row.backend == document.reference), "")

    def other(row: Result, dtype: str) -> str:
        found = document.beside(row, document.reference, dtype)
        return _speed(found) if found is not None and found.measured else ""

    def over_fp32(row: Result) -> str:
        found = document.headline(row)
        # Without the reference in fp32 the headline is like for like, and stands there.
        return "" if found is None or found.dtype != "fp32" else f"{times(found.ratio)} {marks(row)}".rstrip()

    def interval(row: Result) -> str:
        found = document.headline(row)
        return "" if found is None else span(found.low, found.high)

    def like(row: Result) -> str:
        found = document.like_for_like(row)
        return "" if found is None else times(found.ratio)

    def peak(row: Result) -> float | None:
        found = document.reference_row(row)
        return None if found is None else _product(found.number("peak_bytes"), 1e-9)

    name = reference.split(",")[0]
    in_fp32 = any(row.backend == document.reference and row.dtype == "fp32" for row in document.measured)
    labels = list(dict.fromkeys(row.label for row in document.measured if row.ours)) or [OURS]
    return [
        Column("form", lambda row: row.label if len(labels) > 1 else "", number=False),
        Column("dtype", lambda row: row.dtype, number=False),
        Column(labels[0] if len(labels) == 1 else "accelerated", _speed),
        Column(f"{name} fp32", lambda row: other(row, "fp32")),
        Column("over fp32", over_fp32),
        Column(f"{name}, same dtype", lambda row: other(row, row.dtype) if row.dtype != "fp32" else "", detail=in_fp32),
        Column("like for like", like),
        Column("95% interval", interval, detail=True),
        Column(f"{name} peak GB", _cell(peak, ".2f"), detail=True),
    ]


def _among(document: Document) -> list[Column]:
    """Columns of documents of several backends: how many times as fast xfm-fast is, in each of its dtypes."""

    def compared(row: Result, dtype: str) -> Comparison | None:
        ours = document.beside(row, OURS, dtype)
        found = (c for c in (ours.against if ours else []) if (c.backend, c.dtype) == (row.backend, row.dtype))
        return None if row.ours else next(found, None)

    def ratio(dtype: str) -> Callable[[Result], str]:
        return lambda row: times(found.ratio) if (found := compared(row, dtype)) else ""

    def interval(dtype: str) -> Callable[[Result], str]:
        return lambda row: span(found.low, found.high) if (found := compared(row, dtype)) else ""

    def latency(share: float) -> Callable[[Result], str]:
        return _cell(lambda row: _product(quantile(row, share), 1e3), number)

    dtypes = dict.fromkeys(row.dtype for row in document.measured if row.ours)
    return [
        Column("contender", lambda row: row.label, number=False),
        Column("dtype", lambda row: row.dtype, number=False),
        Column("speed", _speed),
        # The speed of single requests is their p50.
        Column("p50 ms", lambda row: latency(0.5)(row) if row.mode == "server" else "", detail=True),
        Column("p90 ms", latency(0.9), detail=True),
        Column("p99 ms", latency(0.99)),
        *(Column(f"{OURS} {dtype} is", ratio(dtype)) for dtype in dtypes),
        *(Column(f"95% interval, {dtype}", interval(dtype), detail=True) for dtype in dtypes),
    ]


def _shares(rows: list[Result], part: str, title: str) -> Table:
    """Shares of one run's time, each part a column."""
    split = [row for row in rows if row.parts(part)]

    def share(row: Result, name: str) -> str:
        parts = row.parts(part)
        return f"{parts[name] / (sum(parts.values()) or 1):.0%}" if name in parts else ""

    columns = [
        Column("work", lambda row: work(row).rpartition(", ")[0], number=False),
        Column("contender", lambda row: row.title, number=False),
        *(
            Column(name, lambda row, name=name: share(row, name))
            for name in dict.fromkeys(name for row in split for name in row.parts(part))
        ),
    ]
    return build(title, split, columns, "Shares of one run's time.", detail=True)


def _receipt(row: Result) -> Table:
    """FLOPs left after each saving of the procedure of xfm-fast."""
    steps, before = list[tuple[str, float, float]](), 0.0
    for name, left in row.parts("receipt").items():
        steps.append((name, left, (before or left) / (left or 1)))
        before = left
    columns = [
        Column("why it costs less", lambda step: step[0], number=False),
        Column("arithmetic left", lambda step: si(step[1], "FLOP")),
        Column("factor", lambda step: times(step[2])),
    ]
    return build("Receipt", steps, columns, detail=True)


def _missing(document: Document) -> Table:
    """Rows without numbers, and interrupted ones, each with its reason."""
    rows = [
        (work(row), row.title, row.status, row.reason or "") for row in document.rows if not row.measured or row.reason
    ]
    # A dtype that the processor lacks is listed once, not at every row.
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
        against = next((c for c in row.against if (c.backend, c.dtype) == (UNTOUCHED, "fp32")), None)
        if row.dtype == "int8" and against is not None and row.parity is not None:
            cosine = "" if row.parity.cosine is None else f"{row.parity.cosine:.4f}"
            lines.append(f"| {row.name.split(', ')[0]} | {times(against.ratio)} | {cosine} |")
    return "\n".join(lines) + "\n"


def _drop_in_rows(document: Document) -> list[Result]:
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
