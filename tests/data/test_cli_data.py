"""`xfm-fast data`: tables, JSON and exit codes."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.data.record_files import pairs, tiny_tokenizer, write_lines
from xfm_fast import cli_data
from xfm_fast.errors import DataError

app = typer.Typer()
cli_data.register(app)


@app.callback()
def _root() -> None:
    pass


def _run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_good_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", pairs(5))
    tiny_tokenizer().save(tmp_path / "tokenizer.json")
    result = _run("check", path, "--task", "pairs", "--tokenizer", tmp_path / "tokenizer.json", "--image-size", 32)
    assert result.exit_code == 0
    for expected in ("a.jsonl", "5, of which 0 broken", "tokens of a text", "40×30", "rows/s", "MB", "pairs: good"):
        assert expected in result.output


def test_a_bad_file_is_listed_and_exits_with_1(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*pairs(2), "{cut", {"desc": "no image"}])
    result = _run("check", path, "--task", "pairs", "--image-size", 32)
    assert result.exit_code == 1
    for expected in ("50.0%", "no JSON", "'binary'", "not usable"):
        assert expected in result.output
    assert _run("check", path, "--task", "pairs", "--tolerate-bad", 0.5, "--image-size", 32).exit_code == 0
    assert "no JSON" not in _run("check", path, "--task", "pairs", "--list-first", 0, "--image-size", 32).output


def test_json(tmp_path: Path) -> None:
    result = _run("check", write_lines(tmp_path / "a.jsonl", ["{", "{"]), "--task", "text", "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert (content["rows"], content["broken"], content["ok"]) == (2, 2, False)


def test_several_files(tmp_path: Path) -> None:
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [{"desc": "a cat"}])
    one = _run("check", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--task", "text", "--json")
    other = _run("check", f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", "--task", "text", "--json")
    assert json.loads(one.stdout)["rows"] == json.loads(other.stdout)["rows"] == 2


def test_there_and_back(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [*pairs(120), "{cut"])
    there = _run(
        "convert", lines, tmp_path / "shards", "--to", "webdataset", "--samples", 100, "--quarantine", tmp_path / "q"
    )
    assert "120 rows in 2 files" in there.output
    assert "1 broken rows left out" in there.output
    assert (tmp_path / "q").read_text().count("\n") == 1
    back = _run("convert", tmp_path / "shards", tmp_path / "b.jsonl", "--to", "lines")
    assert "120 rows in 1 file:" in back.output
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()] == pairs(120)


def test_wrong_arguments(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", pairs(1))
    with pytest.raises(DataError, match="choose webdataset or lines"):
        _run("convert", lines, tmp_path / "b", "--to", "parquet")
    with pytest.raises(DataError, match="task 'walking' is unknown"):
        _run("check", lines, "--task", "walking")
    with pytest.raises(DataError, match="matches no file"):
        _run("check", tmp_path / "absent", "--task", "pairs")


def test_a_world_passes_its_checks(tmp_path: Path) -> None:
    world = tmp_path / "world"
    result = _run("shapes", world, "--train", 12, "--val", 3, "--test", 3, "--seed", 1)
    assert result.exit_code == 0
    assert "rows in" in result.output
    files = {
        "pairs": "pairs_train.jsonl", "regions": "regions_train.jsonl", "images": "images_val.jsonl",
        "text": "texts_test.jsonl", "vqa": "vqa_train.json", "nlvr2": "nlvr_train.json",
        "retrieval": "retrieval_test.json", "grounding": "grounding_train.json",
    }  # fmt: skip
    for task, name in files.items():
        checked = _run("check", world / name, "--task", task, "--image-size", 64, "--json")
        content = json.loads(checked.stdout)
        assert (checked.exit_code, content["broken"]) == (0, 0), content["problems"]
        assert content["rows"] > 0
