"""What every task promises, from files to answers; a task of one file, registered from outside the
package, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import xfm_fast
from tests.contracts import toy_task
from tests.finetuning.conftest import Make
from tests.finetuning.conftest import pretrained as pretrained
from tests.finetuning.conftest import recipe as recipe
from tests.finetuning.conftest import world as world
from tests.finetuning.test_run import process
from tests.training.small_runs import in_processes
from xfm_fast.benchmarks import machine
from xfm_fast.benchmarks.options import StepOptions
from xfm_fast.benchmarks.record import OURS
from xfm_fast.benchmarks.work import training
from xfm_fast.checkpoint import to_official
from xfm_fast.config import XFMConfig
from xfm_fast.errors import ConfigError, InputError
from xfm_fast.finetuning.recipe import FinetuneRecipe, load_finetune_recipe, open_task
from xfm_fast.finetuning.run import evaluate, finetune, load_weights
from xfm_fast.tasks.checking import Options, check
from xfm_fast.tasks.task import TASKS, Item, explanation
from xfm_fast.training.recipe import FINETUNING, read_recipe, recipe_names

KINDS = [kind for kind in TASKS if kind != toy_task.LikenessOptions().kind]
NAMES = [name for name in recipe_names(FINETUNING) if name.endswith("_tiny_shapes")]
IMAGES = "images/test/000001.png", "images/test/000002.png"


class Case(NamedTuple):
    """Files of the shapes dataset, options, a request, and requests that the task refuses."""

    files: str
    options: dict[str, Any]
    images: tuple[str, ...]
    texts: tuple[str, ...]
    refused: tuple[tuple[int, tuple[str, ...]], ...]


CASES = {
    "captioning": Case(
        "captioning_{}.json", {"max_length": 24, "num_beams": 2}, IMAGES[:1], (), ((0, ()), (1, ("a star",)))
    ),
    "grounding": Case(
        "grounding_{}.json", {}, IMAGES[:1], ("a red circle",), ((0, ("star",)), (2, ("star",)), (1, ()))
    ),
    "image": Case("image_{}.csv", {"view": "whole", "head": "mlp"}, IMAGES[:1], (), ((0, ()), (1, ("a star",)))),
    "nlvr2": Case(
        "nlvr_{}.json", {"augment": False}, IMAGES, ("both images show a star",),
        ((1, ("a dog",)), (2, ("a dog", "a cat")), (2, (" ",))),
    ),
    "retrieval": Case(
        "retrieval_{}.json", {"k": 5, "augment": False, "max_tokens": 32}, IMAGES[:1], ("a red circle", "a star"),
        ((1, ()), (0, ("a star",))),
    ),
    "text": Case(
        "text_{}.tsv", {"columns": {"text": "sentence1", "text2": "sentence2"}, "max_tokens": 64}, (),
        ("there is a red circle", "there is a circle"), ((0, ("a",)), (1, ("a", "b"))),
    ),
    "vqa": Case(
        "vqa_{}.json", {"decoder_layers": 2, "answers": "answers.json", "k": "all", "augment": False}, IMAGES[:1],
        ("what colour is the circle?",), ((0, ("what",)), (2, ("what",)), (1, ()), (1, ("what", " "))),
    ),
    "weak_grounding": Case(
        "grounding_{}.json", {"augment": False, "max_tokens": 32}, (), (), ((1, ("a star",)), (0, ("a star",)))
    ),
}  # fmt: skip
each_task = pytest.mark.parametrize("kind", CASES)


@pytest.fixture
def made(recipe: Make, world: Path, tmp_path: Path) -> Make:
    """Makes the recipe of a case; the boxes of the files are the detections of weak grounding."""

    def make(kind: str, **changes: Any) -> FinetuneRecipe:
        files = CASES[kind].files
        if kind == "weak_grounding":
            boxes: dict[str, list[Any]] = {}
            for split in ("val", "test"):
                for element in json.loads((world / files.format(split)).read_text()):
                    boxes.setdefault(element["image"], []).append(element["bbox"])
            (tmp_path / "detections.json").write_text(json.dumps(boxes))
            splits = {
                split: [files.format(split), str(tmp_path / "detections.json")]
                for split in ("val", "test")
            }
            changes["data"] = {"root": str(world), "train": files.format("train"), "splits": splits}
        return recipe(kind, files, task=CASES[kind].options, **changes)

    return make


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(value, b[name]) for name, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_close, a, b))
    return a == (pytest.approx(b, rel=1e-3, abs=1e-4) if isinstance(a, float) else b)


def test_every_task_has_a_tiny_recipe() -> None:
    assert {read_recipe(name, FINETUNING)["task"]["kind"] for name in NAMES} == {*KINDS} - {
        "weak_grounding"
    }
    assert {*KINDS} == CASES.keys()


@each_task
@torch.no_grad()
def test_predictions_do_not_depend_on_the_batch(kind: str, made: Make) -> None:
    recipe = made(kind)
    task = open_task(recipe)
    torch.manual_seed(1)
    model, records = task.build().eval(), task.records(recipe.paths_of("val"), "val")[:5]
    together = task.predict(model, records)
    assert _close(together, [row for each in records for row in task.predict(model, [each])])


@each_task
def test_requests(kind: str, made: Make) -> None:
    case, task = CASES[kind], open_task(made(kind))
    if case.images or case.texts:
        assert len(task.requests([Path(image) for image in case.images], case.texts)) == 1
    for images, texts in case.refused:
        with pytest.raises(InputError):
            task.requests([Path("a.png")] * images, texts)


def test_first_images_come_before_second_ones(made: Make) -> None:
    task = open_task(made("nlvr2"))
    items = [Item(torch.tensor([10.0 * item, 10 * item + 1]), [0, 5, 2], 1) for item in range(3)]
    assert task.collate(items, np.random.default_rng(0)).image.tolist() == [0, 10, 20, 1, 11, 21]


@pytest.mark.parametrize("kind", ["grounding", "nlvr2", "retrieval", "vqa"])
def test_official_weights_come_back_whole(kind: str, made: Make, tmp_path: Path) -> None:
    task = open_task(made(kind))
    first, second = task.build(), task.build()
    official = to_official(first.state_dict(), task.config, naming="fine-tuning")
    torch.save({"model": official}, tmp_path / "fine_tuned.th")
    assert load_weights(second, task, tmp_path / "fine_tuned.th")
    assert all(
        torch.equal(second.state_dict()[name], value) for name, value in first.state_dict().items()
    )
    again = to_official(second.state_dict(), task.config, naming="fine-tuning")
    assert again.keys() == official.keys()
    assert all(torch.equal(again[name], value) for name, value in official.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps(name: str, world: Path, pretrained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = [
        f"data.root={world}", "shapes=null", f"init.checkpoint={pretrained}", "epochs=1", "steps=3", "batch_size=4",
        "eval_batch_size=4", f"checkpoint={{folder: {folder}, every: 1}}", "log.every=1", "device=cpu",
    ]  # fmt: skip
    if name.startswith("captioning"):
        overrides += ["task.num_beams=1", "task.max_length=10"]
    recipe = load_finetune_recipe(name, overrides)
    assert in_processes(process, 1, tmp_path / "meet", recipe, {"at_step": 2}) == [-9]
    finetune(recipe)
    metrics: dict[str, Any] = json.loads((folder / "evaluation/test/metrics.json").read_text())[
        "metrics"
    ]
    assert metrics
    assert set(metrics) <= set(TASKS[recipe.task.kind].metrics)
    assert evaluate(recipe, folder, "test", tmp_path / "again") == pytest.approx(metrics, abs=1e-6)
    case = CASES[recipe.task.kind]
    rows = xfm_fast.load(folder).predict([world / image for image in case.images], case.texts)
    assert len(rows) == 1
    assert json.loads(json.dumps(rows)) == rows


@each_task
def test_a_batch_is_learnt(kind: str, made: Make) -> None:
    recipe = made(kind, model={"hidden_dropout": 0, "drop_path_rate": 0})
    task, rng = open_task(recipe), np.random.default_rng(0)
    torch.manual_seed(0)
    model, (rows, *_) = task.build().train(), task.rows(recipe.paths_of("train"))
    batch = task.collate([task.item(rows.read(row), rng) for row in (0, 4, 8, 12)], rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[float] = []
    while len(losses) < 25 and (not losses or losses[-1] > 0.7 * losses[0]):
        torch.manual_seed(0)
        loss = torch.stack([*task.losses_of(model, batch).values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_a_task_from_outside(recipe: Make, world: Path, tmp_path: Path) -> None:
    """Check that a file of 80 lines is fine-tuned, resumed, evaluated, asked, checked and exported."""
    for split in ("train", "val", "test"):
        elements = json.loads((world / f"retrieval_{split}.json").read_text())
        captions = [
            element["caption"] if isinstance(element["caption"], str) else element["caption"][0]
            for element in elements
        ]
        rows = [{"image": element["image"], "caption": text, "likeness": 0.9}
                for element, text in zip(elements, captions, strict=True)]  # fmt: skip
        (tmp_path / f"likeness_{split}.json").write_text(json.dumps(rows[:24]))
    files = str(tmp_path / "likeness_{}.json")
    data = {"root": str(world), "images": str(world), "train": files.format("train"),
            "splits": {split: files.format(split) for split in ("val", "test")}}  # fmt: skip
    made = recipe("likeness", "", epochs=1, data=data, choose={"by": "closeness", "split": "val"})
    result = finetune(made)
    assert finetune(made).metrics == result.metrics
    assert result.metrics["test"]["closeness"] > 50
    run = Path(made.checkpoint.folder)
    assert evaluate(made, run, "test", tmp_path / "again") == pytest.approx(
        result.metrics["test"], abs=1e-6
    )
    request = [world / IMAGES[0]], ["a red circle"]
    predictor = xfm_fast.load(run)
    (row,) = predictor.predict(*request)
    assert row["likeness"] > 0.5
    with pytest.raises(InputError, match="2 texts"):
        predictor.predict(request[0], ["a", "b"])
    with pytest.raises(ConfigError, match=r"task\.knd .*kind"):
        recipe("likeness", "", data=data, task={"knd": 1})
    options = Options(
        config=XFMConfig.preset("tiny", image_size=32, patch_size=8), image_root=world
    )
    report = check([files.format("train")], "likeness", options)
    assert (report.ok, report.rows, report.texts) == (True, 24, 24)
    pytest.importorskip("onnxruntime", reason="exports are run by it")
    from xfm_fast.export import export_onnx

    model: Any = predictor.model
    export_onnx(
        model, tmp_path / "out", graphs=("vision", "text"), companions=explanation(predictor.task)
    )
    assert xfm_fast.load(tmp_path / "out").predict(*request)[0] == pytest.approx(row, abs=1e-4)


def test_a_task_from_outside_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare it with its losses on the reference ops, since it has no official procedure."""
    monkeypatch.setitem(machine.PROBE_SHAPE, "cpu", (128, 256, 256))
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 1 << 16)
    step = StepOptions(
        random="tiny", quick=True, device="cpu", dtype=("fp32",), task="likeness", pairs=2
    )
    document = training.run(step)
    expected = [(OURS, "measured"), (training.REFERENCE_OPS, "measured")]
    assert [(row.backend, row.status) for row in document.rows] == expected
    assert all(row.parity is not None and row.parity.passed for row in document.rows)
    assert document.headline(document.rows[0]) is not None
