"""Training recipes: typed and validated configuration of a run, from YAML and `key=value` overrides."""

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
# An evaluation of a tenth of the images, 1,000 at most, costs less than so many steps.
_STEPS_OF_EVALUATION = 100
# Stands for a number that is not known before rows are counted, and passes every check.
_UNKNOWN = MOST_ITEMS


class Run(Section):
    """Fields of pretraining and fine-tuning recipes; `model` may omit `preset` if `init.checkpoint` is a folder."""

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
        for key, value in _flat(values):
            if any(
                isinstance(each, str) and "\0" in each
                for each in (value if isinstance(value, list) else [value])
            ):
                raise ConfigError(
                    f"{key}={value!r}: it holds a NUL, which no path and no name may; remove it"
                )
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error, type(self))) from None

    @model_validator(mode="before")
    @classmethod
    def _with_sizes_of_init(cls, values: Any) -> Any:
        model, init = values.get("model", {}), values.get("init") or {}
        place = init.get("checkpoint") if isinstance(init, Mapping) else None
        folder = model_folder(Path(place)) if isinstance(place, str) else None
        if folder is None and "model" not in values:
            fault = (
                "init.checkpoint is missing"
                if place is None
                else f"init.checkpoint={place} is no folder of a model"
            )
            raise ValueError(
                f"{fault}; give a run of xfm-fast pretrain, a folder that xfm-fast convert makes of an official file, "
                "or sizes to start with random weights: model.preset=tiny"
            )
        if folder is None or not isinstance(model, Mapping) or "preset" in model:
            return values
        try:
            saved = XFMConfig.load(folder / CONFIG_FILE).model_dump()
        except ConfigError as error:
            raise ValueError(f"init.checkpoint={place}: {error}") from None
        return {**values, "model": {**saved, **model}}

    @field_validator("model", mode="before")
    @classmethod
    def _with_preset(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        fields = {str(name): field for name, field in value.items()}
        preset = fields.pop("preset", "base")
        known = [*XFMConfig.model_fields, "preset"]
        if unknown := [name for name in fields if name not in known]:
            raise ValueError("; ".join(_unknown(f"model.{name}", known) for name in unknown))
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
        """The streams of each update of a step."""
        raise NotImplementedError

    def updates_in(self, step: int) -> tuple[tuple[str, ...], ...]:
        """The streams of each update of a step, counted from 1, that draws a batch."""
        return self.active_updates

    def losses_of(self, stream: str) -> tuple[str, ...]:
        """Losses computed on a stream."""
        raise NotImplementedError

    def weight_of(self, stream: str) -> float:
        """Weight of a stream's summed losses."""
        raise NotImplementedError

    def micro_batch_size(self, stream: str) -> int:
        """Items per forward pass on one rank."""
        raise NotImplementedError

    @property
    def folder_of_data(self) -> str:
        """Folder that relative data paths refer to."""
        raise NotImplementedError

    @property
    def initial_folder(self) -> Path | None:
        """Folder of the initial weights, if they are in one of ours."""
        return None if self.init.checkpoint is None else model_folder(Path(self.init.checkpoint))

    def make_world(self) -> None:
        """Write the shapes dataset into `data` if the recipe defines one and it is missing; run on one process."""
        if self.shapes is None:
            return
        from xfm_fast.data.shapes import Split, write_world

        world = self.shapes
        images: dict[Split, int] = {"train": world.train, "val": world.val, "test": world.test}
        if world.known:
            images["known"] = world.known
        write_world(
            self.folder_of_data, seed=world.seed, images=images, resolution=world.resolution
        )

    def expand(self, paths: Iterable[str], key: str, remedy: str) -> list[Path]:
        """Data files and folders of a key, glob patterns expanded in sorted order."""
        found: list[Path] = []
        for path in paths:
            pattern = str(Path(self.folder_of_data) / path)
            matches = (
                [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
            )
            if not matches:
                raise DataError(f"{key}: there is no {pattern}; give {key}=..., {remedy}")
            found += [Path(match) for match in matches]
        return found

    def check_places(self, tokenizer: str | None) -> None:
        """Raise `DataError` for initial weights or a vocabulary that do not exist."""
        places = {"init.roberta": self.init.roberta, "init.beit2": self.init.beit2}
        places |= {"init.checkpoint": self.init.checkpoint, "tokenizer": tokenizer}
        for key, place in places.items():
            if place is not None and not Path(place).exists():
                raise DataError(f"{key}: there is no {place}; give {key}=<path>")

    def check_device(self) -> None:
        """Raise `UnavailableError` if this machine lacks the device or precision."""
        import torch

        accelerated = torch.cuda.is_available()
        if self.device == "cuda" and not accelerated:
            raise UnavailableError(
                "device=cuda, but PyTorch finds no GPU here; use device=cpu or auto"
            )
        if self.precision == "fp16" and not accelerated:
            raise UnavailableError(
                "precision=fp16 needs a GPU, and PyTorch finds none here; use bf16 or fp32"
            )


class Recipe(Run):
    """A pretraining run.

    A step runs the `updates` in order: an update sums the gradients of its streams, clips them and steps the optimizer.
    A stream with `every: 4` is drawn in every fourth step. The schedule advances once per step. The official step is
    `[[text], [regions, imagenet], [pairs]]`; with web data `[[text], [regions, web, imagenet, pairs]]`.
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
                raise ValueError(_unknown(f"updates: {name}", self.streams, what="stream"))
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
                raise ValueError(
                    f"streams.{name}.batch_size={stream.batch_size} does not split into accumulate={self.accumulate} "
                    f"equal micro-batches; use {f'{lower} or ' if lower else ''}{lower + self.accumulate}"
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
        """Losses of a stream: its own or the defaults of its kind, minus losses that `method` disables."""
        chosen = self.streams[stream].losses or LOSSES_OF_KIND[self.streams[stream].kind]
        if self.method.mim_guidance:
            return chosen
        return tuple(loss for loss in chosen if loss != "mim")

    @property
    def active_updates(self) -> tuple[tuple[str, ...], ...]:
        """`updates` without streams that compute no loss."""
        updates = (
            tuple(name for name in update if self.losses_of(name)) for update in self.updates
        )
        return tuple(update for update in updates if update)

    def updates_in(self, step: int) -> tuple[tuple[str, ...], ...]:
        drawn = (
            tuple(name for name in u if step % self.streams[name].every == 0)
            for u in self.active_updates
        )
        return tuple(update for update in drawn if update)

    def weight_of(self, stream: str) -> float:
        return self.streams[stream].weight

    @property
    def folder_of_data(self) -> str:
        return self.data

    def micro_batch_size(self, stream: str) -> int:
        return self.streams[stream].batch_size // self.accumulate

    def micro_batch_images(self, stream: str) -> int:
        """Maximum images per micro-batch of a regions stream."""
        source = self.streams[stream]
        assert isinstance(source, RegionStream)
        return -(-source.max_images // self.accumulate)

    def options_of(self, stream: str) -> AnyStreamOptions:
        """Options of a stream with the batch size of one micro-batch on one rank."""
        options, changed = self.streams[stream], {}
        if isinstance(options, ImageOptions) and options.image_root is not None:
            changed["image_root"] = Path(self.data) / options.image_root
        if isinstance(options, RegionStream):
            changed["max_images"] = self.micro_batch_images(stream)
        return options.model_copy(update=changed)

    def paths_of(self, stream: str) -> list[Path]:
        """Files and folders of a stream."""
        remedy = f"set data=<folder>, or leave the stream out with streams.{stream}=null"
        return self.expand(self.streams[stream].paths, f"streams.{stream}.paths", remedy)

    def check_machine(self, *, world_size: int = 1) -> None:
        """Validate data paths, device and process count before the run starts."""
        self.check_device()
        for name in (name for update in self.active_updates for name in update):
            self.paths_of(name)
            pairs = self.micro_batch_size(name) * world_size
            if "itm" in self.losses_of(name) and pairs < 2:
                raise ConfigError(
                    f"streams.{name}: a batch of {pairs} pair holds no negative for itm; raise "
                    f"streams.{name}.batch_size, lower accumulate, or leave itm out of streams.{name}.losses"
                )
        self.check_places(None if self.tokenizer == "train" else self.tokenizer)


PRETRAINING, FINETUNING = "xfm_fast.training", "xfm_fast.finetuning"
"""Packages with a `recipes` folder."""


def recipe_names(package: str = PRETRAINING) -> list[str]:
    """Names of the recipes shipped in `package`."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in _shipped(package)
        if entry.name.endswith(".yaml")
    )


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load a pretraining recipe by name or YAML path, with `key=value` overrides; `streams.NAME=null` drops one."""
    values = override(read_recipe(name_or_path, PRETRAINING), overrides)
    if "task" in values:
        raise ConfigError(
            f"recipe {name_or_path} has a task, so it is one of fine-tuning: xfm-fast finetune {name_or_path}"
        )
    if "streams" not in values:
        raise ConfigError(
            f"recipe {name_or_path} has no streams, so it is none of pretraining; add streams.NAME.kind=... and "
            "updates=[[NAME]]. What an official file of pretraining says is in pretrain_base_4m and pretrain_base_web: "
            "xfm-fast pretrain pretrain_base_4m data=<folder>; those of fine-tuning are read by xfm-fast finetune"
        )
    streams, updates, init = values.get("streams"), values.get("updates"), values.get("init")
    if isinstance(streams, dict):
        for stream in streams.values():
            if isinstance(stream, dict) and stream.get("losses") == "auto":
                # Other losses pay once features tell images apart.
                stream["losses"] = [] if isinstance(init, dict) and any(init.values()) else ["itc"]
        gone = {name for name, stream in streams.items() if stream is None}
        values["streams"] = {name: stream for name, stream in streams.items() if name not in gone}
        if gone and isinstance(updates, list):
            kept = [
                [name for name in update if name not in gone]
                for update in updates
                if isinstance(update, list)
            ]
            values["updates"] = [update for update in kept if update]
    if "tokenizer" in values and values["tokenizer"] is None:
        place = init.get("checkpoint") if isinstance(init, dict) else None
        found = vocabulary_of(place)
        if found is None and place is not None:
            raise ConfigError(
                f"init.checkpoint={place} has no {TOKENIZER_FILE}; name its vocabulary: tokenizer=<path>"
            )
        values["tokenizer"] = "train" if found is None else str(found)
    keys = {"batch_size": "streams.pairs.batch_size", "steps": "steps", "lr": "optimizer.lr"}
    return fit_auto(Recipe, values, keys, _pair_rows)


def _pair_rows(recipe: Recipe) -> int:
    if "pairs" not in recipe.streams:
        raise ConfigError("auto fits the rows of the stream pairs, and there is none; give numbers")
    return int(len(open_records(recipe.paths_of("pairs"))) * (1 - recipe.streams["pairs"].hold_out))


def vocabulary_of(checkpoint: object) -> Path | None:
    """Vocabulary file next to the initial weights, if any."""
    place = model_folder(Path(checkpoint)) if isinstance(checkpoint, str) else None
    near = [] if place is None else [place / TOKENIZER_FILE, place.parent / TOKENIZER_FILE]
    return next((path for path in near if path.is_file()), None)


def fit_auto(
    kind: type[R], values: dict[str, Any], keys: Mapping[str, str], rows: Callable[[R], int]
) -> R:
    """Build a recipe, replacing `auto` values in place from the model width and dataset size.

    Batch size: largest power of two up to a quarter of the rows, in [2, 64]. Epochs: as many as 2,000 steps take, in
    [5, 20], or [5, 50] from random weights. Epochs between evaluations: as many as 100 steps take. Learning rate: 2e-5,
    or 5e-5 from random weights, at 768 channels and batch 64, scaled by channels^-1.5 and sqrt(batch).
    """

    def value_of(key: str) -> Any:
        inner: Any = values
        for part in key.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        return inner

    auto = {name: key for name, key in keys.items() if value_of(key) == "auto"}
    recipe = kind(**override(values, (f"{key}={_UNKNOWN}" for key in auto.values())))
    if not auto:
        return recipe
    count = rows(recipe)
    batch = int(value_of(keys["batch_size"]))
    if "batch_size" in auto:
        batch = min(_LARGEST_BATCH, 1 << max(2, count // 4).bit_length() - 1)
    per_epoch = max(1, count // batch)
    # From random weights more is to be learnt, and a step of ITC alone takes 0.4 of the time.
    base, most = (5e-5, 50) if recipe.init == Init() else (2e-5, 20)
    epochs = min(most, max(5, -(-2000 // per_epoch)))
    lr = base * (768 / recipe.model.text_width) ** 1.5 * (batch / _LARGEST_BATCH) ** 0.5
    every = -(-_STEPS_OF_EVALUATION // per_epoch)
    fit = {
        "batch_size": batch,
        "epochs": epochs,
        "every": every,
        "steps": epochs * per_epoch,
        "lr": f"{lr:.2e}",
    }
    return kind(**override(values, (f"{key}={fit[name]}" for name, key in auto.items())))


def _shipped(package: str) -> Iterable[Any]:
    return files(package).joinpath("recipes").iterdir()


def read_recipe(name_or_path: str | Path, package: str) -> dict[str, Any]:
    """Raw values of a recipe, by name in `package` or by YAML path."""
    path = Path(name_or_path)
    shipped = {entry.name: entry for entry in _shipped(package)}
    source = shipped.get(f"{name_or_path}.yaml", path)
    if source is path and not path.is_file():
        command, other = (
            ("finetune", FINETUNING) if package == PRETRAINING else ("pretrain", PRETRAINING)
        )
        if str(name_or_path) in recipe_names(other):
            raise ConfigError(
                f"{name_or_path} is a recipe of {command}: xfm-fast {command} {name_or_path}"
            )
        names = recipe_names(package)
        raise ConfigError(
            f"there is no recipe {str(name_or_path)!r}{_suggestion(str(name_or_path), names)}; "
            f"choose one of {', '.join(names)}, or give the path of a YAML file"
        )
    try:
        values = parse_yaml(
            source.read_bytes() if source is not path else read_bytes(path, MOST_YAML_BYTES)
        )
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
    if other := [key for key in values if not isinstance(key, str)]:
        raise ConfigError(
            f"recipe {name_or_path} has the key {other[0]!r}, which is no name; remove it"
        )
    return values


def override(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `key=value` overrides to recipe values in place."""
    for each in overrides:
        key, equals, text = each.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {each!r} is no key=value; write, for example, steps=100")
        try:
            value = parse_yaml(text)
        except (ValueError, yaml.YAMLError) as error:
            raise ConfigError(
                f"override {each!r}: the value is not valid YAML: {_yaml_problem(error)}"
            ) from None
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            if inner.get(section) is None:
                inner[section] = {}
            inner = inner[section]
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"override {each!r}: {section} is a {type(inner).__name__} and has no keys inside"
                )
        inner[last] = value
    return values


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _unknown(key: str, known: Iterable[str], what: str = "key") -> str:
    name = key.rpartition("." if what == "key" else " ")[2]
    return f"{key} is no {what} of a recipe{_suggestion(name, known)}; known here: {', '.join(sorted(known))}"


def _inside(hint: Any, part: int | str) -> tuple[Any, bool]:
    """Type at one component of a pydantic error location, and whether the component is a key (not a union tag)."""
    hint = _plain(hint)
    if (section := getattr(hint, "of_kind", lambda kind: None)(part)) is not None:
        return section, False
    for option in (hint, *get_args(hint)):
        if (
            getattr(option, "model_fields", {}).get("kind")
            and option.model_fields["kind"].default == part
        ):
            return option, False
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        field = hint.model_fields.get(str(part))
        return (None if field is None else field.annotation), True
    if get_origin(hint) is dict:
        return get_args(hint)[1], True
    sections = [
        option
        for option in get_args(hint)
        if isinstance(option, type) and issubclass(option, BaseModel)
    ]
    return _inside(sections[0], part) if len(sections) == 1 else (None, True)


def _explain(error: ValidationError, recipe: type[Run]) -> str:
    lines = []
    for problem in error.errors():
        hint: Any = recipe
        sections, shown = [hint], []
        for part in problem["loc"]:
            hint, is_key = _inside(hint, part)
            sections.append(hint)
            if is_key:
                shown.append(part)
        where = ".".join(str(part) for part in shown)
        message = advice(problem)
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            lines.append(_unknown(where, _keys_of(sections[-2])))
        elif problem["type"] == "missing" and isinstance(place := problem["loc"][-1], int):
            lines.append(
                f"{where.rpartition('.')[0]} has too few values; give at least {place + 1}"
            )
        elif problem["type"] == "missing":
            lines.append(f"{where} is missing; add it to the recipe or as {where}=...")
        elif problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
            members = get_args(_plain(hint)) or (hint,)
            kinds = ", ".join(each.model_fields["kind"].default for each in members)
            what = "a stream" if where.startswith("streams") else f"a {where}"
            lines.append(f"{where}: {what} needs kind: one of {kinds}")
        elif not where or (
            problem["type"] == "value_error" and not isinstance(problem["input"], (str, int, float))
        ):
            lines.append(f"{where}: {message}" if where else message)
        else:
            lines.append(f"{where}={problem['input']!r}: {message}")
    return "; ".join(lines)


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _keys_of(section: Any) -> list[str]:
    """Field names of a model, a dataclass, or an optional one."""
    options = [_plain(section), *get_args(_plain(section))]
    section = next(
        option for option in options if hasattr(option, "model_fields") or is_dataclass(option)
    )
    return (
        [field.name for field in fields(section)]
        if is_dataclass(section)
        else list(section.model_fields)
    )


# With these changed, the weights and the state of the optimizer would mean something else.
_FIXED = ("model.", "optimizer.zero_grad")
# These change how a run is run or watched, not what it computes.
_HARMLESS = ("checkpoint.", "log.", "workers", "data")


def changes(before: Mapping[str, Any], recipe: Run, world_before: int, world_now: int) -> list[str]:
    """Describe how `recipe` differs from the checkpoint's recipe; a different model is a `ConfigError`."""
    old, new = dict(_flat(before)), dict(_flat(recipe.model_dump(mode="json")))
    differing = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    changed = {name: f"{name}: {old.get(name)} → {new.get(name)}" for name in differing}
    if fixed := [changed[name] for name in differing if name.startswith(_FIXED)]:
        raise ConfigError(
            f"the checkpoint in checkpoint.folder={recipe.checkpoint.folder} is of another run ({'; '.join(fixed)}); "
            "set these as they were, or set checkpoint.folder to a new folder"
        )
    notes = []
    if noted := [changed[name] for name in differing if not name.startswith(_HARMLESS)]:
        notes.append(f"the recipe has changed since the checkpoint: {'; '.join(noted)}")
    if world_before != world_now:
        notes.append(
            f"the checkpoint is of {world_before} processes and this run has {world_now}: an update now sees "
            f"{world_now} instead of {world_before} times streams.*.batch_size, every stream goes on behind the items "
            "already seen (to within a batch) in the same order, and dropout and negatives are drawn anew from seed, "
            "rank and step"
        )
    return notes


def position_after(
    batches: int,
    stream: str,
    before: Mapping[str, Any],
    recipe: Run,
    world_before: int,
    world_now: int,
) -> int:
    """Batch index to resume a stream at: repeats no item and skips less than one batch."""
    batch = before["streams"][stream] if "streams" in before else before
    size = batch["batch_size"] // before["accumulate"] * world_before
    return -(-batches * size // (recipe.micro_batch_size(stream) * world_now))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
