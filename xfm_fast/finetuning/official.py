"""Converts configurations of the official code to recipes.

Values override our recipe of the same task. Every published key maps to a recipe key, a model field, a required value,
or is ignored because it has no effect; other keys are errors. Paths stay relative to the working directory, and weights
are set by `init.checkpoint`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xfm_fast.config import XFMConfig
from xfm_fast.errors import ConfigError
from xfm_fast.training.recipe import FINETUNING, read_recipe

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
        flat |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, Mapping) else {key: value}
    if unknown := [key for key in flat if key not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ConfigError(
            f"{name}: {', '.join(unknown)} is no key of the official fine-tuning files"
            f"{f' (did you mean {near[0]}?)' if near else ''}; take it out, or write a recipe of your own"
        )
    if other := [key for key, value in _ONLY.items() if flat.get(key, value) not in (value, None)]:
        raise ConfigError(f"{name}: {other[0]}={flat[other[0]]!r} is not offered; only {_ONLY[other[0]]!r} is")
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
            recipe["steps"] = recipe["epochs"] * math.ceil(values["train_dataset_size"] / (8 * regions["texts"]))
    if "accelerator" not in values:
        # Only domain pretraining runs in mixed precision.
        recipe["precision"] = "fp32"
    recipe["model"] = XFMConfig.from_official(dict(values)).model_dump()
    recipe["tokenizer"] = values["text_encoder"]
    recipe["init"] = {}
    # VQA has a root for each data set in its place, relative to where the command runs as all of them are.
    places: dict[str, Any] = {"root": ".", "images": values.get("image_root", ""), "official_pictures": True}
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
    raise ConfigError(f"{name}: its keys do not tell which task of the official code it is for; write a recipe")


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
    found = {split: values[key] for split, key in (("val", "val_file"), ("test", "test_file")) if values.get(key)}
    beside: list[str] = []
    if base == "refcoco_plus":
        # The refer toolkit finds these below its folder; `det_file` and `coco_file` are only for detections.
        beside = [str(Path(values["refcoco_data"]) / "refcoco+" / name) for name in ("refs(unc).p", "instances.json")]
    truth = {split: values.get(f"{split}_gt_file") for split in ("val", "test")}
    splits = {split: [*_list(paths), *beside, *_list(truth[split])] for split, paths in found.items()}
    return {**data, "train": [*_list(values["train_file"]), *beside], "splits": splits}


def _list(value: Any) -> list[str]:
    return [] if value is None else value if isinstance(value, list) else [value]
