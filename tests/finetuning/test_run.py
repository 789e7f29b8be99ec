"""A fine-tuning run: its files, resuming after a kill, and errors before the first step."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, DistributedSampler

import xfm_fast
from tests.cli.runner import invoke
from tests.finetuning.conftest import Make, make_recipe
from tests.training.small_runs import in_processes, join_group, numbers
from xfm_fast.data.annotations import AnnotationRows, TextRecord
from xfm_fast.data.records import RecordSet
from xfm_fast.data.streams import Quarantine, ShuffledBatches
from xfm_fast.errors import CheckpointError, ConfigError, DataError, StorageError
from xfm_fast.finetuning import run as runs
from xfm_fast.finetuning.recipe import FinetuneRecipe, resumed_steps
from xfm_fast.finetuning.run import evaluate, finetune
from xfm_fast.io import hold
from xfm_fast.tasks.task import TASKS

NLVR2 = "nlvr2", "nlvr_{}.json"
CHOICE = {"by": "accuracy", "split": "val"}
Kill = dict[str, int]


def process(
    rank: int, world_size: int, meeting_point: Path, recipe: FinetuneRecipe, kill: Kill
) -> None:
    """Run one process of a run, which may kill itself after a step or within an evaluation."""
    join_group(rank, world_size, meeting_point)
    if "at_step" in kill:
        train = runs.train

        def killed_train(recipe: FinetuneRecipe, *, on_step: Any, **options: Any) -> Any:
            def hook(step: int, *arguments: Any) -> Any:
                metrics = on_step(step, *arguments)
                if step == kill["at_step"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return metrics

            return train(recipe, on_step=hook, **options)

        runs.train = killed_train
    if "at_batch" in kill:
        task, calls = TASKS[recipe.task.kind], iter(range(1_000_000))
        predict = task.predict

        def killed_predict(self: Any, *given: Any) -> Any:
            if next(calls) == kill["at_batch"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return predict(self, *given)

        task.predict = killed_predict  # type: ignore[method-assign]
    finetune(recipe)


def weights(recipe: FinetuneRecipe, name: str = "model") -> bytes:
    return (Path(recipe.checkpoint.folder) / name / "model.safetensors").read_bytes()


def metrics(recipe: FinetuneRecipe) -> dict[str, str]:
    folder = Path(recipe.checkpoint.folder) / "evaluation"
    return {split: (folder / split / "metrics.json").read_text() for split in recipe.data.splits}


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, world: Path, pretrained: Path
) -> FinetuneRecipe:
    """Finish an uninterrupted run in its own process."""
    folder = tmp_path_factory.mktemp("whole")
    run = make_recipe(world, pretrained, folder)(*NLVR2, choose=CHOICE)
    assert in_processes(process, 1, folder / "meet", run, {}) == [0]
    return run


@pytest.mark.parametrize("kill", [{"at_step": 5}, {"at_batch": 1}])
def test_killed_and_resumed(
    kill: Kill, whole: FinetuneRecipe, recipe: Make, tmp_path: Path
) -> None:
    """At the end of an epoch, and in the first evaluation."""
    again = recipe(*NLVR2, choose=CHOICE)
    assert in_processes(process, 1, tmp_path / "meet", again, kill) == [-9]
    assert in_processes(process, 1, tmp_path / "meet", again, {}) == [0]
    assert numbers(Path(again.checkpoint.folder)) == numbers(Path(whole.checkpoint.folder))
    assert weights(again) == weights(whole)
    assert weights(again, "best") == weights(whole, "best")
    assert metrics(again) == metrics(whole)


def test_two_processes_find_what_one_finds(recipe: Make, tmp_path: Path) -> None:
    made = recipe(*NLVR2, choose=CHOICE, epochs=1, batch_size=4)
    assert in_processes(process, 2, tmp_path / "meet", made, {}) == [0, 0]
    alone = evaluate(made, Path(made.checkpoint.folder), "test", tmp_path / "alone")
    assert json.loads(metrics(made)["test"])["metrics"] == alone


def test_steps_of_epochs_are_kept_by_a_change_of_processes(recipe: Make) -> None:
    made = recipe(*NLVR2)
    single = resumed_steps(made, 40, 1, None)
    assert (single.steps, single.schedule.steps) == (10, 10)
    odd = resumed_steps(made, 43, 1, None)
    assert (odd.steps, odd.schedule.steps) == (10, 12)
    saved: dict[str, Any] = {"world_size": 1, "step": 4, "batches": {"train": 4}}
    saved["recipe"] = single.model_dump(mode="json")
    two = resumed_steps(made, 40, 2, saved)
    assert two.steps == 4 + (2 * 2 - 2)
    later: dict[str, Any] = {"world_size": 2, "step": 5, "batches": {"train": 3}}
    later["recipe"] = two.model_dump(mode="json")
    assert resumed_steps(made, 40, 2, later).steps == two.steps
    assert resumed_steps(recipe(*NLVR2, steps=3), 40, 1, None).steps == 3


class Numbers:
    """Items and batches of rows that are numbers."""

    def item(self, record: Any, rng: Any) -> int:
        return int(record.text)

    def collate(self, items: list[int], rng: Any) -> Any:
        return items


@pytest.mark.parametrize(("world_size", "count"), [(1, 13), (2, 7), (3, 11)])
def test_the_last_batch_is_kept_like_the_official_loader_does(
    world_size: int, count: int, tmp_path: Path
) -> None:
    """Rows are dealt as torch's DistributedSampler and DataLoader do: equally many a rank, and each
    is in a batch.
    """
    assert {kind for kind, task in TASKS.items() if not task.drop_last} == {"image", "text"}
    rows = RecordSet(
        [
            AnnotationRows(
                tmp_path, [{"text": str(n), "label": "a"} for n in range(count)], TextRecord
            )
        ]
    )
    numbered: Any = range(count)
    official = DataLoader(
        numbered, batch_size=2, sampler=DistributedSampler(numbered, world_size, 0)
    )
    ranks = [
        ShuffledBatches(
            rows, Numbers(), rows=2, seed=1, rank=rank, world_size=world_size, drop_last=False,
            quarantine=Quarantine(None, tolerate_bad=0),
        )
        for rank in range(world_size)
    ]  # fmt: skip
    assert {len(source) for source in ranks} == {len(official)}
    for epoch in range(2):
        numbers = range(epoch * len(official), (epoch + 1) * len(official))
        dealt: list[Any] = [[source.batch(index) for index in numbers] for source in ranks]
        assert all(
            list(map(len, batches)) == [len(batch) for batch in official] for batches in dealt
        )
        seen = [row for batches in dealt for batch in batches for row in batch]
        assert set(seen) == set(range(count))
        assert len(seen) - count < world_size


def test_a_copied_run_is_evaluated_in_its_own_folder(recipe: Make, tmp_path: Path) -> None:
    first = recipe(*NLVR2, steps=1)
    finetune(first)
    original, copy = Path(first.checkpoint.folder), tmp_path / "copy"
    shutil.copytree(original, copy)
    shutil.rmtree(copy / "evaluation")
    before = sorted(original.rglob("*"))
    done = invoke(["evaluate", copy, "--split", "test", "--json"])
    assert done.exit_code == 0, done.stderr
    assert (copy / "evaluation/test/metrics.json").is_file()
    said = json.loads((copy / "recipe.json").read_text())
    said["shapes"] = {"train": 1, "val": 1, "test": 1}
    for planted in (
        {"root": str(tmp_path / "planted")},
        {"splits": {"../../planted": "nlvr_test.json"}},
    ):
        (copy / "recipe.json").write_text(json.dumps(said | {"data": said["data"] | planted}))
        assert invoke(["evaluate", copy]).exit_code == 2
    assert not (tmp_path / "planted").exists()
    assert sorted(original.rglob("*")) == before


def test_a_second_run_in_the_folder_changes_nothing_of_the_first(recipe: Make) -> None:
    made = recipe(*NLVR2, steps=1)
    folder = Path(made.checkpoint.folder)
    finetune(made)
    before = (folder / "recipe.json").read_bytes()
    with (
        hold(folder / ".lock", "the first"),
        pytest.raises(StorageError, match=r"checkpoint\.folder="),
    ):
        finetune(recipe(*NLVR2, steps=2))
    assert (folder / "recipe.json").read_bytes() == before
    finetune(recipe(*NLVR2, steps=2))
    assert json.loads((folder / "recipe.json").read_text())["steps"] == 2


def test_what_is_refused_before_the_first_step(
    recipe: Make, pretrained: Path, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"choose\.split=dev"):
        recipe(*NLVR2, choose={"by": "accuracy", "split": "dev"})
    with pytest.raises(DataError, match=r"data\.train.*absent\.json"):
        finetune(recipe("nlvr2", "absent.json"))
    copy = tmp_path / "other"
    shutil.copytree(pretrained, copy)
    (copy / "task.json").write_text('{"format": 1, "task": {"kind": "nlvr2", "surprise": 1}}')
    with pytest.raises(CheckpointError, match=r"task\.json"):
        finetune(recipe(*NLVR2, init={"checkpoint": str(copy)}))
    with pytest.raises(CheckpointError, match="cls_head"):
        evaluate(recipe(*NLVR2), pretrained, "test", tmp_path / "out")
    with pytest.raises(CheckpointError, match="task"):
        xfm_fast.load(pretrained)
    assert not (tmp_path / "out").exists()


def test_a_broken_element_is_quarantined_and_a_missing_test_image_named(
    recipe: Make, world: Path, tmp_path: Path
) -> None:
    elements = json.loads((world / "nlvr_train.json").read_text())
    del elements[3]["sentence"]
    elements[5]["images"][0] = "images/train/none.png"
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(elements))
    data = {
        "root": str(world),
        "train": str(path),
        "splits": {"val": "nlvr_val.json"},
        "bad_share": 0.1,
    }
    made = recipe(*NLVR2, data=data, epochs=1)
    finetune(made)
    listed = (Path(made.checkpoint.folder) / "quarantine/train.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in sorted(listed)] == ["element 3", "element 5"]
    path.write_text(json.dumps(elements[4:]))
    with pytest.raises(DataError, match=r"images/train/none\.png"):
        evaluate(
            recipe(*NLVR2, data=data | {"splits": {"val": str(path)}}), "x", "val", tmp_path / "out"
        )


def test_an_average_is_what_is_judged(recipe: Make) -> None:
    made = recipe(*NLVR2, choose=CHOICE, ema=0.5, epochs=1)
    result = finetune(made)
    assert result.folder.name == "best"
    assert weights(made, "best") == weights(made, "average") != weights(made)
