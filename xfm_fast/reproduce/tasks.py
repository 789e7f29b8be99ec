"""All fine-tuning tasks on a tiny pretrained model and the shapes dataset, over seeds.

Runs are single-threaded subprocesses of the command line, as many in parallel as there are cores. Finished runs are
reused, and killed ones resume.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xfm_fast.errors import XFMError
from xfm_fast.finetuning.recipe import STREAM, FinetuneRecipe, load_finetune_recipe
from xfm_fast.finetuning.run import open_task
from xfm_fast.io import read_json, write_bytes
from xfm_fast.reproduce import Progress, check_same_study
from xfm_fast.tasks.evaluation import METRICS_FILE
from xfm_fast.tasks.grounding import pixel_iou
from xfm_fast.tasks.task import Task
from xfm_fast.training.recipe import load_recipe

PRETRAINING = "pretrain_tiny_shapes"
OVERRIDES = (
    "model.patch_size=4", "model.num_masking_patches=24", "model.min_num_patches=4", "steps=1600", "optimizer.lr=3e-3",
    "optimizer.table_lr_mult=10",
)  # fmt: skip
"""Pretraining overrides: 4-pixel patches resolve shapes, and position tables need a large rate to learn boxes."""
STEM = "downstream-tiny-shapes"
HELD_OUT, KNOWN = "test", "known"
COLUMNS = {KNOWN: "known combinations", HELD_OUT: "held-out combinations"}
"""Evaluation splits, both of new scenes."""
# Overrides of every recipe.
_WORLD = "shapes.known=500"
# Training boxes among which the best constant one is searched.
_BOXES = 500


class Twin(NamedTuple):
    """A tiny task: recipe, metric, and target on the split `asked`."""

    recipe: str
    metric: str
    target: float | None = None
    asked: str = KNOWN


TWINS = (
    Twin("retrieval_tiny_shapes", "r_mean", 90),
    Twin("vqa_tiny_shapes", "exact_match", 75),
    Twin("nlvr2_tiny_shapes", "accuracy", 75),
    Twin("grounding_tiny_shapes", "accuracy", 80, HELD_OUT),
    Twin("captioning_tiny_shapes", "true_captions", 75),
    Twin("captioning_tiny_shapes", "true_shapes"),
    Twin("captioning_tiny_shapes", "true_relations"),
    Twin("captioning_tiny_shapes", "CIDEr-D"),
    Twin("text_tiny_shapes", "accuracy"),
    Twin("image_tiny_shapes", "top1"),
)


def run_tasks(
    out: Path,
    *,
    seeds: int = 1,
    jobs: int | None = None,
    overrides: Sequence[str] = OVERRIDES,
    on_change: Progress = lambda results: None,
) -> dict[str, Any]:
    """Pretrain once, then fine-tune and evaluate every twin with every seed; returns `read_results`.

    Runs are evaluated on new scenes with held-out and with known combinations. `overrides` are those of pretraining.
    `jobs` runs execute in parallel (default: one per core). A failed run raises `XFMError` with its output.
    """
    # Unknown names are refused before anything is written.
    load_recipe(PRETRAINING, overrides)
    check_same_study(out, tuple(overrides))
    world, pretrained = out / "shapes_world", out / PRETRAINING
    if not (pretrained / "model").is_dir():
        places = [f"data={world}", f"checkpoint.folder={pretrained}"]
        _run(out, PRETRAINING, 0, ["pretrain", PRETRAINING, *places, _WORLD, *overrides])

    def finetune(recipe: str, seed: int) -> None:
        if not all(_metrics_file(out, recipe, seed, split).is_file() for split in COLUMNS):
            places = [f"checkpoint.folder={_folder(out, recipe, seed)}", f"seed={seed}"]
            _run(out, recipe, seed, ["finetune", recipe, *_overrides(out, recipe), *places])
        on_change(read_results(out, seeds))

    plan = [(recipe, seed) for seed in range(seeds) for recipe in dict.fromkeys(twin.recipe for twin in TWINS)]
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        for done in [pool.submit(finetune, *each) for each in plan]:
            done.result()
    return read_results(out, seeds)


def _folder(out: Path, recipe: str, seed: int) -> Path:
    return out / f"seed-{seed}" / recipe


def _metrics_file(out: Path, recipe: str, seed: int, split: str) -> Path:
    return _folder(out, recipe, seed) / "evaluation" / split / METRICS_FILE


def _overrides(out: Path, recipe: str) -> list[str]:
    """Recipe overrides: pretrained model, dataset, and the split of known combinations."""
    init = f"init.checkpoint={out / PRETRAINING}"
    (test,) = load_finetune_recipe(recipe, [init]).data.splits[HELD_OUT]
    known = f"data.splits.{KNOWN}={test.replace(HELD_OUT, KNOWN)}"
    return [init, f"data.root={out / 'shapes_world'}", known, _WORLD]


def _run(out: Path, recipe: str, seed: int, command: Sequence[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    arguments = [sys.executable, "-m", "xfm_fast", *command]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        # CPU time does not depend on other load, wall time does.
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip()[-400:]
            raise XFMError(f"xfm-fast {' '.join(command)} ended with {process.returncode}: {last}")
    folder = out / "seconds" / recipe
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes({folder / f"{seed}.json": json.dumps(round(used.ru_utime + used.ru_stime, 1)).encode()})


def read_results(out: Path, seeds: int) -> dict[str, Any]:
    """Results of all finished runs in a folder: metric of every twin by split and seed, core seconds, missing runs."""
    rows, missing = [], []
    for twin in TWINS:
        by_seed: dict[str, dict[int, float]] = {split: {} for split in COLUMNS}
        for seed in range(seeds):
            for split, values in by_seed.items():
                path = _metrics_file(out, twin.recipe, seed, split)
                if path.is_file():
                    values[seed] = read_json(path)["metrics"][twin.metric]
                elif (twin.recipe, seed) not in missing:
                    missing.append((twin.recipe, seed))
        chance = _chance(out, twin) if any(by_seed.values()) else {}
        rows.append({**twin._asdict(), "by_seed": by_seed, "without_looking": chance})
    seconds = {
        folder.name: {int(path.stem): read_json(path) for path in sorted(folder.glob("*.json"))}
        for folder in sorted((out / "seconds").glob("*"))
    }
    pretraining = read_json(out / "pretraining.json")
    return {"splits": COLUMNS, "pretraining": pretraining, "rows": rows, "seconds": seconds, "missing": missing}


@cache
def _chance(out: Path, twin: Twin) -> dict[str, float]:
    """Metric by split of a random ranking or of the best constant answer of the training files."""
    recipe = load_finetune_recipe(twin.recipe, _overrides(out, twin.recipe))
    task = open_task(recipe)
    records = {split: task.records(recipe.paths_of(split), split) for split in COLUMNS}
    if recipe.task.kind == "retrieval":
        return {split: random_recall([len(record.caption) for record in of]) for split, of in records.items()}
    row = constant_answer(task, recipe)
    return {split: task.score([row] * len(of), of)[twin.metric] for split, of in records.items()}


def random_recall(captions: Sequence[int]) -> float:
    """Expected mean of R@1, R@5 and R@10 in both directions, in percent, for `captions` per image."""
    images, texts = len(captions), sum(captions)
    of_texts = [100 * min(1.0, k / images) for k in (1, 5, 10)]

    def missed(right: int, k: int) -> float:
        """Probability that none of the `right` texts is in the first `k`."""
        share = 1.0
        for place in range(k):
            share *= max(0, texts - right - place) / max(1, texts - place)
        return share

    of_images = [100 * sum(1 - missed(right, k) for right in captions) / images for k in (1, 5, 10)]
    return sum(of_texts + of_images) / 6


def constant_answer(task: Task[Any, Any, Any, Any], recipe: FinetuneRecipe) -> dict[str, Any]:
    """The most frequent answer, label or caption of the training files, or the box that overlaps most."""
    rows = task.rows(recipe.paths_of(STREAM))
    records = [record for each in rows for record in map(each.read, range(len(each)))]
    kind = recipe.task.kind
    if kind == "grounding":
        boxes = torch.tensor([record.bbox for record in records], dtype=torch.float64)
        met = [int((pixel_iou(box.expand_as(boxes), boxes) >= 0.5).sum()) for box in boxes[:_BOXES]]
        return {"bbox": boxes[max(range(len(met)), key=met.__getitem__)].tolist()}
    field = {"vqa": "answer", "captioning": "caption"}.get(kind, "label")
    values: Counter[Any] = Counter()
    for record in records:
        value = getattr(record, field)
        values.update(value if isinstance(value, tuple) else (value,))
    best = values.most_common(1)[0][0]
    return {"answer": best, "caption": best, "probabilities": {best: 1.0}}


def markdown(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    heads = ["recipe", "metric", *COLUMNS.values(), "target", "without looking", "minutes"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in (row for row in results["rows"] if any(row["by_seed"].values())):
        minutes = [seconds / 60 for seconds in results["seconds"].get(row["recipe"], {}).values()]
        target, chance = row["target"], row["without_looking"]
        lines.append("| " + " | ".join([
            f"`{row['recipe']}`", row["metric"],
            *(", ".join(f"{value:.1f}" for value in row["by_seed"][split].values()) for split in COLUMNS),
            "" if target is None else f"≥ {target:g}, {COLUMNS[row['asked']].partition(' ')[0]}",
            ", ".join(f"{chance[split]:.1f}" for split in COLUMNS if split in chance),
            f"{sum(minutes) / len(minutes):.1f}" if minutes else "",
        ]) + " |")  # fmt: skip
    text = (
        "One tiny model pretrained on the shapes world, fine-tuned for every task, a number for each seed; percent "
        "(CIDEr-D × 100) on new scenes, with the combinations of colour and shape of the training files, and with "
        'others, which no training file holds. "Without looking" is a random ranking for retrieval, and elsewhere the '
        "best constant answer of the training files, on known and on held-out combinations. Minutes are those of one "
        "core."
    )
    if results["pretraining"]:
        text += f" Overrides of the pretraining recipe: `{' '.join(results['pretraining'])}`."
    return "\n".join(["# The tasks of the paper in miniature", "", text, "", *lines, ""])
