"""Text classification and regression: pairs, GLUE files, bad data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.finetuning.conftest import Make
from tests.finetuning.official_data import write_glue
from xfm_fast.data.tables import GLUE
from xfm_fast.errors import DataError
from xfm_fast.finetuning.recipe import open_task
from xfm_fast.finetuning.run import finetune, initial_model

RNG = np.random.default_rng(0)
WORLD = "text", "text_{}.tsv"
COLUMNS: dict[str, Any] = {"columns": {"text": "sentence1", "text2": "sentence2"}, "max_tokens": 64}


def test_a_pair_is_encoded_as_roberta_reads_it(recipe: Make) -> None:
    task = open_task(recipe(*WORLD, task=COLUMNS))
    assert task.options.labels == ("no", "yes")
    assert task.options.pairs
    (rows,) = task.rows(recipe(*WORLD).paths_of("train"))
    records = [rows.read(index) for index in range(4)]
    model = task.build().train(False)
    loss = task.losses_of(model, task.collate([task.item(record, RNG) for record in records], RNG))[
        "loss"
    ]
    encode = task.tokenizer.encode_ids
    ids = []
    for record in records:
        (first,), (second,) = encode([record.text], 99), encode([record.text2 or ""], 99)
        ids.append([*first, task.tokenizer.eos_token_id, *second[1:]])
    width = max(map(len, ids))
    by_hand = torch.tensor(
        [[*row, *[task.tokenizer.pad_token_id] * (width - len(row))] for row in ids]
    )
    targets = torch.tensor([("no", "yes").index(record.label or "") for record in records])
    torch.testing.assert_close(loss, model(None, by_hand, targets=targets))


# Metrics and submission file.
RESULTS = {
    "cola": ({"accuracy", "matthews"}, "CoLA"), "mnli": ({"accuracy"}, "MNLI-m"), "mrpc": ({"accuracy", "f1"}, "MRPC"),
    "stsb": ({"pearson", "spearman"}, "STS-B"),
}  # fmt: skip


@pytest.mark.parametrize("name", RESULTS)
def test_glue(name: str, recipe: Make, tmp_path: Path) -> None:
    write_glue(tmp_path)
    files = {"val": "dev.tsv", "test": "test.tsv"}
    if name == "mnli":
        files = {each: f"{each}.tsv" for each in ("val", "test", "test_mismatched")} | {
            "val": "dev_matched.tsv"
        }
    data = {"root": str(tmp_path / name), "train": "train.tsv", "splits": files}
    opened = recipe(
        "text", "", task={"glue": name, "max_tokens": 64}, data=data, steps=1, batch_size=2
    )
    assert open_task(opened).options.labels == (GLUE[name].classes or ())
    result = finetune(opened)
    known_metrics, stem = RESULTS[name]
    assert set(result.metrics["val"]) == known_metrics
    assert result.metrics["test"] == {}
    folder = Path(opened.checkpoint.folder) / "evaluation"
    head, *rows = (folder / "test" / f"{stem}.tsv").read_text().splitlines()
    assert head == "index\tprediction"
    assert [row.split("\t")[0] for row in rows] == [str(index) for index in range(len(rows))]
    assert len(rows) == 2 * len(GLUE[name].classes or "ab")
    answers = [row.split("\t")[1] for row in rows]
    if name == "stsb":
        assert all(0 <= float(each) <= 5 for each in answers)
    else:
        assert set(answers) <= set(GLUE[name].classes or ())
    if name == "mnli":
        assert (folder / "test_mismatched" / "MNLI-mm.tsv").is_file()


def run_on(
    recipe: Make, folder: Path, train: str, val: str, suffix: str = "csv", **task: Any
) -> Any:
    for split, content in (("train", train), ("val", val)):
        (folder / f"{split}.{suffix}").write_text(content)
    data = {"root": str(folder), "train": f"train.{suffix}", "splits": {"val": f"val.{suffix}"}}
    return finetune(recipe("text", "", task={"max_tokens": 64, **task}, data=data, steps=1))


TRAIN = "text,label\ngood,up\nbad,down\nfine,up\n"


@pytest.mark.parametrize(
    ("train", "val", "options", "said"),
    [
        (TRAIN, "text,label\nso,sideways\n", {}, r"1 of 1.*'sideways'"),
        ("text,label\na,up\nb,up\n", TRAIN, {}, r"class.*'up'"),
        (TRAIN, TRAIN, {"columns": {"text": "review"}}, r"'review'.*'text', 'label'"),
        (TRAIN, TRAIN, {"labels": ["up", "down", "up"]}, "'up'"),
    ],
)
def test_bad_data(
    train: str, val: str, options: dict[str, Any], said: str, recipe: Make, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        run_on(recipe, tmp_path, train, val, **options)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_test_file_without_labels_gets_predictions(recipe: Make, tmp_path: Path) -> None:
    result = run_on(
        recipe,
        tmp_path,
        TRAIN.replace("label", "stars"),
        "text\nso\nlala\n",
        columns={"label": "stars"},
    )
    assert result.metrics["val"] == {}
    lines = (tmp_path / "run/evaluation/val/predictions.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["index", "0", "1"]


def test_roberta_alone_is_a_start(recipe: Make, pretrained: Path, tmp_path: Path) -> None:
    opened = recipe(*WORLD, task=COLUMNS)
    task = open_task(opened)
    expected = {
        name.replace("text_encoder.roberta.", "roberta."): torch.full_like(value, 0.25)
        for name, value in task.build().state_dict().items()
        if name.startswith("text_encoder.roberta.")
    }
    save_file(expected, tmp_path / "roberta.safetensors")
    init = {"roberta": str(tmp_path / "roberta.safetensors")}
    tokenizer = str(pretrained / "tokenizer.json")
    again = recipe(
        *WORLD, task=COLUMNS, init=init, model=opened.model.model_dump(), tokenizer=tokenizer
    )
    model = initial_model(again, open_task(again))
    for name, value in model.state_dict().items():
        assert name.startswith("text_encoder.roberta.") == bool((value == 0.25).all()), name
