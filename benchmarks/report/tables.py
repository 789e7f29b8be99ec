"""Results as tables: a line per result, a column per quantity. Terminal, Markdown and page show the same tables.

All numbers of a column have one unit per kind of work: items per second of batches, ms of single requests and
operations, requests per second under a latency bound.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from xfm_fast.errors import DataError

from ..record import (
    ACCELERATED,
    OURS,
    UNTOUCHED,
    Comparison,
    Direction,
    Document,
    Result,
    format_seconds,
)
from ..timing import percentile

STYLES = {
    **dict.fromkeys(("bad", "failed", "parity failed", "slower", "lost"), "red"),
    **dict.fromkeys(("warning", "partial", "contended"), "yellow"),
    "faster": "green",
}
_GAP = 2
# Minimum width of the first column, the work, before columns of details are shown.
_WORK_WIDTH = 24
_MAX_SKIPPED = 12
_BAR_WIDTH = 32
_RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_QUALITY = (
    ("least cosine", "cosine_least", ".4f"),
    ("mean cosine", "cosine_mean", ".4f"),
    ("nearest text kept", "nearest_kept", ".1%"),
)


@dataclass(frozen=True)
class Column:
    """One column: its head and the text of a row; `detail` is shown where there is room."""

    head: str
    cell: Callable[[Any], str]
    right: bool = True
    detail: bool = False


text_column = partial(Column, right=False)


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
    """Build a table of rows without its empty columns."""
    rows, filled, cells = list(rows), list[Column](), list[list[str]]()
    for column in columns:
        texts = [column.cell(row) for row in rows]
        if any(texts):
            filled.append(column)
            cells.append(texts)
    lines = [list(line) for line in zip(*cells, strict=True)]
    weak = [index for index, row in enumerate(rows) if isinstance(row, Result) and not row.ours]
    return Table(title, filled, lines, about, detail, frozenset(weak))


def pivot(
    heads: Sequence[str],
    cells: Iterable[tuple[tuple[str, ...], str, str]],
    title: str = "",
    about: str = "",
) -> Table:
    """Build a table from (line, column, text): a line per first, a column per second."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    names: dict[str, None] = {}
    for line, name, text in cells:
        lines.setdefault(line, {})[name] = text
        names[name] = None
    columns = [
        text_column(head, lambda line, index=index: line[0][index])
        for index, head in enumerate(heads)
    ]
    columns += [Column(name, lambda line, name=name: line[1].get(name, "")) for name in names]
    return build(title, lines.items(), columns, about, detail=True)


def number(value: float) -> str:
    """Format three digits, with separators instead of an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def si(value: float, unit: str = "") -> str:
    """Format a number with its SI prefix: `si(3e9, "FLOP/s")` is `3 GFLOP/s`."""
    sizes = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: "", 1e-3: "m", 1e-6: "µ"}
    size = next((size for size in sizes if abs(value) >= size * 0.9995), 1)
    return f"{value / size:.3g} {sizes[size]}{unit}".strip()


def plain(value: Any) -> str:
    """Format a fact of the machine in words; empty for an unknown one."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        items = (item.get("name", item) if isinstance(item, dict) else item for item in value)
        return ", ".join(map(str, items))
    return "" if value is None else str(value)


def times(ratio: float) -> str:
    """Format a factor, with two decimals near 1."""
    return f"{ratio:.2f}×" if ratio < 2 else f"{ratio:.1f}×"


def span(pair: Any) -> str:
    """Format the interval of a comparison; empty without one."""
    if pair is None or pair.low is None or pair.high is None:
        return ""
    return f"{pair.low:.2f} to {pair.high:.2f}"


def speed(row: Result) -> tuple[float, str, bool]:
    """Return the number that a row is measured for, its unit, and whether more is better."""
    capacity = row.number("max_qps")
    if capacity is not None:
        return capacity, "requests/s", True
    if row.unit == "evaluations":
        return (row.median_s or 0.0) / 3600, "h", False
    if row.mode == "single-stream" or row.mode in get_args(Direction):
        return (row.median_s or 0.0) * 1e3, "ms", False
    return row.rate or 0.0, f"{row.unit}/s", True


def marked(text: str, row: Result) -> str:
    """Mark a text: † something else ran on the machine, * interrupted."""
    contended = "†" if row.contended else ""
    interrupted = "*" if row.status == "partial" else ""
    return f"{text} {contended}{interrupted}".rstrip()


def work(row: Result, *, unit: bool = True) -> str:
    """Format the work of a row, with the unit of its speed."""
    words = [row.name]
    if row.mode != "offline":
        words.append(row.mode)
    if unit and row.measured:
        words.append(speed(row)[1])
    return ", ".join(words)


def _quantile_ms(row: Result, share: float) -> float | None:
    single = row.mode == "single-stream" and row.seconds
    value = percentile(row.seconds, share) if single else row.number(f"p{share * 100:.0f}_s")
    return None if value is None else 1e3 * value


def _cold_start(row: Result) -> str:
    values = [row.number(name) for name in ("build_s", "load_s", "first_call_s")]
    return (
        " / ".join(format_seconds(value) if value else "0" for value in values)
        if any(values)
        else ""
    )


def _error(row: Result) -> str:
    if row.parity is None:
        return ""
    return "not finite" if row.parity.error is None else f"{row.parity.error:.0e}"


def _speed(row: Result | None) -> str:
    return "" if row is None or not row.measured else marked(number(speed(row)[0]), row)


def _quantity(
    head: str,
    find: Callable[[Result], float | None],
    scale: float = 1,
    form: str = "",
    detail: bool = False,
) -> Column:
    """Return a column of numbers, empty for a row without the number."""

    def cell(row: Result) -> str:
        value = find(row)
        if value is None:
            return ""
        return format(value * scale, form) if form else number(value * scale)

    return Column(head, cell, detail=detail)


def _extra(
    head: str, name: str, scale: float = 1, form: str = "", *, detail: bool = False
) -> Column:
    """Return a column of a number of `Result.extra`."""
    return _quantity(head, lambda row: row.number(name), scale, form, detail)


def _gigabytes(head: str, name: str) -> Column:
    return _extra(head, name, 1e-9, ".2f", detail=True)


def _traffic(row: Result) -> float | None:
    return row.per_second("bytes") if row.mode in get_args(Direction) else None


def _allowed_error(row: Result) -> float | None:
    return row.parity.band if row.parity else None


# Quantities of a result beyond its speed.
_QUANTITIES = (
    _extra("of matrix rate", "mfu", form=".0%"),
    _extra("of the floor", "share_of_floor", form=".0%"),
    _gigabytes("peak GB", "peak_bytes"),
    _gigabytes("grown GB", "grown_bytes"),
    _gigabytes("checkpointed GB", "checkpointed_bytes"),
    _quantity("tokens/s", lambda row: row.per_second("tokens"), 1, ",.0f", detail=True),
    _quantity("with padding", lambda row: row.per_second("padded_tokens"), 1, ",.0f", detail=True),
    _quantity("TFLOP/s", lambda row: row.per_second("needed_flops"), 1e-12, ".3g", detail=True),
    _quantity("GB/s", _traffic, 1e-9, ".3g", detail=True),
    _extra("of data sheet", "mfu_data_sheet", form=".0%", detail=True),
    _quantity("error allowed", _allowed_error, 1, ".0e", detail=True),
    _extra("p50 ms of clients", "clients_p50_s", 1e3),
    _extra("p99 ms of clients", "clients_p99_s", 1e3),
    _extra("CPU ms of a request", "cpu_s", 1e3),
    _quantity("samples", lambda row: len(row.seconds) or None, 1, "d", detail=True),
)


def _with_reference(document: Document) -> list[Column]:
    """Return columns where a line holds xfm-fast and its one reference."""
    reference = document.reference
    name = next((row.label for row in document.rows if row.backend == reference), "").split(",")[0]
    in_fp32 = any(row.backend == reference and row.dtype == "fp32" for row in document.measured)
    labels = list(dict.fromkeys(row.label for row in document.measured if row.ours)) or [OURS]

    def over_fp32(row: Result) -> str:
        comparison = document.headline(row)
        # Without the reference in fp32 the headline is like for like, and has that column.
        if comparison is None or comparison.dtype != "fp32":
            return ""
        return marked(times(comparison.ratio), row)

    def like_for_like(row: Result) -> str:
        comparison = document.like_for_like(row)
        return "" if comparison is None else times(comparison.ratio)

    def same_dtype(row: Result) -> str:
        if row.dtype == "fp32":
            return ""
        return _speed(document.at_same_case(row, reference, row.dtype))

    def peak(row: Result) -> float | None:
        baseline = document.reference_row(row)
        return None if baseline is None else baseline.number("peak_bytes")

    return [
        text_column("form", lambda row: row.label if len(labels) > 1 else ""),
        text_column("dtype", lambda row: row.dtype),
        Column(labels[0] if len(labels) == 1 else "accelerated", _speed),
        Column(f"{name} fp32", lambda row: _speed(document.at_same_case(row, reference, "fp32"))),
        Column("over fp32", over_fp32),
        Column(f"{name}, same dtype", same_dtype, detail=in_fp32),
        Column("like for like", like_for_like),
        Column("95% interval", lambda row: span(document.headline(row)), detail=True),
        _quantity(f"{name} peak GB", peak, 1e-9, ".2f", detail=True),
    ]


def _with_backends(document: Document) -> list[Column]:
    """Return columns where every backend has a line: the speed-up of xfm-fast over it, in each of its dtypes."""

    def fastest(row: Result, dtype: str) -> Result | None:
        candidates = [
            result
            for result in document.measured
            if result.ours and (*result.place, result.dtype) == (*row.place, dtype)
        ]
        return min(candidates, key=lambda result: result.median_s or 0.0, default=None)

    def comparison(row: Result, dtype: str) -> Comparison | None:
        ours = None if row.ours else fastest(row, dtype)
        for candidate in ours.against if ours else ():
            if (candidate.backend, candidate.dtype) == (row.backend, row.dtype):
                return candidate
        return None

    def ratio(row: Result, dtype: str) -> str:
        baseline = comparison(row, dtype)
        return times(baseline.ratio) if baseline else ""

    def server_p50_ms(row: Result) -> float | None:
        # The speed of single requests is their p50.
        return _quantile_ms(row, 0.5) if row.mode == "server" else None

    columns = [
        text_column("backend", lambda row: row.label),
        text_column("dtype", lambda row: row.dtype),
        Column("speed", _speed),
        _quantity("p50 ms", server_p50_ms, detail=True),
        _quantity("p90 ms", lambda row: _quantile_ms(row, 0.9), detail=True),
        _quantity("p99 ms", lambda row: _quantile_ms(row, 0.99)),
    ]
    dtypes = list(dict.fromkeys(row.dtype for row in document.measured if row.ours))
    columns += [Column(f"{OURS} {dtype} is", partial(ratio, dtype=dtype)) for dtype in dtypes]
    for dtype in dtypes:
        interval = f"95% interval, {dtype}"
        columns.append(
            Column(interval, lambda row, dtype=dtype: span(comparison(row, dtype)), detail=True)
        )
    return columns


def tables(document: Document) -> list[Table]:
    """Build every table of a document that has lines, the most important first."""
    rows = document.measured
    baselines = {row.backend for row in rows if not row.ours}
    paired = baselines == {document.reference}
    about = "† something else ran on the machine meanwhile. * interrupted."
    about += " Errors are the largest difference from the reference, over its largest value."
    size = f" ({document.model.preset} size)" if document.model else ""
    columns = [
        text_column(f"work{size}", work),
        text_column("inputs", lambda row: row.conditions),
        *(_with_reference if paired else _with_backends)(document),
        Column("error", _error),
        *_QUANTITIES,
        Column("build / load / first call", _cold_start, detail=True),
    ]
    lines = [row for row in rows if row.ours or not paired]
    skipped = document.data.skipped if document.data else []
    candidates = [
        build("All rows", lines, columns, about),
        _shares(rows, "stages", "by stage"),
        _shares(rows, "operations", "by kind of operation"),
        *map(_receipt, rows),
        _not_measured(document.rows),
        build(
            f"Skipped ({len(skipped)})",
            skipped,
            [
                text_column("skipped", lambda skip: skip.what),
                text_column("reason", lambda skip: skip.reason),
            ],
            "Inputs that could not be used.",
            detail=True,
        ),
    ]
    return [table for table in candidates if table.lines]


def _shares(rows: Iterable[Result], name: str, title: str) -> Table:
    """Build the table of where the time of one run goes."""
    cells = []
    for row in rows:
        seconds_by_name = row.numbers(name)
        total = sum(seconds_by_name.values()) or 1
        line = work(row, unit=False), row.title
        cells += [(line, name, f"{value / total:.0%}") for name, value in seconds_by_name.items()]
    title, about = f"Where the time goes, {title}", "Shares of the time of one run."
    return pivot(("work", "backend"), cells, title, about)


def _receipt(row: Result) -> Table:
    """Build the table of what an evaluation saves, step by step."""
    remaining = row.numbers("receipt")
    costs = list(remaining.values())
    steps = zip(remaining.items(), [*costs[:1], *costs], strict=False)
    columns = [
        text_column("why it costs less", lambda step: step[0][0]),
        Column("arithmetic left", lambda step: si(step[0][1], "FLOP")),
        Column("factor", lambda step: times(step[1] / (step[0][1] or 1))),
    ]
    return build("Receipt", steps, columns, detail=True)


def _not_measured(rows: Iterable[Result]) -> Table:
    """Build the table of rows with a reason; a dtype that the processor lacks is listed once, not at every row."""
    lines, not_offered = list[tuple[str, ...]](), set[tuple[str, ...]]()
    for row in rows:
        if row.measured and not row.reason:
            continue
        line = row.title, row.status, row.reason or ""
        if row.status == "not offered":
            not_offered.add(("all", *line))
        else:
            lines.append((work(row), *line))
    columns = [
        text_column(head, lambda line, index=index: line[index])
        for index, head in enumerate(("work", "backend", "status", "reason"))
    ]
    about = "Rows without numbers, and why."
    return build("Not measured", lines + sorted(not_offered), columns, about, detail=True)


def markdown_table(table: Table) -> str:
    """Format a table without its details; ends with a line break."""
    columns = [index for index, column in enumerate(table.columns) if not column.detail]
    rule = "".join("---:|" if table.columns[index].right else "---|" for index in columns)
    drawn = []
    for line in ([column.head for column in table.columns], *table.lines):
        cells = [line[index].replace("|", "\\|") for index in columns]
        drawn.append("| " + " | ".join(cells) + " |")
    drawn.insert(1, f"|{rule}")
    return "\n".join(drawn) + "\n"


def markdown(document: Document) -> str:
    """Format the main tables of a document, for a README or an issue."""
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
        for backend, title in {OURS: OURS, **_RUNTIMES}.items():
            result = document.at_same_case(row, backend, "fp32")
            if result is not None and result.measured and result.median_s:
                ratios[title] = eager.median_s / result.median_s
        gained.append(Gain(row.name, row.conditions, eager.median_s, ratios))
    return gained


def gains(document: Document, label: str = ACCELERATED) -> str:
    """Format `drop-in` in fp32 as Markdown: time of each call in eager PyTorch, and speed-ups over it."""
    cells = []
    for gain in fp32_gains(document, label):
        line = gain.call, gain.inputs
        cells.append((line, "eager", format_seconds(gain.eager_s)))
        cells += [(line, title, times(ratio)) for title, ratio in gain.ratios.items()]
    return markdown_table(pivot(("call", "inputs"), cells)) + f"\n{machine_line(document)}\n"


def int8_gains(document: Document) -> str:
    """Format `drop-in` in int8 as Markdown: speed-up over eager fp32, and agreement of trained weights with fp32.

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
    table = markdown_table(pivot(("call", "inputs", "int8 of"), cells))
    return f"{table}\n{machine_line(document)}\n"


def machine_line(document: Document) -> str:
    """Format processor, threads, versions and date of a document as a line of Markdown."""
    machine = document.machine
    versions = machine.get("versions", {})
    facts = [
        processor(document),
        f"{machine['threads']} threads",
        f"PyTorch {machine['torch'].split('+')[0]}",
    ]
    for name, title in _RUNTIMES.items():
        if versions.get(name):
            facts.append(f"{title} {versions[name]}")
    return f"*{', '.join([*facts, document.date[:10]])}*"


def by_backend(document: Document) -> str:
    """Format Markdown with a column per backend; in brackets a session's speed-up over its library."""
    cells = []
    for row in document.measured:
        comparison = None if row.ours else next(iter(row.against), None)
        ratio = "" if comparison is None else f" ({times(comparison.ratio)})"
        cells.append(((work(row), row.dtype), row.label, f"{_speed(row)}{ratio}"))
    return markdown_table(pivot(("work", "dtype"), cells))


def drop_in_rows(document: Document) -> list[Result]:
    """Return the accelerated rows of `drop-in`; raises `DataError` for another benchmark."""
    if document.benchmark != "drop-in":
        raise DataError(
            f"gains are of bench drop-in, and these are results of {document.benchmark}"
        )
    return [row for row in document.rows if row.ours]


def processor(document: Document) -> str:
    """Return the processor with its generation."""
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
    widths = [_min_width(table, index) for index in range(len(table.columns))]
    indices = list(range(len(table.columns)))
    optional = [
        index for index in indices if table.columns[index].right or table.columns[index].detail
    ]
    optional.sort(key=lambda index: table.columns[index].detail)
    while optional and sum(widths[index] + _GAP for index in indices) - _GAP > console.width:
        indices.remove(optional.pop())
    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for index in indices:
        column = table.columns[index]
        justify = "right" if column.right else "left"
        grid.add_column(column.head, justify=justify, min_width=widths[index], vertical="top")
    limit = _MAX_SKIPPED if table.title.startswith("Skipped") else len(table.lines)
    above = ""
    for row, line in enumerate(table.lines[:limit]):
        cells = []
        for index in indices:
            # The work is printed once, above all its backends.
            cell = "" if index == 0 and line[0] == above else line[index]
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
    if len(table.lines) > limit:
        hidden = len(table.lines) - limit
        print_line(f"... and {hidden} more (all are in the JSON file)", "dim", console)


def print_chart(
    title: str, groups: Mapping[str, Sequence[Result]], base: Result, console: Console
) -> None:
    """Print a bar for every result, under the words of its group, with its factor over `base`."""
    longest = max(speed(row)[0] for rows in groups.values() for row in rows)
    grid = Grid.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    for words, rows in groups.items():
        grid.add_row(f"[bold]{escape(words)}[/]")
        for row in rows:
            value, unit, _ = speed(row)
            ready = row.number("build_s") or 0.0
            grid.add_row(
                escape(f"  {OURS if row.ours else row.label}, {row.dtype}"),
                Bar(longest, 0, value, width=_BAR_WIDTH, color="green" if row.ours else "blue"),
                escape(marked(f"{number(value)} {unit}", row)),
                times(value / speed(base)[0]),
                f"error {_error(row)}" if row.parity and row is not base else "",
                f"ready in {format_seconds(ready)}" if ready >= 1 else "",
            )
    console.print(f"\n[bold]{escape(title)}[/]")
    console.print(grid)


def _min_width(table: Table, index: int) -> int:
    """Return the width of a column whose numbers stand on one line and whose words are whole."""
    column, cells = table.columns[index], [line[index] for line in table.lines]
    width = max(len(word) for text in (column.head, *cells) for word in text.split())
    if column.right:
        return max(width, *map(len, cells))
    return max(width, _WORK_WIDTH) if index == 0 else width
