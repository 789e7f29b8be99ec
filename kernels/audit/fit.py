"""Fits a card's constants to measurements of Nsight Compute (`ncu --csv`), which the model of time then predicts by.

Launches are recognised by the name of the kernel function, the grid and the threads: those of the model's shapes in
bf16 at head dimension 64. Few launches say little of many constants, so that each constant that moves costs something.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from xfm_fast.errors import InputError

from ..triton.launch import KernelSpec
from . import sass
from .cards import Card
from .compiling import Task, compile_all, default_cache, read_binary
from .launches import Launch, model_launch
from .prediction import predict
from .rows import Form, shipped_forms
from .simulator import simulate

_FACTORS = (0.5, 0.7, 0.85, 0.93, 1.07, 1.15, 1.4, 2.0)
_SWEEPS = 2
_PRIOR = 0.02  # of the squared logarithm of a factor, against that of the error of a launch

_SECONDS = {
    "s": 1.0,
    "second": 1.0,
    "ms": 1e-3,
    "msecond": 1e-3,
    "us": 1e-6,
    "usecond": 1e-6,
    "ns": 1e-9,
    "nsecond": 1e-9,
}
_DURATION = ("gpu__time_duration.sum", "gpu__time_duration.avg", "Duration")
_CYCLES = ("sm__cycles_elapsed.max", "sm__cycles_elapsed.avg", "Elapsed Cycles")


@dataclass(frozen=True)
class Measured:
    """One launch that was profiled: kernel function, programs, threads of each, architecture, seconds, cycles or 0."""

    function: str
    grid: int
    threads: int
    arch: int
    seconds: float
    cycles: float


@dataclass(frozen=True)
class Fit:
    """The outcome: the card with its constants; per launch (kernel, measured, predicted before, after), microseconds;
    and the launches that no shipped form explains.
    """

    arch: int
    card: Card
    launches: list[tuple[str, float, float, float]]
    unknown: list[str]

    @property
    def error(self) -> float:
        """Root mean square of the logarithms of predicted by measured time, about the relative error."""
        return math.sqrt(sum(math.log(after / seen) ** 2 for _, seen, _, after in self.launches) / len(self.launches))


def read_counters(path: Path) -> list[Measured]:
    """The launches of a file that `ncu --csv` wrote, page `details` or `raw`.

    Raises:
        InputError: the file cannot be read, is no such file, or says of no launch how long it took.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    # Messages of the profiler and the program may come first.
    first = next(
        (n for n, line in enumerate(lines) if line.lstrip('"').startswith("ID") and "Kernel Name" in line), None
    )
    if first is None:
        raise InputError(f"{path} is no output of ncu --csv: no line of it names the columns ID and Kernel Name")
    table = list(csv.DictReader(lines[first:]))
    launches = _details(table) if table and "Metric Name" in table[0] else _raw(table)
    if not launches:
        raise InputError(
            f"{path} does not say how long a launch took; profile with --set basic, or with the metric {_DURATION[0]}"
        )
    return launches


def _details(table: list[dict[str, str]]) -> list[Measured]:
    """One line for each launch and metric."""
    launches: dict[str, dict[str, str]] = {}
    metrics: dict[str, dict[str, float]] = {}
    for line in table:
        value = _number(line.get("Metric Value"))
        if value is None or not line.get("ID"):
            continue
        launches.setdefault(line["ID"], line)
        unit = _SECONDS.get(line.get("Metric Unit") or "", 1.0) if line["Metric Name"] in _DURATION else 1.0
        metrics.setdefault(line["ID"], {})[line["Metric Name"]] = value * unit
    made = (_measured(line, metrics[number]) for number, line in launches.items())
    return [launch for launch in made if launch is not None]


def _raw(table: list[dict[str, str]]) -> list[Measured]:
    """One line for each launch; the line before them has the units."""
    units = table[0] if table and not (table[0].get("ID") or "").isdigit() else {}
    found: list[Measured] = []
    for line in table:
        if not (line.get("ID") or "").isdigit():
            continue
        values = {name: value for name in (*_DURATION, *_CYCLES) if (value := _number(line.get(name))) is not None}
        for name in _DURATION:
            if name in values:
                values[name] *= _SECONDS.get(units.get(name) or "", 1e-9)
        launch = _measured(line, values)
        found += [launch] if launch else []
    return found


def _measured(line: dict[str, str], values: dict[str, float]) -> Measured | None:
    seconds = next((values[name] for name in _DURATION if name in values), 0.0)
    sizes = [[int(n) for n in re.findall(r"\d+", line.get(name) or "")] for name in ("Grid Size", "Block Size")]
    capability = re.findall(r"\d+", line.get("CC") or "")
    if seconds <= 0 or not all(sizes) or len(capability) < 2:
        return None
    function = re.split(r"[(<]", line["Kernel Name"])[0].split()[-1]
    cycles = next((values[name] for name in _CYCLES if name in values), 0.0)
    arch = 10 * int(capability[0]) + int(capability[1])
    return Measured(function, math.prod(sizes[0]), math.prod(sizes[1]), arch, seconds, cycles)


def _number(text: str | None) -> float | None:
    try:
        number = float((text or "").replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def fit(
    measured: Iterable[Measured],
    specs: Iterable[KernelSpec],
    card: Callable[[int], Card],
    *,
    source: str,
    jobs: int | None = None,
    cache_dir: Path | None = None,
) -> Fit:
    """The constants with which the model comes closest to what was measured.

    Args:
        measured: launches of one card.
        specs: the shipped kernels.
        card: gives the constants to begin with, by architecture.
        source: of the measurements, which is kept with the constants.
        jobs, cache_dir: of the audit, which compiles what was launched.

    Raises:
        InputError: launches of several architectures, or none that a shipped kernel makes at the model's shapes.
    """
    measured = list(measured)
    arches = sorted({launch.arch for launch in measured})
    if len(arches) != 1:
        raise InputError(
            f"launches of {len(arches)} architectures ({', '.join(map(str, arches))}); fit one card at a time"
        )
    arch = arches[0]
    forms = [form for form in shipped_forms(specs, (arch,), ("bf16", "fp32")) if _native(form)]
    cases: list[tuple[Measured, Form, Launch]] = []
    unknown: list[str] = []
    for launch in measured:
        matching = [(form, made) for form in forms if (made := _matches(launch, form)) is not None]
        if matching:
            cases.append((launch, *matching[0]))
        else:
            unknown.append(f"{launch.function}, {launch.grid} programs of {launch.threads} threads")
    if not cases:
        raise InputError(
            f"none of {len(measured)} launches is one that a shipped kernel makes at the model's shapes on sm_{arch}:"
            f" {'; '.join(unknown[:5])}"
        )
    model = _Model(cases, arch, jobs, cache_dir)
    before = card(arch)
    clocks = [launch.cycles / launch.seconds / 1e9 for launch, _, _ in cases if launch.cycles]
    start = replace(before, clock_ghz=round(median(clocks), 3)) if clocks else before
    after = _search(model, start)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    after = replace(after, date=today, source=f"fitted to {len(cases)} launches of {source}")
    times = zip(cases, model.times(before), model.times(after), strict=True)
    rows = [(form.key, seen.seconds * 1e6, old, new) for (seen, form, _), old, new in times]
    return Fit(arch, after, rows, unknown)


def _native(form: Form) -> bool:
    """The forms that are launched at the model's sizes; the one without a bias never is."""
    return form.variant.get("head_dim", 64) == 64 and form.variant.get("bias") is not False


def _matches(launch: Measured, form: Form) -> Launch | None:
    if form.spec.kernel.fn.__name__ != launch.function or form.config.num_warps * 32 != launch.threads:
        return None
    made = model_launch(form.spec.name, form.variant, form.config, form.arch)
    return made if made is not None and (made.grid or made.programs) == launch.grid else None


class _Model:
    """The launches that were measured, and what the model says of them with one card's constants or another's."""

    def __init__(
        self, cases: list[tuple[Measured, Form, Launch]], arch: int, jobs: int | None, cache_dir: Path | None
    ) -> None:
        tasks = [
            Task.of(form.spec.request(form.variant, form.dtype, arch, form.config), arch, launch.programs)
            for _, form, launch in cases
        ]
        figures = compile_all(tasks, jobs=jobs, cache_dir=cache_dir)
        self._cases = []
        for (seen, form, launch), task in zip(cases, tasks, strict=True):
            found = figures[task.figures_key]
            binary = read_binary(cache_dir or default_cache(), task.key)
            if binary is None or found.timing is None:
                raise InputError(f"{form.key} was measured but does not compile here: {found.error}")
            code = sass.parse(binary.listing, binary.resources)
            self._cases.append((seen, launch, code, binary, found.timing.resident))

    def times(self, card: Card) -> list[float]:
        """Predicted microseconds of every launch."""
        made: list[float] = []
        for _, launch, code, binary, resident in self._cases:
            timing = simulate(
                code, card, warps=binary.warps, resident=resident, rows=binary.row_lines, products=binary.products,
                tile_bytes=binary.tile_bytes,
            )  # fmt: skip
            made.append(predict(timing, launch, card).microseconds)
        return made

    def loss(self, card: Card) -> float:
        """Mean square of the logarithms of predicted by measured time."""
        pairs = zip(self.times(card), self._cases, strict=True)
        return sum(math.log(time / (case[0].seconds * 1e6)) ** 2 for time, case in pairs) / len(self._cases)


def _search(model: _Model, start: Card) -> Card:
    """One constant after the other, by factors, as long as what is gained is worth the step away from the start."""
    factors = dict.fromkeys(_constants(start), 1.0)
    best = model.loss(start)
    for _ in range(_SWEEPS):
        for name in factors:
            for factor in _FACTORS:
                tried = factors | {name: factors[name] * factor}
                if not 0.3 <= tried[name] <= 3:
                    continue
                cost = model.loss(_scaled(start, tried)) + _PRIOR * sum(math.log(f) ** 2 for f in tried.values())
                if cost < best:
                    best, factors = cost, tried
    return _scaled(start, factors)


def _constants(card: Card) -> list[str]:
    """The constants that launches can tell: the tensor cores that the architecture has, latencies, rates of memory."""
    tensor = "wgmma_products" if card.wgmma_products else "tcgen05_products" if card.tcgen05_products else "cycles.hmma"
    return [tensor, "latency.load", "latency.copy", "cycles.special", "l2_bytes", "memory_bytes_per_s"]


def _scaled(card: Card, factors: dict[str, float]) -> Card:
    cycles, latency, changed = dict(card.cycles), dict(card.latency), {}
    for name, factor in factors.items():
        group, _, member = name.partition(".")
        if member:
            table = cycles if group == "cycles" else latency
            table[member] = round(table[member] * factor, 2)
        else:
            changed[name] = round(getattr(card, name) * factor, 2)
    return dataclasses.replace(card, cycles=cycles, latency=latency, **changed)
