"""The official configurations as recipes, and what the recipes of the package say of themselves.

The values are those of the published files, written out anew.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from xfm_fast.benchmarks.options import FineTuned
from xfm_fast.benchmarks.work.finetuning_cost import Shape, step_costs
from xfm_fast.config import XFMConfig
from xfm_fast.errors import ConfigError
from xfm_fast.finetuning.recipe import FinetuneRecipe, load_finetune_recipe
from xfm_fast.finetuning.run import finetune
from xfm_fast.training.recipe import FINETUNING, recipe_names

MODEL: dict[str, Any] = {
    "use_beit_v2": True, "vision_config": "configs/model/config_beit2_base.json", "image_res": 384, "patch_size": 16,
    "local_attn_depth": -1, "text_encoder": "../data/roberta-base", "text_num_hidden_layers": 12,
    "text_fusion_start_at": 12, "fusion_num_hidden_layers": 12, "fusion_fusion_start_at": 0,
}  # fmt: skip
IMAGE: dict[str, Any] = MODEL | {
    "image_res": 224, "text_num_hidden_layers": 0, "text_fusion_start_at": 0, "fusion_num_hidden_layers": 0,
    "batch_size_test": 512, "num_readers": 4, "mixup": 0.8, "cutmix": 1.0, "cutmix_minmax": None, "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5, "mixup_mode": "batch", "smoothing": 0.1, "num_labels": 1000, "color_jitter": None,
    "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "remode": "pixel", "recount": 1,
}  # fmt: skip


def trained(lr: str, epochs: int) -> dict[str, Any]:
    # YAML 1.1 reads 3e-5 as text.
    return {
        "optimizer": {"opt": "adamW", "lr": lr, "weight_decay": 0.01, "lr_mult": 2},
        "schedular": {"sched": "linear", "lr": lr, "epochs": epochs, "num_warmup_steps": 0.1},
    }


def files(name: str) -> dict[str, Any]:
    return {
        "train_file": [f"d/{name}_train.json"],
        "val_file": f"d/{name}_val.json",
        "test_file": f"d/{name}_test.json",
    }


RETRIEVAL = MODEL | trained("3e-5", 20) | files("coco") | {
    "image_root": "../images/coco/", "batch_size_train": 32, "batch_size_test": 64, "batch_size_test_text": 64,
    "max_tokens": 40, "embed_dim": 256, "temp": 0.07, "k_test": 256, "accumulation_steps": 1,
}  # fmt: skip
VQA = MODEL | trained("2e-5", 10) | {
    "train_file": ["vqa_train.json", "vg_qa.json"], "test_file": ["vqa_test.json"], "answer_list": "answers.json",
    "vqa_root": "../images/coco/", "vg_root": "../images/vg/", "image_res": 480, "num_dec_layers": 12,
    "decoder_fusion_start_at": 0, "batch_size_train": 24, "batch_size_test": 32, "max_tokens": 40, "k_test": 128,
    "start_eval": 2,
}  # fmt: skip
GROUNDING = MODEL | trained("2e-5", 15) | {
    "train_file": ["rc_train.json"], "test_file": ["rc_val.json", "rc_test.json"], "refcoco_data": "../data/finetune/",
    "det_file": "dets.json", "coco_file": "cocos.json", "image_root": "../images/coco/", "careful_hflip": True,
    "batch_size": 20, "max_tokens": 40,
}  # fmt: skip
CAPTIONING = MODEL | trained("1e-5", 5) | files("ck") | {
    "image_root": "../images/coco/", "val_gt_file": "ck_val_gt.json", "test_gt_file": "ck_test_gt.json",
    "batch_size_train": 32, "batch_size_test": 32, "max_tokens": 40, "label_smoothing": 0.1, "max_length": 20,
    "min_length": 5, "num_beams": 3, "prompt": "a picture of ",
}  # fmt: skip
GLUE = MODEL | {
    "train_file": None, "validation_file": None, "test_file": None, "glue_datasets": "../glue", "task_name": "mnli",
    "num_labels": 3, "max_length": 128, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 8,
    "learning_rate": "2e-5", "weight_decay": 0.0, "num_train_epochs": 5, "lr_scheduler_type": "linear", "seed": 42,
    "num_warmup_steps": 0, "fusion_num_hidden_layers": 0, "use_xbrain": True,
}  # fmt: skip
PROBE = IMAGE | {
    "task_name": "cifar10", "dataset": "../images/cifar10", "batch_size_train": 256, "is_lp": True,
    "optimizer": {"opt": "adamW", "lr": "2e-5", "weight_decay": 0.02, "momentum": 0.9},
    "schedular": {"lr": "2e-5", "min_lr": 0, "epochs": 100, "warmup_epochs": 10},
}  # fmt: skip
# The two files of domain pretraining list no data; whoever runs them says where theirs lies.
DOMAIN: dict[str, Any] = MODEL | trained("3e-5", 2) | {
    "image_res": 224, "max_words": 40, "max_tokens": 40, "mask_whole_word": True, "mask_prob": 0.25, "max_masks": 8,
    "skipgram_prb": 0.2, "skipgram_size": 3,
    "accelerator": {
        "ACCELERATOR": "ApexDDP", "AUTO_CAST": False, "SYNCBN": False, "FP16_OPT_LEVEL": "O1",
        "FP16_LOSS_SCALE": "dynamic", "RNG_SEED": 42, "GRAD_ACCUMULATE_STEPS": 1, "CLIP_GRAD_NORM": 1.0,
    },
}  # fmt: skip
REGIONS = DOMAIN | {
    "train_file_regions": [], "train_dataset_size": 318547, "refcoco_data": "d", "det_file": "d", "coco_file": "d",
    "image_root": "i", "calc_image_bbox_loss": False,
    "regions": {
        "image_key": "binary", "is_image_rpath": False, "caption_key": "caption", "tokenized": True,
        "careful_hflip": True, "iter_perc": 1.0, "batch_size": 64, "max_images": 28, "max_regions": 5,
        "min_perc_in_image": 0.5, "num_workers": 4,
    },
}  # fmt: skip
PAIRS = DOMAIN | {
    "train_file": [], "train_dataset_size": 5114489, "embed_dim": 256,
    "images": {
        "image_key": "binary", "is_image_rpath": False, "caption_key": "desc", "tokenized": False, "batch_size": 128,
        "num_workers": 4,
    },
}  # fmt: skip


def load(values: dict[str, Any], tmp_path: Path, *overrides: str) -> FinetuneRecipe:
    path = tmp_path / "official.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_finetune_recipe(path, overrides)


@pytest.mark.parametrize(
    ("values", "ours", "same"),
    [
        # The multiple of lr differs, which nothing of retrieval learns by.
        (RETRIEVAL, "retrieval_coco", {"task", "model", "epochs", "batch_size", "schedule", "choose"}),
        (MODEL | trained("1e-5", 15) | files("nlvr") | {"image_root": "i", "batch_size": 8}, "nlvr2",
         {"task", "model", "epochs", "batch_size", "optimizer", "schedule"}),
        (VQA, "vqa2", {"model", "epochs", "batch_size", "optimizer", "schedule"}),
        (GROUNDING, "refcoco_plus", {"task", "model", "epochs", "batch_size", "optimizer", "schedule"}),
        (CAPTIONING, "coco_captioning", {"task", "model", "epochs", "batch_size", "optimizer", "schedule", "choose"}),
        (GLUE, "glue_mnli", {"task", "epochs", "batch_size", "optimizer", "schedule"}),
    ],
)  # fmt: skip
def test_a_published_file_is_our_recipe(values: dict[str, Any], ours: str, same: set[str], tmp_path: Path) -> None:
    """The shipped recipes hold the official numbers, so that both say the same."""
    official, shipped = load(values, tmp_path), load_finetune_recipe(ours)
    for section in same:
        assert getattr(official, section) == getattr(shipped, section), section
    assert official.checkpoint.folder == "runs/official"


def test_files_and_folders_are_those_of_the_file(tmp_path: Path) -> None:
    retrieval = load(RETRIEVAL, tmp_path, "batch_size=4", "init.checkpoint=x.th")
    assert retrieval.data.train == ("d/coco_train.json",)
    assert retrieval.data.splits == {"val": ("d/coco_val.json",), "test": ("d/coco_test.json",)}
    assert (retrieval.batch_size, retrieval.eval_batch_size, retrieval.tokenizer) == (4, 64, "../data/roberta-base")
    assert str(retrieval.image_folder) == "../images/coco"
    grounding = load(GROUNDING, tmp_path)
    beside = ("../data/finetune/refcoco+/refs(unc).p", "../data/finetune/refcoco+/instances.json")
    assert grounding.data.train == ("rc_train.json", *beside)
    assert grounding.data.splits == {"test": ("rc_val.json", "rc_test.json", *beside)}
    assert grounding.choose is None
    captioning = load(CAPTIONING, tmp_path)
    assert captioning.data.splits["val"] == ("d/ck_val.json", "ck_val_gt.json")
    probe = load(PROBE, tmp_path)
    assert probe.task.kind == "image"
    assert (probe.task.dataset, probe.task.frozen, probe.task.mixup, probe.task.view) == ("CIFAR10", True, 0, "probe")
    assert (probe.schedule.kind, probe.schedule.warmup, probe.optimizer.weight_decay) == ("cosine", 0.1, 0.01)
    assert probe.model == XFMConfig.preset("base", text_layers=0, fusion_layers=0)


@pytest.mark.parametrize(("values", "ours"), [(REGIONS, "refcoco_domain"), (PAIRS, "captioning_domain")])
def test_domain_pretraining_is_our_recipe(values: dict[str, Any], ours: str, tmp_path: Path) -> None:
    official, shipped = load(values, tmp_path, "data.train=mine"), load_finetune_recipe(ours)
    for section in ("model", "epochs", "steps", "batch_size", "optimizer", "schedule", "workers"):
        assert getattr(official, section) == getattr(shipped, section), section
    for section in ("regions", "pairs"):
        assert getattr(official.task, section, None) == getattr(shipped.task, section, None)
    with pytest.raises(ConfigError, match=r"data\.train is missing; add it to the recipe or as data\.train="):
        load(values, tmp_path)


def test_values_in_sections_arrive(tmp_path: Path) -> None:
    changed = {"max_images": 7, "max_regions": 3, "batch_size": 16, "min_perc_in_image": 0.25, "careful_hflip": False}
    changed |= {"tokenized": False, "image_key": "img", "num_workers": 2}
    values = REGIONS | {"regions": REGIONS["regions"] | changed, "train_dataset_size": 1000, "max_words": 9}
    regions = load(values | trained("1e-5", 3), tmp_path, "data.train=mine")
    assert (regions.batch_size, regions.steps, regions.workers, regions.optimizer.lr) == (7, 3 * 8, 2, 1e-5)
    found: Any = getattr(regions.task, "regions")  # noqa: B009, not of every task
    assert (found.max_images, found.max_regions, found.texts, found.max_words) == (7, 3, 16, 9)
    assert (found.least_visible, found.careful_flip, found.tokenized, found.image_key) == (0.25, False, False, "img")
    images = PAIRS["images"] | {"caption_key": "text", "batch_size": 5, "language_chosen": "en"}
    accelerator = DOMAIN["accelerator"] | {"CLIP_GRAD_NORM": 2.0}
    pairs = load(PAIRS | {"images": images, "accelerator": accelerator}, tmp_path, "data.train=mine")
    assert (pairs.batch_size, pairs.optimizer.clip_norm) == (5, 2.0)
    found = getattr(pairs.task, "pairs")  # noqa: B009
    assert (found.caption_key, found.language) == ("text", "en")


def test_what_cannot_be_translated_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"regions\.max_regoins is no key .*\(did you mean regions\.max_regions\?\)"):
        load(REGIONS | {"regions": {"max_regoins": 3}}, tmp_path)
    with pytest.raises(ConfigError, match=r"images\.is_image_rpath=True is not offered; only False is"):
        load(PAIRS | {"images": PAIRS["images"] | {"is_image_rpath": True}}, tmp_path)
    with pytest.raises(ConfigError, match=r"k_tset is no key of the official .*\(did you mean k_test\?\)"):
        load(RETRIEVAL | {"k_tset": 3}, tmp_path)
    with pytest.raises(ConfigError, match=r"mixup_prob=0\.5 is not offered; only 1\.0 is"):
        load(PROBE | {"mixup_prob": 0.5}, tmp_path)
    with pytest.raises(ConfigError, match=r"epochs=0 trains nothing; .* xfm-fast evaluate"):
        finetune(load(RETRIEVAL | trained("3e-5", 0), tmp_path))
    with pytest.raises(ConfigError, match="do not tell which task"):
        load(MODEL | {"train_file": ["x"]}, tmp_path)


def head_of(name: str) -> str:
    """The comments of a recipe, of which the first are its head, as one line."""
    text = (Path(__file__).parents[2] / f"xfm_fast/finetuning/recipes/{name}.yaml").read_text()
    return " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))


@pytest.mark.parametrize("name", recipe_names(FINETUNING))
def test_recipes_say_what_to_expect(name: str) -> None:
    head = head_of(name)
    order = [head.index(said) for said in ("command: ", "expected time: ", "expected number: ")]
    assert order == sorted(order)
    assert f"finetune {name}" in head[order[0] : order[1]]
    if not name.endswith("_tiny_shapes"):
        assert re.search(r"FLOP.*\(counted\).*(A100|H100)", head[order[1] : order[2]])
        assert re.search(r"README|arXiv|none is published|that of refcoco_plus", head[order[2] :])


# What their time is counted for: the items of a step, or one where that of an item is said, and tokens of a text.
COUNTED: dict[str, tuple[FineTuned, int, int]] = {
    "retrieval_coco": ("retrieval", 32, 13), "retrieval_flickr30k": ("retrieval", 32, 17), "vqa2": ("vqa", 1, 10),
    "nlvr2": ("nlvr2", 1, 18), "refcoco_plus": ("grounding", 20, 6), "refcoco_plus_weak": ("retrieval", 32, 6),
    "coco_captioning": ("captioning", 32, 16), "captioning_domain": ("captioning", 128, 16),
    "imagenet_ft": ("image", 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_operations_of_recipes_are_counted(name: str) -> None:
    task, items, tokens = COUNTED[name]
    said = re.search(r"([\d.]+) ([GT])FLOP", head_of(name))
    assert said is not None
    shape = Shape(
        items, [tokens] * items if tokens else (), tokens, [[3, 4]] * items, 4, given=5, decoder_layers=12, classes=1000
    )
    counted = step_costs(task, load_finetune_recipe(name).model, shape).needed
    assert float(said[1]) * {"G": 1e9, "T": 1e12}[said[2]] == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("name", [name for name in recipe_names(FINETUNING) if name.startswith("glue_")])
def test_operations_of_glue_are_counted(name: str) -> None:
    said = re.search(r"([\d,]+) steps of one GPU, ([\d.]+) PFLOP at (\d+) tokens", head_of(name))
    assert said is not None
    recipe, tokens = load_finetune_recipe(name), int(said[3])
    shape = Shape(recipe.batch_size, [tokens] * recipe.batch_size, tokens, classes=3)
    counted = int(said[1].replace(",", "")) * step_costs("text", recipe.model, shape).needed
    assert float(said[2]) * 1e15 == pytest.approx(counted, rel=0.05)
