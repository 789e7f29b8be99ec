"""Report of an ablation study: intervals over seeds as Markdown and JSON, with their limits."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from xfm_fast.checkpoint.files import write_bytes
from xfm_fast.errors import InputError
from xfm_fast.reproduce.ablations import TITLES, Study
from xfm_fast.reproduce.evaluation import METRICS

STEM = "ablations"
TARGETS = {"image_to_text_r1": 60.0, "text_to_image_r1": 60.0, "grounding": 60.0}
"""The means over seeds that the full method must reach, in percent."""

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
