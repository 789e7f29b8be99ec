"""`xfm-fast embed`: output, exit codes, shares of processes, interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.runner import Done, invoke
from tests.library_models import write_embedder
from xfm_fast.cli.app import run
from xfm_fast.cli.options import UNFINISHED
from xfm_fast.encoders import LibraryEncoder

pa: Any = pytest.importorskip("pyarrow")
pq: Any = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("fsspec")
pytest.importorskip("sentence_transformers")


TEXTS = ["a red circle 0", "a red circle 1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for index in range(5):
        texts = [f"a red circle {row}" for row in range(index + 2)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"in/{index}.parquet")
    return tmp_path / "in"


def _embed(shards: Path, model: Path, *options: object) -> Done:
    out = () if "--out" in options else ("--out", shards.parent / "out")
    return invoke(["embed", shards, *out, "--model", model, "--device", "cpu", *options])


def test_shards_are_embedded_once(shards: Path, model: Path) -> None:
    done = _embed(shards, model)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"embedded: 20 rows of 5 shards, 0 of them before: {shards.parent}/out\n"
    assert done.stderr == ""
    assert len([*(shards.parent / "out").iterdir()]) == 5
    (shards.parent / "out/3.parquet").unlink()
    pq.write_table(pa.table({"text": ["a", None]}), shards / "5.parquet")
    done = _embed(shards, model)
    assert "22 rows of 6 shards, 4 of them before" in done.stdout
    assert "1 rows have no embedding, such as row 1 of" in done.stderr
    assert "22 rows of 6 shards, 6 of them before" in _embed(shards, model).stdout


@pytest.mark.parametrize(
    ("options", "names", "ids"),
    [
        ((), ["id", "text", "embedding"], [0, 1]),
        (("--id", "text", "--keep", "text"), ["id", "text", "embedding"], TEXTS),
    ],
)
def test_columns(
    options: tuple[str, ...], names: list[str], ids: list[object], shards: Path, model: Path
) -> None:
    done = _embed(shards / "0.parquet", model, "--out", shards / "out", *options)
    assert done.exit_code == 0, done.stderr
    table = pq.read_table(shards / "out/0.parquet")
    assert table.column_names == names
    assert table["id"].to_pylist() == ids


def test_job_arrays_and_processes_share_shards(
    shards: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shards.parent / "out"
    written: list[list[str]] = []
    for shard, rank, size in (("0/2", 0, 1), ("1/2", 0, 2), ("1/2", 1, 2), ("7/8", 0, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        before = {*out.iterdir()} if out.exists() else set()
        words = ["embed", shards, "--out", out, "--model", model, "--device", "cpu"]
        assert run([*map(str, words), "--shard", shard]) == 0
        after = {*out.iterdir()} if out.exists() else set()
        written.append(sorted(path.stem for path in after - before))
    # The shares of 1/2 are every fourth shard from 2 and from 3 on.
    assert written == [["0", "2", "4"], [], ["3"], []]
    capsys.readouterr()


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", "0/0", "1/2/3"])
def test_bad_shares(shard: str, shards: Path, model: Path) -> None:
    done = _embed(shards, model, f"--shard={shard}")
    assert done.exit_code == 2
    assert f"--shard {shard}: give I/N with I from 0 to N - 1, such as 0/8" in done.stderr


def test_broken_shards_do_not_stop_the_others(shards: Path, model: Path) -> None:
    (shards / "1.parquet").write_bytes(b"PAR1 broken")
    pq.write_table(pa.table({"body": ["a"]}), shards / "2.parquet")
    done = _embed(shards, model)
    assert done.exit_code == 2
    assert "embedded: 13 rows of 3 shards" in done.stdout
    assert "1.parquet cannot be read" in done.stderr
    assert "2.parquet has no column text, but body" in done.stderr
    assert "2 of 5 shards are not embedded; mend them, and run the command again" in done.stderr


def test_an_interrupted_command_resumes(
    shards: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    compute = LibraryEncoder.run

    def interrupt(self: LibraryEncoder, inputs: Any, normalise: bool = False) -> Any:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, inputs, normalise)

    monkeypatch.setattr(LibraryEncoder, "run", interrupt)
    done = _embed(shards, model)
    assert done.exit_code == UNFINISHED
    assert "stopped; the same command resumes" in done.stderr
    names = sorted(path.name for path in (shards.parent / "out").iterdir())
    # The width takes the first call.
    assert names == ["0.parquet", "1.parquet"]
    done = _embed(shards, model)
    assert "20 rows of 5 shards, 2 of them before" in done.stdout


@pytest.mark.slow
def test_a_killed_command_resumes_with_the_same_files(shards: Path, model: Path) -> None:
    """SIGKILL at any moment loses no finished file and leaves no partial one."""
    for index in range(40):
        texts = [f"a blue square {row}" for row in range(300)]
        pq.write_table(pa.table({"text": texts}), shards / f"{index}.parquet")
    words = ["embed", str(shards), "--model", str(model), "--device", "cpu", "--out"]
    command = [sys.executable, "-m", "xfm_fast.cli", *words]
    killed, whole = shards.parent / "killed", shards.parent / "whole"
    sizes: list[int] = []
    while len(sizes) < 3:
        process = subprocess.Popen([*command, str(killed)])
        goal = sizes[-1] + 8 if sizes else 8
        while process.poll() is None and len([*killed.glob("*.parquet")]) < goal:
            time.sleep(0.01)
        process.kill()
        process.wait()
        sizes.append(len([*killed.glob("*.parquet")]))
        for path in killed.glob("*.parquet"):
            assert pq.read_metadata(path).num_rows == 300
    assert sizes[0] < sizes[2]
    subprocess.run([*command, str(killed)], check=True)
    subprocess.run([*command, str(whole)], check=True)
    files = sorted(whole.iterdir())
    assert len(files) == 40
    for path in files:
        assert path.read_bytes() == (killed / path.name).read_bytes()
