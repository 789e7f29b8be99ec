"""Fine-tuning runs, and evaluation of existing weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from xfm_fast.finetuning.recipe import STREAM, Choice, FinetuneRecipe, resumed_steps
from xfm_fast.io import read_json, write_bytes
from xfm_fast.models.hub import resolve
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.evaluation import Evaluation, Metrics
from xfm_fast.tasks.task import Task, TaskModel, TaskOptions, explanation, make_task, task_of
from xfm_fast.tokenizer import CaptionTokenizer
from xfm_fast.training import checkpoints
from xfm_fast.training.checkpoints import full_state, save_model, seed_everything
from xfm_fast.training.distributed import Processes, join_processes
from xfm_fast.training.loop import autocast, seen_images, train
from xfm_fast.training.metrics import LOG_FILE, Show, read_log
from xfm_fast.training.optimizer import WeightAverage
from xfm_fast.training.recipe import override, position_after

RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class FinetuneResult:
    """Result of a run: `folder` of the selected weights, their `metrics` per split; a signal sets `interrupted`."""

    step: int
    folder: Path
    metrics: dict[str, Metrics] = field(default_factory=dict)
    interrupted: bool = False


def open_task(recipe: FinetuneRecipe, *, complete: bool = True) -> Task[Any, Any, Any, Any]:
    """Task of a recipe; `complete` reads missing options from the training files."""
    path = recipe.tokenizer_path()
    tokenizer = None if path is None else CaptionTokenizer.from_files(path)
    options = recipe.task
    if complete:
        # Tasks without options from training files are evaluated without them.
        learns = options.learns and type(options).completed is not TaskOptions.completed
        options = options.completed(
            recipe.paths_of(STREAM) if learns else [], Path(recipe.data.root)
        )
    return make_task(
        options,
        recipe.model,
        tokenizer,
        recipe.image_folder,
        official_pictures=recipe.data.official_pictures,
        hold_out=recipe.data.hold_out,
    )


def initial_model(recipe: FinetuneRecipe, task: Task[Any, Any, Any, Any]) -> TaskModel:
    """Task model initialised as in `init`."""
    model, init = task.build(), recipe.init
    if init.checkpoint is not None:
        load_weights(model, task, init.checkpoint)
    elif init.roberta or init.beit2:
        initialise(model, roberta=init.roberta, beit2=init.beit2)
    return model


def load_weights(model: TaskModel, task: Task[Any, Any, Any, Any], place: str | Path) -> bool:
    """Load a run, folder, Hub model or official checkpoint in place; false if the task's own parts stay random."""
    weights = resolve(place)
    kinds = (task.options.kind, *task.takes_weights_of)
    if (found := task_of(weights)) is not None and found.kind not in kinds:
        raise CheckpointError(
            f"{place} was fine-tuned for the task {found.kind}, and this is {task.options.kind}; give a pretrained "
            "model, or one of this task"
        )
    # Our names are the official ones, so that position tables are fitted to this model's size either way.
    state = read_state_dict(weights / MODEL_FILE if weights.is_dir() else weights)
    model.load_official(state)
    return not model.own_parts or any(name.startswith(model.own_parts) for name in state)


def finetune(
    recipe: FinetuneRecipe, *, resume: bool = True, show: Show | None = None
) -> FinetuneResult:
    """Run a recipe on one process or on every process that `torchrun` started.

    `recipe.checkpoint.folder` receives `recipe.json`, the files of `xfm_fast.training.loop.train` (`model/`: last
    weights), `best/` (weights selected by `recipe.choose`) and `evaluation/<split>/` with `metrics.json` and the
    benchmark's files. `xfm_fast.load` reads the weight folders. Data is validated before the first step; `show`
    receives the losses or the split, and the steps or records done and in all.
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
        records = {
            split: task.records(recipe.paths_of(split), split) for split in recipe.data.splits
        }
        for split, found in records.items():
            if not found:
                raise DataError(
                    f"data.splits.{split} holds no records; a metric needs at least one"
                )
            known, choose = task.metrics_of(found), recipe.choose
            if choose is not None and choose.split == split and choose.by not in known:
                raise _no_metric(choose, known)
        quarantine = Quarantine(
            folder / "quarantine" / f"{STREAM}.jsonl",
            tolerate_bad=recipe.data.bad_share,
            setting="data.bad_share",
        )
        files = task.training_rows(recipe.paths_of(STREAM))
        if processes.first:
            annotated = [each for each in files if isinstance(each, AnnotationRows)]
            for note in (note for each in annotated for note in each.notes):
                print(note, file=sys.stderr)
            _warn_of_overlap(annotated, records)
            _warn_of_trained(recipe.initial_folder, task, records)
        rows = RecordSet(files)
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
        found = (
            processes.from_first(lambda: checkpoints.newest(folder / "checkpoints"))
            if resume
            else None
        )
        done = 0
        if found is not None:
            world = found.state["world_size"]
            taken = found.state["batches"].get(STREAM, 0)
            done = position_after(
                taken, STREAM, found.state["recipe"], recipe, world, processes.world_size
            )
        saved = None if found is None else found.state
        recipe = resumed_steps(recipe, len(rows), processes.world_size, saved, done)
        seed_everything(recipe.seed)
        model = initial_model(recipe, task)
        explained = explanation(task)
        written = json.dumps(recipe.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"

        per_epoch = epoch_batches(
            len(rows), recipe.batch_size * processes.world_size, drop_last=task.drop_last
        )
        hook = _EpochEnd(
            recipe,
            task,
            records,
            processes,
            per_epoch,
            explained,
            show or (lambda text, done, of: None),
        )
        result = train(
            recipe, resume=resume, sources={STREAM: source}, model=model,
            objective=lambda model, batch, losses: task.losses_of(model, batch),
            explained_by=explained, on_step=hook, show=show,
            # Only once the folder is this run's: another one that works in it wrote its own.
            on_start=lambda: write_bytes({folder / RECIPE_FILE: written.encode()}),
        )  # fmt: skip
        if processes.first and (bad := sum(map(quarantine.count, files))):
            print(
                f"{bad} broken elements of training were left out; {quarantine.path} lists them",
                file=sys.stderr,
            )
        best = folder / "best"
        chosen = (
            best
            if (best / MODEL_FILE).is_file()
            else folder / ("model" if recipe.ema is None else "average")
        )
        if result.interrupted:
            return FinetuneResult(result.step, chosen, interrupted=True)
        task.options = _update_free(task_of(chosen) or task.options, task.options)
        weights = task.build().to(processes.device)
        load_weights(weights, task, chosen)
        metrics = {split: hook.evaluate(split, weights) for split in records}
        return FinetuneResult(result.step, chosen, metrics)


def _update_free(options: TaskOptions, recipe: TaskOptions) -> TaskOptions:
    """Options of weights, updated with the ones that a recipe may change."""
    chosen = {name: value for name in options.free if (value := getattr(recipe, name)) != "auto"}
    return options.model_copy(update=chosen)


def _no_metric(choose: Choice, known: Iterable[str]) -> ConfigError:
    names = ", ".join(known) or "none: its records hold no truth"
    return ConfigError(
        f"choose.by={choose.by} is no metric of {choose.split}; it has {names}; choose another, or null"
    )


def _warn_of_overlap(
    files: Sequence[AnnotationRows[Any]], splits: Mapping[str, Sequence[Any]]
) -> None:
    """Warn of splits that share images or texts with training."""
    for split, records in splits.items():
        texts = isinstance(records[0], (TextRecord, TextScoreRecord))
        what, shared = (
            ("texts", overlap_of_texts(files, records))
            if texts
            else ("images", overlap(files, records))
        )
        if shared.total:
            more = ", ..." if shared.total > len(shared.examples) else ""
            print(
                f"{shared.total} {what} of the split {split} are in the files of training too "
                f"({', '.join(shared.examples)}{more}), so its metrics do not say how the model does on new ones; take "
                "them out of one of the two",
                file=sys.stderr,
            )


def _warn_of_trained(
    weights: Path | None, task: Task[Any, Any, Any, Any], splits: Mapping[str, Sequence[Any]]
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
    task: Task[Any, Any, Any, Any]
    records: Mapping[str, list[Any]]
    processes: Processes
    per_epoch: int
    explained: dict[str, bytes]
    show: Show

    def evaluate(self, split: str, model: XFM) -> Metrics:
        """Metrics of a split."""
        folder = Path(self.recipe.checkpoint.folder, "evaluation", split)
        work = _evaluation(self.recipe, folder, self.processes, partial(self.show, split))
        return work.run(self.task, model, self.records[split])

    def __call__(self, step: int, model: XFM, average: WeightAverage | None) -> Metrics | None:
        choose, steps = self.recipe.choose, self.recipe.steps
        # Steps that were made before the number of processes changed are not whole epochs of now.
        begun = (
            steps - self.recipe.epochs * self.per_epoch
            if steps > self.recipe.epochs * self.per_epoch
            else 0
        )
        every = self.per_epoch * (1 if choose is None else choose.every)
        if choose is None or ((step - begun) % every and step != steps) or step <= begun:
            return None
        judged = model
        if average is not None or self.recipe.parallel == "fsdp":
            judged = self.task.build().to(self.processes.device)
            judged.load_state_dict(
                full_state(model, None if average is None else average.state_dict())
            )
        metrics = self.evaluate(choose.split, judged)
        self.explained |= explanation(self.task, self.task.settled(metrics))
        if choose.by not in metrics:
            raise _no_metric(choose, metrics)
        folder, key = Path(self.recipe.checkpoint.folder), f"{choose.split}/{choose.by}"

        def before() -> float | None:
            lines = read_log(folder / LOG_FILE) if (folder / LOG_FILE).is_file() else []
            return max(
                (line[key] for line in lines if key in line and line["step"] < step), default=None
            )

        earlier = self.processes.from_first(before)
        if earlier is None or metrics[choose.by] > earlier:
            seen = partial(fingerprint_of, folder, self.recipe.initial_folder)
            files = self.explained | self.processes.from_first(seen)
            save_model(judged, folder / "best", self.processes, files=files)
        return {f"{choose.split}/{name}": value for name, value in metrics.items()}


def evaluate(
    recipe: FinetuneRecipe,
    weights: str | Path,
    split: str,
    folder: str | Path,
    *,
    show: Show = lambda split, done, of: None,
) -> Metrics:
    """Metrics of weights on a split of a recipe, on one process or under `torchrun`.

    `weights` is a run, a weight folder, a Hub name or an official checkpoint (pretrained ones only for tasks without
    new parts, e.g. retrieval). `folder` receives `metrics.json` and the benchmark's files; a killed evaluation
    resumes there.
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
                f"{weights} lacks {', '.join(model.own_parts)}*, which the task {task.options.kind} trains; fine-tune "
                "it first: xfm-fast finetune"
            )
        return _evaluation(recipe, Path(folder), processes, partial(show, split)).run(
            task, model, records
        )


def _evaluation(
    recipe: FinetuneRecipe, folder: Path, processes: Processes, progress: Callable[[int, int], None]
) -> Evaluation:
    precision = partial(autocast, recipe, processes)
    return Evaluation(
        folder, processes, recipe.eval_batch_size, autocast=precision, progress=progress
    )


def recipe_of(run: Path, overrides: Iterable[str] = ()) -> FinetuneRecipe:
    """Recipe of a run with overrides; its folder is `run`, and it generates no dataset."""
    path = run / RECIPE_FILE
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{run} is no fine-tuning run: its {RECIPE_FILE} cannot be read ({error}); give a run, or --recipe too"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no recipe; copy the run again")
    values |= {"checkpoint": {"folder": str(run)}, "shapes": None}
    return FinetuneRecipe(**override(values, overrides))
