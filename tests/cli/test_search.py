"""`xfm-fast index` and `search`, as one types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.runner import invoke
from tests.search.conftest import write_model, write_picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        write_picture(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


def test_random_weights_are_noted(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"none")
    done = invoke(["index", folder])
    assert done.exit_code == 0
    assert "THE WEIGHTS ARE RANDOM" in done.stderr
    assert "broken.png" in done.stderr
    assert "indexed: 4 images, 4 of them read now, 0 gone, 1 left out" in done.stdout
    done = invoke(["search", folder, "a red circle", "--top", 3, "--sheet", tmp_path / "sheet.html"])
    assert done.exit_code == 0
    assert "THE WEIGHTS ARE RANDOM" in done.stderr
    assert done.stdout.count(".png") == 3
    assert "The weights are random" in (tmp_path / "sheet.html").read_text()


def test_a_model_and_an_index_of_ones_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "weights", seed=0)
    monkeypatch.chdir(tmp_path)
    done = invoke(["index", "photos", "--model", "weights", "--index", "found", "--json"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout)["images"] == 4
    monkeypatch.chdir(folder)
    named = ["--json", "--index", tmp_path / "found", "--model", tmp_path / "weights"]
    done = invoke(["search", folder, "a red circle", *named])
    # An untrained head gives all images about the same score.
    assert "--rank similarity" in done.stderr
    found = json.loads(done.stdout)
    assert not found["random"]
    assert [0 <= hit["match"] <= 1 for hit in found["hits"]] == [True] * 4
    best = json.loads(invoke(["search", folder, "2.png", *named]).stdout)["hits"][0]
    assert (Path(best["path"]), best["match"]) == (folder / "2.png", None)


def test_an_index_names_no_model_and_no_pictures(folder: Path, tmp_path: Path) -> None:
    weights = write_model(tmp_path / "weights", seed=0)
    invoke(["index", folder, "--model", weights])
    invoke(["index", folder, "--random", "tiny", "--index", tmp_path / "elsewhere"])
    for arguments in (["index", folder], ["search", folder, "a dog"]):
        done = invoke(arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"--model {weights}" in done.stderr
    done = invoke(["search", tmp_path / "elsewhere", "a dog"])
    assert done.exit_code == 2
    assert str(folder) in done.stderr
    # A stranger's entries: one outside the folder, one inside it.
    write_picture(tmp_path / "private.png", 9)
    header = folder / ".xfm-index/index.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), "sums": {}}))
    entries = next((folder / ".xfm-index").glob("images-*.jsonl"))
    entries.write_text(entries.read_text().replace('"0.png"', '"../private.png"', 1))
    sheet = tmp_path / "sheet.html"
    done = invoke(["search", folder, "a dog", "--model", weights, "--sheet", sheet])
    assert done.exit_code == 0
    assert "private.png" in done.stderr
    assert sheet.read_text().count("data:image") == 3
    done = invoke(["search", folder, folder / "1.png", "--model", weights, "--sheet", sheet])
    assert done.exit_code == 0
    assert sheet.read_text().count("data:image") == 3


def test_one_line_and_code_2(folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "weights", seed=0)
    assert "has no index; make one" in invoke(["search", folder, "a dog"]).stderr
    invoke(["index", folder, "--model", tmp_path / "weights"])
    (tmp_path / "note.txt").write_text("a text file")
    for arguments, message in (
        (["search", folder, "a dog", "--random", "tiny"], "was made with"),
        (["search", folder, "a dog", "--random", "tiny", "--model", "x"], "--model x and --random tiny"),
        (["search", folder, "a dog", "--sheet", "a.png"], "a.png"),
        (["search", folder, tmp_path / "note.txt", "--model", tmp_path / "weights"], "in no format that Pillow reads"),
        (["index", folder, "--random", "tiny"], "(--index)"),
        (["index", tmp_path / "nowhere"], "does not exist"),
        (["index", folder, "--model", tmp_path / "nothing"], "nothing"),
    ):
        done = invoke(arguments)
        assert done.exit_code == 2
        assert message in done.stderr
