"""Fine-tuning recipes: a task, its data and the run fields; configurations of the official code are
converted to them.

Values of a configuration override our recipe of the same task. `official.yaml` maps every published
key to a recipe key, a model field or a required value, or lists it as ignored because it has no
effect; other keys are errors. Paths stay relative to the working directory, and weights are set by
`init.checkpoint`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from xfm_fast.config import XFMConfig
from xfm_fast.data.streams import epoch_batches
from xfm_fast.errors import ConfigError
from xfm_fast.io import is_plain_name, parse_yaml
from xfm_fast.tasks.task import HELD_OUT, TASKS, AnyTask, Task, TaskOptions, make_task
from xfm_fast.tokenizer import CaptionTokenizer
from xfm_fast.training.loop import position_after
from xfm_fast.training.recipe import FINETUNING, Run, fit_auto, override, read_recipe, vocabulary_of
from xfm_fast.training.recipe_fields import MOST_ITEMS, Paths, Section

STREAM = "train"
"""Name of the only stream of a fine-tuning run."""


class DataSection(Section):
    """Data files of a task, relative to `root`; glob patterns such as `*.json` are expanded."""

    root: str = Field(default=".", description="folder of all relative paths")
    images: str | None = Field(
        default="", description="folder of relative image paths; null: that of the training file"
    )
    train: Paths = Field(description="files or folders to train on")
    splits: dict[str, Paths] = Field(
        default={}, description="files or folders to evaluate on, by name: val, test, ..."
    )
    official_pictures: bool = Field(
        default=False,
        description="ignore EXIF orientation and transparency, as the official code does; by default images are "
        "upright and on white",
    )
    bad_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="share of broken elements per file at which training stops",
    )
    hold_out: float = Field(
        default=0,
        ge=0,
        lt=1,
        description="share of the images of `train` held out as the split val if there is none, by the smallest "
        "digests of their bytes; at most 1,000, at least 10 of 40 or more",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_held_out(cls, values: Any) -> Any:
        """Add the split `val` of `hold_out`, or set `hold_out` to 0 for another `val`."""
        if not (isinstance(values, Mapping) and values.get("hold_out") and "train" in values):
            return values
        splits = values.get("splits") or {}
        if not isinstance(splits, Mapping):
            return values
        if HELD_OUT not in splits:
            return {**values, "splits": {HELD_OUT: values["train"], **splits}}
        if _as_list(splits[HELD_OUT]) == _as_list(values["train"]):
            return values
        return {**values, "hold_out": 0}

    @field_validator("splits")
    @classmethod
    def _check_split_names(cls, splits: dict[str, Paths]) -> dict[str, Paths]:
        if wrong := [name for name in splits if not is_plain_name(name)]:
            raise ValueError(
                f"the split {wrong[0]!r} gives its results a folder; name it without slashes or dots"
            )
        return splits


class Choice(Section):
    """Selection of the best weights."""

    by: str = Field(description="metric of the task; higher is better")
    split: str = Field(
        default="val", description="split to evaluate; retrieval officially uses `test`"
    )
    every: int = Field(
        default=1,
        gt=0,
        description="epochs between evaluations; the last epoch is always evaluated",
    )


class FinetuneRecipe(Run):
    """A fine-tuning run; fields of every run are in `xfm_fast.training.recipe.Run`."""

    task: AnyTask
    tokenizer: str | None = Field(
        None, description="vocabulary file or folder; default: that in init.checkpoint"
    )
    data: DataSection
    epochs: int = Field(ge=0, description="0 for zero-shot evaluation only")
    steps: int = Field(0, ge=0, lt=2**31, description="0: set by epochs")
    batch_size: int = Field(
        gt=0, le=MOST_ITEMS, description="per rank and update, before accumulation splits it"
    )
    eval_batch_size: int = Field(
        64, gt=0, le=MOST_ITEMS, description="records per prediction batch and rank"
    )
    choose: Choice | None = Field(
        None, description="null: keep the last weights and evaluate only at the end"
    )

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} does not split into accumulate={self.accumulate} equal micro-batches"
            )
        if self.choose is None:
            return self
        metrics, splits = TASKS[self.task.kind].metrics, self.data.splits
        if self.choose.by not in metrics:
            raise ValueError(
                f"choose.by={self.choose.by} is not a metric of the task {self.task.kind}; it has {', '.join(metrics)}"
            )
        if self.choose.split not in splits:
            names = ", ".join(splits) or "none"
            raise ValueError(
                f"choose.split={self.choose.split} is not a split of data.splits ({names}); name one, or set "
                "choose=null"
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
        """Expand the files and folders of `train` or a split."""
        splits = self.data.splits
        if split == STREAM:
            patterns, key = self.data.train, "data.train"
        elif split in splits:
            patterns, key = splits[split], f"data.splits.{split}"
        else:
            raise ConfigError(
                f"there is no split {split}; data.splits has {', '.join(splits) or 'none'}"
            )
        return self.expand(patterns, key, "or set data.root=<folder>")

    def open_tokenizer(self) -> CaptionTokenizer | None:
        """Read the vocabulary of the recipe, or that next to the initial weights, if any."""
        path = self.tokenizer or vocabulary_of(self.init.checkpoint)
        return None if path is None else CaptionTokenizer.from_files(path)

    def check_machine(self) -> None:
        """Validate data paths and device before the run starts, without reading data."""
        self.check_device()
        for split in (STREAM, *self.data.splits):
            self.paths_of(split)
        self.check_paths(self.tokenizer)


def load_finetune_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> FinetuneRecipe:
    """Load a recipe by name, YAML path or official configuration, with `key=value` overrides."""
    values = read_recipe(name_or_path, FINETUNING)
    if is_official(values):
        values = from_official(values, str(name_or_path))
    values = override(values, overrides)
    if "task" not in values:
        raise ConfigError(
            f"recipe {name_or_path} has no task, so it is not for fine-tuning; add task.kind=..., one of "
            f"{', '.join(TASKS)}, or run xfm-fast pretrain {name_or_path}"
        )
    keys = {
        "batch_size": "batch_size",
        "epochs": "epochs",
        "every": "choose.every",
        "lr": "optimizer.lr",
    }
    return fit_auto(FinetuneRecipe, values, keys, _count_rows)


def _count_rows(recipe: FinetuneRecipe) -> int:
    files = open_task(recipe, complete=False).training_rows(recipe.paths_of(STREAM))
    return sum(map(len, files))


def open_task(recipe: FinetuneRecipe, *, complete: bool = True) -> Task[Any]:
    """Create the task of a recipe; `complete` reads missing options from the training files."""
    options = recipe.task
    if complete:
        # Tasks without options from training files are evaluated without them.
        learns = options.learns and type(options).completed is not TaskOptions.completed
        train = recipe.paths_of(STREAM) if learns else []
        options = options.completed(train, Path(recipe.data.root))
    return make_task(
        options,
        recipe.model,
        recipe.open_tokenizer(),
        recipe.image_folder,
        official_pictures=recipe.data.official_pictures,
        hold_out=recipe.data.hold_out,
    )


def resumed_steps(
    recipe: FinetuneRecipe, rows: int, world_size: int, saved: Mapping[str, Any] | None
) -> FinetuneRecipe:
    """Set the number of steps from the epochs.

    The schedule counts the last partial batch of an epoch even if it is dropped, as in the official
    code. A run resumed with another number of processes keeps its completed steps and adds the ones
    of its remaining epochs. `saved` is the `state.json` of its checkpoint.
    """
    if recipe.steps:
        return recipe
    drop_last = TASKS[recipe.task.kind].drop_last
    batch = recipe.batch_size * world_size
    steps = recipe.epochs * epoch_batches(rows, batch, drop_last=drop_last)
    scheduled = recipe.epochs * epoch_batches(rows, batch, drop_last=False)
    if saved is not None:
        previous, batches = saved["recipe"], saved["batches"].get(STREAM, 0)
        if saved["world_size"] != world_size:
            done = position_after(
                batches, STREAM, previous, recipe, saved["world_size"], world_size
            )
            ahead = saved["step"] - done // recipe.accumulate
            steps, scheduled = steps + ahead, scheduled + ahead
        elif all(previous.get(key) == getattr(recipe, key) for key in ("epochs", "batch_size")):
            # Includes an earlier change of the number of processes.
            steps, scheduled = previous["steps"], previous["schedule"]["steps"]
    schedule = recipe.schedule
    if schedule.steps is None:
        schedule = schedule.model_copy(update={"steps": scheduled})
    return recipe.model_copy(update={"steps": steps, "schedule": schedule})


@cache
def _official() -> dict[str, Any]:
    """Read the tables of the official keys."""
    return parse_yaml(files("xfm_fast.finetuning").joinpath("official.yaml").read_bytes())


def is_official(values: Mapping[str, Any]) -> bool:
    """Return whether a mapping has the sections of official files."""
    sections = {"schedular", "train_file", "train_file_regions", "glue_datasets"}
    return "task" not in values and not sections.isdisjoint(values)


def from_official(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Convert an official configuration to recipe values; `name` is for messages and the run folder."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": setting for inner, setting in value.items()}
        else:
            flat[key] = value
    _check_keys(flat, name)
    base = _base_recipe(values, name)
    recipe = read_recipe(base, FINETUNING)
    _set_values(recipe, flat, base)

    task, data_set = recipe["task"], values.get("task_name")
    # VQA has a root for each data set instead; both are relative to the working directory.
    image_root = {"root": ".", "images": values.get("image_root", ""), "official_pictures": True}
    recipe["data"] = _data(values, recipe["data"], base) | image_root
    if not recipe["data"]["train"]:
        # The published files of domain pretraining list no data; the error about a missing key says
        # how to give it.
        del recipe["data"]["train"]
    if base == "vqa2":
        # The official list of parameters with a larger rate is empty; here it has the decoder.
        recipe["optimizer"]["lr_mult"] = 1.0
        task["image_folders"] = {"vqa": values["vqa_root"], "vg": values["vg_root"]}
        task["official_ranking"] = True
    elif base == "refcoco_domain":
        # Official batches and epochs count texts, ours images; the published run has 8 GPUs.
        recipe["batch_size"] = task["regions"]["max_images"]
        if "train_dataset_size" in values:
            epoch = math.ceil(values["train_dataset_size"] / (8 * task["regions"]["texts"]))
            recipe["steps"] = recipe["epochs"] * epoch
    elif base.startswith("imagenet"):
        if values.get("is_lp"):
            task |= {"mixup": 0.0, "cutmix": 0.0}
        if data_set in _official()["torchvision"]:
            split = "trainval" if data_set == "oxfordiiitpet" else "train"
            task |= {"dataset": data_set, "view": "probe", "train_split": split}
    if "schedular.warmup_epochs" in flat:
        recipe["schedule"]["warmup"] = flat["schedular.warmup_epochs"] / recipe["epochs"]
    if "accelerator" not in values:
        # Only domain pretraining runs in mixed precision.
        recipe["precision"] = "fp32"
    recipe["model"] = XFMConfig.from_official(dict(values)).model_dump()
    recipe["tokenizer"] = values["text_encoder"]
    recipe["init"] = {}
    recipe["checkpoint"]["folder"] = f"runs/{Path(name).stem}"
    choice, splits = recipe.get("choose"), recipe["data"].get("splits", {})
    if choice is not None and choice["split"] not in splits:
        # The only split is `test`: it includes the val of RefCOCO+ (`val_d`), and image sets choose
        # by it.
        metric = "accuracy_val" if base == "refcoco_plus" else choice["by"]
        recipe["choose"] = {"by": metric, "split": "test"} if "test" in splits else None
    return recipe


def _check_keys(flat: Mapping[str, Any], name: str) -> None:
    """Raise `ConfigError` for an unknown key, or a value that is not supported."""
    tables = _official()
    keys = [
        key for table in ("keys", "model", "only", "ignored", "combined") for key in tables[table]
    ]
    if unknown := [key for key in flat if key not in keys]:
        near = difflib.get_close_matches(unknown[0], keys, n=1)
        raise ConfigError(
            f"{name}: {', '.join(unknown)} is not a key of the official fine-tuning files"
            f"{f' (did you mean {near[0]}?)' if near else ''}; take it out, or write a recipe of your own"
        )
    for key, value in tables["only"].items():
        if flat.get(key) not in (None, value):
            raise ConfigError(f"{name}: {key}={flat[key]!r} is not offered; only {value!r} is")


def _set_values(recipe: dict[str, Any], flat: Mapping[str, Any], base: str) -> None:
    """Set the recipe keys that correspond to official ones."""
    tables = _official()
    keys: dict[str, str | None] = dict(tables["keys"])
    for prefix, exceptions in tables["exceptions"].items():
        if base.startswith(prefix):
            keys |= exceptions
    for key, path in keys.items():
        value = flat.get(key)
        if value is None or path is None:
            continue
        section = recipe
        *sections, last = path.split(".")
        for inner in sections:
            section = section[inner]
        section[last] = float(value) if path in tables["numbers"] else value


def _base_recipe(values: Mapping[str, Any], name: str) -> str:
    """Return the name of our recipe of the same task."""
    if "glue_datasets" in values:
        return f"glue_{values.get('task_name')}"
    if "dataset" in values:
        return "imagenet_linear" if values.get("is_lp") else "imagenet_ft"
    for key, base in _official()["recipes"].items():
        if key in values:
            return base
    raise ConfigError(
        f"{name}: its keys do not tell which task of the official code it is for; write a recipe"
    )


def _data(values: Mapping[str, Any], data: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Merge official files into the section `data` of our recipe."""
    if base.startswith("glue_"):
        folder = f"{values['glue_datasets']}/{values['task_name']}"
        return {**data, "train": folder, "splits": dict.fromkeys(data["splits"], folder)}
    if base.startswith("imagenet"):
        train = test = values["dataset"]
        if values["task_name"] not in _official()["unsplit"]:
            train, test = f"{train}/train", f"{test}/val"
        split = "test" if values["task_name"] in _official()["torchvision"] else "val"
        return {**data, "train": train, "splits": {split: test}}
    if base == "refcoco_domain":
        return {**data, "train": values["train_file_regions"]}
    references: list[str] = []
    if base == "refcoco_plus":
        # The refer toolkit finds these below its folder; `det_file` and `coco_file` are only for
        # detections.
        folder = Path(values["refcoco_data"]) / "refcoco+"
        references = [str(folder / name) for name in ("refs(unc).p", "instances.json")]
    splits = {}
    for split in ("val", "test"):
        if paths := _as_list(values.get(f"{split}_file")):
            splits[split] = [*paths, *references, *_as_list(values.get(f"{split}_gt_file"))]
    return {**data, "train": [*_as_list(values.get("train_file")), *references], "splits": splits}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return [*value] if isinstance(value, (list, tuple)) else [value]
