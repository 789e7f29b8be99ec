"""Fine-tuning runs, and evaluation of existing weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from xfm_fast.checkpoint import initialise, read_state_dict
from xfm_fast.checkpoint.files import MODEL_FILE
from xfm_fast.data.annotations import (
    AnnotationRows,
    TextRecord,
    TextScoreRecord,
    image_names,
    overlap,
    overlap_of_texts,
)
from xfm_fast.data.fingerprints import fingerprint_of, trained_on
from xfm_fast.data.records import RecordSet
from xfm_fast.data.streams import Quarantine, ShuffledBatches, epoch_batches
from xfm_fast.errors import CheckpointError, ConfigError, DataError
from xfm_fast.finetuning.recipe import STREAM, Choice, FinetuneRecipe, open_task, resumed_steps
from xfm_fast.io import read_json, write_bytes
from xfm_fast.models.hub import resolve
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.evaluation import Evaluation, Metrics
from xfm_fast.tasks.models import TaskModel
from xfm_fast.tasks.task import Task, TaskOptions, explanation, task_of
from xfm_fast.training import checkpoints
from xfm_fast.training.checkpoints import full_state, save_model, seed_everything
from xfm_fast.training.distributed import Processes, join_processes
from xfm_fast.training.loop import autocast, seen_images, train
from xfm_fast.training.metrics import LOG_FILE, Show, read_log
from xfm_fast.training.optimizer import WeightAverage
from xfm_fast.training.recipe import override

RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class FinetuneResult:
    """Selected weights of a run and their `metrics` per split; a signal sets `interrupted`."""

    step: int
    folder: Path
    metrics: dict[str, Metrics] = field(default_factory=dict)
    interrupted: bool = False


def initial_model(recipe: FinetuneRecipe, task: Task[Any]) -> TaskModel:
    """Build the task model and initialise it as in `init`."""
    model, init = task.build(), recipe.init
    if init.checkpoint is not None:
        load_weights(model, task, init.checkpoint)
    elif init.roberta or init.beit2:
        initialise(model, roberta=init.roberta, beit2=init.beit2)
    return model


def load_weights(model: TaskModel, task: Task[Any], source: str | Path) -> bool:
    """Load any kind of weights in place; return false if new modules stay random."""
    weights = resolve(source)
    options, kind = task_of(weights), task.options.kind
    if options is not None and options.kind not in (kind, *task.takes_weights_of):
        raise CheckpointError(
            f"{source} was fine-tuned for the task {options.kind}, and this is {kind}; give a pretrained "
            "model, or one of this task"
        )
    # Our names are accepted as official ones, so that position tables are fitted to this model's
    # size either way.
    state = read_state_dict(weights / MODEL_FILE if weights.is_dir() else weights)
    model.load_official(state)
    return not model.new_modules or any(name.startswith(model.new_modules) for name in state)


def finetune(
    recipe: FinetuneRecipe, *, resume: bool = True, show: Show | None = None
) -> FinetuneResult:
    """Run a recipe on one process or on every process that `torchrun` started.

    `recipe.checkpoint.folder` receives `recipe.json`, the files of `xfm_fast.training.loop.train`
    (`model/`: last weights), `best/` (weights selected by `recipe.choose`) and
    `evaluation/<split>/` with `metrics.json` and the benchmark's files. `xfm_fast.load` reads the
    weight folders. Data is validated before the first step; `show` receives the losses or the
    split, and the steps or records done and in all.
    """
    if not recipe.epochs and not recipe.steps:
        raise ConfigError(
            "epochs=0 trains nothing; evaluate weights as they are: xfm-fast evaluate CHECKPOINT --recipe R"
        )
    folder = Path(recipe.checkpoint.folder)
    with join_processes(recipe.device) as processes:
        processes.from_first(recipe.make_world)
        recipe.check_machine()
        task = open_task(recipe)
        recipe = recipe.model_copy(update={"task": task.options})
        files = task.training_rows(recipe.paths_of(STREAM))
        records = {
            split: task.records(recipe.paths_of(split), split) for split in recipe.data.splits
        }
        _check_data(recipe, task, files, records, quiet=not processes.first)
        rows = RecordSet(files)
        newest = None
        if resume:
            newest = processes.from_first(lambda: checkpoints.newest(folder / "checkpoints"))
        saved = None if newest is None else newest.state
        recipe = resumed_steps(recipe, len(rows), processes.world_size, saved)

        seed_everything(recipe.seed)
        model = initial_model(recipe, task)
        epoch_end = _EpochEnd(
            recipe, task, records, processes, len(rows), explanation(task), show or _show_nothing
        )
        quarantine = Quarantine(
            folder / "quarantine" / f"{STREAM}.jsonl",
            tolerate_bad=recipe.data.bad_share,
            setting="data.bad_share",
        )
        source = ShuffledBatches(
            rows,
            task,
            rows=recipe.micro_batch_size(STREAM),
            seed=recipe.seed,
            rank=processes.rank,
            world_size=processes.world_size,
            drop_last=task.drop_last,
            quarantine=quarantine,
            observer=seen_images(folder, STREAM, processes),
        )
        recipe_json = json.dumps(recipe.model_dump(mode="json"), indent=1, ensure_ascii=False)
        result = train(
            recipe,
            resume=resume,
            sources={STREAM: source},
            model=model,
            objective=lambda model, batch, losses: task.losses_of(model, batch),
            explained_by=epoch_end.explained,
            on_step=epoch_end,
            show=show,
            # Only once the folder is locked: another run that works in it wrote its own.
            on_start=lambda: write_bytes({folder / RECIPE_FILE: f"{recipe_json}\n".encode()}),
        )
        if processes.first and (broken := sum(map(quarantine.count, files))):
            print(
                f"{broken} broken elements of training were left out; {quarantine.path} lists them",
                file=sys.stderr,
            )
        weights = _selected_weights(recipe)
        if result.interrupted:
            return FinetuneResult(result.step, weights, interrupted=True)
        task.options = _update_free(task_of(weights) or task.options, task.options)
        selected = task.build().to(processes.device)
        load_weights(selected, task, weights)
        metrics = {split: epoch_end.evaluate(split, selected) for split in records}
        return FinetuneResult(result.step, weights, metrics)


def _show_nothing(text: str, done: int, total: int) -> None:
    pass


def _selected_weights(recipe: FinetuneRecipe) -> Path:
    """Return the folder of the weights that `choose` selected, else of the last ones."""
    folder = Path(recipe.checkpoint.folder)
    if (folder / "best" / MODEL_FILE).is_file():
        return folder / "best"
    return folder / ("model" if recipe.ema is None else "average")


def _update_free(options: TaskOptions, recipe: TaskOptions) -> TaskOptions:
    """Update the options of weights with the ones that a recipe may change."""
    changes = {name: getattr(recipe, name) for name in options.free}
    return options.model_copy(
        update={name: value for name, value in changes.items() if value != "auto"}
    )


def _no_metric(choose: Choice, metrics: Iterable[str]) -> ConfigError:
    names = ", ".join(metrics) or "none: its records hold no truth"
    return ConfigError(
        f"choose.by={choose.by} is not a metric of {choose.split}; it has {names}; choose another, or null"
    )


def _check_data(
    recipe: FinetuneRecipe,
    task: Task[Any],
    files: Sequence[Any],
    splits: Mapping[str, Sequence[Any]],
    *,
    quiet: bool,
) -> None:
    """Check that splits have records and the metric of `choose`; warn of splits that training saw."""
    choose = recipe.choose
    for split, records in splits.items():
        if not records:
            raise DataError(f"data.splits.{split} holds no records; a metric needs at least one")
        metrics = task.metrics_of(records)
        if choose is not None and choose.split == split and choose.by not in metrics:
            raise _no_metric(choose, metrics)
    if quiet:
        return
    annotated = [rows for rows in files if isinstance(rows, AnnotationRows)]
    for rows in annotated:
        for note in rows.notes:
            print(note, file=sys.stderr)
    _warn_of_overlap(annotated, splits)
    _warn_of_trained(recipe.initial_folder, task, splits)


def _warn_of_overlap(
    files: Sequence[AnnotationRows[Any]], splits: Mapping[str, Sequence[Any]]
) -> None:
    """Warn of splits that share images or texts with training."""
    for split, records in splits.items():
        if isinstance(records[0], (TextRecord, TextScoreRecord)):
            what, shared = "texts", overlap_of_texts(files, records)
        else:
            what, shared = "images", overlap(files, records)
        if shared.total:
            more = ", ..." if shared.total > len(shared.examples) else ""
            print(
                f"{shared.total} {what} of the split {split} are in the files of training too "
                f"({', '.join(shared.examples)}{more}), so its metrics do not say how the model does on new ones; take "
                "them out of one of the two",
                file=sys.stderr,
            )


def _warn_of_trained(
    weights: Path | None, task: Task[Any], splits: Mapping[str, Sequence[Any]]
) -> None:
    """Warn of splits with images that the weights in a folder have been trained on."""
    if weights is None or not task.image_files:
        return
    for split, records in splits.items():
        names = [*dict.fromkeys(image_names(records))]
        if shared := trained_on(weights, names, task.images):
            print(
                f"{weights} was trained on {len(shared)} of the {len(names)} images of the split {split} "
                f"({', '.join(shared[:3])}{', ...' * (len(shared) > 3)}), so its metrics do not say how the model does "
                "on new ones; hold them out there too (streams.NAME.hold_out, data.hold_out), or name another split",
                file=sys.stderr,
            )


@dataclass
class _EpochEnd:
    """Evaluation after an epoch and selection of the best weights."""

    recipe: FinetuneRecipe
    task: Task[Any]
    records: Mapping[str, list[Any]]
    processes: Processes
    rows: int
    explained: dict[str, bytes]
    show: Show

    def evaluate(self, split: str, model: XFM) -> Metrics:
        """Compute the metrics of a split."""
        folder = Path(self.recipe.checkpoint.folder, "evaluation", split)
        work = _evaluation(self.recipe, folder, self.processes, split, self.show)
        return work.run(self.task, model, self.records[split])

    def _is_due(self, step: int, choose: Choice) -> bool:
        """Return whether the step ends an epoch to evaluate, or the run."""
        recipe = self.recipe
        batch = recipe.batch_size * self.processes.world_size
        epoch = epoch_batches(self.rows, batch, drop_last=self.task.drop_last)
        # Steps that were made before the number of processes changed are not whole epochs of now.
        start = max(recipe.steps - recipe.epochs * epoch, 0)
        ends = (step - start) % (epoch * choose.every) == 0 or step == recipe.steps
        return step > start and ends

    def __call__(self, step: int, model: XFM, average: WeightAverage | None) -> Metrics | None:
        choose, processes = self.recipe.choose, self.processes
        if choose is None or not self._is_due(step, choose):
            return None
        evaluated = model
        if average is not None or self.recipe.parallel == "fsdp":
            evaluated = self.task.build().to(processes.device)
            averages = None if average is None else average.state_dict()
            evaluated.load_state_dict(full_state(model, averages))
        metrics = self.evaluate(choose.split, evaluated)
        self.explained |= explanation(self.task, self.task.settled(metrics))
        if choose.by not in metrics:
            raise _no_metric(choose, metrics)
        folder, key = Path(self.recipe.checkpoint.folder), f"{choose.split}/{choose.by}"

        def best_before() -> float | None:
            lines = read_log(folder / LOG_FILE) if (folder / LOG_FILE).is_file() else []
            values = [line[key] for line in lines if key in line and line["step"] < step]
            return max(values, default=None)

        best = processes.from_first(best_before)
        if best is None or metrics[choose.by] > best:
            fingerprints = partial(fingerprint_of, folder, self.recipe.initial_folder)
            files = self.explained | processes.from_first(fingerprints)
            save_model(evaluated, folder / "best", processes, files=files)
        return {f"{choose.split}/{name}": value for name, value in metrics.items()}


def evaluate(
    recipe: FinetuneRecipe,
    weights: str | Path,
    split: str,
    folder: str | Path,
    *,
    show: Show = _show_nothing,
) -> Metrics:
    """Compute the metrics of weights on a split of a recipe, on one process or under `torchrun`.

    `weights` is a run, a weight folder, a Hub name or an official checkpoint (pretrained ones only
    for tasks without new parts, e.g. retrieval). `folder` receives `metrics.json` and the
    benchmark's files; a killed evaluation resumes there.
    """
    with join_processes(recipe.device) as processes:
        processes.from_first(recipe.make_world)
        recipe.check_device()
        options = task_of(resolve(weights))
        if options is not None and options.kind == recipe.task.kind:
            # Class names and answers come from the weights.
            recipe = recipe.model_copy(update={"task": _update_free(options, recipe.task)})
        task = open_task(recipe, complete=options is None)
        records = task.records(recipe.paths_of(split), split)
        if processes.first:
            _warn_of_trained(resolve(weights), task, {split: records})
        model = task.build().to(processes.device)
        if not load_weights(model, task, weights):
            raise CheckpointError(
                f"{weights} lacks {', '.join(model.new_modules)}*, which the task {task.options.kind} trains; "
                "fine-tune it first: xfm-fast finetune"
            )
        work = _evaluation(recipe, Path(folder), processes, split, show)
        return work.run(task, model, records)


def _evaluation(
    recipe: FinetuneRecipe, folder: Path, processes: Processes, split: str, show: Show
) -> Evaluation:
    return Evaluation(
        folder,
        processes,
        recipe.eval_batch_size,
        autocast=partial(autocast, recipe, processes),
        progress=partial(show, split),
    )


def recipe_of(run: Path, overrides: Iterable[str] = ()) -> FinetuneRecipe:
    """Read the recipe of a run with overrides; its folder is `run`, and it generates no dataset."""
    path = run / RECIPE_FILE
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{run} is not a fine-tuning run: its {RECIPE_FILE} cannot be read ({error}); give a run, or --recipe too"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no recipe; copy the run again")
    values |= {"checkpoint": {"folder": str(run)}, "shapes": None}
    return FinetuneRecipe(**override(values, overrides))
