"""All fine-tuning tasks on a tiny pretrained model and the shapes dataset, over seeds.

Runs are single-threaded subprocesses of the command line, as many in parallel as there are cores.
Finished runs are reused, and killed ones resume.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xfm_fast.errors import XFMError
from xfm_fast.io import read_json
from xfm_fast.reproduce import Progress, check_same_study, page
from xfm_fast.tasks.evaluation import METRICS_FILE
from xfm_fast.tasks.task import TASKS
from xfm_fast.training.recipe import FINETUNING, load_recipe, read_recipe, recipe_names

PRETRAINING = "pretrain_tiny_shapes"
OVERRIDES = (
    "model.patch_size=4",
    "model.num_masking_patches=24",
    "model.min_num_patches=4",
    "steps=1600",
    "optimizer.lr=3e-3",
    "optimizer.table_lr_mult=10",
)
"""Pretraining overrides: 4-pixel patches resolve shapes, and position tables need a large rate to learn boxes."""
STEM = "downstream-tiny-shapes"
RECIPES = [name for name in recipe_names(FINETUNING) if name.endswith("_tiny_shapes")]
COLUMNS = {"known": "known combinations", "test": "held-out combinations"}
"""Evaluation splits, both of new scenes."""
# Reported metrics other than the first of a task.
_METRIC = {"retrieval": "r_mean", "vqa": "exact_match"}
# Overrides of every recipe.
_WORLD = "shapes.known=500"


def run_tasks(
    out: Path,
    *,
    seeds: int = 1,
    overrides: Sequence[str] = OVERRIDES,
    on_change: Progress = lambda results: None,
) -> dict[str, Any]:
    """Pretrain once, then fine-tune and evaluate every recipe with every seed; returns `read_results`.

    Runs are evaluated on new scenes with held-out and with known combinations. `overrides` are those of
    pretraining. A failed run raises `XFMError` with its output.
    """
    # Unknown names are refused before anything is written.
    load_recipe(PRETRAINING, overrides)
    check_same_study(out, tuple(overrides))
    pretrained = out / PRETRAINING
    if not (pretrained / "model").is_dir():
        paths = [f"data={out / 'shapes_world'}", f"checkpoint.folder={pretrained}"]
        _run(["pretrain", PRETRAINING, *paths, _WORLD, *overrides])

    def finetune(recipe: str, seed: int) -> None:
        if not all(_metrics_file(out, recipe, seed, split).is_file() for split in COLUMNS):
            test: str = read_recipe(recipe, FINETUNING)["data"]["splits"]["test"]
            changes = {
                "init.checkpoint": pretrained,
                "data.root": out / "shapes_world",
                "seed": seed,
                "data.splits.known": test.replace("test", "known"),
                "checkpoint.folder": out / f"seed-{seed}" / recipe,
            }
            settings = [f"{key}={value}" for key, value in changes.items()]
            _run(["finetune", recipe, _WORLD, *settings])
        on_change(read_results(out, seeds))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = [
            pool.submit(finetune, recipe, seed) for seed in range(seeds) for recipe in RECIPES
        ]
        for future in futures:
            future.result()
    return read_results(out, seeds)


def _metrics_file(out: Path, recipe: str, seed: int, split: str) -> Path:
    return out / f"seed-{seed}" / recipe / "evaluation" / split / METRICS_FILE


def _run(command: Sequence[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.run(
        [sys.executable, "-m", "xfm_fast", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if process.returncode:
        output = process.stderr.decode(errors="replace").strip()[-400:]
        raise XFMError(f"xfm-fast {' '.join(command)} ended with {process.returncode}: {output}")


def read_results(out: Path, seeds: int) -> dict[str, Any]:
    """Read the metric of all finished runs in a folder, by split and seed, and list missing runs."""
    rows, missing = [], []
    for recipe in RECIPES:
        task = recipe.removesuffix("_tiny_shapes")
        metric = _METRIC.get(task, TASKS[task].metrics[0])
        by_split: dict[str, dict[int, float]] = {split: {} for split in COLUMNS}
        for seed in range(seeds):
            for split, by_seed in by_split.items():
                path = _metrics_file(out, recipe, seed, split)
                if path.is_file():
                    by_seed[seed] = read_json(path)["metrics"][metric]
            if any(seed not in by_seed for by_seed in by_split.values()):
                missing.append((recipe, seed))
        if any(by_split.values()):
            rows.append({"recipe": recipe, "metric": metric, "by_seed": by_split})
    return {
        "splits": COLUMNS,
        "pretraining": read_json(out / "pretraining.json"),
        "rows": rows,
        "missing": missing,
    }


def markdown(results: dict[str, Any]) -> str:
    """Write the results as a Markdown page."""
    table = [["recipe", "metric", *COLUMNS.values()]]
    for row in results["rows"]:
        cells = [f"`{row['recipe']}`", row["metric"]]
        for split in COLUMNS:
            values = row["by_seed"][split].values()
            cells.append(", ".join(f"{value:.1f}" for value in values))
        table.append(cells)
    text = (
        "One tiny model pretrained on the shapes dataset, fine-tuned for every task, a value for each seed; percent "
        "(CIDEr-D × 100) on new scenes, with combinations of colour and shape from the training files, and with "
        f"combinations that no training file has. Overrides of pretraining: `{' '.join(results['pretraining'])}`."
    )
    return page("The tasks of the paper in miniature", text, table)
