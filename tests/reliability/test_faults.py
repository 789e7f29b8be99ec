"""Work that a fault of the machine strikes ends as if nothing had happened; `make soak` strikes at every moment."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.injection import LOSSES, SHARED_MEMORY, WORKS, Bench, Fault, Kind, Loss, change_world, lose

pytestmark = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="needs /dev/shm, whose inodes are not used twice")


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    place = Path(tempfile.mkdtemp(prefix="xfm-faults-", dir=SHARED_MEMORY))
    yield Bench(place)
    shutil.rmtree(place)


def _spread(operations: int, places: int) -> list[int]:
    return sorted({1 + number * (operations - 1) // max(1, places - 1) for number in range(places)})


@pytest.mark.parametrize(
    ("kind", "at", "loss"),
    [("kill", 0.5, "tail"), ("power", 0.7, "zeros"), ("power", 0.9, "names"), ("full", 0.6, "tail")],
)
def test_reranking_goes_on(bench: Bench, kind: Kind, at: float, loss: Loss) -> None:
    operations = bench.whole("re-ranking")[1]
    assert operations > 4
    bench.disturbed("re-ranking", Fault(kind, int(at * operations)), loss=loss)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "power", "full", "clock"])
@pytest.mark.parametrize("name", WORKS)
def test_work_goes_on(bench: Bench, name: str, kind: Kind) -> None:
    operations = bench.whole(name)[1]
    for number, at in enumerate(_spread(operations, 3)):
        bench.disturbed(name, Fault(kind, at), loss=LOSSES[number % len(LOSSES)])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WORKS if name != "re-ranking"])
def test_two_processes_go_on(bench: Bench, name: str) -> None:
    operations, seconds = bench.whole(name, 2)[1:]
    bench.disturbed(name, Fault("power", operations // 2), 2, "names")
    bench.killed(name, 0.8 * seconds, 2)


@pytest.mark.slow
def test_the_number_of_processes_may_change(tmp_path: Path) -> None:
    assert change_world(tmp_path / "run") == 12


def test_what_was_not_flushed_is_lost(tmp_path: Path) -> None:
    """The shim itself: without its losses, no test of it could fail."""
    losses: dict[Loss, tuple[bytes, bytes]] = {
        "tail": (b"12345678", b"never "),
        "zeros": (b"123456" + bytes(4), bytes(13)),
        "empty": (b"123456", b""),
        "names": (b"12345678", b"o"),
    }
    for loss, (half, new) in losses.items():
        folder = tmp_path / loss
        folder.mkdir()
        (folder / "a").write_bytes(b"1234567890")
        (folder / "new").write_bytes(b"never flushed")
        (tmp_path / f"kept-{loss}").write_bytes(b"old")
        flushed = {"flushed": os.stat(folder / "a").st_ino, "bytes": 6, "folder": None}
        renamed = {"from": str(folder / ".new.tmp"), "to": str(folder / "new"), "kept": str(tmp_path / f"kept-{loss}")}
        notes = tmp_path / f"notes-{loss}"
        notes.write_text("".join(json.dumps(each) + "\n" for each in (flushed, renamed)))
        lose(folder, notes, loss)
        assert ((folder / "a").read_bytes(), (folder / "new").read_bytes()) == (half, new)
        assert (folder / ".new.tmp").exists() == (loss == "names")
