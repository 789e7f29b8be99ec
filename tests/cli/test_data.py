"""`xfm-fast data`: tables, JSON and exit codes."""

import json
from pathlib import Path

from tests.cli.runner import Done, invoke
from tests.data.record_files import pairs, tiny_tokenizer, write_lines


def _run(*arguments: object) -> Done:
    return invoke(["data", *arguments])


def test_a_good_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", pairs(5))
    tiny_tokenizer().save(tmp_path / "tokenizer.json")
    result = _run("check", path, "--task", "pairs", "--tokenizer", tmp_path / "tokenizer.json")
    assert result.exit_code == 0
    for expected in ("a.jsonl", "5, of which 0 broken", "tokens of a text", "40×30", "pairs: good"):
        assert expected in result.output


def test_a_bad_file_is_listed_and_exits_with_1(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*pairs(2), "{cut", {"desc": "no image"}])
    result = _run("check", path, "--task", "pairs")
    assert result.exit_code == 1
    for expected in ("50.0%", "not JSON", "'binary'", "not usable"):
        assert expected in result.output
    assert _run("check", path, "--task", "pairs", "--tolerate-bad", 0.5).exit_code == 0


def test_json(tmp_path: Path) -> None:
    result = _run(
        "check", write_lines(tmp_path / "a.jsonl", ["{"] * 30), "--task", "text", "--json"
    )
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert (content["rows"], content["broken"], content["ok"]) == (30, 30, False)
    assert [problem["row"] for problem in content["problems"]] == [*range(1, 31)]


def test_there_and_back(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [*pairs(120), "{cut"])
    there = _run("convert", lines, tmp_path / "shards", "--samples", 100)
    assert "120 rows in 2 files" in there.output
    assert "1 broken rows left out" in there.output
    back = _run("convert", tmp_path / "shards", tmp_path / "b.jsonl")
    assert "120 rows in 1 file:" in back.output
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()] == pairs(
        120
    )


def test_wrong_arguments(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", pairs(1))
    for command, message in (
        (("convert", lines, tmp_path / "b", "--to", "lines"), "--to"),
        (("check", lines, "--task", "walking"), "task 'walking' is unknown"),
        (("check", tmp_path / "absent", "--task", "pairs"), "matches no file"),
    ):
        done = _run(*command)
        assert done.exit_code == 2
        assert message in done.stderr


def test_a_world_passes_its_checks(tmp_path: Path) -> None:
    world = tmp_path / "world"
    result = _run("shapes", world, "--train", 60, "--seed", 1)
    assert result.exit_code == 0
    assert "rows in" in result.output
    files = {
        "pairs": "pairs_train.jsonl", "regions": "regions_train.jsonl", "images": "images_val.jsonl",
        "text": "texts_test.jsonl", "vqa": "vqa_train.json", "nlvr2": "nlvr_train.json",
        "retrieval": "retrieval_test.json", "grounding": "grounding_train.json",
    }  # fmt: skip
    for task, name in files.items():
        checked = _run("check", world / name, "--task", task, "--json")
        content = json.loads(checked.stdout)
        assert (checked.exit_code, content["broken"]) == (0, 0), content["problems"]
        assert content["rows"] > 0
