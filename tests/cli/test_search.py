"""`xfm-fast index` and `search`, as one types them."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.cli.runner import invoke
from tests.library_models import write_embedder
from tests.search.conftest import write_model, write_picture
from tests.search.test_index import features_of
from tests.training.small_runs import ROOT
from xfm_fast.cli.options import UNFINISHED
from xfm_fast.errors import DataError
from xfm_fast.search import open_index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        write_picture(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


def test_random_weights_are_noted(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"none")
    done = invoke(["index", folder])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--model" in done.stderr
    assert not (folder / ".xfm-index").exists()
    done = invoke(["index", folder, "--random", "tiny"])
    assert done.exit_code == 0
    assert "THE WEIGHTS ARE RANDOM" in done.stderr
    assert "broken.png" in done.stderr
    assert "indexed: 4 images, 4 of them read now, 0 gone, 1 left out" in done.stdout
    done = invoke(
        ["search", folder, "a red circle", "--top", 3, "--sheet", tmp_path / "sheet.html"]
    )
    assert done.exit_code == 0
    assert "THE WEIGHTS ARE RANDOM" in done.stderr
    assert done.stdout.count(".png") == 3
    assert "The weights are random" in (tmp_path / "sheet.html").read_text()


def test_a_model_and_an_index_of_ones_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "weights", seed=0)
    monkeypatch.chdir(tmp_path)
    done = invoke(["index", "photos", "--model", "weights", "--index", "found", "--json"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout)["entries"] == 4
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
    with closing(sqlite3.connect(folder / ".xfm-index/index.sqlite")) as connection:
        connection.execute("UPDATE entries SET name = '../private.png' WHERE name = '0.png'")
        connection.commit()
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
        (
            ["search", folder, "a dog", "--random", "tiny", "--model", "x"],
            "--model x and --random tiny",
        ),
        (["search", folder, "a dog", "--sheet", "a.png"], "a.png"),
        (
            ["search", folder, tmp_path / "note.txt", "--model", tmp_path / "weights"],
            "a format that Pillow does not read",
        ),
        (["index", folder, "--random", "tiny"], "(--index)"),
        (["index", tmp_path / "nowhere", "--random", "tiny"], "does not exist"),
        (["index", folder, "--model", tmp_path / "nothing"], "nothing"),
    ):
        done = invoke(arguments)
        assert done.exit_code == 2
        assert message in done.stderr


def _start(arguments: list[object], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "xfm_fast.cli", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment, text=True,
    )  # fmt: skip


def _end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


@pytest.mark.slow
def test_workers_and_torchrun_make_the_index_of_one_process(folder: Path, tmp_path: Path) -> None:
    for number in range(4, 40):
        write_picture(folder / f"{number:02}.png", number)
    (folder / "broken.png").write_bytes(b"none")
    weights = write_model(tmp_path / "weights", seed=0)
    named = ["index", folder, "--model", weights]
    alone = json.loads(invoke([*named, "--json", "--index", tmp_path / "alone"]).stdout)
    code, output, errors = _end(
        _start([*named, "--index", tmp_path / "shared", "--workers", "2", "--json"])
    )
    assert (code, errors) == (0, "")
    assert json.loads(output) == alone | {"folder": str(tmp_path / "shared")}
    joined = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"}
    ranks = [
        _start(
            [*named, "--index", tmp_path / "joined"], **joined, RANK=str(rank), LOCAL_RANK=str(rank)
        )
        for rank in range(2)
    ]
    (_, output, _), (_, silence, _) = map(_end, ranks)
    assert "indexed: 40 images" in output
    assert silence == ""
    expected = features_of(tmp_path / "alone")
    for place in (tmp_path / "shared", tmp_path / "joined"):
        found = features_of(place)
        assert found.keys() == expected.keys()
        for name, feature in found.items():
            actual, reference = (
                np.frombuffer(content, np.float32) for content in (feature, expected[name])
            )
            np.testing.assert_allclose(actual, reference, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "number"), [("command", signal.SIGTERM), ("worker", signal.SIGKILL)]
)
def test_interrupted_workers_resume(
    folder: Path, tmp_path: Path, target: str, number: signal.Signals
) -> None:
    for image in range(4, 400):
        write_picture(folder / f"{image:03}.png", image)
    named = ["index", folder, "--random", "tiny", "--workers", "2"]
    process = _start(named)
    lock = folder / ".xfm-index/.lock"
    while not lock.exists():
        assert process.poll() is None, _end(process)
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    worker = next(child for child in children if child.environ()["RANK"] == "1")
    os.kill(process.pid if target == "command" else worker.pid, number)
    code, output, errors = _end(process)
    assert output == ""
    if target == "command":
        assert code == UNFINISHED
        assert "the same command resumes" in errors
    else:
        assert code == 2
        assert "process 1 of 2 was killed by signal 9; the same command resumes" in errors
        assert "internal error" not in errors
    with pytest.raises(DataError):
        open_index(folder)
    code, output, _ = _end(_start(named))
    assert (code, len(open_index(folder))) == (0, 400)
    assert "indexed: 400 images" in output


@pytest.mark.slow
def test_a_worker_that_cannot_start_is_explained(folder: Path) -> None:
    code, _, errors = _end(
        _start(["index", folder, "--random", "tiny", "--workers", "2", "--device", "cuda"])
    )
    assert code == 2
    assert errors.splitlines()[-1].count("GPU") >= 1


def test_rows_of_a_table_with_filters(tmp_path: Path) -> None:
    path = tmp_path / "goods.csv"
    path.write_text(
        "product,brand,year\na red circle,acme,2024\na blue star,acme,2023\na dot,b=c,2024\n"
    )
    model = ["--model", write_embedder(tmp_path)]
    done = invoke(["index", path, *model, "--column", "product"])
    assert done.exit_code == 0, done.stderr
    assert "indexed: 3 texts, 3 of them read now, 0 gone" in done.stdout
    assert invoke(["index", path, *model, "--column", "product", "--check"]).exit_code == 0
    for options, names in (
        ([], {"#2", "#3", "#4"}),
        (["--where", "brand=acme", "--where", "year=2024"], {"#2"}),
        (["--where", "brand=b=c"], {"#4"}),
        (["--glob", "*#[34]"], {"#3", "#4"}),
        (["--where", "brand=none"], set()),
    ):
        done = invoke(["search", path, "a circle", *model, *options, "--json"])
        hits = json.loads(done.stdout)["hits"]
        assert {hit["path"].removeprefix(str(path)) for hit in hits} == names
        assert all(hit["match"] is None for hit in hits)
    (hit,) = json.loads(
        invoke(["search", path, "a", *model, "--where", "brand=b=c", "--json"]).stdout
    )["hits"]
    assert (hit["caption"], hit["fields"]) == ("a dot", {"brand": "b=c", "year": "2024"})
    for options, message in (
        (["--where", "brand"], "brand=acme"),
        (["--where", "color=red"], "'brand', 'year'"),
        (["--where", "brand=a", "--where", "brand=b"], "give one"),
        (["--rank", "match"], "rank=match"),
    ):
        done = invoke(["search", path, "a circle", *model, *options])
        assert (done.exit_code, done.stdout) == (2, "")
        assert message in done.stderr
    assert "a red circle" in invoke(["search", path, "a circle", *model]).stdout
    done = invoke(["index", path, *model])
    assert done.exit_code == 2
    assert "--column" in done.stderr
    features = next((tmp_path / "goods.csv.xfm-index").glob("features-*"))
    features.write_bytes(features.read_bytes()[:-1] + b"?")
    done = invoke(["index", path, *model, "--column", "product", "--check"])
    assert done.exit_code == 2
    assert "checksum" in done.stderr
