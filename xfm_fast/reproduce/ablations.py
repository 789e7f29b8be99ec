"""Ablations of stop-gradient and MIM guidance, over seeds, and their report.

Every run has its own folder with `result.json`, so that an interrupted or extended study trains only missing runs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from xfm_fast.checkpoint.files import write_bytes
from xfm_fast.documents import read_json
from xfm_fast.errors import ConfigError, DataError, InputError
from xfm_fast.models.hub import TOKENIZER_FILE
from xfm_fast.reproduce.evaluation import METRICS, HeldOut, evaluate
from xfm_fast.tokenizer import CaptionTokenizer
from xfm_fast.training.loop import train
from xfm_fast.training.recipe import Recipe, load_recipe

RECIPE = "pretrain_tiny_shapes"
RESULT_FILE = "result.json"
VARIANTS: dict[str, tuple[str, ...]] = {
    "full": (),
    "no-stop-gradient": ("method.stop_gradient=false",),
    "no-mim-guidance": ("method.mim_guidance=false",),
    "neither": ("method.stop_gradient=false", "method.mim_guidance=false"),
}
"""Recipe overrides by variant."""
TITLES = {
    "full": "full method",
    "no-stop-gradient": "without stop-gradient",
    "no-mim-guidance": "without MIM guidance",
    "neither": "without both",
}
STEM = "ablations"
TARGETS = {"image_to_text_r1": 60.0, "text_to_image_r1": 60.0, "grounding": 60.0}
"""Target means of the full method, in percent."""

LIMITS = (
    "These are tiny models on generated pictures with a vocabulary of some sixty words. The paper's gains come from a "
    "model of 327 million parameters that starts from RoBERTa and BEiT-v2, whose knowledge stop-gradient protects; "
    "here every encoder starts from random weights, and the only language is that of the captions. So this study shows "
    "that the method trains, that the switches do what they say, and what they cost or gain at this size; it neither "
    "confirms nor refutes the size of the effects in the paper."
)
VARIANTS_EXPLAINED = (
    "Without stop-gradient, ITM, IMLM and BBP train the language encoder too. Without MIM guidance there is no MIM "
    "loss at all: the target of MIM is the guidance. Differences are paired: runs of one seed share initial weights "
    "and batches."
)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    variant: str  # key of `VARIANTS`
    seed: int  # of the initial weights and the data order
    metrics: dict[str, float]  # percent, see `evaluation.evaluate`
    # `steps`; `seconds` and `cpu_seconds` since the start or last resumption, evaluation included
    cost: dict[str, float]


@dataclass(frozen=True)
class Study:
    """Finished and missing runs."""

    runs: tuple[Run, ...]
    missing: tuple[tuple[str, int], ...]
    recipe: str

    def values(self, variant: str, metric: str) -> dict[int, float]:
        """A metric of a variant by seed."""
        return {run.seed: run.metrics[metric] for run in self.runs if run.variant == variant}

    @property
    def variants(self) -> list[str]:
        """Variants with a finished run, in the order of `VARIANTS`."""
        return [variant for variant in VARIANTS if any(run.variant == variant for run in self.runs)]


def run_ablations(
    out: Path,
    *,
    seeds: int = 3,
    variants: Sequence[str] = tuple(VARIANTS),
    minutes: float | None = None,
    recipe: str | Path = RECIPE,
    overrides: Iterable[str] = (),
    on_change: Callable[[Study], None] | None = None,
) -> Study:
    """Train and evaluate every variant with every seed, seed by seed.

    `minutes` limits when the last run starts; `on_change` receives the study at the start and after every run. Folders
    of another recipe raise `DataError`.
    """
    if seeds < 1 or not variants:
        raise ConfigError(f"seeds={seeds} of {len(variants)} variants; at least one of each is needed")
    if unknown := [variant for variant in variants if variant not in VARIANTS]:
        raise ConfigError(f"variant {', '.join(unknown)} is unknown; choose from {', '.join(VARIANTS)}")
    chosen = [variant for variant in VARIANTS if variant in variants]
    plan = {
        (variant, seed): _recipe(out, variant, seed, recipe, tuple(overrides))
        for seed in range(seeds)
        for variant in chosen
    }
    finished = {key: run for key, one in plan.items() if (run := _read(*key, one)) is not None}
    begun = time.monotonic()

    def study() -> Study:
        missing = tuple(key for key in plan if key not in finished)
        return Study(tuple(finished[key] for key in plan if key in finished), missing, str(recipe))

    if on_change is not None:
        on_change(study())
    for key, one in plan.items():
        if key in finished:
            continue
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            break
        run = _train(*key, one)
        if run is None:
            break
        finished[key] = run
        if on_change is not None:
            on_change(study())
    return study()


def _recipe(out: Path, variant: str, seed: int, recipe: str | Path, overrides: tuple[str, ...]) -> Recipe:
    # A seed gives all its variants the same initial weights and the same batches; the world is that of all runs.
    own = (f"seed={seed}", f"data={out / 'world'}", f"checkpoint.folder={out / variant / f'seed-{seed}'}")
    made = load_recipe(recipe, (*overrides, *VARIANTS[variant], *own))
    if made.shapes is None:
        raise ConfigError(f"recipe {recipe} has no shapes world; the ablations are evaluated on its held-out scenes")
    return made


def _train(variant: str, seed: int, recipe: Recipe) -> Run | None:
    """Train and evaluate a run, from its newest checkpoint; None if a signal stopped it."""
    assert recipe.shapes is not None
    clocks = time.perf_counter(), time.process_time()
    trained = train(recipe)
    if trained.interrupted:
        return None
    folder = Path(recipe.checkpoint.folder)
    tokenizer = CaptionTokenizer.from_files(
        folder / TOKENIZER_FILE if recipe.tokenizer == "train" else Path(recipe.tokenizer)
    )
    held_out = HeldOut(recipe.shapes.seed, recipe.shapes.resolution)
    metrics = evaluate(trained.model, tokenizer, held_out)
    cost = {
        "steps": float(trained.step),
        "seconds": time.perf_counter() - clocks[0],
        "cpu_seconds": time.process_time() - clocks[1],
    }
    run = Run(variant, seed, metrics, cost)
    content = {"variant": variant, "seed": seed, "metrics": metrics, "cost": cost, "recipe": _identity(recipe)}
    data = (json.dumps(content, indent=1) + "\n").encode()
    write_bytes({folder / RESULT_FILE: data})
    return run


def _identity(recipe: Recipe) -> dict[str, Any]:
    """Recipe fields that a result depends on: no paths, logging or loading."""
    described = recipe.model_dump(mode="json")
    return {name: value for name, value in described.items() if name not in ("data", "checkpoint", "log", "workers")}


def _read(variant: str, seed: int, recipe: Recipe) -> Run | None:
    path = Path(recipe.checkpoint.folder) / RESULT_FILE
    try:
        content = read_json(path)
        run = Run(variant, seed, dict(content["metrics"]), dict(content["cost"]))
        described = content["recipe"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it, and the run is evaluated again") from None
    wanted = _identity(recipe)
    if described != wanted:
        differing = sorted(name for name in wanted if described.get(name) != wanted[name])
        raise DataError(
            f"{path} comes from a recipe with other {', '.join(differing)}; choose another folder for this study, or "
            "delete the run"
        )
    return run


@dataclass(frozen=True)
class Interval:
    """Mean with a confidence interval under normality; `half` is infinite for a single value."""

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.half:.1f}" if self.count > 1 else "")

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean."""
    if not values or not 0 < confidence < 1:
        raise InputError(f"{len(values)} values and confidence={confidence}; give some values and a number in (0, 1)")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.inf, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    return Interval(mean, quantile * deviation / math.sqrt(count), count)


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval of the mean of `a - b`, paired by seed."""
    if len(a) != len(b):
        raise InputError(f"{len(a)} and {len(b)} runs do not pair up; compare the seeds that both have")
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], confidence)


def summary(study: Study) -> dict[str, dict[str, Interval]]:
    """Mean and 95% interval over seeds by variant and metric."""
    return {
        variant: {metric: mean_interval([*study.values(variant, metric).values()]) for metric in METRICS}
        for variant in study.variants
    }


def differences(study: Study) -> dict[str, dict[str, Interval]]:
    """Variant minus full method by variant and metric, paired over common seeds."""
    found: dict[str, dict[str, Interval]] = {}
    for variant in study.variants:
        if variant == "full":
            continue
        for metric in METRICS:
            ours, full = study.values(variant, metric), study.values("full", metric)
            both = sorted(set(ours) & set(full))
            if both:
                pair = paired_difference([ours[seed] for seed in both], [full[seed] for seed in both])
                found.setdefault(variant, {})[metric] = pair
    return found


def findings(study: Study) -> list[str]:
    """One sentence per finding: targets, significant differences, the rest, missing runs."""
    lines = []
    if "full" in study.variants:
        for metric, target in TARGETS.items():
            mean = mean_interval([*study.values("full", metric).values()]).mean
            lines.append(
                f"full method, {METRICS[metric]}: {mean:.1f}%, target {target:.0f}% "
                f"{'reached' if mean >= target else 'MISSED'}"
            )
    compared = differences(study)
    for variant, by_metric in compared.items():
        clear = {metric: pair for metric, pair in by_metric.items() if pair.excludes_zero}
        for metric, pair in clear.items():
            lines.append(
                f"{TITLES[variant]}: {METRICS[metric]} {'higher' if pair.mean > 0 else 'lower'} than the full method "
                f"by {abs(pair.mean):.1f} points (95% interval {pair.low:+.1f} to {pair.high:+.1f}, {pair.count} seeds)"
            )
        noise = [METRICS[metric] for metric in by_metric if metric not in clear]
        if noise:
            seeds = min(pair.count for pair in by_metric.values())
            lines.append(
                f"{TITLES[variant]}: nothing that {seeds} {'seed tells' if seeds == 1 else 'seeds tell'} from noise in "
                + ", ".join(noise)
            )
    if pairs := [pair for by_metric in compared.values() for pair in by_metric.values()]:
        seeds = min(pair.count for pair in pairs)
        lines.append(
            f"{len(pairs)} comparisons at 95% mark about {len(pairs) / 20:.1f} of them by chance alone"
            + ("; one seed gives no interval, so it claims none" if seeds == 1 else "")
        )
    if study.missing:
        names = ", ".join(f"{TITLES[variant]} seed {seed}" for variant, seed in study.missing)
        lines.append(f"not finished: {names}; the same command goes on there")
    return lines


def markdown(study: Study) -> str:
    """The report as Markdown."""
    heads = ["variant", "seeds", *METRICS.values(), "CPU min per run"]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    rows += ["| " + " | ".join(cells) + " |" for cells in _cells(study)]
    caption = (
        f"Recipe `{study.recipe}`; {len(study.runs)} runs. Percent on held-out combinations of colour and shape, mean "
        "± half the 95% interval (Student's t over seeds). Chance: R@1 1%, text probe 18%, image probe 44%."
    )
    lines = [
        "# Ablations of the training method on the shapes world",
        "",
        caption,
        "",
        *rows,
        "",
        *(f"- {line}" for line in findings(study)),
        "",
        LIMITS,
        "",
        VARIANTS_EXPLAINED,
        "",
    ]
    return "\n".join(lines)


def as_json(study: Study) -> dict[str, Any]:
    """All numbers of the report and its runs; an infinite interval is null."""
    return {
        "recipe": study.recipe,
        "runs": [asdict(run) for run in study.runs],
        "missing": [{"variant": variant, "seed": seed} for variant, seed in study.missing],
        "summary": {variant: _plain(by_metric) for variant, by_metric in summary(study).items()},
        "minus_full": {variant: _plain(by_metric) for variant, by_metric in differences(study).items()},
        "findings": findings(study),
    }


def save(study: Study, folder: Path) -> list[Path]:
    """Write `ablations.md` and `.json` atomically."""
    contents = {
        folder / f"{STEM}.md": markdown(study),
        folder / f"{STEM}.json": json.dumps(as_json(study), indent=1, allow_nan=False) + "\n",
    }
    write_bytes({path: text.encode() for path, text in contents.items()})
    return list(contents)


def _cells(study: Study) -> list[list[str]]:
    rows = []
    for variant, by_metric in summary(study).items():
        runs = [run for run in study.runs if run.variant == variant]
        minutes = sum(run.cost["cpu_seconds"] for run in runs) / len(runs) / 60
        rows.append(
            [TITLES[variant], str(len(runs)), *(str(by_metric[metric]) for metric in METRICS), f"{minutes:.1f}"]
        )
    return rows


def _plain(by_metric: dict[str, Interval]) -> dict[str, Any]:
    return {
        metric: {"mean": one.mean, "half": one.half if one.count > 1 else None, "seeds": one.count}
        for metric, one in by_metric.items()
    }
