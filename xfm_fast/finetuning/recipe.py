"""Fine-tuning recipes: a task, its data and the run fields; configurations of the official code are converted to them.

Values of a configuration override our recipe of the same task. Every published key maps to a recipe key, a model field,
a required value, or is ignored because it has no effect; other keys are errors. Paths stay relative to the working
directory, and weights are set by `init.checkpoint`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from xfm_fast.config import XFMConfig
from xfm_fast.data.streams import epoch_batches
from xfm_fast.errors import ConfigError
from xfm_fast.io import is_plain_name
from xfm_fast.tasks.task import HELD_OUT, TASKS, AnyTask, make_task
from xfm_fast.tokenizer import CaptionTokenizer
from xfm_fast.training.recipe import FINETUNING, Run, fit_auto, override, read_recipe, vocabulary_of
from xfm_fast.training.recipe_fields import MOST_ITEMS, Paths, Section

STREAM = "train"
"""Name of the only stream of a fine-tuning run."""


class DataSection(Section):
    """Data files of a task. Relative paths refer to `root`; glob patterns such as `*.json` are expanded."""

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
        """Add the split `val` created by `hold_out`, or set it to 0 if another `val` is given."""
        if not (isinstance(values, Mapping) and values.get("hold_out") and "train" in values):
            return values
        splits = values.get("splits") or {}
        if not isinstance(splits, Mapping):
            return values
        if HELD_OUT not in splits:
            return {**values, "splits": {HELD_OUT: values["train"], **splits}}
        return (
            values
            if _listed(splits[HELD_OUT]) == _listed(values["train"])
            else {**values, "hold_out": 0}
        )

    @field_validator("splits")
    @classmethod
    def _splits_name_folders(cls, splits: dict[str, Paths]) -> dict[str, Paths]:
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
    def _possible(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} does not split into accumulate={self.accumulate} equal micro-batches"
            )
        if self.choose is not None and self.choose.by not in (
            known := TASKS[self.task.kind].metrics
        ):
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
            raise ConfigError(
                f"there is no split {split}; data.splits has {', '.join(self.data.splits) or 'none'}"
            )
        return self.expand(
            self.data.splits[split], f"data.splits.{split}", "or set data.root=<folder>"
        )

    def tokenizer_path(self) -> Path | None:
        """Vocabulary in the recipe, or next to the initial weights, if any."""
        return (
            vocabulary_of(self.init.checkpoint) if self.tokenizer is None else Path(self.tokenizer)
        )

    def check_machine(self) -> None:
        """Validate data paths and device before the run starts, without reading data."""
        self.check_device()
        for split in (STREAM, *self.data.splits):
            self.paths_of(split)
        self.check_paths(self.tokenizer)


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
    keys = {
        "batch_size": "batch_size",
        "epochs": "epochs",
        "every": "choose.every",
        "lr": "optimizer.lr",
    }
    return fit_auto(FinetuneRecipe, values, keys, _training_rows)


def _training_rows(recipe: FinetuneRecipe) -> int:
    path = recipe.tokenizer_path()
    tokenizer = None if path is None else CaptionTokenizer.from_files(path)
    task = make_task(
        recipe.task, recipe.model, tokenizer, recipe.image_folder, hold_out=recipe.data.hold_out
    )
    return sum(map(len, task.training_rows(recipe.paths_of(STREAM))))


def _listed(value: Any) -> list[Any]:
    return [*value] if isinstance(value, (list, tuple)) else [value]


def resumed_steps(
    recipe: FinetuneRecipe,
    rows: int,
    world_size: int,
    saved: Mapping[str, Any] | None,
    batches_done: int,
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


_SECTIONS = {"schedular", "train_file", "train_file_regions", "glue_datasets"}

# Official keys that are options of the task.
_SAME = (
    "max_tokens", "max_words", "max_length", "min_length", "num_beams", "prompt", "label_smoothing", "mixup", "cutmix",
)  # fmt: skip
# Official keys (`section.key` in a section), and the recipe key that takes their value.
_KEYS = {name: f"task.{name}" for name in _SAME} | {
    "batch_size": "batch_size",
    "batch_size_train": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "batch_size_test": "eval_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "smoothing": "task.label_smoothing",
    "is_lp": "task.frozen",
    "k_test": "task.k",
    "num_dec_layers": "task.decoder_layers",
    "answer_list": "task.answers",
    "careful_hflip": "task.careful_flip",
    "num_readers": "workers",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "num_train_epochs": "epochs",
    "seed": "seed",
    "optimizer.lr": "optimizer.lr",
    "optimizer.lr_mult": "optimizer.lr_mult",
    "optimizer.weight_decay": "optimizer.weight_decay",
    "schedular.epochs": "epochs",
    "schedular.num_warmup_steps": "schedule.warmup",
    "schedular.min_lr": "schedule.min_lr",
    "accelerator.CLIP_GRAD_NORM": "optimizer.clip_norm",
    "accelerator.GRAD_ACCUMULATE_STEPS": "accumulate",
    "images.image_key": "task.pairs.image_key",
    "images.caption_key": "task.pairs.caption_key",
    "images.language_chosen": "task.pairs.language",
    "images.batch_size": "batch_size",
    "images.num_workers": "workers",
    "regions.image_key": "task.regions.image_key",
    "regions.language_chosen": "task.regions.language",
    "regions.tokenized": "task.regions.tokenized",
    "regions.careful_hflip": "task.regions.careful_flip",
    "regions.batch_size": "task.regions.texts",
    "regions.max_images": "task.regions.max_images",
    "regions.max_regions": "task.regions.max_regions",
    "regions.min_perc_in_image": "task.regions.least_visible",
    "regions.num_workers": "workers",
}
# YAML 1.1 reads 3e-5 as text.
_NUMBERS = {"lr", "lr_mult", "weight_decay", "min_lr"}
# Read by XFMConfig.from_official.
_MODEL = {
    "use_beit_v2", "vision_config", "image_res", "patch_size", "local_attn_depth", "text_encoder",
    "text_num_hidden_layers", "text_fusion_start_at", "fusion_num_hidden_layers", "fusion_fusion_start_at", "embed_dim",
    "temp",
}  # fmt: skip
# What the official code does with other values is not offered.
_ONLY: dict[str, Any] = {
    "decoder_fusion_start_at": 0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "reprob": 0.25,
    "remode": "pixel", "recount": 1, "aa": "rand-m9-mstd0.5-inc1", "use_huggingface_models": False,
    "pad_to_max_length": False, "lr_scheduler_type": "linear", "num_warmup_steps": 0, "gradient_accumulation_steps": 1,
    "use_xbrain": True, "calc_image_bbox_loss": False, "optimizer.opt": "adamW", "schedular.sched": "linear",
    "accelerator.FP16_OPT_LEVEL": "O1", "images.is_image_rpath": False, "images.tokenized": False,
    "regions.is_image_rpath": False, "regions.caption_key": "caption", "regions.iter_perc": 1.0,
}  # fmt: skip
# Without effect on a result: how the official code evaluates, what its programs read from elsewhere or not at all.
_IDLE = {
    "accumulation_steps", "batch_size_test_text", "start_eval", "train_dataset_size", "num_labels", "cutmix_minmax",
    "color_jitter", "max_train_steps", "use_slow_tokenizer", "output_dir", "checkpoint", "ckpt_frequent",
    "model_name_or_path", "mask_whole_word", "mask_prob", "max_masks", "skipgram_prb", "skipgram_size",
    "optimizer.momentum", "schedular.lr", "accelerator.ACCELERATOR", "accelerator.AUTO_CAST", "accelerator.SYNCBN",
    "accelerator.FP16_LOSS_SCALE", "accelerator.RNG_SEED",
}  # fmt: skip
# Keys that are read together below.
_READ = {
    "train_file", "val_file", "test_file", "validation_file", "val_gt_file", "test_gt_file", "train_file_regions",
    "image_root", "vqa_root", "vg_root", "refcoco_data", "det_file", "coco_file", "dataset", "task_name",
    "glue_datasets", "schedular.warmup_epochs",
}  # fmt: skip
_TORCHVISION = {
    "food101", "cifar10", "cifar100", "stanfordcars", "fgvcaircraft", "dtd", "oxfordiiitpet", "flowers102", "mnist",
    "stl10", "sun397", "caltech101", "caltech256", "gtsrb", "country211", "fer2013", "pcam", "kitti", "renderedsst2",
}  # fmt: skip
# Sets without folders `train` and `val`: split by the official code, or read from one file.
_WHOLE = {"sun397", "caltech101", "caltech256", "fer2013"}


def is_official(values: Mapping[str, Any]) -> bool:
    """True for a mapping with the sections of official files."""
    return "task" not in values and bool(_SECTIONS & values.keys())


def from_official(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Recipe values from an official configuration; `name` is used in messages and as the run folder."""
    known = [*_KEYS, *_MODEL, *_ONLY, *_IDLE, *_READ]
    # Values of sections as `section.key`.
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            {f"{key}.{name}": each for name, each in value.items()}
            if isinstance(value, Mapping)
            else {key: value}
        )
    if unknown := [key for key in flat if key not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ConfigError(
            f"{name}: {', '.join(unknown)} is no key of the official fine-tuning files"
            f"{f' (did you mean {near[0]}?)' if near else ''}; take it out, or write a recipe of your own"
        )
    if other := [key for key, value in _ONLY.items() if flat.get(key, value) not in (value, None)]:
        raise ConfigError(
            f"{name}: {other[0]}={flat[other[0]]!r} is not offered; only {_ONLY[other[0]]!r} is"
        )
    base = _base(values, name)
    recipe = read_recipe(base, FINETUNING)
    kind = recipe["task"]["kind"]
    for key, ours in _KEYS.items():
        value = flat.get(key)
        if base.startswith("glue_") and key == "max_length":
            ours = "task.max_tokens"
        elif base == "refcoco_domain" and key in ("max_words", "max_tokens"):
            ours = f"task.regions.{key}"
        elif key == "optimizer.weight_decay" and kind == "image":
            # The image scripts ignore the file and use torch's default weight decay.
            continue
        elif key == "max_tokens" and base == "refcoco_plus":
            # The official tokenizer gets this length without `truncation`: it does not cut.
            continue
        if value is not None:
            *sections, last = ours.split(".")
            section = recipe
            for name_of_section in sections:
                section = section[name_of_section]
            section[last] = float(value) if last in _NUMBERS else value
    if kind == "vqa":
        # The official list of parameters to multiply it for is empty; here it means the decoder.
        recipe["optimizer"]["lr_mult"] = 1.0
    if values.get("is_lp"):
        recipe["task"] |= {"mixup": 0.0, "cutmix": 0.0}
    if "schedular.warmup_epochs" in flat:
        recipe["schedule"]["warmup"] = flat["schedular.warmup_epochs"] / recipe["epochs"]
    if base == "refcoco_domain":
        # Their batches and epochs count texts, ours images; the published run has 8 GPUs.
        regions = recipe["task"]["regions"]
        recipe["batch_size"] = regions["max_images"]
        if "train_dataset_size" in values:
            recipe["steps"] = recipe["epochs"] * math.ceil(
                values["train_dataset_size"] / (8 * regions["texts"])
            )
    if "accelerator" not in values:
        # Only domain pretraining runs in mixed precision.
        recipe["precision"] = "fp32"
    recipe["model"] = XFMConfig.from_official(dict(values)).model_dump()
    recipe["tokenizer"] = values["text_encoder"]
    recipe["init"] = {}
    # VQA has a root for each data set in its place, relative to where the command runs as all of them are.
    places: dict[str, Any] = {
        "root": ".",
        "images": values.get("image_root", ""),
        "official_pictures": True,
    }
    recipe["data"] = _data(values, recipe["data"], base) | places
    if not recipe["data"]["train"]:
        # As the published files of domain pretraining have it; the message about a missing key says how to give it.
        del recipe["data"]["train"]
    if kind == "vqa":
        folders = {"vqa": values["vqa_root"], "vg": values["vg_root"]}
        recipe["task"] |= {"image_folders": folders, "official_ranking": True}
    if kind == "image" and (data_set := values["task_name"]) in _TORCHVISION:
        split = "trainval" if data_set == "oxfordiiitpet" else "train"
        recipe["task"] |= {"dataset": data_set, "view": "probe", "train_split": split}
    recipe["checkpoint"] = recipe["checkpoint"] | {"folder": f"runs/{Path(name).stem}"}
    choice, splits = recipe.get("choose"), recipe["data"].get("splits", {})
    if choice is not None and choice["split"] not in splits:
        # The only split is `test`: it includes the val of RefCOCO+ (`val_d`), and image sets choose by it.
        by = "accuracy_val" if base == "refcoco_plus" else choice["by"]
        recipe["choose"] = {"by": by, "split": "test"} if "test" in splits else None
    return recipe


def _base(values: Mapping[str, Any], name: str) -> str:
    """Our recipe of the same task."""
    task = values.get("task_name")
    if "glue_datasets" in values:
        return f"glue_{task}"
    if "dataset" in values:
        return "imagenet_linear" if values.get("is_lp") else "imagenet_ft"
    for key, base in (
        ("train_file_regions", "refcoco_domain"), ("refcoco_data", "refcoco_plus"), ("answer_list", "vqa2"),
        ("prompt", "coco_captioning"), ("images", "captioning_domain"), ("k_test", "retrieval_coco"),
    ):  # fmt: skip
        if key in values:
            return base
    if "train_file" in values and "val_file" in values:
        return "nlvr2"
    raise ConfigError(
        f"{name}: its keys do not tell which task of the official code it is for; write a recipe"
    )


def _data(values: Mapping[str, Any], data: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The section `data`: official files merged into the recipe's own."""
    if base.startswith("glue_"):
        folder = f"{values['glue_datasets']}/{values['task_name']}"
        return {**data, "train": folder, "splits": dict.fromkeys(data["splits"], folder)}
    if base.startswith("imagenet"):
        folder, name = values["dataset"], values["task_name"]
        train, test = (folder, folder) if name in _WHOLE else (f"{folder}/train", f"{folder}/val")
        return {**data, "train": train, "splits": {"test" if name in _TORCHVISION else "val": test}}
    if base == "refcoco_domain":
        return {**data, "train": values["train_file_regions"]}
    found = {
        split: values[key]
        for split, key in (("val", "val_file"), ("test", "test_file"))
        if values.get(key)
    }
    beside: list[str] = []
    if base == "refcoco_plus":
        # The refer toolkit finds these below its folder; `det_file` and `coco_file` are only for detections.
        beside = [
            str(Path(values["refcoco_data"]) / "refcoco+" / name)
            for name in ("refs(unc).p", "instances.json")
        ]
    truth = {split: values.get(f"{split}_gt_file") for split in ("val", "test")}
    splits = {
        split: [*_list(paths), *beside, *_list(truth[split])] for split, paths in found.items()
    }
    return {**data, "train": [*_list(values["train_file"]), *beside], "splits": splits}


def _list(value: Any) -> list[str]:
    return [] if value is None else value if isinstance(value, list) else [value]
