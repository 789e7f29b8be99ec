"""Cost as work grows: a kind of work at several sizes, offline, and the exponent of the growth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from scipy import stats

from xfm_fast.errors import InputError

from .. import machine
from ..measure import Progress
from ..options import SweepOptions
from ..record import LEAST_POINTS, Document, Fit
from .entrants import Entrant
from .scenario import known
from .setting import Scale, opened
from .task_requests import ANSWERING

AXES = {
    "embed-image": ("batch", "resolution"),
    "embed-text": ("batch", "lengths"),
    "rerank": ("batch", "resolution", "texts", "lengths"),
    "retrieve": ("batch", "resolution"),
    "nlvr2": ("batch", "resolution"),
    "grounding": ("batch", "resolution", "texts", "lengths"),
    "captioning": ("batch", "resolution"),
    **dict.fromkeys(ANSWERING, ("batch", "resolution", "texts")),
}
_LABELS = {"batch": "requests together", "resolution": "pixels along a side", "texts": "texts of an image",
           "lengths": "mean tokens of a text"}  # fmt: skip
_ROUNDS, _MOST_ROUNDS = 3, 15


def default_values(options: SweepOptions) -> list[str]:
    """The values that are tried when none are named: four or more points, each about twice the one before."""
    tiny = options.preset == "tiny"
    values = {
        "batch": ["1", "2", "4", "8", "16"],
        "resolution": ["24", "32", "48", "64", "96"] if tiny else ["128", "224", "320", "384", "512"],
        "texts": ["4", "8", "16", "32", "64", "128"],
        "lengths": ["fixed-5", "fixed-10", "fixed-20", "fixed-40", "captions", "uniform-20", "bimodal-20"],
    }
    return values[options.over][:4] if options.quick else values[options.over]


def run(
    work: str, options: SweepOptions, progress: Progress | None = None, command: Sequence[str] = ()
) -> Document:  # fmt: skip
    """Measure a kind of work at several sizes. An interruption (Ctrl-C) keeps the sizes that were measured.

    Raises:
        XFMError: an option, the checkpoint or the data cannot be used.
    """
    known(work)
    if options.over not in AXES[work]:
        raise InputError(f"{work} cannot be swept over {options.over!r}; choose from {', '.join(AXES[work])}")
    points: list[int | str] = []
    for value in options.values or default_values(options):
        if options.over != "lengths" and (not value.isdigit() or int(value) < 1):
            raise InputError(f"{options.over} {value!r} is no number above zero")
        points.append(value if options.over == "lengths" else int(value))
    if len(set(points)) < 2:
        raise InputError(f"a sweep over {options.over} needs two different values or more; {len(set(points))} given")
    device = machine.choose_device(options.device)
    scale = Scale.of(work, options, device)
    progress = progress or Progress()
    progress.begin(2 + len(points))
    with opened(options, "sweep", device, progress, command) as setting:
        setting.prepare(scale.image_size)
        setting.document.options["scenario"] = work
        built: dict[int, list[Entrant]] = {}
        if options.over == "resolution":
            for value in points:
                setting.material.config(int(value))  # refuses impossible ones before anything is measured
        field = "image_size" if options.over == "resolution" else options.over
        for value in points:
            setting.progress.stage(f"{work}, {options.over} {value}")
            sized = replace(scale, **{field: value})
            workload = sized.workload(work, setting.material)
            if sized.image_size not in built:
                built[sized.image_size] = setting.entrants(work, sized.image_size, options.baselines, options.official)
            entrants = built[sized.image_size]
            setting.check(entrants, workload)
            # In a sweep over anything but the batch, one request is the work.
            default = scale.batch if work == "embed-text" else 1
            mean = workload.point.mean_length
            setting.measure(
                workload, entrants, batch=sized.batch if options.over == "batch" else options.batch or default,
                rounds=_ROUNDS, budget_s=scale.budget_s / 5, most_rounds=_MOST_ROUNDS, warmups=1,
                x=float(mean or 0) if options.over == "lengths" else float(value),
            )  # fmt: skip
            for entrant in entrants:
                if entrant.status == "parity failed":
                    # Other sizes may be right; each is checked for itself.
                    entrant.status, entrant.reason = "measured", None
    document = setting.finish()
    document.fits = fits(document, options.over)
    return document


def fits(document: Document, axis: str) -> list[Fit]:
    """The exponent of every contender in every type that has enough sizes."""
    found = []
    for work, contender, dtype in dict.fromkeys((row.work, row.contender, row.dtype) for row in document.rows):
        rows = [row for row in document.rows if (row.work, row.contender, row.dtype) == (work, contender, dtype)]
        points = [(row.x, row.median_s) for row in rows if row.x and row.median_s]
        law = fit_power_law([x for x, _ in points], [seconds for _, seconds in points])
        if law is not None:
            fit = Fit(
                work=work, contender=contender, dtype=dtype, over=axis, x_label=_LABELS[axis], points=len(points),
                **law._asdict(),
            )  # fmt: skip
            found.append(fit)
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
    line: Any = stats.linregress([math.log(value) for value in x], [math.log(value) for value in seconds])
    slope, r2 = float(line.slope), float(line.rvalue) ** 2
    reach = float(stats.t.ppf((1 + level) / 2, len(x) - 2)) * float(line.stderr)
    return PowerLaw(slope, slope - reach, slope + reach, r2)
