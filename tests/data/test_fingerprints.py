"""Which images are held out, and the record of those that loaders have read."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.record_files import picture, write_lines, write_tar
from xfm_fast.batches import PairBatch
from xfm_fast.config import XFMConfig
from xfm_fast.data.fingerprints import FINGERPRINT_FILE, fingerprint_of, held_out, trained_on
from xfm_fast.data.options import PairStreamOptions, TextStreamOptions
from xfm_fast.data.streams import Stream, load_batches
from xfm_fast.errors import CheckpointError, DataError
from xfm_fast.tokenizer import CaptionTokenizer
from xfm_fast.training.distributed import Processes
from xfm_fast.training.loop import seen_images

COUNT, SHARE = 120, 0.2
CONTENTS = [picture(number, size=(12, 8)) for number in range(COUNT)]


def table(folder: Path, names: Callable[[int], str]) -> Path:
    """Write a table of all images, and of the first once more under another name."""
    rows = []
    for index, content in enumerate([*CONTENTS, CONTENTS[0]]):
        (folder / names(index)).parent.mkdir(parents=True, exist_ok=True)
        (folder / names(index)).write_bytes(content)
        rows.append(f"{names(index)},a cat number {index}\n")
    (folder / "pairs.csv").write_text("image,caption\n" + "".join(rows))
    return folder / "pairs.csv"


def lines(folder: Path) -> Path:
    folder.mkdir()
    rows = (
        {"binary": base64.b64encode(content).decode(), "desc": "a cat"}
        for content in reversed(CONTENTS)
    )
    return write_lines(folder / "pairs.jsonl", rows)


def shard(folder: Path) -> Path:
    folder.mkdir()
    members = {
        f"{n:03}.{end}": [content, b"a cat"][end == "txt"]
        for n, content in enumerate(CONTENTS)
        for end in ("jpg", "txt")
    }
    return write_tar(folder / "0.tar", members)


def opened(
    path: Path,
    share: float = SHARE,
    observer: Callable[[bytes], None] | None = None,
    batch_size: int = 8,
) -> Stream[PairBatch]:
    vocabulary = CaptionTokenizer.train_on_texts(["a cat number"], 300)
    config = XFMConfig.preset("tiny", vocab_size=vocabulary.vocab_size)
    options = PairStreamOptions(hold_out=share, augment=False)
    return Stream(
        path,
        options,
        config=config,
        tokenizer=vocabulary,
        batch_size=batch_size,
        seed=0,
        observer=observer,
    )


def test_the_bytes_decide_in_every_form_of_data(tmp_path: Path) -> None:
    """Renamed, copied, reordered, in lines and in shards: the same images are left out, and all others are read."""
    mask = held_out(COUNT, lambda index: [CONTENTS[index]], SHARE)
    assert 0.1 * COUNT < mask.sum() < 0.3 * COUNT
    expected = {content for content, held in zip(CONTENTS, mask, strict=True) if not held}
    tables = [
        table(tmp_path / "a", lambda index: f"{index}.jpg"),
        table(tmp_path / "b", lambda index: f"deep/other-{index * 7}.jpeg"),
        lines(tmp_path / "c"),
        shard(tmp_path / "d"),
    ]
    for path in tables:
        read: list[bytes] = []
        stream = opened(path, observer=read.append, batch_size=1)
        for index in range(len(stream)):
            stream.batch(index)
        assert {*read} == expected, path
    assert len(opened(tables[0], share=0).records) == COUNT + 1


def test_other_images_change_nothing_between_the_limits() -> None:
    """Hold out the same images of a table, of a part of it and of a larger one."""

    def left_out(images: range, share: float = SHARE) -> set[int]:
        mask = held_out(len(images), lambda row: [CONTENTS[images[row]]], share)
        return {image for image, held in zip(images, mask, strict=True) if held}

    all_left_out = left_out(range(COUNT))
    assert left_out(range(COUNT // 2)) == all_left_out & {*range(COUNT // 2)}
    assert len(left_out(range(12), 0.01)) == 3
    assert len(left_out(range(COUNT), 0.001)) == 10

    # A row that cannot be read has no say.
    def broken(row: int) -> list[bytes]:
        if row == COUNT:
            raise DataError("broken")
        return [CONTENTS[row]]

    assert {*np.flatnonzero(held_out(COUNT + 1, broken, SHARE)).tolist()} == all_left_out
    with pytest.raises(DataError, match="hold_out=0"):
        held_out(3, lambda row: [CONTENTS[0]], SHARE)


def test_texts_have_nothing_to_hold_out(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "texts.jsonl", [{"desc": "a cat"}] * 4)
    vocabulary = CaptionTokenizer.train_on_texts(["a cat"], 300)
    config = XFMConfig.preset("tiny", vocab_size=vocabulary.vocab_size)
    with pytest.raises(DataError, match="0 of 4 images"):
        Stream(
            path,
            TextStreamOptions(hold_out=0.1, max_tokens=9),
            config=config,
            tokenizer=vocabulary,
            batch_size=2,
            seed=0,
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_what_loaders_read_is_known_afterwards(workers: int, tmp_path: Path) -> None:
    """Also after a restart, which reads other images, and on top of what initial weights were trained on."""
    path, run, later = (
        table(tmp_path / "a", lambda index: f"{index}.jpg"),
        tmp_path / "run",
        tmp_path / "later",
    )
    names = [f"{index}.jpg" for index in range(COUNT)]
    run.mkdir()
    later.mkdir()

    def read_two_batches(start: int) -> set[str]:
        stream = opened(path, share=0, observer=seen_images(run, "pairs", Processes()))
        batches = load_batches(stream, start=start, workers=workers)
        drawn = {next(batches).image.sum().item() for _ in range(2)}
        assert len(drawn) == 2
        batches.close()  # type: ignore[attr-defined]
        (run / FINGERPRINT_FILE).write_bytes(fingerprint_of(run, None)[FINGERPRINT_FILE])
        return {*trained_on(run, names, path.parent)}

    first, second = read_two_batches(0), read_two_batches(8)
    assert len(first) >= 15
    assert first < second
    if not workers:
        assert 30 <= len(second) <= 32
    assert fingerprint_of(later, run) == fingerprint_of(run, None)
    seen_images(later, "pairs", Processes(rank=1))(b"another image")
    assert len(fingerprint_of(later, run)[FINGERPRINT_FILE]) == 8 * (len(second) + 1)
    assert fingerprint_of(tmp_path / "nowhere", None) == {}
    (later / FINGERPRINT_FILE).mkdir()
    with pytest.raises(CheckpointError, match=FINGERPRINT_FILE):
        trained_on(later, names, path.parent)
