"""A run that was killed goes on as if it had not been."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.small_runs import (
    in_processes,
    numbers,
    process_of_a_run,
    run,
    small_recipe,
    without_dropout,
)
from xfm_fast.checkpoint import load_pretrained_files
from xfm_fast.errors import CheckpointError, ConfigError, StorageError
from xfm_fast.kernels.cpu import gemm, selection
from xfm_fast.models.xfm import XFM
from xfm_fast.training import checkpoints
from xfm_fast.training.checkpoints import newest
from xfm_fast.training.loop import position_after, recipe_changes
from xfm_fast.training.metrics import read_log

STEPS = 12


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert in_processes(
        process_of_a_run, 1, folder / "meet", small_recipe(folder, steps=STEPS), {}
    ) == [0]
    return folder


def same_after_kill(folder: Path, whole: Path, options: dict[str, Any], **changes: Any) -> None:
    recipe = small_recipe(folder, steps=STEPS, **changes)
    assert in_processes(process_of_a_run, 1, folder / "meet", recipe, options) == [-9]
    assert in_processes(process_of_a_run, 1, folder / "meet", recipe, {}) == [0]
    assert numbers(folder) == numbers(whole)
    assert (folder / "model/model.safetensors").read_bytes() == (
        whole / "model/model.safetensors"
    ).read_bytes()


def test_killed_between_checkpoints(tmp_path: Path, whole_run: Path) -> None:
    """Step 5 is made again from the checkpoint of step 4, with dropout, and everything after it is the same."""
    same_after_kill(tmp_path, whole_run, {"kill_at": 5}, workers=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"kill_at": 1}, {"kill_in_checkpoint": 4}, {"kill_in_checkpoint": 8}]
)
def test_killed_anywhere(tmp_path: Path, whole_run: Path, options: dict[str, Any]) -> None:
    same_after_kill(tmp_path, whole_run, options)


@pytest.mark.slow
def test_killed_with_two_processes(tmp_path: Path) -> None:
    kept = {}
    for name, options in (("whole", {}), ("killed", {"kill_at": 5})):
        folder = tmp_path / name
        recipe = small_recipe(folder, steps=STEPS)
        first = in_processes(process_of_a_run, 2, tmp_path / f"meet-{name}", recipe, options)
        if options:
            assert first == [-9, -9]
            assert in_processes(
                process_of_a_run, 2, tmp_path / f"meet-again-{name}", recipe, {}
            ) == [0, 0]
        else:
            assert first == [0, 0]
        kept[name] = numbers(folder)
    assert len(kept["whole"]) == STEPS
    assert kept["killed"] == kept["whole"]


def test_average_and_accumulation_resume_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 6, "ema": 0.9, "accumulate": 2, "model": without_dropout()}
    whole = run(small_recipe(tmp_path / "whole", **options))
    with pytest.raises(RuntimeError, match="stop"):
        run(small_recipe(tmp_path / "parts", **options), on_step=_raise_at(5))
    run(small_recipe(tmp_path / "parts", **options))
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert newest(tmp_path / "parts/checkpoints").state["batches"]["pairs"] == 12
    state = load_pretrained_files(tmp_path / "parts/average").state
    assert whole.average is not None
    for name, average in whole.average.state_dict().items():
        assert torch.equal(state[name], average)
    assert not torch.equal(state["temp"], whole.model.temp)


def test_average_can_begin_later(tmp_path: Path) -> None:
    run(small_recipe(tmp_path, steps=2, checkpoint={"folder": str(tmp_path), "every": 2}))
    before = XFM.from_pretrained(tmp_path / "model")
    result = run(small_recipe(tmp_path, steps=3, ema=0.75))
    assert result.average is not None
    average, now = result.average.state_dict(), dict(result.model.named_parameters())
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(average[name], parameter + 0.25 * (now[name] - parameter))


def test_interruption_writes_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    def send(step: int, *_: object) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = small_recipe(tmp_path / "stopped", steps=6)
    stopped = run(recipe, on_step=send)
    # The signal comes when the third step is over, so one more is made.
    assert (stopped.step, stopped.interrupted) == (4, True)
    assert newest(tmp_path / "stopped/checkpoints").state["step"] == 4
    assert not (tmp_path / "stopped/model").exists()
    assert run(recipe).interrupted is False
    run(small_recipe(tmp_path / "whole", steps=6))
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    said: list[str] = []

    def start_another(step: int, *_: object) -> None:
        with pytest.raises(StorageError) as caught:
            run(small_recipe(tmp_path, steps=2, seed=7))
        said.append(str(caught.value))

    assert run(small_recipe(tmp_path, steps=2), on_step=start_another).step == 2
    assert f"checkpoint.folder={tmp_path}" in said[0]
    assert str(os.getpid()) in said[0]
    assert not (tmp_path / ".lock").exists()


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    run(small_recipe(folder, steps=8))
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    return to


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("training.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-7])),
        ("state.json", Path.unlink),
        ("model/model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?")),
        ("manifest.json", Path.unlink),
    ],
)
def test_damaged_checkpoint_is_passed_over(
    tmp_path: Path, two_checkpoints: Path, file: str, damage: Callable[[Path], Any]
) -> None:
    folder = copy_of(two_checkpoints, tmp_path) / "checkpoints"
    damage(folder / "step-00000008" / file)
    found = newest(folder)
    assert found is not None
    assert found.path.name == "step-00000004"
    assert len(found.rejected) == 1
    assert "step-00000008" in found.rejected[0]


def _resealed(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def damage(path: Path) -> None:
        change(path)
        (path / "manifest.json").unlink()
        checkpoints._seal(path)

    return damage


def _state(**changes: Any) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(state | changes))

    return _resealed(change)


def _manifest(name: str) -> Callable[[Path], Any]:
    content = json.dumps({"files": {name: {"bytes": 1, "sha256": ""}}})
    return lambda path: (path / "manifest.json").write_text(content)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "foreign file": (_manifest("../x"), "../x"),
    "unlisted file": (lambda path: (path / "more").touch(), "more"),
    "another step": (_state(step=5), "step 5"),
}


@pytest.mark.parametrize(("damage", "message"), HOSTILE.values(), ids=HOSTILE)
def test_false_checkpoint_is_passed_over(
    tmp_path: Path, two_checkpoints: Path, damage: Callable[[Path], Any], message: str
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints / "checkpoints", folder)
    (folder / "step-³").mkdir()
    (folder / f"step-{'9' * 5000}"[:250]).mkdir()
    damage(folder / "step-00000008")
    found = newest(folder)
    assert found is not None
    assert found.path.name == "step-00000004"
    assert message in found.rejected[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": {}},
        {"scaler": {"scale": "x"}, "optimizer": {"groups": [], "numbers": {}}},
        {"cpu_kernels": []},
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_an_error(
    tmp_path: Path, two_checkpoints: Path, changes: dict[str, Any]
) -> None:
    folder = copy_of(two_checkpoints, tmp_path)
    _state(**changes)(folder / "checkpoints/step-00000008")
    with pytest.raises((CheckpointError, ConfigError)):
        run(small_recipe(folder, steps=9))


def test_nothing_whole_is_an_error(tmp_path: Path, two_checkpoints: Path) -> None:
    folder = copy_of(two_checkpoints, tmp_path)
    for path in (folder / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        run(small_recipe(folder, steps=9))


def test_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(
        tmp_path, steps=4, checkpoint={"folder": str(tmp_path), "every": 2, "keep": 1}
    )
    write = checkpoints.write_safetensors

    def full(file: Any, tensors: Any) -> None:
        if "00000004" in str(file.name):
            file.write(b"begun")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, tensors)

    monkeypatch.setattr(checkpoints, "write_safetensors", full)
    with pytest.raises(StorageError, match=r"step 4.*space"):
        run(recipe)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert run(recipe).step == 4
    assert [line["step"] for line in numbers(tmp_path)] == [1, 2, 3, 4]
    # Only the newest is kept.
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_choices_between_two_comparisons_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They follow from the times of both, so that a resumed run needs these too."""
    few = {"aten": 2e-4, "onednn": 3e-4}
    many = {"aten": 9e-3, "onednn": 1e-3}
    chosen = {"linear": many, "linear of few rows": few}
    monkeypatch.setattr(selection, "_selections", {})
    for operation, seconds in chosen.items():
        fastest = min(seconds, key=seconds.__getitem__)
        selection.set_choice(operation, torch.float32, fastest, seconds)
    weight = torch.ones(64, 64)
    before = [gemm._choose("linear", weight, rows) for rows in (15, 17, 100, 223)]
    assert len({*before}) == 2
    kernels = json.loads(json.dumps(checkpoints._selected_kernels()))
    monkeypatch.setattr(selection, "_selections", {})
    checkpoints._select_kernels(kernels)
    assert [gemm._choose("linear", weight, rows) for rows in (15, 17, 100, 223)] == before


def test_kernels_are_kept_from_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends before its first checkpoint does not choose by the clock again."""
    monkeypatch.setattr(selection, "_selections", {})
    with pytest.raises(RuntimeError, match="stop"):
        run(small_recipe(tmp_path, steps=3), on_step=_raise_at(2))
    noted = {
        (operation, dtype)
        for operation, dtype, *_ in json.loads((tmp_path / "cpu_kernels.json").read_text())[0]
    }
    assert noted
    monkeypatch.setattr(selection, "_selections", {})
    with pytest.raises(RuntimeError, match="stop"):
        run(small_recipe(tmp_path, steps=3), on_step=_raise_at(1))
    settled = {
        (s.operation, str(s.dtype).removeprefix("torch."))
        for s in selection.selections()
        if s.source == "settled"
    }
    assert settled == noted


def test_another_model_is_refused_by_field(tmp_path: Path, two_checkpoints: Path) -> None:
    folder = copy_of(two_checkpoints, tmp_path)
    other = {"preset": "tiny", "vision_depth": 1, "text_layers": 1, "fusion_layers": 2}
    with pytest.raises(ConfigError, match=r"model\.fusion_layers.*1.*2"):
        run(small_recipe(folder, steps=9, model=other))


def test_starting_over_does_not_mix_runs(tmp_path: Path, two_checkpoints: Path) -> None:
    folder = copy_of(two_checkpoints, tmp_path)
    with pytest.raises(ConfigError, match="step-00000008"):
        run(small_recipe(folder, steps=9), resume=False)


def test_another_number_of_processes_is_said(tmp_path: Path, two_checkpoints: Path) -> None:
    folder = copy_of(two_checkpoints, tmp_path)
    recipe = small_recipe(folder, steps=10)
    (told,) = recipe_changes(small_recipe(folder, steps=10).model_dump(mode="json"), recipe, 1, 2)
    assert "2 instead of 1 times" in told
    assert in_processes(process_of_a_run, 2, tmp_path / "meet", recipe, {}) == [0, 0]
    # 8 batches of one process are 4 global batches of two; then 2 more steps.
    assert newest(folder / "checkpoints").state["batches"]["pairs"] == 6
    assert newest(folder / "checkpoints").state["world_size"] == 2


def test_position_counts_items() -> None:
    recipe = small_recipe(Path("nowhere"), accumulate=2)
    before = json.loads(json.dumps(small_recipe(Path("nowhere")).model_dump(mode="json")))
    # 7 batches of 4 items on 3 processes are 84 items; 2 processes take micro-batches of 2.
    assert position_after(7, "pairs", before, recipe, 3, 2) == 21
    assert position_after(7, "pairs", before, recipe, 3, 16) == 3


def test_log_is_cut_where_the_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        run(small_recipe(tmp_path, steps=8), on_step=_raise_at(7))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "loss/text')
    run(small_recipe(tmp_path, steps=8))
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [*range(1, 9)]


def _raise_at(last: int) -> Callable[..., None]:
    def stop(step: int, *_: object) -> None:
        if step == last:
            raise RuntimeError("stop")

    return stop
