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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xfm_fast.checkpoint.files import write_bytes
from xfm_fast.data.shapes.world import WORLD_FILE
from xfm_fast.documents import read_json
from xfm_fast.errors import XFMError
from xfm_fast.finetuning.recipe import STREAM, FinetuneRecipe, load_finetune_recipe
from xfm_fast.finetuning.run import open_task
from xfm_fast.models.xfm import XFM
from xfm_fast.reproduce.evaluation import HeldOut, shape_probe
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
PROBE_FILE = "shape-probe-tiny-shapes.json"
PRETRAINING_FILE = "pretraining.json"
HELD_OUT, KNOWN = "test", "known"
COLUMNS = {KNOWN: "known combinations", HELD_OUT: "held-out combinations"}
"""Evaluation splits, both of new scenes."""
# Overrides of every recipe.
_WORLD = "shapes.known=500"
# Training boxes among which the best constant one is looked for.
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


@dataclass(frozen=True)
class Table:
    """Results of a study."""

    values: dict[Twin, dict[str, dict[int, float]]]  # of every twin, by split and seed
    chance: dict[Twin, dict[str, float]]  # metric of a constant or random answer, by twin and split
    seconds: dict[str, dict[int, float]]  # core seconds by recipe (or pretraining) and seed
    missing: tuple[tuple[str, int], ...]  # unfinished recipes and seeds
    pretraining: tuple[str, ...] = ()  # overrides of the pretraining recipe


def run_downstream(
    out: Path,
    *,
    seeds: int = 1,
    jobs: int | None = None,
    pretraining: Sequence[str] = OVERRIDES,
    on_change: Callable[[Table], None] = lambda table: None,
) -> Table:
    """Pretrain once, probe the image tokens, then fine-tune and evaluate every twin with every seed.

    Runs are evaluated on new scenes with held-out and with known combinations. `jobs` runs execute in parallel
    (default: one per core). A failed run raises `XFMError` with its output.
    """
    if seeds < 1:
        raise XFMError(f"seeds={seeds}; at least one is needed")
    # What the recipe does not know is refused before anything is written.
    load_recipe(PRETRAINING, pretraining)
    if (recorded := _pretraining(out)) is None:
        out.mkdir(parents=True, exist_ok=True)
        write_bytes({out / PRETRAINING_FILE: json.dumps(pretraining).encode()})
    elif recorded != tuple(pretraining):
        raise XFMError(
            f"{out} holds a study with the pretraining overrides {' '.join(recorded) or '(none)'}, not "
            f"{' '.join(pretraining) or '(none)'}; repeat these, or give another folder"
        )
    world, pretrained = out / "shapes_world", out / PRETRAINING
    if not (pretrained / "model").is_dir():
        places = [f"data={world}", f"checkpoint.folder={pretrained}"]
        _run(out, PRETRAINING, 0, ["pretrain", PRETRAINING, *places, _WORLD, *pretraining])
    if not (out / PROBE_FILE).is_file():
        write_bytes({out / PROBE_FILE: (json.dumps(_probed(world, pretrained), indent=1) + "\n").encode()})
    plan = [(recipe, seed) for seed in range(seeds) for recipe in dict.fromkeys(twin.recipe for twin in TWINS)]

    def train(recipe: str, seed: int) -> None:
        if not all(_metrics_file(out, recipe, seed, split).is_file() for split in COLUMNS):
            places = [f"checkpoint.folder={_folder(out, recipe, seed)}", f"seed={seed}"]
            _run(out, recipe, seed, ["finetune", recipe, *_overrides(out, recipe), *places])
        on_change(read_table(out, seeds))

    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        for done in [pool.submit(train, *each) for each in plan]:
            done.result()
    return read_table(out, seeds)


def _pretraining(out: Path) -> tuple[str, ...] | None:
    """Pretraining overrides recorded in the folder; None for a new folder."""
    path = out / PRETRAINING_FILE
    return tuple(read_json(path)) if path.is_file() else None


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


def _probed(world: Path, pretrained: Path) -> dict[str, float]:
    """Shape probe of the pretrained image tokens."""
    made = read_json(world / WORLD_FILE)
    model = XFM.from_pretrained(pretrained / "model").eval()
    return shape_probe(model, HeldOut(made["seed"], made["resolution"]))


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


def read_table(out: Path, seeds: int) -> Table:
    """Results of all finished runs in a folder."""
    values: dict[Twin, dict[str, dict[int, float]]] = {twin: {split: {} for split in COLUMNS} for twin in TWINS}
    missing: list[tuple[str, int]] = []
    for twin, seed, split in product(TWINS, range(seeds), COLUMNS):
        path = _metrics_file(out, twin.recipe, seed, split)
        if path.is_file():
            values[twin][split][seed] = json.loads(path.read_text())["metrics"][twin.metric]
        elif (twin.recipe, seed) not in missing:
            missing.append((twin.recipe, seed))
    seconds = {
        folder.name: {int(path.stem): json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        for folder in sorted((out / "seconds").glob("*"))
    }
    chance = {twin: _chance(out, twin) for twin, of_split in values.items() if any(of_split.values())}
    return Table(values, chance, seconds, tuple(missing), _pretraining(out) or ())


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


def markdown(table: Table) -> str:
    """The table as Markdown."""
    heads = ["recipe", "metric", *COLUMNS.values(), "target", "without looking", "minutes"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for twin in (twin for twin in TWINS if any(table.values[twin].values())):
        minutes = [seconds / 60 for seconds in table.seconds.get(twin.recipe, {}).values()]
        of_split = table.chance.get(twin, {})
        target = "" if twin.target is None else f"≥ {twin.target:g}, {COLUMNS[twin.asked].partition(' ')[0]}"
        lines.append("| " + " | ".join([
            f"`{twin.recipe}`", twin.metric,
            *(", ".join(f"{value:.1f}" for value in table.values[twin][split].values()) for split in COLUMNS),
            target,
            ", ".join(f"{of_split[split]:.1f}" for split in COLUMNS if split in of_split),
            f"{sum(minutes) / len(minutes):.1f}" if minutes else "",
        ]) + " |")  # fmt: skip
    text = (
        "One tiny model pretrained on the shapes world, fine-tuned for every task, a number for each seed; percent "
        "(CIDEr-D × 100) on new scenes, with the combinations of colour and shape of the training files, and with "
        'others, which no training file holds. "Without looking" is a random ranking for retrieval, and elsewhere the '
        "best constant answer of the training files, on known and on held-out combinations. Minutes are those of one "
        "core."
    )
    if table.pretraining:
        text += f" Overrides of the pretraining recipe: `{' '.join(table.pretraining)}`."
    return "\n".join(["# The tasks of the paper in miniature", "", text, "", *lines, ""])


def save(table: Table, folder: Path) -> list[Path]:
    """Write the Markdown page and the JSON atomically."""
    numbers = [
        {
            "recipe": twin.recipe, "metric": twin.metric, "target": twin.target, "asked": twin.asked,
            "by_seed": table.values[twin], "without_looking": table.chance.get(twin, {}),
        }
        for twin in TWINS
    ]  # fmt: skip
    content = {
        "splits": COLUMNS, "pretraining": table.pretraining, "rows": numbers, "seconds": table.seconds,
        "missing": table.missing,
    }  # fmt: skip
    written = {folder / f"{STEM}.md": markdown(table), folder / f"{STEM}.json": json.dumps(content, indent=1) + "\n"}
    write_bytes({path: text.encode() for path, text in written.items()})
    return list(written)
