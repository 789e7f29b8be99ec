"""The official configurations as recipes, trained on generated data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from tests.finetuning.conftest import SMALL
from tests.finetuning.official_data import (
    accept_made_up_files,
    write_image_set,
    write_official_world,
)
from tests.finetuning.official_files import (
    CAPTIONING,
    FILES,
    GROUNDING,
    NLVR,
    PAIRS,
    REGIONS,
    SETS,
    VQA,
)
from xfm_fast.config import XFMConfig
from xfm_fast.errors import ConfigError
from xfm_fast.finetuning.recipe import FinetuneRecipe, load_finetune_recipe
from xfm_fast.finetuning.run import evaluate, finetune
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.grounding import GroundingOptions
from xfm_fast.tasks.nlvr2 import NLVR2Options
from xfm_fast.tasks.task import AnyTask, make_task
from xfm_fast.tokenizer import CaptionTokenizer


def load(values: dict[str, Any], tmp_path: Path, *overrides: str) -> FinetuneRecipe:
    path = tmp_path / "official.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_finetune_recipe(path, overrides)


@pytest.mark.parametrize(
    ("values", "ours", "same"),
    [
        # The multiple of lr differs, which nothing of retrieval learns by.
        (FILES["Retrieval_coco"], "retrieval_coco", {"task", "model", "epochs", "batch_size", "schedule", "choose"}),
        (NLVR, "nlvr2",
         {"task", "model", "epochs", "batch_size", "optimizer", "schedule"}),
        (VQA, "vqa2", {"model", "epochs", "batch_size", "optimizer", "schedule"}),
        (GROUNDING, "refcoco_plus", {"task", "model", "epochs", "batch_size", "optimizer", "schedule"}),
        (CAPTIONING, "coco_captioning", {"task", "model", "epochs", "batch_size", "optimizer", "schedule", "choose"}),
        (FILES["glue_mnli"], "glue_mnli", {"task", "epochs", "batch_size", "optimizer", "schedule"}),
    ],
)  # fmt: skip
def test_a_published_file_is_our_recipe(
    values: dict[str, Any], ours: str, same: set[str], tmp_path: Path
) -> None:
    """Check that the shipped recipes have the official numbers."""
    official, shipped = load(values, tmp_path), load_finetune_recipe(ours)
    for section in same:
        assert getattr(official, section) == getattr(shipped, section), section
    assert official.checkpoint.folder == "runs/official"


@pytest.mark.parametrize("name", FILES)
def test_runs_are_as_the_official_code_makes_them(name: str, tmp_path: Path) -> None:
    loaded = load(FILES[name], tmp_path, "data.train=mine")
    task: Any = loaded.task
    assert loaded.data.official_pictures
    # Only domain pretraining runs in mixed precision (Apex).
    assert loaded.precision == ("bf16" if name.endswith("_O1") else "fp32")
    # The scripts of image classification alone take PyTorch's optimizer.
    assert loaded.optimizer.kind == ("torch" if task.kind == "image" else "transformers")
    # `val_d` over val, testA and testB together; sets of images have no val.
    choices = {"Grounding_bbox": ("accuracy_val", "test")} | dict.fromkeys(SETS, ("top1", "test"))
    if name in choices:
        assert loaded.choose is not None
        assert (loaded.choose.by, loaded.choose.split) == choices[name]
    if name in SETS:
        folder, data_set = FILES[name]["dataset"], FILES[name]["task_name"]
        # Split by the code itself, or read from a file.
        unsplit = data_set in ("sun397", "caltech101", "fer2013")
        assert loaded.data.splits == {"test": (folder if unsplit else f"{folder}/val",)}
        probe = load(FILES[name], tmp_path)
        assert probe.data.train == (folder if unsplit else f"{folder}/train",)
        assert probe.task.kind == "image"
        task = probe.task
        assert task.train_split == ("trainval" if data_set == "oxfordiiitpet" else "train")
        assert (task.dataset, task.frozen, task.mixup, task.view) == (data_set, True, 0, "probe")
        assert (probe.schedule.kind, probe.optimizer.weight_decay) == ("cosine", 0.01)
        assert probe.model == XFMConfig.preset("base", text_layers=0, fusion_layers=0)
    if loaded.task.kind == "vqa":
        assert task.official_ranking
        assert (loaded.image_folder, task.image_folders["vg"]) == (
            Path(),
            "../images/visualgenome/",
        )
    if isinstance(loaded.task, (NLVR2Options, GroundingOptions)):
        # The official tokenizer does not truncate.
        assert loaded.task.max_tokens is None


# One for every script of the official code; the others differ from these in numbers and files.
QUICK = {
    "Captioning", "Captioning_pretrain_O1", "Grounding_bbox", "Grounding_bbox_pretrain_O1", "NLVR", "Retrieval_coco",
    "VQA", "glue_rte", "imagenet1k", "oxfordiiitpet_lp",
}  # fmt: skip

# The two files that list no data, and have no evaluation.
LIES = "../data/finetune"
DOMAIN_DATA = {
    "Captioning_pretrain_O1": [
        f"data.train={LIES}/pairs_train.jsonl",
        f"data.splits.val={LIES}/coco_karpathy/coco_karpathy_val*.json",
        "data.images=../images/coco",
    ],
    "Grounding_bbox_pretrain_O1": [
        f"data.train={LIES}/regions_train.jsonl",
        f"data.splits.val=[{LIES}/refcoco+_val.json, {LIES}/refcoco+/refs(unc).p, {LIES}/refcoco+/instances.json]",
    ],
}


@pytest.fixture(scope="module")
def official_world(world: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the folder that the official code runs in, with a small pretrained model that reads
    texts as long as RoBERTa.
    """
    tokenizer = CaptionTokenizer.from_files(pretrained / "tokenizer.json")
    folder = write_official_world(tmp_path_factory.mktemp("official"), world, tokenizer)
    config = XFMConfig.preset("tiny", vocab_size=tokenizer.vocab_size, max_positions=514, **SMALL)
    XFM(config).save_pretrained(folder / "pretrained")
    return folder


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FILES],
)
def test_a_published_file_trains_and_is_evaluated(
    name: str, official_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a step and an evaluation of every file as it is, except for the sizes of the model and of
    batches.
    """
    values = FILES[name]
    monkeypatch.chdir(official_world)
    if "dataset" in values:
        accept_made_up_files(monkeypatch)
        write_image_set(values, official_world)
    layers = {
        f"{encoder}_layers": min(2, values[f"{encoder}_num_hidden_layers"])
        for encoder in ("text", "fusion")
    }
    vocabulary = XFMConfig.load("pretrained/config.json").vocab_size
    overrides = [
        f"model.{size}={value}"
        for size, value in {**SMALL, **layers, "vocab_size": vocabulary}.items()
    ]
    overrides += [
        "init.checkpoint=pretrained",
        f"checkpoint.folder={tmp_path / 'run'}",
        "steps=1",
        "device=cpu",
    ]
    overrides += ["batch_size=2", "eval_batch_size=4", "workers=0"]
    if "num_dec_layers" in values:
        overrides.append("task.decoder_layers=2")
    recipe = load(values, tmp_path, *overrides, *DOMAIN_DATA.get(name, []))
    result = finetune(recipe)
    assert result.step == 1
    assert result.folder.name == ("model" if recipe.choose is None or not recipe.epochs else "best")
    assert result.metrics.keys() == recipe.data.splits.keys()
    for split, metrics in result.metrics.items():
        assert metrics or (split.startswith("test") and "glue_datasets" in values)
        assert evaluate(recipe, result.folder, split, tmp_path / split) == pytest.approx(
            metrics, abs=1e-6
        )


@pytest.mark.parametrize("kind", ["nlvr2", "grounding"])
def test_texts_are_truncated_to_words_only(kind: str, official_world: Path) -> None:
    """Thirty words are kept, however many tokens they have; the official code gives the tokenizer
    no length.
    """
    tokenizer = CaptionTokenizer.from_files(official_world / "../data/roberta-base/tokenizer.json")
    config = XFMConfig.load(official_world / "pretrained/config.json")
    task = make_task(TypeAdapter(AnyTask).validate_python({"kind": kind}), config, tokenizer)
    text = " ".join(["quixotry"] * 31)
    ids = task.caption_ids(text, task.options.max_words, task.options.max_tokens)
    assert ids == tokenizer.encode_ids([text.rpartition(" ")[0]], 500)[0]
    assert len(ids) > 40


@pytest.mark.parametrize(
    ("values", "ours"), [(REGIONS, "refcoco_domain"), (PAIRS, "captioning_domain")]
)
def test_domain_pretraining_is_our_recipe(
    values: dict[str, Any], ours: str, tmp_path: Path
) -> None:
    official, shipped = load(values, tmp_path, "data.train=mine"), load_finetune_recipe(ours)
    for section in (
        "model",
        "epochs",
        "steps",
        "batch_size",
        "optimizer",
        "schedule",
        "workers",
        "precision",
    ):
        assert getattr(official, section) == getattr(shipped, section), section
    for section in ("regions", "pairs"):
        assert getattr(official.task, section, None) == getattr(shipped.task, section, None)
    with pytest.raises(ConfigError, match=r"data\.train"):
        load(values, tmp_path)
