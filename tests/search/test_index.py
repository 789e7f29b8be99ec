"""An index holds the features of the current images, and computes none twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from tests.data.record_files import pairs, write_lines
from tests.search.conftest import write_model, write_picture
from tests.training.small_runs import in_processes, join_group
from xfm_fast.data.collection import Entry
from xfm_fast.encoders import Encoder, open_encoder
from xfm_fast.errors import DataError, StorageError
from xfm_fast.search import IndexReport, build_index, index, index_folder, open_index, search, store
from xfm_fast.training.distributed import join_processes


def indexed(photos: Path, model: Encoder, **options: Any) -> tuple[IndexReport, int]:
    """Index, and count the images that were read."""
    numbers = [0]
    report = build_index(photos, model, progress=lambda done, of: numbers.append(done), **options)
    return report, max(numbers)


def check_features(photos: Path, model: Any) -> list[str]:
    """Compare the features of an index with `encode`; returns the names of its images."""
    opened = open_index(photos)
    opened.verify()
    with opened.store.read() as snapshot:
        rows = dict(snapshot.entries())
        features = snapshot.features[[*rows]]
    names = [entry.name for entry in rows.values()]
    encoded = model.model.encode([photos / name for name in names])
    np.testing.assert_allclose(features, encoded, atol=1e-5)
    return names


def features_of(folder: Path) -> dict[tuple[str, int], bytes]:
    """Read the features of an index by names and passages."""
    with open_index(folder).store.read() as snapshot:
        return {
            (entry.name, entry.passage): snapshot.features[row].tobytes()
            for row, entry in snapshot.entries()
        }


def test_only_new_and_changed_images_are_read(photos: Path, model: Encoder) -> None:
    report = build_index(photos, model, batch_size=3)
    assert (report.entries, report.added, report.removed, dict(report.faults)) == (7, 7, 0, {})
    names = check_features(photos, model)
    assert names == sorted(names)
    with open_index(photos).store.read() as snapshot:
        assert snapshot.features.base is not None
        assert isinstance(snapshot.features.base.base, np.memmap)
    (features,) = index_folder(photos).glob("features-*")
    before = features.stat().st_mtime_ns
    assert indexed(photos, model)[1] == 0
    assert [*index_folder(photos).glob("features-*")] == [features]
    assert features.stat().st_mtime_ns == before
    assert {path.name for path in index_folder(photos).iterdir()} == {features.name, "index.sqlite"}
    write_picture(photos / "7.png", 7)
    write_picture(photos / "0.png", 9)
    os.utime(photos / "0.png", ns=(1, 1))
    (photos / "2.png").unlink()
    report, read = indexed(photos, model)
    assert (report.entries, report.added, report.removed, read) == (7, 2, 1, 2)
    assert "2.png" not in check_features(photos, model)


def test_captions_are_renewed_without_their_images(photos: Path, model: Encoder) -> None:
    (photos / "0.txt").write_text("a star")
    build_index(photos, model)
    (photos / "0.txt").write_text("a red star\na star\n")
    (photos / "trip/1.txt").write_text("a trip")
    assert indexed(photos, model)[1] == 0
    captions = {
        entry.name: entry.captions for entry in open_index(photos).entries() if entry.captions
    }
    assert captions == {"0.png": ("a red star", "a star"), "trip/1.png": ("a trip",)}
    (photos / "0.txt").unlink()
    build_index(photos, model)
    assert open_index(photos).entries()[0].captions == ()


def test_broken_images_are_listed(photos: Path, model: Encoder) -> None:
    (photos / "3.png").write_bytes(b"none")
    for expected in (8, 1):
        report, read = indexed(photos, model)
        assert (report.entries, [*report.faults], read) == (7, ["3.png"], expected)
    write_picture(photos / "3.png", 3)
    assert build_index(photos, model).entries == 8
    (photos / "3.png").write_bytes(b"none now")
    report, read = indexed(photos, model)
    assert (report.entries, [*report.faults], report.removed) == (7, ["3.png"], 0)


def test_a_killed_run_resumes(
    photos: Path, model: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_COMMIT_ENTRIES", 2)

    def kill(done: int, of: int) -> None:
        if done == 4:
            os._exit(9)

    if (child := os.fork()) == 0:
        build_index(photos, model, batch_size=1, progress=kill)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with pytest.raises(DataError, match="never finished"):
        open_index(photos)
    # Half a part is none; files of other names stay.
    ours = [f"part-0-{model.fingerprint}-0123456789ab.sqlite", "work-0123456789ab.sqlite"]
    foreign = ["part-1.jpg", "work-2024.sqlite", "features-old.f32"]
    for name in (*ours, *foreign):
        (index_folder(photos) / name).write_text('{"name":')
    report, read = indexed(photos, model)
    assert (report.entries, read) == (7, 3)
    check_features(photos, model)
    left = {path.name for path in index_folder(photos).iterdir()}
    assert {*foreign} < left
    assert len(left) == len(foreign) + 2


@pytest.mark.parametrize("rows", [[], [(b"gone.png", 1, 1, None, "{}", "[[]]", bytes(128))]])
def test_results_of_a_killed_run_that_fit_nothing(
    photos: Path, model: Encoder, rows: list[Any]
) -> None:
    part = index_folder(photos) / f"part-0-{model.fingerprint}-0123456789ab.sqlite"
    part.parent.mkdir()
    with store.connect(part, store.PART_TABLES, write=True) as connection:
        sql = "INSERT INTO rows VALUES (NULL, CAST(? AS TEXT), ?, ?, ?, ?, ?, ?)"
        connection.executemany(sql, rows)
    stop = Event()
    stop.set()
    assert build_index(photos, model, stop=stop).interrupted
    with pytest.raises(DataError, match="no index"):
        open_index(photos)
    assert build_index(photos, model).entries == 7


@pytest.mark.slow
def test_kills_at_random_moments_lose_and_corrupt_nothing(
    model: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_COMMIT_ENTRIES", 4)
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    for number in range(60):
        write_picture(folder / f"{number:02}.png", number)
    start = time.monotonic()
    build_index(folder, model, tmp_path / "timed", batch_size=2)
    duration, kills = time.monotonic() - start, 0
    for _ in range(20):
        # Between the runs some images change, and some go.
        write_picture(folder / f"{rng.integers(60):02}.png", int(rng.integers(1000)))
        (folder / f"{rng.integers(60):02}.png").unlink(missing_ok=True)
        if (child := os.fork()) == 0:
            build_index(folder, model, batch_size=2)
            os._exit(0)
        time.sleep(rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if (index_folder(folder) / "index.sqlite").exists():
            # A first run may not have finished.
            with suppress(DataError):
                opened = open_index(folder)
                opened.verify()
                assert search(opened, model, "a dog", candidates=0, top=99).hits
    assert kills
    build_index(folder, model)
    names = sorted(path.name for path in folder.glob("*.png"))
    assert sorted(check_features(folder, model)) == names
    assert len([*index_folder(folder).iterdir()]) == 2


def test_readers_see_whole_commits_while_a_writer_writes(tmp_path: Path) -> None:
    """Each commit replaces all entries by those of the next generation, and some compact."""
    folder, rng = tmp_path, np.random.default_rng(0)
    features = rng.standard_normal((40, 8)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)

    def write(generation: int) -> None:
        with store.open_writer(folder, new_header()) as writer:
            for number in range(20):
                entry = Entry(f"{number}.png", generation, generation, captions=(str(generation),))
                writer.add(entry, [entry.captions], features[[(number + generation) % 40]])
            writer.commit()
            if generation % 5 == 4:
                writer.compact()

    write(0)
    reader, failures, stop = store.Store(folder), list[BaseException](), Event()

    def read() -> None:
        try:
            while not stop.is_set():
                with reader.read() as snapshot:
                    rows = dict(snapshot.entries())
                    assert len(rows) == snapshot.live.sum() == 20
                    (generation,) = {entry.size for entry in rows.values()}
                    for row, entry in rows.items():
                        expected = features[(int(entry.name[:-4]) + generation) % 40]
                        np.testing.assert_array_equal(snapshot.features[row], expected)
        except BaseException as error:
            failures.append(error)

    threads = [Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for generation in range(1, 40):
        write(generation)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    with reader.read() as snapshot:
        assert {entry.size for _, entry in snapshot.entries()} == {39}


def new_header(width: int = 8) -> store.Header:
    return store.Header(
        width=width, modality="image", path="..", images=None, column=None, model=store.Weights(),
        fingerprint="0" * 32, features=store.features_name(),
    )  # fmt: skip


def test_blocks_and_compaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums of blocks are those of their rows, whatever batches wrote them."""
    monkeypatch.setattr(store, "BLOCK_ROWS", 5)
    features = np.random.default_rng(0).standard_normal((23, 8)).astype(np.float32)

    def check(names: list[int]) -> None:
        with store.Store(tmp_path).read() as snapshot:
            store.check_blocks(snapshot.connection, snapshot.features)
            rows = dict(snapshot.entries())
            assert [*rows] == snapshot.live.nonzero()[0].tolist()
            assert [int(entry.name) for entry in rows.values()] == names
            np.testing.assert_array_equal(snapshot.features[[*rows]], features[names])

    start = 0
    for size in (1, 3, 7, 12):
        with store.open_writer(tmp_path, new_header()) as writer:
            for number in range(start, start + size):
                writer.add(Entry(str(number), 1, 1), [()], features[[number]])
            writer.commit()
            # What is not committed is overwritten by the next writer.
            writer.add(Entry("lost", 1, 1), [()], features[:6])
        start += size
        check([*range(start)])
    kept = [number for number in range(23) if number % 3 == 1]
    with store.open_writer(tmp_path, new_header()) as writer:
        writer.delete([number for number in range(23) if number not in kept])
        assert writer.count == len(kept)
        writer.commit()
        check(kept)
        writer.compact()
    check(kept)
    assert len([*tmp_path.glob("features-*")]) == 1
    with store.Store(tmp_path).read() as snapshot:
        assert len(snapshot.features) == len(kept)


def test_many_deleted_rows_are_compacted(photos: Path, model: Encoder) -> None:
    build_index(photos, model)
    for number in (0, 2, 4, 6):
        (photos / f"{number}.png").unlink()
    report = build_index(photos, model)
    assert (report.entries, report.removed) == (3, 4)
    with open_index(photos).store.read() as snapshot:
        assert len(snapshot.features) == 3
    assert check_features(photos, model) == ["trip/1.png", "trip/3.png", "trip/5.png"]


def test_a_stopped_run_resumes_and_one_runs_at_a_time(photos: Path, model: Encoder) -> None:
    stop = Event()
    stop.set()
    report, read = indexed(photos, model, stop=stop, batch_size=1)
    assert (report, read) == (IndexReport(index_folder(photos), interrupted=True), 1)

    def second(done: int, of: int) -> None:
        assert of == 6
        with pytest.raises(StorageError, match="in use"):
            build_index(photos, model)

    assert build_index(photos, model, progress=second).entries == 7


def test_another_model_or_collection_is_refused(
    photos: Path, model: Encoder, tmp_path: Path
) -> None:
    build_index(photos, model)
    second = open_encoder(write_model(tmp_path / "other", seed=1))
    for call in (lambda: build_index(photos, second), lambda: open_index(photos).check(second)):
        with pytest.raises(DataError, match="other"):
            call()
    # The dtype is not part of its identity.
    open_index(photos).check(open_encoder(replace(model.source, dtype="bf16")))
    build_index(photos, model, tmp_path / "index")
    with pytest.raises(DataError, match=r"photos.*trip"):
        build_index(photos / "trip", model, tmp_path / "index")


@pytest.fixture(scope="module")
def built(model: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an index of two images."""
    folder = tmp_path_factory.mktemp("whole")
    for seed in range(2):
        write_picture(folder / f"{seed}.png", seed)
    return build_index(folder, model).folder


def _header(**values: Any) -> Callable[[sqlite3.Connection], object]:
    def change(connection: sqlite3.Connection) -> None:
        (content,) = connection.execute("SELECT content FROM header").fetchone()
        header = json.dumps(json.loads(content) | values)
        connection.execute("UPDATE header SET content = ?", (header,))

    return change


def _sql(*statements: str) -> Callable[[sqlite3.Connection], object]:
    return lambda connection: [connection.execute(statement) for statement in statements]


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_sql("PRAGMA user_version=2"), "format"),
        (_sql("PRAGMA application_id=7"), "format"),
        (_sql("DELETE FROM header"), "finished"),
        (_sql("UPDATE header SET content = '[]'"), "damaged"),
        (_header(rows=5), "5 rows"),
        (_header(rows=1 << 50), "rows"),
        (_header(width=0), "width"),
        (_header(features="/dev/zero"), "features"),
        (_header(features="../images"), "features"),
        (_header(features="missing"), "damaged"),
        (_header(path="a\0"), "path"),
        (_sql("CREATE VIEW a AS SELECT 1"), "tables"),
        (_sql("CREATE TRIGGER a AFTER INSERT ON header BEGIN SELECT 1; END"), "tables"),
        (_sql("DROP TABLE blocks"), "tables"),
        (_sql("ALTER TABLE entries RENAME COLUMN size TO length"), "tables"),
    ],
)
def test_a_damaged_index_is_refused(built: Path, tmp_path: Path, damage: Any, word: str) -> None:
    folder = shutil.copytree(built, tmp_path / "index")
    with closing(sqlite3.connect(folder / "index.sqlite")) as connection:
        damage(connection)
        connection.commit()
    with pytest.raises(DataError, match=word):
        open_index(folder)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_sql("UPDATE entries SET name = CAST(x'61ff' AS TEXT) WHERE row = 0"), "decode"),
        (_sql("UPDATE entries SET name = 'a' || char(0) WHERE row = 0"), "NUL"),
        (_sql("UPDATE entries SET fields = '{\"a\": 5}'"), "fields"),
        (_sql("UPDATE entries SET fields = 'no JSON'"), "damaged"),
        (_sql("UPDATE entries SET size = 'large'"), "size"),
        (_sql("INSERT INTO captions VALUES (0, '[[]]')"), "captions"),
        (_sql("DELETE FROM entries WHERE row = 1"), "missing"),
    ],
)
def test_damaged_entries_are_refused(
    built: Path, model: Encoder, tmp_path: Path, damage: Any, word: str
) -> None:
    folder = shutil.copytree(built, tmp_path / "index")
    with closing(sqlite3.connect(folder / "index.sqlite")) as connection:
        damage(connection)
        connection.commit()
    opened = open_index(folder)
    for call in (lambda: search(opened, model, "a dog", candidates=0), opened.verify):
        with pytest.raises(DataError, match=f"damaged.*({word}|are not)"):
            call()


def test_damaged_features_are_refused(built: Path, model: Encoder, tmp_path: Path) -> None:
    folder = shutil.copytree(built, tmp_path / "index")
    path = next(folder.glob("features-*"))
    content = path.read_bytes()
    for damaged in (content[:-4] + b"\0\0\xc8\x42", content[:-4] + b"\0\0\xc0\x7f"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="checksum"):
            open_index(folder).verify()
        with pytest.raises(DataError, match="not normalised"):
            search(open_index(folder), model, "a dog", candidates=0)
    path.write_bytes(content[:-4])
    with pytest.raises(DataError, match="shorter"):
        open_index(folder)
    (folder / "index.sqlite").write_bytes(b"SQLite format 3\0" + bytes(100))
    with pytest.raises(DataError, match="damaged"):
        open_index(folder)


def test_a_folder_of_a_stranger_is_not_written_through_links(
    photos: Path, model: Encoder, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = build_index(photos, model).folder
    (photos / "0.png").unlink()
    write_picture(photos / "8.png", 8)
    features = next(folder.glob("features-*"))
    for name in ("index.sqlite-wal", "index.sqlite-shm", "index.sqlite-journal", features.name):
        link = folder / name
        backup = link.rename(tmp_path / "backup") if link.exists() else None
        link.symlink_to(victim)
        with pytest.raises(DataError, match=r"link|shorter"):
            build_index(photos, model)
        link.unlink()
        if backup is not None:
            backup.rename(link)
    assert victim.read_text() == "precious"
    # A journal is not played: it may name files to delete.
    (folder / "index.sqlite-journal").write_bytes(b"\xd9\xd5\x05\xf9 \xa1c\xd7" + bytes(600))
    assert build_index(photos, model).entries == 7
    assert not (folder / "index.sqlite-journal").exists()


def test_a_forged_tree_of_pages_ends(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(built, tmp_path / "index")
    monkeypatch.setattr(store, "_STEPS", 0)
    monkeypatch.setattr(store, "_STEPS_PER_BYTE", 0)
    monkeypatch.setattr(store, "_STEP", 1)
    with pytest.raises(DataError, match="interrupted"):
        open_index(folder)


def test_an_index_moves_with_its_folder(photos: Path, model: Encoder, tmp_path: Path) -> None:
    build_index(photos, model)
    moved = Path(shutil.move(photos, tmp_path / "moved"))
    opened = open_index(moved)
    assert opened.load(opened.entries()[0]).size == (80, 60)
    assert indexed(moved, model)[1] == 0


def test_rows_of_a_file(tmp_path: Path, model: Encoder) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", [*pairs(3), {"binary": "!", "desc": "broken"}])
    report = build_index(path, model)
    assert (report.entries, [*report.faults]) == (3, ["pairs.jsonl#4"])
    opened = open_index(path)
    assert opened.entries()[1].caption == "picture number 1 of a cat"
    assert opened.folder == tmp_path / "pairs.jsonl.xfm-index"


def test_what_cannot_be_indexed(photos: Path, model: Encoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/index"):
        build_index(photos, model, tmp_path / "file" / "index")
    for path in (photos, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=path.name):
            open_index(path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"none")
    with pytest.raises(DataError, match=r"a\.png"):
        build_index(tmp_path / "broken", model)


def _build(
    rank: int,
    world_size: int,
    photos: Path,
    weights: Path,
    folder: Path,
    shard_images: int,
    last: int,
) -> None:
    """Build an index as one of several processes, which is stopped after `last` images."""
    join_group(rank, world_size, folder.with_name(f"meet-{folder.name}-{world_size}-{last}"))
    index._COMMIT_ENTRIES = shard_images
    stop = Event()

    def count(done: int, of: int) -> None:
        if done >= last:
            stop.set()

    with join_processes("cpu") as processes:
        report = build_index(
            photos,
            open_encoder(weights),
            folder,
            batch_size=2,
            processes=processes,
            progress=count,
            stop=stop,
        )
    assert report.interrupted == (last < 7)
    assert report.interrupted or (report.entries, [*report.faults]) == (7, ["broken.png"])


def test_processes_share_the_work_bit_by_bit(photos: Path, weights: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"none")
    runs = {"alone": [(1, 99)], "two": [(2, 99)], "three": [(3, 99)], "stopped": [(2, 2), (3, 99)]}
    for name, steps in runs.items():
        for processes, last in steps:
            assert not any(
                in_processes(_build, processes, photos, weights, tmp_path / name, 1, last)
            ), name
    alone = features_of(tmp_path / "alone")
    assert len(alone) == 7
    for name in runs:
        assert features_of(tmp_path / name) == alone
        left = {path.name.split("-")[0] for path in (tmp_path / name).iterdir()}
        assert left == {"features", "index.sqlite"}


def test_a_pipe_in_an_index_is_refused_at_once(built: Path, tmp_path: Path) -> None:
    for pattern in ("index.sqlite", "features-*"):
        folder = shutil.copytree(built, tmp_path / pattern.strip("-*"))
        path = next(folder.glob(pattern))
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DataError, match=r"damaged|no index"):
            open_index(folder)


def test_an_index_is_read_from_a_read_only_folder(
    built: Path, model: Encoder, tmp_path: Path
) -> None:
    folder = shutil.copytree(built, tmp_path / "a ?#% \udcff folder")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.chmod(0o555)
    assert len(search(open_index(folder), model, "a dog", candidates=0).hits) == 2
    folder.chmod(0o755)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
