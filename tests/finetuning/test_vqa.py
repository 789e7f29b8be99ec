"""VQA from files to results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import xfm_fast
from tests.finetuning.conftest import Make
from xfm_fast.finetuning.recipe import open_task
from xfm_fast.finetuning.run import evaluate, finetune, initial_model
from xfm_fast.tasks.vqa import RESULT_FILE, VQAModel, VQARecord, VQATask

FILES = "vqa", "vqa_{}.json"
TINY = {"decoder_layers": 2, "answers": "answers.json", "k": "all", "augment": False}


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def task(recipe: Make) -> VQATask:
    opened = open_task(recipe(*FILES, task=TINY))
    assert isinstance(opened, VQATask)
    return opened


@pytest.fixture
def model(recipe: Make, task: VQATask) -> VQAModel:
    built = initial_model(recipe(*FILES, task=TINY), task)
    assert isinstance(built, VQAModel)
    return built.eval()


def record(**fields: Any) -> VQARecord:
    defaults = {
        "image": "images/train/000000.png",
        "question": "what is it",
        "question_id": 0,
        "answer": ["dog"],
    }
    return VQARecord(**defaults | fields)


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_answer_weights(task: VQATask) -> None:
    """Shares of the annotators; Visual Genome's only answer counts half, GQA's whole."""
    answers = {"vqa": ["dog", "cat", "dog", "dog"], "vg": "dog", "gqa": "dog"}
    items = [
        task.item(record(dataset=name, answer=texts), rng()) for name, texts in answers.items()
    ]
    batch = task.collate(items, rng())
    assert batch.answer_weights.tolist() == [0.75, 0.25, 0.5, 1.0]
    assert batch.answers_per_question.tolist() == [2, 1, 1]


@torch.no_grad()
def test_questions_are_truncated_in_training_only(task: VQATask, model: VQAModel) -> None:
    many, long = (record(question=" ".join([word] * 60)) for word in ("cyan", "quixotry"))
    assert task.item(many, rng()).ids == task.tokenizer.encode_ids([" ".join(["cyan"] * 30)], 40)[0]
    assert len(task.item(long, rng()).ids) == 40
    fifty, empty = record(question=" ".join(["cyan"] * 50)), record(question="?!")
    assert task.predict(model, [many])[0] == task.predict(model, [fifty])[0]
    assert "answer" in task.predict(model, [empty])[0]


@torch.no_grad()
def test_probabilities_are_those_of_writing_the_answer(
    task: VQATask, model: VQAModel, world: Path
) -> None:
    (question, *_) = task.records([world / "vqa_val.json"], "val")
    best = task.predict(model, [question])[0]
    answered = question.model_copy(update={"answer": (best["answer"],)})
    loss = task.losses_of(model, task.collate([task.item(answered, rng())], rng()))["loss"]
    assert float((-loss).exp()) == pytest.approx(best["probability"], rel=1e-3)


def test_the_official_ranking(task: VQATask, model: VQAModel, world: Path) -> None:
    """In file order, with its padding, the first token twice, and probabilities among the
    candidates.
    """
    options = task.options.model_copy(update={"official_ranking": True, "k": 5})
    official = VQATask(options, task.config, task.tokenizer, images=world)
    records = task.records([world / "vqa_val.json"], "val")[:8]
    assert not official.groups_by_image
    ids, mask = task.padded(
        [task.tokenizer.encode_ids([element.question], 40)[0] for element in records]
    )
    answers, answer_mask = task.padded(task.tokenizer.encode_ids(options.answers or (), 40))
    with torch.no_grad():
        rows = official.predict(model, records)
        pixels = torch.stack([task.pixels(element.image) for element in records])
        memory = model.encode_questions(pixels, ids, mask, attend_to_padding=True)
        expected = model.rank_answers(
            memory, answers, answer_mask, k=5, count_first_token_twice=True
        )
    assert not mask.all()
    for row, indices, shares in zip(rows, expected.indices, expected.probabilities, strict=True):
        ranked = [row, *row["runners_up"]]
        assert [element["answer"] for element in ranked] == [
            (options.answers or ())[index] for index in indices
        ]
        assert [element["probability"] for element in ranked] == pytest.approx(
            shares.tolist(), rel=1e-4
        )


def test_from_files_to_results(
    recipe: Make, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two sets with image folders; an empty answer; ranked, then generated."""
    elements = json.loads((world / "vqa_train.json").read_text())[:20]
    folder = str(world / "images")
    vqa = [element | {"image": element["image"].removeprefix("images/")} for element in elements]
    genome = [
        element | {"dataset": "vg", "image": "000000.png", "answer": "unheard of"}
        for element in elements[:4]
    ]
    files = [
        written(
            tmp_path / "vqa.json",
            [vqa[0] | {"answer": ["", "two"]}, *vqa[1:]],
        ),
        written(tmp_path / "vg.json", genome),
    ]
    made = recipe(
        *FILES, epochs=1, steps=2,
        task=TINY | {"image_folders": {"vqa": folder, "vg": f"{folder}/train"}},
        data={"root": str(world), "train": list(map(str, files)), "splits": {"val": str(files[0])}},
    )  # fmt: skip
    result = finetune(made)
    assert "1 empty answers" in capsys.readouterr().err
    run = Path(made.checkpoint.folder)
    assert len(json.loads((run / "evaluation/val" / RESULT_FILE).read_text())) == 20
    assert result.metrics["val"].keys() == {"exact_match"}
    (first, second) = xfm_fast.load(run).predict(
        [f"{folder}/train/000000.png"], ["how many objects are there", "what"]
    )
    assert first["answer"] in json.loads((world / "answers.json").read_text())
    assert len(second["runners_up"]) == 4
    made = made.model_copy(update={"task": made.task.model_copy(update={"generate": True})})
    evaluate(made, run, "val", tmp_path / "free")
    assert len(json.loads((tmp_path / "free" / RESULT_FILE).read_text())) == 20
