"""Cost as work grows: a kind of work at several sizes, offline, and the exponent of the growth.

On a CPU also what more threads gain, and what is left to each where several processes compete for the cores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from xfm_fast.errors import InputError

from .. import files, machine
from ..measure import Progress
from ..options import Axis, SweepOptions
from ..record import LEAST_POINTS, Document, Fit, Row
from . import competing
from .entrants import Entrant
from .scenario import known
from .setting import Scale, Setting, opened
from .task_requests import ANSWERING

_SIZES: Mapping[str, tuple[Axis, ...]] = {
    "embed-image": ("batch", "resolution"),
    "embed-text": ("batch", "lengths"),
    "rerank": ("batch", "resolution", "texts", "lengths"),
    "retrieve": ("batch", "resolution"),
    "nlvr2": ("batch", "resolution"),
    "grounding": ("batch", "resolution", "texts", "lengths"),
    "captioning": ("batch", "resolution"),
    **dict.fromkeys(ANSWERING, ("batch", "resolution", "texts")),
}
_LABELS = {
    "batch": "requests together", "resolution": "pixels along a side", "texts": "texts of an image",
    "lengths": "mean tokens of a text", "tokens": "tokens", "threads": "threads",
    "processes": "processes at a time",
}  # fmt: skip
_ROUNDS, _MOST_ROUNDS = 3, 15
# Facts of the machine that the rows of one document share.
_FACTS = ("cpu", "gpus", "threads", "torch", "xfm_fast", "commit")


def axes(work: str, device: torch.device) -> tuple[Axis, ...]:
    """What a kind of work is swept over."""
    scale: tuple[Axis, ...] = ("threads", "processes") if work in competing.WORKS else ("threads",)
    return _SIZES[work] + (scale if device.type == "cpu" else ())


def default_values(axis: Axis, work: str, options: SweepOptions) -> list[str]:
    """The values that are tried when none are named: four or more points, of sizes each about twice the one before."""
    tiny, cores = options.preset == "tiny", options.threads or machine.default_threads()
    longest = [64, 256, 512] if not tiny else [32, 48, 64]
    values = {
        "batch": ["1", "4", "16", "64", "256"] if work == "embed-text" else ["1", "2", "4", "8", "16"],
        "resolution": ["24", "32", "48", "64", "96"] if tiny else ["128", "224", "320", "384", "512"],
        "texts": ["4", "8", "16", "32", "64", "128"],
        "lengths": [f"fixed-{size}" for size in (4, 16, *longest)] + ["captions", "uniform-20", "bimodal-20"],
        "threads": [*(str(2**power) for power in range(cores.bit_length()) if 2**power < cores), str(cores)],
        "processes": ["1", "2", "4", "8"],
    }
    return values[axis][:4] if options.quick else values[axis]


def run(
    work: str, options: SweepOptions, progress: Progress | None = None, command: Sequence[str] = ()
) -> Document:  # fmt: skip
    """Measure a kind of work at several sizes. An interruption (Ctrl-C) keeps the sizes that were measured.

    Raises:
        XFMError: an option, the checkpoint or the data cannot be used.
    """
    known(work)
    device = machine.choose_device(options.device)
    points: dict[Axis, list[int | str]] = {axis: _points(axis, work, options, device) for axis in options.over}
    progress = progress or Progress()
    scale = Scale.of(work, options, device)
    progress.begin(2 + sum(map(len, points.values())))
    earlier = None if options.add_to is None else files.load(options.add_to)
    with opened(options, "sweep", device, progress, command) as setting:
        setting.prepare(scale.image_size, work=work)
        setting.document.options["scenario"] = work
        if earlier is not None:
            _refuse_others(earlier, setting.document, options)
        for value in points.get("resolution", ()):
            setting.material.config(int(value))  # refuses impossible ones before anything is measured
        swept = _Sweep(work, setting, scale, options)
        for axis, values in points.items():
            for value in values:
                setting.progress.stage(f"{work}, {axis} {value}")
                swept.measure(axis, value)
    document = setting.finish()
    if earlier is not None:
        _join(earlier, document)
    document.fits = fits(document)
    return document


def _refuse_others(earlier: Document, now: Document, options: SweepOptions) -> None:
    """Refuse rows that were measured of something else than those to come.

    Raises:
        InputError: it names what differs.
    """
    facts = [(name, earlier.machine.get(name), now.machine.get(name)) for name in _FACTS]
    facts += [("benchmark", earlier.benchmark, now.benchmark), ("device", earlier.device, now.device)]
    facts += [(name, earlier.options.get(name), now.options.get(name)) for name in ("scenario", "preset", "seed")]
    facts += [("model", earlier.model, now.model), ("data", earlier.data, now.data)]
    for name, was, became in facts:
        if was != became:
            told = f" ({was} there, {became} here)" if isinstance(was, str | int) else ""
            raise InputError(
                f"{options.add_to} is of another {name}{told}; measure the sweep anew, without --add-to, or choose the "
                "results that it belongs to"
            )


def _join(earlier: Document, document: Document) -> None:
    """Put the rows of an earlier document first, but for those that were measured anew."""
    anew = {row.key for row in document.rows}
    kept = [row for row in earlier.rows if row.key not in anew]
    document.rows = kept + document.rows
    document.options["over"] = list(dict.fromkeys([*earlier.options["over"], *document.options["over"]]))
    document.interrupted |= any(row.status == "partial" for row in kept)
    document.duration_s += earlier.duration_s


def _points(axis: Axis, work: str, options: SweepOptions, device: torch.device) -> list[int | str]:
    if axis not in axes(work, device):
        raise InputError(f"{work} cannot be swept over {axis!r}; choose from {', '.join(axes(work, device))}")
    if options.values and len(options.over) > 1:
        raise InputError(f"values {','.join(options.values)} belong to one axis; sweep over one, or leave them out")
    points: list[int | str] = []
    for value in options.values or default_values(axis, work, options):
        if axis != "lengths" and (not value.isdigit() or int(value) < 1):
            raise InputError(f"{axis} {value!r} is no number above zero")
        points.append(value if axis == "lengths" else int(value))
    # To a sweep that is there, a single value may be what it lacks.
    if len(set(points)) < 2 and (axis != "threads" or options.values) and options.add_to is None:
        raise InputError(f"a sweep over {axis} needs two different values or more; {len(set(points))} given")
    return points


class _Sweep:
    def __init__(self, work: str, setting: Setting, scale: Scale, options: SweepOptions) -> None:
        self._work, self._setting, self._scale, self._options = work, setting, scale, options
        self._built: dict[int, list[Entrant]] = {}
        self._threads = torch.get_num_threads()

    def measure(self, axis: Axis, value: int | str) -> None:
        """Add the rows of one size."""
        setting, options, work = self._setting, self._options, self._work
        field = {"resolution": "image_size", "batch": "batch", "texts": "texts", "lengths": "lengths"}.get(axis)
        sized = self._scale if field is None else replace(self._scale, **{field: value})
        workload = sized.workload(work, setting.material)
        if sized.image_size not in self._built:
            self._built[sized.image_size] = setting.entrants(
                work, sized.image_size, options.baselines, options.official
            )
        entrants = self._built[sized.image_size]
        setting.check(entrants, workload)
        # In a sweep over anything but the batch, one request is the work.
        default = self._scale.batch if work == "embed-text" else 1
        batch = sized.batch if axis == "batch" else options.batch or default
        budget_s, start = self._scale.budget_s / 5, len(setting.document.rows)
        if axis == "processes":
            competing.measure(
                setting, workload, sized, int(value), entrants, batch, rounds=_ROUNDS, seconds=budget_s / 8
            )  # fmt: skip
        else:
            torch.set_num_threads(int(value) if axis == "threads" else self._threads)
            try:
                setting.measure(
                    workload, entrants, batch=batch, rounds=_ROUNDS, budget_s=budget_s, most_rounds=_MOST_ROUNDS,
                    warmups=1, x=float(workload.point.mean_length or 0) if axis == "lengths" else float(value),
                )  # fmt: skip
            finally:
                torch.set_num_threads(self._threads)
                for row in setting.document.rows[start:]:
                    row.over = axis
                    if axis == "threads":
                        row.name += f", {value} thread{'s' * (value != 1)}"
        for entrant in entrants:
            if entrant.status == "parity failed":
                # Other sizes may be right; each is checked for itself.
                entrant.status, entrant.reason = "measured", None


def fits(document: Document) -> list[Fit]:
    """The exponent of every contender in every type that has enough sizes."""
    found, keys = [], ("over", "work", "contender", "dtype")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in document.rows:
        groups.setdefault(tuple(getattr(row, key) for key in keys), []).append(row)
    for key, rows in groups.items():
        points = [(row.x, row.median_s) for row in rows if row.x and row.median_s]
        law = fit_power_law([x for x, _ in points], [seconds for _, seconds in points])
        if law is not None:
            named = dict(zip(keys, key, strict=True))
            found.append(Fit(**named, x_label=_LABELS[named["over"]], points=len(points), **law._asdict()))
    return found


class PowerLaw(NamedTuple):
    """`seconds ∝ x^exponent`.

    Attributes:
        low, high: interval of the exponent.
        r2: share of the variance of the logarithm that the line explains.
    """

    exponent: float
    low: float
    high: float
    r2: float


def fit_power_law(x: Sequence[float], seconds: Sequence[float], level: float = 0.95) -> PowerLaw | None:
    """Fit an exponent by least squares of the logarithms, with Student's interval for the slope of a line.

    Args:
        x: amounts of work, above zero.
        seconds: what each took, above zero.

    Returns:
        None for fewer than `LEAST_POINTS` different amounts.
    """
    if len(set(x)) < LEAST_POINTS:
        return None
    from scipy import stats  # a second of loading, see `measure.bootstrap`

    line: Any = stats.linregress([math.log(value) for value in x], [math.log(value) for value in seconds])
    slope, r2 = float(line.slope), float(line.rvalue) ** 2
    reach = float(stats.t.ppf((1 + level) / 2, len(x) - 2)) * float(line.stderr)
    return PowerLaw(slope, slope - reach, slope + reach, r2)
