"""VQA from files to results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import xfm_fast
from tests.agreement import inputs_of, tensors, with_weights
from tests.conftest import config, load_json
from tests.finetuning.conftest import Make
from tests.finetuning.golden_words import word_tokenizer, words
from xfm_fast.errors import DataError
from xfm_fast.finetuning.run import evaluate, finetune, initial_model, open_task
from xfm_fast.tasks.vqa import RESULT_FILE, VQAModel, VQAOptions, VQARecord, VQATask

FILES = "vqa", "vqa_{}.json"
TINY = {"decoder_layers": 2, "answers": "answers.json", "k": "all", "augment": False}
PIXELS = torch.zeros(3, 8, 8)


@pytest.fixture
def task(recipe: Make) -> VQATask:
    made = open_task(recipe(*FILES, task=TINY))
    assert isinstance(made, VQATask)
    return made


@pytest.fixture
def model(recipe: Make, task: VQATask) -> VQAModel:
    made = initial_model(recipe(*FILES, task=TINY), task)
    assert isinstance(made, VQAModel)
    return made.eval()


def record(**fields: Any) -> VQARecord:
    return VQARecord(**{"image": "a.png", "question": "what is it", "question_id": 0, "answer": ["dog"]} | fields)


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_the_path_of_a_recipe_gives_the_official_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file with ten answers to each question; weights are their shares."""
    x = {k.partition("/")[2]: v for k, v in inputs_of("tiny_b/ft_inputs", torch.float64).items() if k[:4] == "vqa/"}
    cfg = config("tiny_b")
    task = VQATask(
        VQAOptions(decoder_layers=3, generate=True, augment=False), cfg, word_tokenizer(cfg.vocab_size), images=tmp_path
    )
    monkeypatch.setattr(task, "pixels", lambda name: x["image"][int(Path(name).name)])
    texts, shares = [words(ids) for ids in x["train_answer_ids"]], x["train_weights"].tolist()
    first, elements = 0, []
    for number, ids in enumerate(x["question_ids"]):
        last = first + int(x["train_n_answers"][number])
        said = [
            text
            for text, share in zip(texts[first:last], shares[first:last], strict=True)
            for _ in range(round(10 * share))
        ]
        elements.append({"image": str(number), "question": words(ids), "question_id": number, "answer": said})
        first = last
    (rows,) = task.rows([written(tmp_path / "train.json", elements)])
    rng = np.random.default_rng(0)
    batch = task.collate([task.item(rows.read(row), rng) for row in range(len(rows))], rng)
    model = with_weights(VQAModel(cfg, decoder_layers=3), "tiny_b", torch.float64, "vqa")
    loss = task.losses_of(model, batch)["loss"]
    assert float(loss.detach()) == pytest.approx(float(tensors("tiny_b/ft_outputs")["vqa/train_loss"]), rel=1e-6)


def test_weights_of_other_data_sets(task: VQATask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Visual Genome's only answer counts half, GQA's whole."""
    monkeypatch.setattr(task, "pixels", lambda name: PIXELS)
    rng = np.random.default_rng(0)
    batch = task.collate([task.item(record(dataset=name, answer="dog"), rng) for name in ("vg", "gqa")], rng)
    assert batch.answer_weights.tolist() == [0.5, 1.0]
    assert batch.answers_per_question.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("question", "answers", "may_flip"),
    [
        ("what is it", ["dog"], True),
        ("what is on the LEFT", ["dog"], False),
        ("where is it", ["dog", "to the right"], False),
    ],
)
def test_no_mirror_where_a_side_is_meant(
    task: VQATask, monkeypatch: pytest.MonkeyPatch, question: str, answers: list[str], may_flip: bool
) -> None:
    seen = []
    monkeypatch.setattr(task, "augmented", lambda image, rng, may_flip: seen.append(may_flip) or PIXELS)
    task.item(record(question=question, answer=answers), np.random.default_rng(0))
    assert seen == [may_flip]


def test_questions_are_cut_in_training_alone(task: VQATask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "pixels", lambda name: PIXELS)
    encode = task.tokenizer.encode_ids
    many, long = (record(question=" ".join([word] * 60)) for word in ("cyan", "quixotry"))
    assert task.item(many, np.random.default_rng(0)).ids == encode([" ".join(["cyan"] * 30)], 40)[0]
    assert len(task.item(long, np.random.default_rng(0)).ids) == 40
    assert task._question_ids(many) == encode([" ".join(["cyan"] * 50)], 500)[0]
    assert task._question_ids(record(question="?!")) == [0, 2]


def test_probabilities_are_those_of_writing_the_answer(task: VQATask, model: VQAModel, world: Path) -> None:
    (asked, *_) = task.records([world / "vqa_val.json"], "val")
    with torch.no_grad():
        best = task.predict(model, [asked])[0]
        batch = task.collate(
            [task.item(asked.model_copy(update={"answer": (best["answer"],)}), np.random.default_rng(0))],
            np.random.default_rng(0),
        )
        assert float((-task.losses_of(model, batch)["loss"]).exp()) == pytest.approx(best["probability"], rel=1e-3)


def test_the_official_ranking(task: VQATask, model: VQAModel, world: Path) -> None:
    """In the order of the file, with its padding, the first token twice, and probabilities among the candidates."""
    options = task.options.model_copy(update={"official_ranking": True, "k": 5})
    official = VQATask(options, task.config, task.tokenizer, images=world)
    records = task.records([world / "vqa_val.json"], "val")[:8]
    assert official.groups(records) == [[number] for number in range(8)]
    ids, mask = task.padded([task._question_ids(each) for each in records])
    answers, answer_mask = task.padded(task.tokenizer.encode_ids(options.answers or (), 40))
    with torch.no_grad():
        rows = official.predict(model, records)
        pixels = torch.stack([task.pixels(each.image) for each in records])
        memory = model.encode_questions(pixels, ids, mask, attend_to_padding=True)
        wanted = model.rank_answers(memory, answers, answer_mask, k=5, count_first_token_twice=True)
    assert not mask.all()
    for row, places, shares in zip(rows, wanted.indices, wanted.probabilities, strict=True):
        found = [row, *row["runners_up"]]
        assert [each["answer"] for each in found] == [(options.answers or ())[place] for place in places]
        assert [each["probability"] for each in found] == pytest.approx(shares.tolist(), rel=1e-4)


def test_an_image_is_encoded_once(task: VQATask, model: VQAModel, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = task.records([world / "vqa_val.json"], "val")
    group = max(task.groups(records), key=len)
    assert {records[number].image for number in group} == {records[group[0]].image}
    assert len(group) > 3
    encoded: list[Tensor] = []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels: encoded.append(pixels) or encode(pixels))
    with torch.no_grad():
        task.predict(model, [records[number] for number in group])
    assert [len(pixels) for pixels in encoded] == [1]


def golden_records(*, official: bool) -> Sequence[VQARecord]:
    """With ten people's answers as VQA v2 has them, or as the official files do."""
    found = []
    for annotation in load_json("metrics/vqa_inputs")["annotations"]:
        said = [each["answer"] for each in annotation["answers"]]
        kinds = (
            {}
            if official
            else {
                "question_type": annotation["question_type"],
                "answer_type": annotation["answer_type"],
                "answers": said,
            }
        )
        found.append(record(question_id=annotation["question_id"], answer=said, **kinds))
    return found


@pytest.mark.parametrize("official", [False, True])
def test_accuracy_is_the_official_one(task: VQATask, official: bool) -> None:
    golden, records = load_json("metrics/metrics")["vqa"]["accuracy"], golden_records(official=official)
    given = {each["question_id"]: each["answer"] for each in load_json("metrics/vqa_inputs")["predictions"]}
    rows = [{"answer": given[each.question_id]} for each in records]
    found = task.score(rows, records)
    by_type = {f"accuracy_{kind.replace('/', '_')}": value for kind, value in golden["perAnswerType"].items()}
    found.pop("exact_match")
    assert found == {"accuracy": golden["overall"]} | ({} if official else by_type)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["a", "b", "a"], "'a'"),
        (["a", 2], r"answer 1.* 2"),
    ],
)
def test_answer_lists_that_are_none(recipe: Make, tmp_path: Path, answers: Any, message: str) -> None:
    path = written(tmp_path / "answers.json", answers)
    with pytest.raises(DataError, match=message):
        open_task(recipe(*FILES, task=TINY | {"answers": str(path)}))


def test_from_files_to_results(recipe: Make, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sets with images in folders of their own; an unlisted and an empty answer; ranked, then written freely."""
    elements = json.loads((world / "vqa_train.json").read_text())[:20]
    folder, name = str(world / "images"), "train/000000.png"
    own = [each | {"image": each["image"].removeprefix("images/")} for each in elements]
    other = [each | {"dataset": "vg", "image": "000000.png", "answer": "unheard of"} for each in elements[:4]]
    files = [
        written(tmp_path / "vqa.json", [own[0] | {"answer": ["", "two"]}, *own[1:]]),
        written(tmp_path / "vg.json", other),
    ]
    made = recipe(
        *FILES, epochs=1, steps=2,
        task=TINY | {"image_folders": {"vqa": folder, "vg": f"{folder}/train"}},
        data={"root": str(world), "train": list(map(str, files)), "splits": {"val": str(files[0])}},
    )  # fmt: skip
    result = finetune(made)
    said = capsys.readouterr().err
    assert "4 questions" in said
    assert "'unheard of'" in said
    assert "1 empty answers" in said
    run = Path(made.checkpoint.folder)
    assert len(json.loads((run / "evaluation/val" / RESULT_FILE).read_text())) == 20
    assert result.metrics["val"].keys() == {"exact_match"}
    (first, second) = xfm_fast.load(run).predict([f"{folder}/{name}"], ["how many objects are there", "what"])
    assert first["answer"] in json.loads((world / "answers.json").read_text())
    assert len(second["runners_up"]) == 4
    made = made.model_copy(update={"task": made.task.model_copy(update={"generate": True})})
    evaluate(made, run, "val", tmp_path / "free")
    assert len(json.loads((tmp_path / "free" / RESULT_FILE).read_text())) == 20
