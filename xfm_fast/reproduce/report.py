"""The study as a table, as Markdown and as JSON, with words for what its numbers carry and what they do not."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xfm_fast.checkpoint.files import write_bytes
from xfm_fast.reproduce.ablations import TITLES, Study
from xfm_fast.reproduce.evaluation import METRICS
from xfm_fast.reproduce.intervals import Interval, mean_interval, paired_difference
from xfm_fast.reproduce.plot import plot

if TYPE_CHECKING:
    from rich.table import Table

STEM = "ablations"
TARGETS = {"image_to_text_r1": 60.0, "text_to_image_r1": 60.0, "grounding": 60.0}
"""What the full method must reach, in percent, as the mean over seeds."""

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


def summary(study: Study) -> dict[str, dict[str, Interval]]:
    """Mean and 95% interval over seeds by variant and metric."""
    return {
        variant: {metric: mean_interval([*study.values(variant, metric).values()]) for metric in METRICS}
        for variant in study.variants
    }


def differences(study: Study) -> dict[str, dict[str, Interval]]:
    """Variant minus full method, paired by seed, for the seeds that both have."""
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
    """What may be said: targets, differences beyond noise, those within it, and what is missing."""
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
    """The report as a page."""
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
        f"![ablations]({STEM}.svg)",
        "",
        *(f"- {line}" for line in findings(study)),
        "",
        LIMITS,
        "",
        VARIANTS_EXPLAINED,
        "",
    ]
    return "\n".join(lines)


def table(study: Study) -> Table:
    """The report for a terminal."""
    from rich import box
    from rich.table import Table

    made = Table(
        title="ablations on held-out scenes, % (mean ± half the 95% interval over seeds)",
        title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for head in ("variant", "seeds", *METRICS.values(), "CPU min"):
        made.add_column(head, justify="left" if head == "variant" else "right")
    for cells in _cells(study):
        made.add_row(*cells)
    return made


def as_json(study: Study) -> dict[str, Any]:
    """Every number of the report and of the runs behind it. An infinite interval (one seed) is null."""
    return {
        "recipe": study.recipe,
        "runs": [asdict(run) for run in study.runs],
        "missing": [{"variant": variant, "seed": seed} for variant, seed in study.missing],
        "summary": {variant: _plain(by_metric) for variant, by_metric in summary(study).items()},
        "minus_full": {variant: _plain(by_metric) for variant, by_metric in differences(study).items()},
        "findings": findings(study),
    }


def save(study: Study, folder: Path) -> list[Path]:
    """Write `ablations.md`, `.json` and `.svg`, all new or all old.

    Raises:
        StorageError: they cannot be written.
    """
    contents = {
        folder / f"{STEM}.md": markdown(study),
        folder / f"{STEM}.json": json.dumps(as_json(study), indent=1, allow_nan=False) + "\n",
        folder / f"{STEM}.svg": plot(study),
    }
    write_bytes({path: text.encode() for path, text in contents.items()})
    return list(contents)


def _cells(study: Study) -> list[list[str]]:
    rows = []
    for variant, by_metric in summary(study).items():
        runs = [run for run in study.runs if run.variant == variant]
        minutes = sum(run.cost["cpu_seconds"] for run in runs) / len(runs) / 60
        rows.append(
            [TITLES[variant], str(len(runs)), *(_shown(by_metric[metric]) for metric in METRICS), f"{minutes:.1f}"]
        )
    return rows


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.1f}" + (f" ± {interval.half:.1f}" if interval.count > 1 else "")


def _plain(by_metric: dict[str, Interval]) -> dict[str, Any]:
    return {
        metric: {"mean": one.mean, "half": one.half if one.count > 1 else None, "seeds": one.count}
        for metric, one in by_metric.items()
    }
