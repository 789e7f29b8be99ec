"""NLVR2 from files to results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.agreement import inputs_of, tensors, with_weights
from tests.conftest import config, golden, load_json
from tests.finetuning.conftest import Make
from tests.finetuning.golden_words import word_tokenizer, words
from xfm_fast.finetuning.run import open_task
from xfm_fast.tasks.nlvr2 import RESULT_FILE, NLVR2Model, NLVR2Options, NLVR2Record, NLVR2Task

FILES = "nlvr2", "nlvr_{}.json"


@pytest.fixture
def task(recipe: Make) -> NLVR2Task:
    made = open_task(recipe(*FILES, task={"augment": False}))
    assert isinstance(made, NLVR2Task)
    return made


def test_the_path_of_a_recipe_gives_the_official_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = {k.partition("/")[2]: v for k, v in inputs_of("tiny_b/ft_inputs", torch.float64).items() if k[:5] == "nlvr/"}
    cfg = config("tiny_b")
    task = NLVR2Task(NLVR2Options(augment=False), cfg, word_tokenizer(cfg.vocab_size))
    monkeypatch.setattr(task, "pixels", lambda name: x["image"][int(name)])
    elements = [
        {"images": [str(number), str(number + 3)], "sentence": words(ids), "label": str(bool(x["targets"][number]))}
        for number, ids in enumerate(x["text_ids"])
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(elements))
    (rows,) = task.rows([path])
    rng = np.random.default_rng(0)
    batch = task.collate([task.item(rows.read(row), rng) for row in range(len(rows))], rng)
    model = with_weights(NLVR2Model(cfg), "tiny_b", torch.float64, "nlvr")
    loss = task.losses_of(model, batch)["loss"]
    assert float(loss.detach()) == pytest.approx(float(tensors("tiny_b/ft_outputs")["nlvr/loss"]), rel=1e-10)


def test_accuracy_is_the_official_one(task: NLVR2Task) -> None:
    stored = np.load(golden("metrics/nlvr.npz"))
    rows = [{"answer": bool(false < true)} for false, true in stored["logits"]]
    records = [NLVR2Record(images=("a", "b"), sentence="c", label=bool(target)) for target in stored["targets"]]
    wanted = 100 * load_json("metrics/metrics")["nlvr"]["accuracy"]
    assert task.score(rows, records) == {"accuracy": pytest.approx(wanted, rel=1e-6)}


def test_the_file_of_the_benchmark(task: NLVR2Task, tmp_path: Path) -> None:
    """Lines of NLVR2 have identifiers; official elements are numbered."""
    lines = [{"identifier": f"test1-0-{n}-0", "sentence": "a dog", "label": "True"} for n in range(2)]
    raw, official = tmp_path / "test1.json", tmp_path / "nlvr_test.json"
    raw.write_text("".join(json.dumps(line) + "\n" for line in lines))
    official.write_text(json.dumps([{"images": ["a", "b"], "sentence": "a dog", "label": "False"}]))
    records = [record for rows in task.rows([raw, official]) for record in rows.records()]
    assert records[1].images == ("test1/test1-0-1-img0.png", "test1/test1-0-1-img1.png")
    given: list[dict[str, Any]] = [{"answer": True}, {"answer": False}, {"answer": True}]
    assert task.files(given, records) == {RESULT_FILE: b"test1-0-0-0,True\ntest1-0-1-0,False\n2,True\n"}
