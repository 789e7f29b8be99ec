"""Cost as work grows: a scenario's offline run at several sizes, and the exponent of the growth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from xfm_fast.benchmarks.entrants import Entrant
from xfm_fast.benchmarks.rounds import run_rounds
from xfm_fast.benchmarks.row_making import blank, memory, sampled
from xfm_fast.benchmarks.rows import Document, Fit, Memory
from xfm_fast.benchmarks.scaling import fit_power_law
from xfm_fast.benchmarks.scenario_setting import ScenarioOptions, Setting, opened
from xfm_fast.benchmarks.suite import Progress
from xfm_fast.benchmarks.workloads import Workload
from xfm_fast.errors import InputError, UnavailableError

AXES = {
    "embed-image": ("batch", "resolution"),
    "embed-text": ("batch", "lengths"),
    "rerank": ("batch", "resolution", "texts", "lengths"),
    "retrieve": ("batch", "resolution"),
}
_CHANGED = {"batch": "batch", "resolution": "image_size", "texts": "texts", "lengths": "lengths"}
_LABELS = {"batch": "requests together", "resolution": "pixels along a side", "texts": "texts of an image",
           "lengths": "mean tokens of a text"}  # fmt: skip
_ROUNDS, _MOST_ROUNDS = 3, 15


def default_values(axis: str, options: ScenarioOptions) -> list[str]:
    """What is tried when nobody says: three or more points, each about twice the one before."""
    tiny, quick = options.preset == "tiny", options.quick
    values = {
        "batch": ["1", "2", "4", "8", "16"],
        "resolution": ["24", "32", "48", "64", "96"] if tiny else ["128", "224", "320", "384", "512"],
        "texts": ["4", "8", "16", "32", "64", "128"],
        "lengths": ["fixed-5", "fixed-10", "fixed-20", "fixed-40", "captions", "uniform-20", "bimodal-20"],
    }
    return values[axis][:4] if quick else values[axis]


def run(
    options: ScenarioOptions,
    axis: str,
    values: Sequence[str] | None = None,
    *,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> Document:
    """Measure a scenario at several sizes. An interruption (Ctrl-C) keeps the sizes that were measured.

    Args:
        axis: `batch`, `resolution`, `texts` or `lengths`, as far as the scenario has it.
        values: numbers, or for `lengths` names of distributions (`Material.texts`).

    Raises:
        XFMError: an option, the checkpoint or the data cannot be used.
    """
    axes = AXES.get(options.scenario)
    if axes is None:
        raise UnavailableError(f"scenario {options.scenario!r} is unknown; choose from {', '.join(AXES)}")
    if axis not in axes:
        raise InputError(f"{options.scenario} cannot be swept over {axis!r}; choose from {', '.join(axes)}")
    points = [_value(axis, value) for value in (default_values(axis, options) if values is None else values)]
    if len(set(points)) < 2:
        raise InputError(f"a sweep over {axis} needs two different values or more; {len(set(points))} given")
    with opened(options, "sweep", progress, command) as setting:
        _Sweep(setting, axis).measure(points)
    setting.document.fits.extend(fits(setting.document, axis))
    return setting.finish()


def _value(axis: str, text: str) -> int | str:
    if axis == "lengths":
        return text
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"{axis} {text!r} is no number above zero")
    return int(text)


class _Sweep:
    def __init__(self, setting: Setting, axis: str) -> None:
        self.setting, self.axis = setting, axis
        self.built: dict[int, list[Entrant]] = {}

    def measure(self, points: Sequence[int | str]) -> None:
        setting = self.setting
        setting.progress.begin(2 + len(points))
        if self.axis == "resolution":
            for value in points:
                setting.material.config(int(value))  # refuses impossible ones before anything is measured
        for value in points:
            setting.progress.stage(f"{self.axis} {value}")
            changed = {_CHANGED[self.axis]: value}
            image_size = int(changed.get("image_size", setting.scale.image_size))
            workload = setting.workload(**changed)
            entrants = setting.checked(workload, image_size, self.built.get(image_size))
            self.built[image_size] = entrants
            # In a sweep over anything but the batch, one request is the work.
            default = setting.scale.batch if setting.options.scenario == "embed-text" else 1
            batch = int(value) if self.axis == "batch" else setting.options.batch or default
            self._point(workload, entrants, batch, _x(self.axis, value, workload))

    def _point(self, workload: Workload, entrants: list[Entrant], batch: int, x: float) -> None:
        setting = self.setting
        numbers = workload.batch(batch)
        answers: dict[str, Callable[..., Any]] = {}
        peaks: dict[str, Memory] = {}
        outputs: dict[str, Any] = {}
        for entrant in entrants:
            if not entrant.runs:
                continue
            try:
                answer = entrant.answer(workload)
                peaks[entrant.key], outputs[entrant.key] = memory(lambda run=answer: run(numbers), setting.device)
                answers[entrant.key] = answer
            except Exception as error:  # a baseline may fail at some size; the others go on
                entrant.fail(error)

        def block(key: str) -> list[float]:
            begun = time.perf_counter()
            answers[key](numbers)
            return [time.perf_counter() - begun]

        samples = run_rounds(
            {key: lambda key=key: block(key) for key in answers}, setting.probes, setting.meter, rounds=_ROUNDS,
            budget_s=setting.scale.budget_s / 5, most_rounds=_MOST_ROUNDS, on_step=setting.progress.step,
        )  # fmt: skip
        for entrant in entrants:
            if entrant.key in samples.failures:
                entrant.status, entrant.reason = "failed", samples.failures[entrant.key]
            row = blank(entrant, workload, "offline", batch).model_copy(update={"x": x})
            if entrant.runs:
                row = sampled(
                    row, entrant, workload, numbers, outputs[entrant.key], samples, peaks[entrant.key], setting.meter
                )
            setting.document.rows.append(row)
            if entrant.status == "parity failed":
                # Other sizes may be right; each is checked for itself.
                entrant.status, entrant.reason = "measured", None
        if samples.interrupted:
            raise KeyboardInterrupt


def _x(axis: str, value: int | str, workload: Workload) -> float:
    if axis == "lengths":
        assert workload.point.mean_length is not None
        return workload.point.mean_length
    return float(value)


def fits(document: Document, axis: str) -> list[Fit]:
    """The exponent of every contender in every type that has two sizes or more."""
    found = []
    keys = dict.fromkeys((row.scenario, row.contender, row.dtype) for row in document.rows)
    for scenario, contender, dtype in keys:
        points = [
            (row.x, statistics.median(row.seconds))
            for row in document.rows
            if (row.scenario, row.contender, row.dtype) == (scenario, contender, dtype) and row.x and row.seconds
        ]
        law = fit_power_law([x for x, _ in points], [seconds for _, seconds in points])
        if law is not None:
            found.append(
                Fit(
                    scenario=scenario, contender=contender, dtype=dtype, over=axis, x_label=_LABELS[axis],
                    exponent=law.exponent, low=law.low, high=law.high, r2=law.r2, points=len(points),
                )
            )  # fmt: skip
    return found
