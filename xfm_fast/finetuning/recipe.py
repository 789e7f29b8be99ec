"""Fine-tuning recipes: a task, its data and the run fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from xfm_fast.data.streams import epoch_batches
from xfm_fast.errors import ConfigError
from xfm_fast.finetuning.official import from_official, is_official
from xfm_fast.io import is_plain_name
from xfm_fast.tasks.task import TASKS, AnyTask, make_task
from xfm_fast.tokenizer import CaptionTokenizer
from xfm_fast.training.recipe import FINETUNING, Run, fit_auto, override, read_recipe, vocabulary_of
from xfm_fast.training.recipe_fields import Paths, Section

STREAM = "train"
"""Name of the only stream of a fine-tuning run."""


class DataSection(Section):
    """Data files of a task. Relative paths refer to `root`; glob patterns such as `*.json` are expanded."""

    root: str = Field(default=".", description="folder of all relative paths")
    images: str | None = Field(
        default="", description="folder of relative image paths; null: that of the training file"
    )
    train: Paths = Field(description="files or folders to train on")
    splits: dict[str, Paths] = Field(default={}, description="files or folders to evaluate on, by name: val, test, ...")
    official_pictures: bool = Field(
        default=False,
        description="ignore EXIF orientation and transparency, as the official code does; by default images are "
        "upright and on white",
    )
    bad_share: float = Field(
        default=0.01, ge=0, le=1, description="share of broken elements per file at which training stops"
    )

    @field_validator("splits")
    @classmethod
    def _splits_name_folders(cls, splits: dict[str, Paths]) -> dict[str, Paths]:
        if wrong := [name for name in splits if not is_plain_name(name)]:
            raise ValueError(f"the split {wrong[0]!r} gives its results a folder; name it without slashes or dots")
        return splits


class Choice(Section):
    """Selection of the best weights."""

    by: str = Field(description="metric of the task; higher is better")
    split: str = Field(default="val", description="split to evaluate; retrieval officially uses `test`")
    every: int = Field(default=1, gt=0, description="epochs between evaluations; the last epoch is always evaluated")


class FinetuneRecipe(Run):
    """A fine-tuning run; fields of every run are in `xfm_fast.training.recipe.Run`."""

    task: AnyTask
    tokenizer: str | None = Field(None, description="vocabulary file or folder; default: that in init.checkpoint")
    data: DataSection
    epochs: int = Field(ge=0, description="0 for zero-shot evaluation only")
    steps: int = Field(0, ge=0, description="0: set by epochs")
    batch_size: int = Field(gt=0, description="per rank and update, before accumulation splits it")
    eval_batch_size: int = Field(64, gt=0, description="records per prediction batch and rank")
    choose: Choice | None = Field(None, description="null: keep the last weights and evaluate only at the end")

    @model_validator(mode="before")
    @classmethod
    def _with_held_out(cls, values: Any) -> Any:
        """Add the split `val` created by `task.hold_out`, or set it to 0 if another `val` is given."""
        task, data = values.get("task"), values.get("data")
        if not (isinstance(task, Mapping) and task.get("hold_out") and isinstance(data, Mapping) and "train" in data):
            return values
        splits = data.get("splits") or {}
        if not isinstance(splits, Mapping):
            return values
        if "val" not in splits:
            splits = {"val": data["train"], **splits}
        elif _listed(splits["val"]) != _listed(data["train"]):
            task = {**task, "hold_out": 0}
        return {**values, "task": task, "data": {**data, "splits": splits}}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} does not split into accumulate={self.accumulate} equal micro-batches"
            )
        if self.choose is not None and self.choose.by not in (known := TASKS[self.task.kind].metrics):
            raise ValueError(
                f"choose.by={self.choose.by} is no metric of the task {self.task.kind}; it has {', '.join(known)}"
            )
        if self.choose is not None and self.choose.split not in self.data.splits:
            known = ", ".join(self.data.splits) or "none"
            raise ValueError(
                f"choose.split={self.choose.split} is no split of data.splits ({known}); name one, or set choose=null"
            )
        return self

    @property
    def large_lr(self) -> tuple[str, ...]:  # type: ignore[override]
        return TASKS[self.task.kind].large_lr

    @property
    def active_updates(self) -> tuple[tuple[str, ...], ...]:
        return ((STREAM,),)

    def losses_of(self, stream: str) -> tuple[str, ...]:
        return TASKS[self.task.kind].losses

    def weight_of(self, stream: str) -> float:
        return 1.0

    def micro_batch_size(self, stream: str) -> int:
        return self.batch_size // self.accumulate

    @property
    def folder_of_data(self) -> str:
        return self.data.root

    @property
    def image_folder(self) -> Path:
        """Folder that relative image paths refer to."""
        root = Path(self.data.root)
        if self.data.images is not None:
            return root / self.data.images
        first = root / self.data.train[0]
        return first if first.is_dir() else first.parent

    def paths_of(self, split: str) -> list[Path]:
        """Files and folders of `train` or a split."""
        if split == STREAM:
            return self.expand(self.data.train, "data.train", "or set data.root=<folder>")
        if split not in self.data.splits:
            raise ConfigError(f"there is no split {split}; data.splits has {', '.join(self.data.splits) or 'none'}")
        return self.expand(self.data.splits[split], f"data.splits.{split}", "or set data.root=<folder>")

    def tokenizer_path(self) -> Path | None:
        """Vocabulary in the recipe, or next to the initial weights, if any."""
        return vocabulary_of(self.init.checkpoint) if self.tokenizer is None else Path(self.tokenizer)

    def check_machine(self) -> None:
        """Validate data paths and device before the run starts, without reading data."""
        self.check_device()
        for split in (STREAM, *self.data.splits):
            self.paths_of(split)
        self.check_places(self.tokenizer)


def load_finetune_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> FinetuneRecipe:
    """Load a fine-tuning recipe by name, YAML path or official configuration, with `key=value` overrides."""
    values = read_recipe(name_or_path, FINETUNING)
    if is_official(values):
        values = from_official(values, str(name_or_path))
    values = override(values, overrides)
    if "task" not in values:
        raise ConfigError(
            f"recipe {name_or_path} has no task, so it is none of fine-tuning; add task.kind=..., one of "
            f"{', '.join(TASKS)}, or run xfm-fast pretrain {name_or_path}"
        )
    keys = {"batch_size": "batch_size", "epochs": "epochs", "lr": "optimizer.lr"}
    return fit_auto(FinetuneRecipe, values, keys, _training_rows)


def _training_rows(recipe: FinetuneRecipe) -> int:
    path = recipe.tokenizer_path()
    tokenizer = None if path is None else CaptionTokenizer.from_files(path)
    task = make_task(recipe.task, recipe.model, tokenizer, recipe.image_folder)
    return sum(map(len, task.rows(recipe.paths_of(STREAM))))


def _listed(value: Any) -> list[Any]:
    return [*value] if isinstance(value, (list, tuple)) else [value]


def resumed_steps(
    recipe: FinetuneRecipe, rows: int, world_size: int, saved: Mapping[str, Any] | None, batches_done: int
) -> FinetuneRecipe:
    """Set the number of steps from the epochs.

    The schedule counts the last partial batch of an epoch even if it is dropped, as in the official code. A run resumed
    with another number of processes keeps its completed steps and adds the ones of its remaining epochs. `saved` is the
    checkpoint's `state.json`, `batches_done` its micro-batches in this world size.
    """
    if recipe.steps:
        return recipe
    batch = recipe.batch_size * world_size
    steps, schedule = (
        recipe.epochs * epoch_batches(rows, batch, drop_last=drop)
        for drop in (TASKS[recipe.task.kind].drop_last, False)
    )
    if saved is not None and saved["world_size"] != world_size:
        ahead = saved["step"] - batches_done // recipe.accumulate
        steps, schedule = steps + ahead, schedule + ahead
    elif saved is not None and all(
        saved["recipe"].get(key) == getattr(recipe, key) for key in ("epochs", "batch_size")
    ):
        # What an earlier change of the number of processes made of them.
        steps, schedule = saved["recipe"]["steps"], saved["recipe"]["schedule"]["steps"]
    timetable = recipe.schedule
    if timetable.steps is None:
        timetable = timetable.model_copy(update={"steps": schedule})
    return recipe.model_copy(update={"steps": steps, "schedule": timetable})
