"""Texts in classes and with numbers: the recipe's path against the module and golden, GLUE's files, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.agreement import EXACT, inputs_of, tensors, with_weights
from tests.conftest import config
from tests.finetuning.conftest import Make
from tests.finetuning.golden_words import word_tokenizer, words
from xfm_fast.data.annotations import TextRecord, TextScoreRecord
from xfm_fast.data.tables import GLUE
from xfm_fast.errors import DataError
from xfm_fast.finetuning.run import finetune, initial_model, open_task
from xfm_fast.tasks.text import TextTask, TextTaskOptions

RNG = np.random.default_rng(0)
WORLD = "text", "text_{}.tsv"
COLUMNS: dict[str, Any] = {"columns": {"text": "sentence1", "text2": "sentence2"}, "max_tokens": 64}


def golden_task(labels: tuple[str, ...] = tuple("abcde")) -> TextTask:
    cfg = config("tiny_b")
    options = TextTaskOptions(labels=labels, regression=not labels, max_tokens=16)
    return TextTask(options, cfg, word_tokenizer(cfg.vocab_size))


@pytest.mark.parametrize("case", ["cls_text", "cls_text_regression"])
def test_losses_are_golden(case: str) -> None:
    x = {
        name.partition("/")[2]: t for name, t in inputs_of("tiny_b/ft_inputs", torch.float64).items() if "cls/" in name
    }
    regression = case == "cls_text_regression"
    task = golden_task(() if regression else tuple("abcde"))
    model = with_weights(task.build(), "tiny_b", torch.float64, case)
    texts = [words(ids) for ids in x["text_ids"]]
    if regression:
        records: Sequence[Any] = [
            TextScoreRecord(text=text, label=float(target))
            for text, target in zip(texts, x["targets_regression"], strict=True)
        ]
    else:
        records = [
            TextRecord(text=text, label="abcde"[int(target)], index=None)
            for text, target in zip(texts, x["targets"], strict=True)
        ]
    batch = task.collate([task.item(record, RNG) for record in records], RNG)
    assert torch.equal(batch.input_ids, x["text_ids"])
    assert torch.equal(batch.attention_mask, x["text_atts"])
    loss = task.losses_of(model, batch)["loss"]
    # Values to be predicted are fp32 on their way.
    expected = float(tensors("tiny_b/ft_outputs")[f"{case}/loss"])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6 if regression else EXACT)


def test_a_pair_is_encoded_as_roberta_reads_it(recipe: Make) -> None:
    task = open_task(recipe(*WORLD, task=COLUMNS))
    assert task.options.labels == ("no", "yes")
    assert task.options.pairs
    (rows,) = task.rows(recipe(*WORLD).paths_of("train"))
    records = [rows.read(number) for number in range(4)]
    model = task.build().train(False)
    loss = task.losses_of(model, task.collate([task.item(record, RNG) for record in records], RNG))["loss"]
    encode = task.tokenizer.encode_ids
    ids = []
    for record in records:
        (first,), (second,) = encode([record.text], 99), encode([record.text2 or ""], 99)
        ids.append([*first, task.tokenizer.eos_token_id, *second[1:]])
    width = max(map(len, ids))
    by_hand = torch.tensor([[*row, *[task.tokenizer.pad_token_id] * (width - len(row))] for row in ids])
    targets = torch.tensor([("no", "yes").index(record.label or "") for record in records])
    torch.testing.assert_close(loss, model(None, by_hand, targets=targets))


# A line of each file of GLUE's zips, with its columns, and of the file to predict for.
LINES = {
    "cola": (None, "gj04\t1\t\tBirds {} sing.", "index\tsentence", "{}\tBirds sing."),
    "mnli": (
        "index\tsentence1\tsentence2\tgold_label", "{}\tA \"b\tc\tneutral", "index\tsentence1\tsentence2",
        "{}\ta\tb",
    ),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t{}\t2\ta\tb",
        "index\t#1 ID\t#2 ID\t#1 String\t#2 String", "{}\t1\t2\ta\tb",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "{}\ta?\tb\tnot_entailment", "index\tquestion\tsentence", "{}\ta?\tb"),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "{}\t1\t2\ta?\tb?\t1", "id\tquestion1\tquestion2",
        "{}\ta?\tb?",
    ),
    "rte": ("index\tsentence1\tsentence2\tlabel", "{}\ta\tb\tentailment", "index\tsentence1\tsentence2", "{}\ta\tb"),
    "sst2": ("sentence\tlabel", "fine {}\t1", "index\tsentence", "{}\tfine"),
    "stsb": (
        "index\tgenre\tsentence1\tsentence2\tscore", "{}\tnews\ta\tb\t2.5", "index\tgenre\tsentence1\tsentence2",
        "{}\tnews\ta\tb",
    ),
}  # fmt: skip
METRICS = {
    "cola": {"accuracy", "matthews"},
    "mrpc": {"accuracy", "f1"},
    "qqp": {"accuracy", "f1"},
    "stsb": {"pearson", "spearman"},
}
FILES = {"cola": "CoLA", "mnli": "MNLI-m", "sst2": "SST-2", "stsb": "STS-B"}


@pytest.mark.parametrize("name", ["cola", "mnli", "mrpc", "stsb"])
def test_glue(name: str, recipe: Make, tmp_path: Path) -> None:
    header, line, test_header, test_line = LINES[name]
    known = [] if header is None else [header]
    (tmp_path / "train.tsv").write_text("\n".join([*known, *(line.format(n) for n in range(8))]) + "\n")
    (tmp_path / "test.tsv").write_text("\n".join([test_header, *(test_line.format(n) for n in (7, 9))]) + "\n")
    files = {"val": "train.tsv", "test": "test.tsv"}
    if name == "mnli":
        files["test_mismatched"] = "test.tsv"
    data = {"root": str(tmp_path), "train": "train.tsv", "splits": files}
    made = recipe("text", "", task={"glue": name, "max_tokens": 64}, data=data, steps=1)
    assert open_task(made).options.labels == (GLUE[name].classes or ())
    result = finetune(made)
    assert set(result.metrics["val"]) == METRICS.get(name, {"accuracy"})
    assert result.metrics["test"] == {}
    stem = FILES.get(name, name.upper())
    folder = Path(made.checkpoint.folder) / "evaluation"
    head, *rows = (folder / "test" / f"{stem}.tsv").read_text().splitlines()
    assert head == "index\tprediction"
    assert [row.split("\t")[0] for row in rows] == ["7", "9"]
    answers = [row.split("\t")[1] for row in rows]
    assert (
        all(0 <= float(each) <= 5 for each in answers)
        if name == "stsb"
        else set(answers) <= set(GLUE[name].classes or ())
    )
    if name == "mnli":
        assert (folder / "test_mismatched" / "MNLI-mm.tsv").is_file()


def test_scores(recipe: Make) -> None:
    options = TextTaskOptions(glue="mrpc", labels=("0", "1"), pairs=True)
    task = open_task(recipe(*WORLD, task=COLUMNS))
    task.options = options
    truth, said = "1100", "1010"
    records = [TextRecord(text="a", label=label, index=None) for label in truth]
    rows = [{"answer": answer} for answer in said]
    assert task.score(rows, records) == {"accuracy": 50.0, "f1": 50.0}
    task.options = options.model_copy(update={"glue": "cola"})
    assert task.score(rows, records) == {"accuracy": 50.0, "matthews": 0.0}
    task.options = TextTaskOptions(regression=True)
    numbers = [TextScoreRecord(text="a", label=label) for label in (1.0, 2.0, 3.0)]
    ranked = task.score([{"answer": answer} for answer in (0.0, 1.0, 5.0)], numbers)
    assert ranked["spearman"] == pytest.approx(100)
    assert ranked["pearson"] == pytest.approx(100 * np.corrcoef([1, 2, 3], [0, 1, 5])[0, 1])


def run_on(recipe: Make, folder: Path, train: str, val: str, suffix: str = "csv", **task: Any) -> Any:
    for split, content in (("train", train), ("val", val)):
        (folder / f"{split}.{suffix}").write_text(content)
    data = {"root": str(folder), "train": f"train.{suffix}", "splits": {"val": f"val.{suffix}"}}
    return finetune(recipe("text", "", task={"max_tokens": 64, **task}, data=data, steps=1))


TRAIN = "text,label\ngood,up\nbad,down\nfine,up\n"


@pytest.mark.parametrize(
    ("train", "val", "options", "said"),
    [
        (TRAIN, "text,label\nso,sideways\n", {}, r"1 of 1.*'sideways'"),
        (TRAIN, "text,label\nso,up\nlala,\n", {}, "line 3: 'label' is ''"),
        ("text,label\na,up\nb,up\n", TRAIN, {}, r"class.*'up'"),
        (TRAIN, TRAIN, {"columns": {"text": "review"}}, r"'review'.*'text', 'label'"),
        (TRAIN, TRAIN, {"columns": {"label": "stars"}}, "'stars'"),
        ("text\na\n", TRAIN, {}, "label"),
        (TRAIN, TRAIN, {"labels": ["up", "down", "up"]}, "'up'"),
    ],
)
def test_bad_data(train: str, val: str, options: dict[str, Any], said: str, recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        run_on(recipe, tmp_path, train, val, **options)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_holds_all_splits(recipe: Make, tmp_path: Path) -> None:
    folder = tmp_path / "RTE"
    folder.mkdir()
    header, line, test_header, test_line = LINES["rte"]
    for split, known, each, count in (
        ("train", header, line, 8),
        ("dev", header, line, 2),
        ("test", test_header, test_line, 3),
    ):
        (folder / f"{split}.tsv").write_text("\n".join([str(known), *(each.format(n) for n in range(count))]) + "\n")
    data = {"root": str(tmp_path), "train": "RTE", "splits": {"val": "RTE", "test": "RTE"}}
    made = recipe("text", "", task={"glue": "rte", "max_tokens": 64}, data=data, steps=1)
    task = open_task(made)
    assert [len(task.records([folder], split)) for split in ("val", "test")] == [2, 3]
    assert set(finetune(made).metrics["val"]) == {"accuracy"}


def test_a_test_file_without_labels_gets_predictions(recipe: Make, tmp_path: Path) -> None:
    result = run_on(recipe, tmp_path, TRAIN.replace("label", "stars"), "text\nso\nlala\n", columns={"label": "stars"})
    assert result.metrics["val"] == {}
    lines = (tmp_path / "run/evaluation/val/predictions.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["index", "0", "1"]


def test_roberta_alone_is_a_start(recipe: Make, pretrained: Path, tmp_path: Path) -> None:
    made = recipe(*WORLD, task=COLUMNS)
    task = open_task(made)
    theirs = {
        name.replace("text_encoder.roberta.", "roberta."): torch.full_like(value, 0.25)
        for name, value in task.build().state_dict().items()
        if name.startswith("text_encoder.roberta.")
    }
    save_file(theirs, tmp_path / "roberta.safetensors")
    init = {"roberta": str(tmp_path / "roberta.safetensors")}
    tokenizer = str(pretrained / "tokenizer.json")
    again = recipe(*WORLD, task=COLUMNS, init=init, model=made.model.model_dump(), tokenizer=tokenizer)
    model = initial_model(again, open_task(again))
    for name, value in model.state_dict().items():
        assert name.startswith("text_encoder.roberta.") == bool((value == 0.25).all()), name
