"""The study of the tasks in miniature: what it asks, what it repeats, and what an answer without looking gets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from xfm_fast.config import XFMConfig
from xfm_fast.data.shapes import write_world
from xfm_fast.errors import XFMError
from xfm_fast.models.xfm import XFM
from xfm_fast.reproduce import downstream
from xfm_fast.reproduce.downstream import TWINS, markdown, random_recall, read_table, run_downstream, save
from xfm_fast.tokenizer import CaptionTokenizer

RECIPES = dict.fromkeys(twin.recipe for twin in TWINS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Replaces the commands by what they leave; returns what each was told."""
    made: list[dict[str, str]] = []

    def pretend(out: Path, recipe: str, seed: int, command: Sequence[str]) -> None:
        said = dict(each.split("=", 1) for each in command[2:])
        made.append({"command": f"{command[0]} {command[1]}"} | said)
        folder = Path(said["checkpoint.folder"])
        if command[0] == "pretrain":
            write_world(said["data"], images={"train": 60, "val": 4, "test": 6, "known": 6}, resolution=32)
            tokenizer = CaptionTokenizer.train_on_texts(["a red circle left of a star"], 300)
            config = XFMConfig.preset(
                "tiny", image_size=32, patch_size=8, vision_width=32, vision_depth=1, vision_heads=2, text_width=32,
                text_heads=2, text_layers=1, text_intermediate=32, fusion_layers=1, embed_dim=8,
                num_masking_patches=4, min_num_patches=1, vocab_size=tokenizer.vocab_size,
            )  # fmt: skip
            torch.manual_seed(0)
            XFM(config).save_pretrained(folder / "model")
            tokenizer.save(folder / "model" / "tokenizer.json")
            return
        values = {"known": 80.0 + seed, "test": 60.0 + seed}
        for split, value in values.items():
            (folder / "evaluation" / split).mkdir(parents=True)
            metrics = {twin.metric: value for twin in TWINS}
            (folder / "evaluation" / split / "metrics.json").write_text(json.dumps({"metrics": metrics}))

    monkeypatch.setattr(downstream, "_run", pretend)
    monkeypatch.setattr(downstream, "_probed", lambda world, pretrained: {"chance": 16.7})
    downstream._chance.cache_clear()
    return made


def test_the_study_evaluates_on_both_kinds_of_combinations_and_repeats_nothing(
    calls: list[dict[str, str]], tmp_path: Path
) -> None:
    table = run_downstream(tmp_path, jobs=1, pretraining=["model.patch_size=4"])
    assert [call["command"] for call in calls] == [
        "pretrain pretrain_tiny_shapes", *(f"finetune {recipe}" for recipe in RECIPES)
    ]  # fmt: skip
    assert {call["shapes.known"] for call in calls} == {"500"}
    assert [call.get("model.patch_size") for call in calls] == ["4", *[None] * len(RECIPES)]
    for call in calls[1:]:
        assert call["init.checkpoint"] == str(tmp_path / "pretrain_tiny_shapes")
        assert (tmp_path / "shapes_world" / call["data.splits.known"]).is_file()
    assert table.missing == ()
    assert all(values == {"known": {0: 80.0}, "test": {0: 60.0}} for values in table.values.values())
    assert table.pretraining == ("model.patch_size=4",)
    assert "`model.patch_size=4`" in markdown(table)
    run_downstream(tmp_path, jobs=1, pretraining=["model.patch_size=4"])
    assert len(calls) == 1 + len(RECIPES)
    with pytest.raises(XFMError, match=r"model\.patch_size=4"):
        run_downstream(tmp_path, jobs=1, pretraining=())
    # Only what is lacking: another seed, and a run that was never evaluated on known combinations.
    (tmp_path / "seed-0/vqa_tiny_shapes/evaluation/known/metrics.json").unlink()
    assert read_table(tmp_path, 1).missing == (("vqa_tiny_shapes", 0),)
    with pytest.raises(XFMError, match="seeds=0"):
        run_downstream(tmp_path, seeds=0)


def test_the_page_says_what_was_asked_of_which_combinations(calls: list[dict[str, str]], tmp_path: Path) -> None:
    table = run_downstream(tmp_path, seeds=2, jobs=1)
    page, numbers = save(table, tmp_path)
    lines = page.read_text().splitlines()
    chance = table.chance[TWINS[1]]
    assert f"| 80.0, 81.0 | 60.0, 61.0 | ≥ 75, known | {chance['known']:.1f}, {chance['test']:.1f} |" in lines[7]
    assert "| ≥ 80, held-out |" in next(line for line in lines if "grounding" in line)
    assert page.read_text() == markdown(table)
    row = json.loads(numbers.read_text())["rows"][1]
    assert row["by_seed"] == {"known": {"0": 80.0, "1": 81.0}, "test": {"0": 60.0, "1": 61.0}}
    assert row["without_looking"] == chance


def test_what_a_command_takes_of_its_core_is_kept_and_what_it_says_when_it_fails(tmp_path: Path) -> None:
    downstream._run(tmp_path, "image_tiny_shapes", 1, ["--version"])
    assert 0 < json.loads((tmp_path / "seconds/image_tiny_shapes/1.json").read_text()) < 60
    with pytest.raises(XFMError, match="no_such_recipe"):
        downstream._run(tmp_path, "no_such_recipe", 0, ["finetune", "no_such_recipe"])
    assert not (tmp_path / "seconds/no_such_recipe").exists()


def test_answers_without_looking(calls: list[dict[str, str]], tmp_path: Path) -> None:
    run_downstream(tmp_path, jobs=1)
    chance = {twin.recipe: of_split for twin, of_split in read_table(tmp_path, 1).chance.items()}
    assert chance["nlvr2_tiny_shapes"] == {"known": 50.0, "test": 50.0}
    asked = {
        split: json.loads((tmp_path / f"shapes_world/vqa_{split}.json").read_text()) for split in ("train", "known")
    }
    answers = {split: [row["answer"][0] for row in rows] for split, rows in asked.items()}
    common = max(dict.fromkeys(answers["train"]), key=answers["train"].count)
    expected = 100 * answers["known"].count(common) / len(answers["known"])
    assert chance["vqa_tiny_shapes"]["known"] == pytest.approx(expected)


def test_a_random_ranking() -> None:
    # One caption for each of four images: the right one is first once in four, and always among the first five.
    assert random_recall([1] * 4) == pytest.approx((25 + 100 + 100) / 3)
    # Of an image with two captions among four, one is first half of the time.
    assert random_recall([2, 2]) == pytest.approx((50 + 100 + 100 + 50 + 100 + 100) / 6)
