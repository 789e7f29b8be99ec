"""`load` and `predict`: files and strings, and request files on any number of processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.finetuning.conftest import make_recipe
from tests.training.small_runs import in_processes, join_group
from xfm_fast.errors import DataError, InputError
from xfm_fast.finetuning.prediction import answer_lines, load
from xfm_fast.finetuning.run import finetune
from xfm_fast.tasks.evaluation import Evaluation
from xfm_fast.training.distributed import join_processes

SENTENCES = ("there is a red circle in the left image", "both images show a star")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, world: Path, pretrained: Path) -> Path:
    opened = make_recipe(world, pretrained, tmp_path_factory.mktemp("nlvr2"))(
        "nlvr2", "nlvr_{}.json", steps=1
    )
    finetune(opened)
    return Path(opened.checkpoint.folder)


@pytest.fixture
def requests(world: Path, tmp_path: Path) -> Path:
    """Nine requests, one a line, with a blank line and a sentence with a line separator of Unicode."""
    images = sorted(map(str, (world / "images/test").glob("*.png")))
    lines = [
        {"images": images[n : n + 2], "text": SENTENCES[n % 2] + ("\u2028" if n == 4 else "")}
        for n in range(9)
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text(
        "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8"
    )
    return path


def process(
    rank: int, world_size: int, meeting: Path, run: Path, lines: Path, out: Path, kill_at: int
) -> None:
    join_group(rank, world_size, meeting)
    predictor = load(run)
    task, calls = predictor.task, iter(range(1000))
    predict = task.predict

    def dying(model: Any, records: Any) -> Any:
        if next(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return predict(model, records)

    task.predict = dying
    with join_processes("cpu") as processes:
        answer_lines(predictor, lines, out, Evaluation(out.with_name(".parts"), processes, 2))


def test_files_of_requests(run: Path, requests: Path, tmp_path: Path) -> None:
    """Compare the answers of two processes, and of one killed in its third batch, with those of
    one.
    """
    answers = []
    for index, (processes, kill_at) in enumerate([(1, -1), (2, -1), (1, 2)]):
        out = tmp_path / f"{index}" / "answers.jsonl"
        codes = in_processes(
            process, processes, tmp_path / f"meet{index}", run, requests, out, kill_at
        )
        if kill_at >= 0:
            assert codes == [-9]
            assert not out.exists()
            codes = in_processes(process, 1, tmp_path / "again", run, requests, out, -1)
        assert set(codes) == {0}
        assert [path.name for path in out.parent.iterdir()] == ["answers.jsonl"]
        answers.append(out.read_bytes())
    assert len(answers[0].splitlines()) == 9
    assert answers[0] == answers[1] == answers[2]


def test_what_is_no_request(run: Path, tmp_path: Path) -> None:
    predictor, path = load(run), tmp_path / "lines.jsonl"
    work = Evaluation(tmp_path / "parts")
    for text in ('{"images": ["a.png"], "text": "b"}', ""):
        path.write_text(text)
        with pytest.raises(DataError, match=r"lines\.jsonl(:1: | holds)"):
            answer_lines(predictor, path, tmp_path / "out", work)
    with pytest.raises(DataError):
        answer_lines(predictor, tmp_path / "none", tmp_path / "out", work)
    (tmp_path / "full").symlink_to("/dev/full")
    with (
        (tmp_path / "redirected").open("wb") as file,
        pytest.raises(InputError, match="not a regular file"),
    ):
        answer_lines(predictor, path, Path(f"/dev/fd/{file.fileno()}"), work)
    with pytest.raises(InputError, match="full"):
        answer_lines(predictor, path, tmp_path / "full", work)
    assert not (tmp_path / "out").exists()
    assert not work.folder.exists()
    with pytest.raises(InputError, match="two images"):
        predictor.predict(["a.png"], ["b"])
