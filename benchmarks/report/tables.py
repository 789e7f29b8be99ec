"""Results as tables: a line per result, a column per quantity. Terminal, Markdown and page show the same tables.

All numbers of a column have one unit per kind of work: items per second of batches, ms of single requests and
operations, requests per second under a latency bound.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from xfm_fast.errors import DataError

from ..record import ACCELERATED, OURS, UNTOUCHED, Comparison, Direction, Document, Result
from ..timing import percentile

STYLES = {
    **dict.fromkeys(("bad", "failed", "parity failed", "slower", "lost"), "red"),
    **dict.fromkeys(("warning", "partial", "contended"), "yellow"),
    "faster": "green",
}
_GAP = 2
# Characters that the work, which is first, gets before columns of details are shown.
_WORK = 24
_MOST_SKIPPED = 12
_BESIDE = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_QUALITY = (
    ("least cosine", "cosine_least", ".4f"),
    ("mean cosine", "cosine_mean", ".4f"),
    ("nearest text kept", "nearest_kept", ".1%"),
)


@dataclass(frozen=True)
class Column:
    """One column: its head and the text of a row; `number` aligns right, `detail` is shown where there is room."""

    head: str
    cell: Callable[[Any], str]
    number: bool = True
    detail: bool = False


@dataclass(frozen=True)
class Table:
    """Lines of text under columns; Markdown leaves out `detail`, and `weak` are the lines of baselines."""

    title: str
    columns: list[Column]
    lines: list[list[str]]
    about: str = ""
    detail: bool = False
    weak: frozenset[int] = frozenset()


def build(
    title: str,
    rows: Iterable[Any],
    columns: Iterable[Column],
    about: str = "",
    *,
    detail: bool = False,
) -> Table:
    """A table of rows without its empty columns."""
    rows = list(rows)
    filled = [
        (column, cells) for column in columns if any(cells := [column.cell(row) for row in rows])
    ]
    lines = [list(line) for line in zip(*(cells for _, cells in filled), strict=True)]
    weak = frozenset(
        place for place, row in enumerate(rows) if isinstance(row, Result) and not row.ours
    )
    return Table(title, [column for column, _ in filled], lines, about, detail, weak)


def pivot(
    heads: Sequence[str],
    cells: Iterable[tuple[tuple[str, ...], str, str]],
    title: str = "",
    about: str = "",
) -> Table:
    """A line per first and a column per second of (line, column, text)."""
    lines, names = dict[tuple[str, ...], dict[str, str]](), dict[str, None]()
    for line, name, text in cells:
        lines.setdefault(line, {})[name] = text
        names[name] = None
    columns = [
        Column(head, lambda line, place=place: line[0][place], number=False)
        for place, head in enumerate(heads)
    ]
    columns += [Column(name, lambda line, name=name: line[1].get(name, "")) for name in names]
    return build(title, lines.items(), columns, about, detail=True)


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    return (
        f"{value:.3g} s"
        if value >= 1
        else f"{value * 1e3:.3g} ms"
        if value >= 1e-3
        else f"{value * 1e6:.3g} µs"
    )


def number(value: float) -> str:
    """Three digits, with separators instead of an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def si(value: float, unit: str = "") -> str:
    """A number with its SI prefix: `si(3e9, "FLOP/s")` is `3 GFLOP/s`."""
    sizes = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: "", 1e-3: "m", 1e-6: "µ"}
    size = next((size for size in sizes if abs(value) >= size * 0.9995), 1)
    return f"{value / size:.3g} {sizes[size]}{unit}".strip()


def plain(value: Any) -> str:
    """A fact of the machine in words; empty for an unknown one."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items() if one is not None)
    if isinstance(value, list):
        return ", ".join(
            str(one.get("name", one) if isinstance(one, dict) else one) for one in value
        )
    return "" if value is None else str(value)


def times(ratio: float) -> str:
    """A factor, with two decimals near 1."""
    return f"{ratio:.2f}×" if ratio < 2 else f"{ratio:.1f}×"


def span(pair: Any) -> str:
    """The interval of a comparison; empty without one."""
    return (
        ""
        if pair is None or pair.low is None or pair.high is None
        else f"{pair.low:.2f} to {pair.high:.2f}"
    )


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


def marked(text: str, row: Result) -> str:
    """The text with the marks of its row: † something else ran on the machine, * interrupted."""
    return f"{text} {'†' if row.contended else ''}{'*' if row.status == 'partial' else ''}".rstrip()


def work(row: Result, *, unit: bool = True) -> str:
    """The work of a row, with the unit of its speed."""
    how = [row.mode] if row.mode != "offline" else []
    return ", ".join([row.name, *how, *([speed(row)[1]] if unit and row.measured else [])])


def _quantile_ms(row: Result, share: float) -> float | None:
    single = row.mode == "single-stream" and row.seconds
    value = percentile(row.seconds, share) if single else row.number(f"p{share * 100:.0f}_s")
    return None if value is None else 1e3 * value


def _cold_start(row: Result) -> str:
    values = [row.number(name) for name in ("build_s", "load_s", "first_call_s")]
    return " / ".join(seconds(value) if value else "0" for value in values) if any(values) else ""


def _error(row: Result) -> str:
    if row.parity is None:
        return ""
    return "not finite" if row.parity.error is None else f"{row.parity.error:.0e}"


def _speed(row: Result | None) -> str:
    return "" if row is None or not row.measured else marked(number(speed(row)[0]), row)


# Quantities of a result beyond its speed: head, value, scale, format, and whether it is a detail.
_QUANTITIES: tuple[tuple[str, Callable[[Result], float | None], float, str, bool], ...] = (
    ("of matrix rate", lambda row: row.number("mfu"), 1, ".0%", False),
    ("of the floor", lambda row: row.number("share_of_floor"), 1, ".0%", False),
    ("peak GB", lambda row: row.number("peak_bytes"), 1e-9, ".2f", True),
    ("grown GB", lambda row: row.number("grown_bytes"), 1e-9, ".2f", True),
    ("checkpointed GB", lambda row: row.number("checkpointed_bytes"), 1e-9, ".2f", True),
    ("tokens/s", lambda row: row.per_second("tokens"), 1, ",.0f", True),
    ("with padding", lambda row: row.per_second("padded_tokens"), 1, ",.0f", True),
    ("TFLOP/s", lambda row: row.per_second("needed_flops"), 1e-12, ".3g", True),
    ("GB/s", lambda row: row.per_second("bytes") if row.mode in get_args(Direction) else None, 1e-9, ".3g", True),
    ("of data sheet", lambda row: row.number("mfu_data_sheet"), 1, ".0%", True),
    ("error allowed", lambda row: row.parity.band if row.parity else None, 1, ".0e", True),
    ("p50 ms of clients", lambda row: row.number("clients_p50_s"), 1e3, "", False),
    ("p99 ms of clients", lambda row: row.number("clients_p99_s"), 1e3, "", False),
    ("CPU ms of a request", lambda row: row.number("cpu_s"), 1e3, "", False),
    ("samples", lambda row: len(row.seconds) or None, 1, "d", True),
)  # fmt: skip


def _quantity(
    head: str,
    find: Callable[[Result], float | None],
    scale: float = 1,
    form: str = "",
    detail: bool = False,
) -> Column:
    """A column of numbers, empty for a row without the number."""

    def cell(row: Result) -> str:
        value = find(row)
        if value is None:
            return ""
        return format(value * scale, form) if form else number(value * scale)

    return Column(head, cell, detail=detail)


def _with_reference(document: Document) -> list[Column]:
    """Columns where a line holds xfm-fast and its one reference."""
    reference = document.reference
    name = next((row.label for row in document.rows if row.backend == reference), "").split(",")[0]
    in_fp32 = any(row.backend == reference and row.dtype == "fp32" for row in document.measured)
    labels = list(dict.fromkeys(row.label for row in document.measured if row.ours)) or [OURS]

    def over_fp32(row: Result) -> str:
        found = document.headline(row)
        # Without the reference in fp32 the headline is like for like, and has that column.
        return "" if found is None or found.dtype != "fp32" else marked(times(found.ratio), row)

    def like_for_like(row: Result) -> str:
        found = document.like_for_like(row)
        return "" if found is None else times(found.ratio)

    def same_dtype(row: Result) -> str:
        return (
            _speed(document.at_same_case(row, reference, row.dtype)) if row.dtype != "fp32" else ""
        )

    def peak(row: Result) -> float | None:
        found = document.reference_row(row)
        return None if found is None else found.number("peak_bytes")

    return [
        Column("form", lambda row: row.label if len(labels) > 1 else "", number=False),
        Column("dtype", lambda row: row.dtype, number=False),
        Column(labels[0] if len(labels) == 1 else "accelerated", _speed),
        Column(f"{name} fp32", lambda row: _speed(document.at_same_case(row, reference, "fp32"))),
        Column("over fp32", over_fp32),
        Column(f"{name}, same dtype", same_dtype, detail=in_fp32),
        Column("like for like", like_for_like),
        Column("95% interval", lambda row: span(document.headline(row)), detail=True),
        _quantity(f"{name} peak GB", peak, 1e-9, ".2f", detail=True),
    ]


def _with_backends(document: Document) -> list[Column]:
    """Columns where every backend has a line: how many times as fast xfm-fast is, in each of its dtypes."""

    def compared(row: Result, dtype: str) -> Comparison | None:
        ours = document.at_same_case(row, OURS, dtype)
        found = (
            c
            for c in (ours.against if ours else [])
            if (c.backend, c.dtype) == (row.backend, row.dtype)
        )
        return None if row.ours else next(found, None)

    def ratio(row: Result, dtype: str) -> str:
        found = compared(row, dtype)
        return times(found.ratio) if found else ""

    dtypes = list(dict.fromkeys(row.dtype for row in document.measured if row.ours))
    return [
        Column("backend", lambda row: row.label, number=False),
        Column("dtype", lambda row: row.dtype, number=False),
        Column("speed", _speed),
        # The speed of single requests is their p50.
        _quantity(
            "p50 ms",
            lambda row: _quantile_ms(row, 0.5) if row.mode == "server" else None,
            detail=True,
        ),
        _quantity("p90 ms", lambda row: _quantile_ms(row, 0.9), detail=True),
        _quantity("p99 ms", lambda row: _quantile_ms(row, 0.99)),
        *(
            Column(f"{OURS} {dtype} is", lambda row, dtype=dtype: ratio(row, dtype))
            for dtype in dtypes
        ),
        *(
            Column(
                f"95% interval, {dtype}",
                lambda row, dtype=dtype: span(compared(row, dtype)),
                detail=True,
            )
            for dtype in dtypes
        ),
    ]


def tables(document: Document) -> list[Table]:
    """Every table of a document that has lines, the most important first."""
    rows = document.measured
    pairs = {row.backend for row in rows if not row.ours} == {document.reference}
    about = "† something else ran on the machine meanwhile. * interrupted."
    about += " Errors are the largest difference from the reference, over its largest value."
    size = f" ({document.model.preset} size)" if document.model else ""
    columns = [
        Column(f"work{size}", work, number=False),
        Column("inputs", lambda row: row.conditions, number=False),
        *(_with_reference if pairs else _with_backends)(document),
        Column("error", _error),
        *(_quantity(*each) for each in _QUANTITIES),
        Column("build / load / first call", _cold_start, detail=True),
    ]
    found = [build("All rows", [row for row in rows if row.ours or not pairs], columns, about)]
    for part, title in (("stages", "by stage"), ("operations", "by kind of operation")):
        shares = (
            (
                (work(row, unit=False), row.title),
                name,
                f"{value / (sum(row.numbers(part).values()) or 1):.0%}",
            )
            for row in rows
            for name, value in row.numbers(part).items()
        )
        found.append(
            pivot(
                ("work", "backend"),
                shares,
                f"Where the time goes, {title}",
                "Shares of the time of one run.",
            )
        )
    for row in rows:
        left = row.numbers("receipt")
        before = [*left.values()]
        steps = zip(left.items(), [*before[:1], *before], strict=False)
        costs = [
            Column("why it costs less", lambda step: step[0][0], number=False),
            Column("arithmetic left", lambda step: si(step[0][1], "FLOP")),
            Column("factor", lambda step: times(step[1] / (step[0][1] or 1))),
        ]
        found.append(build("Receipt", steps, costs, detail=True))
    missing = [
        (work(r), r.title, r.status, r.reason or "")
        for r in document.rows
        if not r.measured or r.reason
    ]
    # A dtype that the processor lacks is listed once, not at every row.
    lacking = dict.fromkeys(("all", *line[1:]) for line in missing if line[2] == "not offered")
    missing = [line for line in missing if line[2] != "not offered"] + sorted(lacking)
    heads = ("work", "backend", "status", "reason")
    columns = [
        Column(head, lambda line, place=place: line[place], number=False)
        for place, head in enumerate(heads)
    ]
    found.append(
        build("Not measured", missing, columns, "Rows without numbers, and why.", detail=True)
    )
    skipped = document.data.skipped if document.data else []
    columns = [
        Column("skipped", lambda skip: skip.what, number=False),
        Column("reason", lambda skip: skip.reason, number=False),
    ]
    found.append(
        build(
            f"Skipped ({len(skipped)})",
            skipped,
            columns,
            "Inputs that could not be used.",
            detail=True,
        )
    )
    return [table for table in found if table.lines]


def markdown_table(table: Table) -> str:
    """A table without its details; ends with a line break."""
    places = [place for place, column in enumerate(table.columns) if not column.detail]
    lines = [[column.head for column in table.columns], *table.lines]
    drawn = [
        "| " + " | ".join(line[place].replace("|", "\\|") for place in places) + " |"
        for line in lines
    ]
    drawn.insert(
        1, "|" + "".join("---:|" if table.columns[place].number else "---|" for place in places)
    )
    return "\n".join(drawn) + "\n"


def markdown(document: Document) -> str:
    """The main tables of a document, for a README or an issue."""
    return "\n".join(markdown_table(table) for table in tables(document) if not table.detail)


@dataclass(frozen=True)
class Gain:
    """A call of `drop-in`: seconds of the eager model in fp32, and the speed-up over it by runtime."""

    call: str
    inputs: str
    eager_s: float
    ratios: dict[str, float]


def fp32_gains(document: Document, label: str = ACCELERATED) -> list[Gain]:
    """Return the calls of `drop-in` whose rows have a label; raises `DataError` for another benchmark."""
    gained = []
    for row in drop_in_rows(document):
        eager = document.at_same_case(row, UNTOUCHED, "fp32")
        if row.dtype != "fp32" or row.label != label or eager is None or not eager.median_s:
            continue
        ratios = {}
        for backend, title in {OURS: OURS, **_BESIDE}.items():
            other = document.at_same_case(row, backend, "fp32")
            if other is not None and other.measured and other.median_s:
                ratios[title] = eager.median_s / other.median_s
        gained.append(Gain(row.name, row.conditions, eager.median_s, ratios))
    return gained


def gains(document: Document, label: str = ACCELERATED) -> str:
    """Return Markdown of `drop-in` in fp32: time of each call in eager PyTorch, and speed-ups over it."""
    cells = []
    for gain in fp32_gains(document, label):
        line = gain.call, gain.inputs
        cells.append((line, "eager", seconds(gain.eager_s)))
        cells += [(line, title, times(ratio)) for title, ratio in gain.ratios.items()]
    return markdown_table(pivot(("call", "inputs"), cells)) + f"\n{machine_line(document)}\n"


def int8_gains(document: Document) -> str:
    """Return Markdown of `drop-in` in int8: speed-up over eager fp32, and the agreement of trained weights with fp32.

    Raises `DataError` for a document of another benchmark.
    """
    cells = []
    for row in drop_in_rows(document):
        eager = document.at_same_case(row, UNTOUCHED, "fp32")
        if row.dtype != "int8" or not row.measured or eager is None or eager.median_s is None:
            continue
        for backend, title in {OURS: OURS, "onnxruntime": "ONNX Runtime, dynamic"}.items():
            rounded = document.at_same_case(row, backend, "int8")
            if rounded is None or not rounded.median_s:
                continue
            line = row.name, row.conditions, title
            cells.append((line, "over eager fp32", times(eager.median_s / rounded.median_s)))
            for head, quantity, form in _QUALITY:
                value = rounded.number(quantity)
                cells.append((line, head, "" if value is None else format(value, form)))
    return (
        markdown_table(pivot(("call", "inputs", "int8 of"), cells))
        + f"\n{machine_line(document)}\n"
    )


def machine_line(document: Document) -> str:
    """Return the processor, threads, versions and date of a document as a line of Markdown."""
    machine = document.machine
    versions = machine.get("versions", {})
    facts = [
        processor(document),
        f"{machine['threads']} threads",
        f"PyTorch {machine['torch'].split('+')[0]}",
    ]
    facts += [f"{title} {versions[name]}" for name, title in _BESIDE.items() if versions.get(name)]
    return f"*{', '.join([*facts, document.date[:10]])}*"


def by_backend(document: Document) -> str:
    """Markdown with a column per backend; in brackets a session's speed-up over its library."""
    cells = []
    for row in document.measured:
        over = next(iter(row.against), None)
        ratio = "" if row.ours or over is None else f" ({times(over.ratio)})"
        cells.append(((work(row), row.dtype), row.label, f"{_speed(row)}{ratio}"))
    return markdown_table(pivot(("work", "dtype"), cells))


def drop_in_rows(document: Document) -> list[Result]:
    """The accelerated rows of `drop-in`; raises `DataError` for another benchmark."""
    if document.benchmark != "drop-in":
        raise DataError(
            f"gains are of bench drop-in, and these are results of {document.benchmark}"
        )
    return [row for row in document.rows if row.ours]


def processor(document: Document) -> str:
    """The processor with its generation."""
    flags = document.machine.get("cpu_flags", ())
    name = document.machine["cpu"].replace("(R)", "").removesuffix(" Processor")
    if "AMD" in name and "avx512f" in flags:
        return f"{name} ({'Zen 5' if 'avx512_vp2intersect' in flags else 'Zen 4'})"
    return f"{name} (AMX)" if "amx_tile" in flags else name


def print_line(text: str, style: str, console: Console) -> None:
    """Print plain text; the terminal wraps it."""
    console.print(escape(text), style=style, soft_wrap=True)


def print_table(table: Table, console: Console) -> None:
    """Print the columns that fit side by side; details give way first, then the last numbers."""
    columns, least = table.columns, list[int]()
    for place, column in enumerate(columns):
        texts = [column.head, *(line[place] for line in table.lines)]
        words = max(len(word) for text in texts for word in text.split())
        least.append(
            max(words, *map(len, texts[1:]))
            if column.number
            else max(words, _WORK if place == 0 else 0)
        )
    places = list(range(len(columns)))
    order = sorted(
        (p for p in places if columns[p].number or columns[p].detail),
        key=lambda p: columns[p].detail,
    )
    while order and sum(least[place] + _GAP for place in places) - _GAP > console.width:
        places.remove(order.pop())
    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for place in places:
        justify = "right" if columns[place].number else "left"
        grid.add_column(
            columns[place].head, justify=justify, min_width=least[place], vertical="top"
        )
    above, most = "", _MOST_SKIPPED if table.title.startswith("Skipped") else len(table.lines)
    for row, line in enumerate(table.lines[:most]):
        cells = []
        for place in places:
            # The work is printed once, above all its backends.
            cell = "" if place == 0 and line[0] == above else line[place]
            style = STYLES.get(cell, "bold" if re.fullmatch(r"[\d.]+×.*", cell) else "")
            cells.append(f"[{style}]{escape(cell)}[/]" if style else escape(cell))
        above = line[0]
        grid.add_row(*cells, style="dim" if row in table.weak else "")
    console.print()
    if table.title:
        console.print(f"[bold]{escape(table.title)}[/]")
    if table.about:
        print_line(table.about, "dim", console)
    console.print(grid)
    if len(table.lines) > most:
        print_line(
            f"... and {len(table.lines) - most} more (all are in the JSON file)", "dim", console
        )
