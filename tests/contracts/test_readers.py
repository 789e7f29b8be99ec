"""A file format added from outside the package is read by training, fine-tuning, checks, conversion and search."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.record_files import (
    base64_picture,
    picture,
    tiny_config,
    tiny_tokenizer,
    write_lines,
    write_tar,
)
from xfm_fast.data import records
from xfm_fast.data.collection import open_collection, retrieval_rows
from xfm_fast.data.converting import to_lines
from xfm_fast.data.files import open_file
from xfm_fast.data.options import PairStreamOptions
from xfm_fast.data.records import READERS, Reader, Schema, image_at, open_records
from xfm_fast.data.streams import Stream
from xfm_fast.errors import DataError
from xfm_fast.tasks.checking import Options, check

DATA = Path(records.__file__).parent


class Blocks:
    """The toy format: images and captions in turn, separated by a rare word."""

    def __init__(self, path: Path, schema: Schema) -> None:
        with open_file(path) as file:
            self.blocks = file.read().split(b"--next--")
        self.name, self.modified, self.schema = str(path), path.stat().st_mtime_ns, schema

    def __len__(self) -> int:
        return len(self.blocks) // 2

    def label(self, row: int) -> str:
        return f"block {row}"

    def raw(self, row: int) -> bytes:
        return self.blocks[2 * row + 1]

    def read(self, row: int) -> dict[str, Any]:
        image, caption = self.blocks[2 * row : 2 * row + 2]
        if not caption:
            raise DataError("the block has no caption; write one")
        return {self.schema.image_key: image, self.schema.caption_key: caption.decode()}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(READERS, "blocks", Reader(lambda path, _: path.suffix == ".blocks", Blocks))
    path = tmp_path / "a.blocks"
    path.write_bytes(
        b"--next--".join([picture(0), b"a cat", picture(1), b"the dog", picture(2), b""])
    )
    return path


def test_a_format_from_outside_is_read_everywhere(toy: Path, tmp_path: Path) -> None:
    report = check(toy, "pairs", Options(tiny_config(), tolerate_bad=0.5))
    assert (report.rows, report.broken, report.ok, report.problems[0].row) == (
        3,
        1,
        True,
        "block 2",
    )
    collection = open_collection(toy)
    entries = collection.listing().entries
    assert [entry.name for entry in entries] == [
        "a.blocks#block 0",
        "a.blocks#block 1",
        "a.blocks#block 2",
    ]
    assert collection.load(entries[1])[1] == ("the dog",)
    assert to_lines(toy, tmp_path / "a.jsonl").rows == 2
    (rows,) = retrieval_rows([toy])
    pair = rows.read(1)
    assert (pair.caption, image_at(Path(pair.image))) == ("the dog", picture(1))
    batches = []
    for data in (toy, tmp_path / "a.jsonl"):
        options: Any = PairStreamOptions(shuffle=False, augment=False, bad_share=0.5)
        stream = Stream(
            data, options, config=tiny_config(), tokenizer=tiny_tokenizer(), batch_size=2, seed=0
        )
        batches.append(stream.batch(0))
    assert np.array_equal(batches[0].image, batches[1].image)
    assert np.array_equal(batches[0].input_ids, batches[1].input_ids)


@pytest.mark.parametrize("form", ["lines", "pairs", "shards"])
def test_a_reader_names_its_broken_rows(form: str, tmp_path: Path) -> None:
    good = {"binary": base64_picture(0), "desc": "a cat"}
    path = {
        "lines": lambda: write_lines(tmp_path / "a.jsonl", [good, "{cut"]),
        "pairs": lambda: write_lines(tmp_path / "a.csv", ["image,caption", "a.jpg,a cat", "b.jpg"]),
        "shards": lambda: write_tar(
            tmp_path / "a.tar", {"0.jpg": picture(0), "0.txt": b"a cat", "1.json": b"{"}
        ),
    }[form]()
    assert records.find_reader(path) == form
    (rows,) = open_records(path).files
    assert (rows.name, rows.modified, len(rows)) == (str(path), path.stat().st_mtime_ns, 2)
    assert rows.read(0)["desc"] == "a cat"
    assert rows.raw(1)
    with pytest.raises(DataError):
        rows.read(1)
