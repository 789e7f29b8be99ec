"""All fine-tuning tasks on a tiny pretrained model and the shapes dataset, over seeds.

Runs are single-threaded subprocesses of the command line, as many in parallel as there are cores. Finished runs are
reused, and killed ones resume.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from xfm_fast.errors import XFMError
from xfm_fast.finetuning.recipe import STREAM, FinetuneRecipe, load_finetune_recipe
from xfm_fast.finetuning.run import open_task
from xfm_fast.io import read_json
from xfm_fast.reproduce import Progress, check_same_study, page
from xfm_fast.tasks.evaluation import METRICS_FILE
from xfm_fast.tasks.grounding import pixel_iou
from xfm_fast.tasks.task import TASKS, Task
from xfm_fast.training.recipe import FINETUNING, load_recipe, recipe_names

PRETRAINING = "pretrain_tiny_shapes"
OVERRIDES = (
    "model.patch_size=4", "model.num_masking_patches=24", "model.min_num_patches=4", "steps=1600", "optimizer.lr=3e-3",
    "optimizer.table_lr_mult=10",
)  # fmt: skip
"""Pretraining overrides: 4-pixel patches resolve shapes, and position tables need a large rate to learn boxes."""
STEM = "downstream-tiny-shapes"
RECIPES = [name for name in recipe_names(FINETUNING) if name.endswith("_tiny_shapes")]
HELD_OUT, KNOWN = "test", "known"
COLUMNS = {KNOWN: "known combinations", HELD_OUT: "held-out combinations"}
"""Evaluation splits, both of new scenes."""
# Metrics by task; the first of the others.
_METRICS = {
    "captioning": ("true_captions", "true_shapes", "true_relations", "CIDEr-D"),
    "retrieval": ("r_mean",),
    "vqa": ("exact_match",),
}
# Overrides of every recipe.
_WORLD = "shapes.known=500"
# Training boxes among which the best constant one is searched.
_BOXES = 500


def run_tasks(
    out: Path,
    *,
    seeds: int = 1,
    jobs: int | None = None,
    overrides: Sequence[str] = OVERRIDES,
    on_change: Progress = lambda results: None,
) -> dict[str, Any]:
    """Pretrain once, then fine-tune and evaluate every recipe with every seed; returns `read_results`.

    Runs are evaluated on new scenes with held-out and with known combinations. `overrides` are those of pretraining.
    `jobs` runs execute in parallel (default: one per core). A failed run raises `XFMError` with its output.
    """
    # Unknown names are refused before anything is written.
    load_recipe(PRETRAINING, overrides)
    check_same_study(out, tuple(overrides))
    pretrained = out / PRETRAINING
    if not (pretrained / "model").is_dir():
        places = [f"data={out / 'shapes_world'}", f"checkpoint.folder={pretrained}"]
        _run(["pretrain", PRETRAINING, *places, _WORLD, *overrides])

    def finetune(recipe: str, seed: int) -> None:
        if not all(_metrics_file(out, recipe, seed, split).is_file() for split in COLUMNS):
            places = [f"checkpoint.folder={out / f'seed-{seed}' / recipe}", f"seed={seed}"]
            _run(["finetune", recipe, *_overrides(out, recipe), *places])
        on_change(read_results(out, seeds))

    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        for done in [pool.submit(finetune, recipe, seed) for seed in range(seeds) for recipe in RECIPES]:
            done.result()
    return read_results(out, seeds)


def _metrics_file(out: Path, recipe: str, seed: int, split: str) -> Path:
    return out / f"seed-{seed}" / recipe / "evaluation" / split / METRICS_FILE


def _overrides(out: Path, recipe: str) -> list[str]:
    """Recipe overrides: pretrained model, dataset, and the split of known combinations."""
    init = f"init.checkpoint={out / PRETRAINING}"
    (test,) = load_finetune_recipe(recipe, [init]).data.splits[HELD_OUT]
    known = f"data.splits.{KNOWN}={test.replace(HELD_OUT, KNOWN)}"
    return [init, f"data.root={out / 'shapes_world'}", known, _WORLD]


def _run(command: Sequence[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    arguments = [sys.executable, "-m", "xfm_fast", *command]
    done = subprocess.run(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip()[-400:]
        raise XFMError(f"xfm-fast {' '.join(command)} ended with {done.returncode}: {last}")


def read_results(out: Path, seeds: int) -> dict[str, Any]:
    """Results of all finished runs in a folder: every metric by split and seed, and missing runs."""
    rows, missing = [], []
    for recipe in RECIPES:
        found = {split: {} for split in COLUMNS}
        for seed in range(seeds):
            for split, by_seed in found.items():
                if (path := _metrics_file(out, recipe, seed, split)).is_file():
                    by_seed[seed] = read_json(path)["metrics"]
                elif (recipe, seed) not in missing:
                    missing.append((recipe, seed))
        if any(found.values()):
            for metric, chance in _without_images(out, recipe).items():
                by_seed = {split: {seed: each[metric] for seed, each in of.items()} for split, of in found.items()}
                rows.append({"recipe": recipe, "metric": metric, "by_seed": by_seed, "without_looking": chance})
    pretraining = read_json(out / "pretraining.json")
    return {"splits": COLUMNS, "pretraining": pretraining, "rows": rows, "missing": missing}


@cache
def _without_images(out: Path, name: str) -> dict[str, dict[str, float]]:
    """Metrics by split of a random ranking, or of the best constant answer of the training files."""
    recipe = load_finetune_recipe(name, _overrides(out, name))
    task, kind = open_task(recipe), recipe.task.kind
    records = {split: task.records(recipe.paths_of(split), split) for split in COLUMNS}
    if kind == "retrieval":
        return {"r_mean": {split: random_recall([len(each.caption) for each in of]) for split, of in records.items()}}
    row = constant_answer(task, recipe)
    scores = {split: task.score([row] * len(of), of) for split, of in records.items()}
    metrics = _METRICS.get(kind, TASKS[kind].metrics[:1])
    return {metric: {split: of[metric] for split, of in scores.items()} for metric in metrics}


def random_recall(captions: Sequence[int]) -> float:
    """Expected mean of R@1, R@5 and R@10 in both directions, in percent, for `captions` per image."""
    images, texts = len(captions), sum(captions)
    recalls = []
    for k in (1, 5, 10):
        recalls.append(min(1.0, k / images))
        for right in captions:
            missed = 1.0
            for place in range(k):
                missed *= max(0, texts - right - place) / max(1, texts - place)
            recalls.append((1 - missed) / images)
    return 100 * sum(recalls) / 6


def constant_answer(task: Task[Any, Any, Any, Any], recipe: FinetuneRecipe) -> dict[str, Any]:
    """The most frequent answer, label or caption of the training files, or the box that overlaps most."""
    records = [rows.read(row) for rows in task.rows(recipe.paths_of(STREAM)) for row in range(len(rows))]
    kind = recipe.task.kind
    if kind == "grounding":
        boxes = torch.tensor([record.bbox for record in records], dtype=torch.float64)
        hits = [int((pixel_iou(box.expand_as(boxes), boxes) >= 0.5).sum()) for box in boxes[:_BOXES]]
        return {"bbox": boxes[max(range(len(hits)), key=hits.__getitem__)].tolist()}
    values: Counter[Any] = Counter()
    for record in records:
        value = getattr(record, {"vqa": "answer", "captioning": "caption"}.get(kind, "label"))
        values.update(value if isinstance(value, tuple) else (value,))
    best = values.most_common(1)[0][0]
    return {"answer": best, "caption": best, "probabilities": {best: 1.0}}


def markdown(results: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    table = [["recipe", "metric", *COLUMNS.values(), "without looking"]]
    for row in results["rows"]:
        seeds = [", ".join(f"{value:.1f}" for value in row["by_seed"][split].values()) for split in COLUMNS]
        chance = ", ".join(f"{row['without_looking'][split]:.1f}" for split in COLUMNS)
        table.append([f"`{row['recipe']}`", row["metric"], *seeds, chance])
    text = (
        "One tiny model pretrained on the shapes dataset, fine-tuned for every task, a number for each seed; percent "
        "(CIDEr-D × 100) on new scenes, with the combinations of colour and shape of the training files, and with "
        'others, which no training file has. "Without looking" is a random ranking for retrieval, and elsewhere the '
        "best constant answer of the training files, on known and on held-out combinations."
    )
    if results["pretraining"]:
        text += f" Overrides of the pretraining recipe: `{' '.join(results['pretraining'])}`."
    return page("The tasks of the paper in miniature", text, table)
