"""Training recipes: typed, validated configuration of a run, from YAML and `key=value` overrides."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from xfm_fast.checkpoint.files import CONFIG_FILE, TOKENIZER_FILE, model_folder
from xfm_fast.config import XFMConfig
from xfm_fast.data.options import AnyStreamOptions, ImageOptions
from xfm_fast.data.records import open_records
from xfm_fast.errors import ConfigError, DataError, UnavailableError
from xfm_fast.io import MOST_YAML_BYTES, advice, parse_yaml, read_bytes
from xfm_fast.training.recipe_fields import (
    LOSSES_OF_KIND,
    MOST_ITEMS,
    AnyStream,
    CheckpointRecipe,
    Init,
    LogRecipe,
    LossName,
    Method,
    OptimizerRecipe,
    RegionStream,
    ScheduleRecipe,
    Section,
    ShapesWorldRecipe,
)

R = TypeVar("R", bound="Run")

_LARGEST_BATCH = 64
# An evaluation of a tenth of the images, at most 1,000, costs less than this number of steps.
_STEPS_OF_EVALUATION = 100
# Placeholder of `auto` values until the rows are counted; it passes every check.
_UNKNOWN = MOST_ITEMS


class Run(Section):
    """Fields of all recipes; `model` may omit `preset` if `init.checkpoint` is a folder."""

    large_lr: ClassVar[tuple[str, ...]] = ()
    """Name prefixes of parameters with the learning rate `lr * optimizer.lr_mult`."""

    model: XFMConfig = Field(description="`preset: tiny | base`, and fields of XFMConfig")
    init: Init = Init()
    shapes: ShapesWorldRecipe | None = None

    steps: int
    accumulate: int = Field(1, gt=0, description="micro-batches per batch")
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the weight average (EMA)")

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = False
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    seed: int = Field(0, ge=0, lt=2**63)
    workers: int = Field(0, ge=0, le=1024, description="loader processes per stream and rank")

    checkpoint: CheckpointRecipe
    log: LogRecipe = LogRecipe()

    def __init__(self, **values: Any) -> None:
        for key, value in flatten(values):
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str) and "\0" in item:
                    raise ConfigError(
                        f"{key}={value!r}: it holds a NUL, which paths and names cannot; remove it"
                    )
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error, type(self))) from None

    @model_validator(mode="before")
    @classmethod
    def _with_sizes_of_init(cls, values: Any) -> Any:
        """Take sizes that `model` omits from the folder `init.checkpoint`."""
        model, init = values.get("model", {}), values.get("init") or {}
        checkpoint = init.get("checkpoint") if isinstance(init, Mapping) else None
        folder = model_folder(Path(checkpoint)) if isinstance(checkpoint, str) else None
        if folder is None and "model" not in values:
            fault = "init.checkpoint is missing"
            if checkpoint is not None:
                fault = f"init.checkpoint={checkpoint} is not a model folder"
            raise ValueError(
                f"{fault}; give a run of xfm-fast pretrain, a folder from "
                "xfm-fast convert, or sizes to start with random weights: model.preset=tiny"
            )
        if folder is None or not isinstance(model, Mapping) or "preset" in model:
            return values
        try:
            saved = XFMConfig.load(folder / CONFIG_FILE).model_dump()
        except ConfigError as error:
            raise ValueError(f"init.checkpoint={checkpoint}: {error}") from None
        return {**values, "model": {**saved, **model}}

    @field_validator("model", mode="before")
    @classmethod
    def _with_preset(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        fields = {str(name): field for name, field in value.items()}
        preset = fields.pop("preset", "base")
        names = [*XFMConfig.model_fields, "preset"]
        unknown = [
            _describe_unknown(f"model.{name}", names) for name in fields if name not in names
        ]
        if unknown:
            raise ValueError("; ".join(unknown))
        return XFMConfig.preset(preset, **fields)

    @model_validator(mode="after")
    def _runs(self) -> Self:
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(
                f"schedule.min_lr={self.schedule.min_lr} exceeds optimizer.lr={self.optimizer.lr}; lower it"
            )
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError("precision=fp16 has no loss scaling on device=cpu; use bf16 or fp32")
        return self

    @property
    def active_updates(self) -> tuple[tuple[str, ...], ...]:
        """Streams of each update of a step."""
        raise NotImplementedError

    def updates_in(self, step: int) -> tuple[tuple[str, ...], ...]:
        """Return the streams that each update of a step, counted from 1, draws from."""
        return self.active_updates

    def losses_of(self, stream: str) -> tuple[str, ...]:
        """Return the losses computed on a stream."""
        raise NotImplementedError

    def weight_of(self, stream: str) -> float:
        """Return the weight of a stream's summed losses."""
        raise NotImplementedError

    def micro_batch_size(self, stream: str) -> int:
        """Return the items per forward pass on one rank."""
        raise NotImplementedError

    @property
    def folder_of_data(self) -> str:
        """Folder that relative data paths refer to."""
        raise NotImplementedError

    @property
    def initial_folder(self) -> Path | None:
        """Folder of the initial weights, unless they are an official file."""
        return None if self.init.checkpoint is None else model_folder(Path(self.init.checkpoint))

    def make_world(self) -> None:
        """Write the shapes dataset of the recipe into `data` if it is missing; run on one process."""
        if self.shapes is not None:
            self.shapes.write(self.folder_of_data)

    def expand(self, paths: Iterable[str], key: str, remedy: str) -> list[Path]:
        """Return data files and folders of a key, glob patterns expanded in sorted order."""
        expanded: list[Path] = []
        for path in paths:
            pattern = str(Path(self.folder_of_data) / path)
            matches = [pattern]
            if not Path(pattern).exists():
                matches = sorted(glob.glob(pattern, recursive=True))
            if not matches:
                raise DataError(f"{key}: there is no {pattern}; give {key}=..., {remedy}")
            expanded += map(Path, matches)
        return expanded

    def check_paths(self, tokenizer: str | None) -> None:
        """Raise `DataError` for initial weights or a vocabulary that do not exist."""
        paths = {f"init.{name}": path for name, path in self.init}
        for key, path in {**paths, "tokenizer": tokenizer}.items():
            if path is not None and not Path(path).exists():
                raise DataError(f"{key}: there is no {path}; give {key}=<path>")

    def check_device(self) -> None:
        """Raise `UnavailableError` if this machine lacks the device or precision."""
        import torch

        if torch.cuda.is_available():
            return
        if self.device == "cuda":
            raise UnavailableError(
                "device=cuda, but PyTorch finds no GPU here; use device=cpu or auto"
            )
        if self.precision == "fp16":
            raise UnavailableError(
                "precision=fp16 needs a GPU, and PyTorch finds none here; use bf16 or fp32"
            )


class Recipe(Run):
    """A pretraining run.

    A step runs the `updates` in order: an update sums the gradients of its streams, clips them and steps
    the optimizer. A stream with `every: 4` is drawn in every fourth step. The schedule advances once per
    step. The official step is `[[text], [regions, imagenet], [pairs]]`; with web data
    `[[text], [regions, web, imagenet, pairs]]`.
    """

    large_lr = ("vision_proj", "text_proj", "temp", "itm_head", "bbox_head")

    tokenizer: str = Field(
        "train", description="vocabulary file or folder, or `train` to learn one from the streams"
    )
    data: str = Field(".", description="folder of relative stream paths")
    streams: dict[str, AnyStream] = Field(min_length=1)
    updates: tuple[tuple[str, ...], ...] = Field(min_length=1)
    steps: int = Field(gt=0, lt=2**31)
    method: Method = Method()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        used = [name for update in self.updates for name in update]
        for name in used:
            if name not in self.streams:
                raise ValueError(_describe_unknown(f"updates: {name}", self.streams, "stream"))
            if used.count(name) > 1:
                raise ValueError(
                    f"updates name stream {name} {used.count(name)} times; name each stream once"
                )
        if idle := [name for name in self.streams if name not in used]:
            raise ValueError(
                f"stream {', '.join(idle)} is in no update; add it to updates, or remove it with null"
            )
        if not all(self.updates):
            raise ValueError(
                "an update is empty; name the streams whose gradients it sums, or remove it"
            )
        warmup = self.schedule.warmup_steps(self.steps)
        if warmup > self.steps:
            raise ValueError(
                f"schedule.warmup={warmup} is longer than the run of steps={self.steps}; shorten it or raise steps"
            )
        for name, stream in self.streams.items():
            if stream.batch_size % self.accumulate:
                lower = stream.batch_size // self.accumulate * self.accumulate
                sizes = [str(size) for size in (lower, lower + self.accumulate) if size]
                raise ValueError(
                    f"streams.{name}.batch_size={stream.batch_size} does not split into accumulate={self.accumulate} "
                    f"equal micro-batches; use {' or '.join(sizes)}"
                )
            longest = getattr(stream, "max_tokens", 0)
            if longest > self.model.max_text_length:
                raise ValueError(
                    f"streams.{name}.max_tokens={longest} exceeds the {self.model.max_text_length} tokens that "
                    f"model.max_positions={self.model.max_positions} can number; lower it or raise max_positions"
                )
        if not self.active_updates:
            raise ValueError(
                "method.mim_guidance=false leaves no loss at all; add a stream of pairs, regions or text"
            )
        if not self.updates_in(1):
            raise ValueError(
                "no stream is drawn in step 1; set streams.NAME.every=1 for the most frequent one"
            )
        return self

    def losses_of(self, stream: str) -> tuple[LossName, ...]:
        """Return the losses of a stream, without MIM if `method` disables it."""
        options = self.streams[stream]
        losses = options.losses or LOSSES_OF_KIND[options.kind]
        if self.method.mim_guidance:
            return losses
        return tuple(loss for loss in losses if loss != "mim")

    @property
    def active_updates(self) -> tuple[tuple[str, ...], ...]:
        """`updates` without streams that compute no loss."""
        return _select_streams(self.updates, self.losses_of)

    def updates_in(self, step: int) -> tuple[tuple[str, ...], ...]:
        return _select_streams(
            self.active_updates, lambda name: step % self.streams[name].every == 0
        )

    def weight_of(self, stream: str) -> float:
        return self.streams[stream].weight

    @property
    def folder_of_data(self) -> str:
        return self.data

    def micro_batch_size(self, stream: str) -> int:
        return self.streams[stream].batch_size // self.accumulate

    def options_of(self, stream: str) -> AnyStreamOptions:
        """Return the options of a stream, for one micro-batch on one rank."""
        options, changes = self.streams[stream], {}
        if isinstance(options, ImageOptions) and options.image_root is not None:
            changes["image_root"] = Path(self.data) / options.image_root
        if isinstance(options, RegionStream):
            changes["max_images"] = -(-options.max_images // self.accumulate)
        return options.model_copy(update=changes)

    def paths_of(self, stream: str) -> list[Path]:
        """Return the files and folders of a stream."""
        remedy = f"set data=<folder>, or leave the stream out with streams.{stream}=null"
        return self.expand(self.streams[stream].paths, f"streams.{stream}.paths", remedy)

    def check_machine(self, *, world_size: int = 1) -> None:
        """Check data paths, device and process count before the run starts."""
        self.check_device()
        for name in (name for update in self.active_updates for name in update):
            self.paths_of(name)
            pairs = self.micro_batch_size(name) * world_size
            if "itm" in self.losses_of(name) and pairs < 2:
                raise ConfigError(
                    f"streams.{name}: a batch of {pairs} pair holds no negative for itm; raise "
                    f"streams.{name}.batch_size, lower accumulate, or leave itm out of streams.{name}.losses"
                )
        self.check_paths(None if self.tokenizer == "train" else self.tokenizer)


def _select_streams(
    updates: Iterable[Iterable[str]], is_active: Callable[[str], object]
) -> tuple[tuple[str, ...], ...]:
    """Drop inactive streams, and updates without streams."""
    selected = (tuple(name for name in update if is_active(name)) for update in updates)
    return tuple(update for update in selected if update)


PRETRAINING, FINETUNING = "xfm_fast.training", "xfm_fast.finetuning"
"""Packages with a `recipes` folder."""


def recipe_names(package: str = PRETRAINING) -> list[str]:
    """Return the names of the recipes in `package`."""
    return sorted(_recipe_files(package))


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load a pretraining recipe by name or YAML path, with `key=value` overrides; `streams.NAME=null` drops one."""
    values = override(read_recipe(name_or_path, PRETRAINING), overrides)
    if "task" in values:
        raise ConfigError(
            f"recipe {name_or_path} has a task, so it is one of fine-tuning: xfm-fast finetune {name_or_path}"
        )
    if "streams" not in values:
        raise ConfigError(
            f"recipe {name_or_path} has no streams, so it is not for pretraining; add streams.NAME.kind=... and "
            "updates=[[NAME]]. Official pretraining files are the recipes pretrain_base_4m and pretrain_base_web: "
            "xfm-fast pretrain pretrain_base_4m data=<folder>; xfm-fast finetune reads official fine-tuning files"
        )
    streams, updates = values.get("streams"), values.get("updates")
    init = values["init"] if isinstance(values.get("init"), dict) else {}
    if isinstance(streams, dict):
        for stream in streams.values():
            if isinstance(stream, dict) and stream.get("losses") == "auto":
                # The remaining losses pay once features tell images apart.
                stream["losses"] = [] if any(init.values()) else ["itc"]
        dropped = {name for name, stream in streams.items() if stream is None}
        values["streams"] = {name: streams[name] for name in streams if name not in dropped}
        if dropped and isinstance(updates, list):
            lists = [update for update in updates if isinstance(update, list)]
            active = _select_streams(lists, lambda name: name not in dropped)
            values["updates"] = [[*update] for update in active]
    if "tokenizer" in values and values["tokenizer"] is None:
        checkpoint = init.get("checkpoint")
        vocabulary = vocabulary_of(checkpoint)
        if vocabulary is None and checkpoint is not None:
            raise ConfigError(
                f"init.checkpoint={checkpoint} has no {TOKENIZER_FILE}; name its vocabulary: tokenizer=<path>"
            )
        values["tokenizer"] = "train" if vocabulary is None else str(vocabulary)
    keys = {"batch_size": "streams.pairs.batch_size", "steps": "steps", "lr": "optimizer.lr"}
    return fit_auto(Recipe, values, keys, _pair_rows)


def _pair_rows(recipe: Recipe) -> int:
    if "pairs" not in recipe.streams:
        raise ConfigError("auto fits the rows of the stream pairs, and there is none; give numbers")
    records = open_records(recipe.paths_of("pairs"))
    return int(len(records) * (1 - recipe.streams["pairs"].hold_out))


def vocabulary_of(checkpoint: object) -> Path | None:
    """Return the vocabulary file beside the initial weights, or None."""
    folder = model_folder(Path(checkpoint)) if isinstance(checkpoint, str) else None
    if folder is not None:
        for path in (folder / TOKENIZER_FILE, folder.parent / TOKENIZER_FILE):
            if path.is_file():
                return path
    return None


def fit_auto(
    recipe_type: type[R],
    values: dict[str, Any],
    keys: Mapping[str, str],
    count_rows: Callable[[R], int],
) -> R:
    """Build a recipe, replacing `auto` values in place from the model width and dataset size.

    Batch size: largest power of two up to a quarter of the rows, in [2, 64]. Epochs: as many as 2,000
    steps take, in [5, 20], or [5, 50] from random weights. Epochs between evaluations: as many as 100
    steps take. Learning rate: 2e-5, or 5e-5 from random weights, at 768 channels and batch 64, scaled by
    channels^-1.5 and sqrt(batch).
    """
    flat = dict(flatten(values))
    auto = {name: key for name, key in keys.items() if flat.get(key) == "auto"}
    recipe = recipe_type(**override(values, (f"{key}={_UNKNOWN}" for key in auto.values())))
    if not auto:
        return recipe
    rows = count_rows(recipe)
    if "batch_size" in auto:
        batch = min(_LARGEST_BATCH, 1 << max(2, rows // 4).bit_length() - 1)
    else:
        batch = int(flat[keys["batch_size"]])
    per_epoch = max(1, rows // batch)
    # From random weights there is more to learn, and a step of ITC alone takes 0.4 of the time.
    base_lr, max_epochs = (5e-5, 50) if recipe.init == Init() else (2e-5, 20)
    epochs = min(max_epochs, max(5, -(-2000 // per_epoch)))
    lr = base_lr * (768 / recipe.model.text_width) ** 1.5 * (batch / _LARGEST_BATCH) ** 0.5
    fit = {
        "batch_size": batch,
        "epochs": epochs,
        "every": -(-_STEPS_OF_EVALUATION // per_epoch),
        "steps": epochs * per_epoch,
        "lr": f"{lr:.2e}",
    }
    return recipe_type(**override(values, (f"{key}={fit[name]}" for name, key in auto.items())))


def _recipe_files(package: str) -> dict[str, Any]:
    """Return the recipes in `package` by name."""
    entries = files(package).joinpath("recipes").iterdir()
    recipes = [entry for entry in entries if entry.name.endswith(".yaml")]
    return {entry.name.removesuffix(".yaml"): entry for entry in recipes}


def read_recipe(name_or_path: str | Path, package: str) -> dict[str, Any]:
    """Read the raw values of a recipe, by name in `package` or by YAML path."""
    name, path = str(name_or_path), Path(name_or_path)
    recipes = _recipe_files(package)
    if name not in recipes and not path.is_file():
        for command, folder in (("pretrain", PRETRAINING), ("finetune", FINETUNING)):
            if name in _recipe_files(folder):
                raise ConfigError(f"{name} is a recipe of {command}: xfm-fast {command} {name}")
        raise ConfigError(
            f"there is no recipe {name!r}{_suggest(name, recipes)}; "
            f"choose one of {', '.join(sorted(recipes))}, or give the path of a YAML file"
        )
    try:
        if name in recipes:
            values = parse_yaml(recipes[name].read_bytes())
        else:
            values = parse_yaml(read_bytes(path, MOST_YAML_BYTES))
    except OSError as error:
        raise ConfigError(
            f"recipe {name_or_path} cannot be read ({error}); check the path"
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"recipe {name_or_path} is not valid YAML: {_yaml_problem(error)}"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"recipe {name_or_path} holds a {type(values).__name__}; a mapping of keys is needed"
        )
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(
                f"recipe {name_or_path} has the key {key!r}, which is not a name; remove it"
            )
    return values


def override(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `key=value` overrides to recipe values in place."""
    for assignment in overrides:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"override {assignment!r} is not key=value; write, for example, steps=100"
            )
        try:
            value = parse_yaml(text)
        except (ValueError, yaml.YAMLError) as error:
            raise ConfigError(
                f"override {assignment!r}: the value is not valid YAML: {_yaml_problem(error)}"
            ) from None
        *sections, field = key.split(".")
        section_values = values
        for section in sections:
            if section_values.get(section) is None:
                section_values[section] = {}
            section_values = section_values[section]
            if not isinstance(section_values, dict):
                raise ConfigError(
                    f"override {assignment!r}: {section} is a {type(section_values).__name__}, without keys"
                )
        section_values[field] = value
    return values


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())


def _suggest(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _describe_unknown(key: str, names: Iterable[str], noun: str = "key") -> str:
    hint = _suggest(key.rpartition("." if noun == "key" else " ")[2], names)
    return f"{key} is not a {noun} of a recipe{hint}; known here: {', '.join(sorted(names))}"


def _step_into(hint: Any, component: int | str) -> tuple[Any, bool]:
    """Return the type at a component of a pydantic error location, and whether that is a key, not a union tag."""
    hint = _without_metadata(hint)
    members = [hint, *get_args(hint)]
    models = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
    for model in models:
        find_section = getattr(model, "of_kind", None)
        if find_section is not None and (section := find_section(component)) is not None:
            return section, False
        tag = model.model_fields.get("kind")
        if tag is not None and tag.default == component:
            return model, False
    if get_origin(hint) is dict:
        return get_args(hint)[1], True
    field = models[0].model_fields.get(str(component)) if len(models) == 1 else None
    return None if field is None else field.annotation, True


def _explain(error: ValidationError, recipe: type[Run]) -> str:
    lines = []
    for problem in error.errors():
        hints: list[Any] = [recipe]
        keys = []
        for component in problem["loc"]:
            hint, is_key = _step_into(hints[-1], component)
            hints.append(hint)
            if is_key:
                keys.append(component)
        key, last = ".".join(map(str, keys)), problem["loc"][-1] if problem["loc"] else None
        error_type, value, message = problem["type"], problem["input"], advice(problem)
        if error_type in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(_describe_unknown(key, _field_names(hints[-2])))
        elif error_type == "missing" and isinstance(last, int):
            lines.append(f"{key.rpartition('.')[0]} has too few values; give at least {last + 1}")
        elif error_type == "missing":
            lines.append(f"{key} is missing; add it to the recipe or as {key}=...")
        elif error_type in ("union_tag_invalid", "union_tag_not_found"):
            hint = _without_metadata(hints[-1])
            tags = [model.model_fields["kind"].default for model in get_args(hint) or (hint,)]
            noun = "stream" if key.startswith("streams") else key
            lines.append(f"{key}: a {noun} needs kind: one of {', '.join(tags)}")
        elif not key:
            lines.append(message)
        elif error_type == "value_error" and not isinstance(value, (str, int, float)):
            lines.append(f"{key}: {message}")
        else:
            lines.append(f"{key}={value!r}: {message}")
    return "; ".join(lines)


def _without_metadata(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _field_names(section: Any) -> list[str]:
    """Return the field names of a model, a dataclass, or an optional one."""
    hint = _without_metadata(section)
    for member in (hint, *get_args(hint)):
        if is_dataclass(member):
            return [field.name for field in fields(member)]
        if hasattr(member, "model_fields"):
            return list(member.model_fields)
    raise TypeError(f"{section} has no fields")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested sections by dotted key."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
