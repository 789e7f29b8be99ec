"""Tables and folders of texts and images: columns, the sets of GLUE, class folders."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.data.record_files import picture, write_lines
from xfm_fast.data.annotations import TextScoreRecord, label_names
from xfm_fast.data.tables import GLUE, image_rows, text_rows
from xfm_fast.errors import DataError

# A line of training and one of the test file of each set, with their headers, as the official zips hold them.
SETS = {
    "cola": (
        ['gj04\t0\t*\tThey said "so.', "gj04\t1\t\tHi."],
        ["index\tsentence", "0\tBill left."],
    ),
    "mnli": (
        [
            "index\tpromptID\tpairID\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
            '4\t1\t1n\t(A)\t(B)\tHe "ran.\tHe moved.\tneutral\tentailment',
            "5\t1\t1n\t(A)\t(B)\tHe ran.\tHe flew.\tneutral\t-",
        ],
        ["index\tpromptID\tpairID\tsentence1\tsentence2", "7\t1\t1n\tA.\tB."],
    ),
    "mrpc": (
        ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t70\t71\tA "b.\tA b.'],
        ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t10\t11\tA.\tB."],
    ),
    "qnli": (
        ["index\tquestion\tsentence\tlabel", "0\tWhen?\tIn 1990.\tnot_entailment"],
        ["index\tquestion\tsentence", "0\tWho?\tHe."],
    ),
    "qqp": (
        [
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            "133273\t213221\t213222\tHow?\tWhy?\t0",
        ],
        ["id\tquestion1\tquestion2", "0\tHow?\tWhy?"],
    ),
    "rte": (
        ["index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tentailment"],
        ["index\tsentence1\tsentence2", "0\tA.\tB."],
    ),
    "sst2": (
        ["sentence\tlabel", "hide new secretions \t0"],
        ["index\tsentence", "0\tuneasy mishmash"],
    ),
    "stsb": (
        [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tmain\tMSR\t2012\t0001\tnone\tnone\tA.\tB.\t3.800",
        ],
        [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
            "0\tm\tM\t2\t1\tn\tn\tA.\tB.",
        ],
    ),
}


def _text(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", GLUE)
def test_sets_of_glue(tmp_path: Path, name: str) -> None:
    train, test = ("\n".join(lines) + "\n" for lines in SETS[name])
    (rows,) = text_rows(_text(tmp_path / "train.tsv", train), glue=name)
    record = rows.read(0)
    assert record.text
    assert (record.text2 is None) == (name in ("cola", "sst2"))
    assert record.label in (GLUE[name].classes or (3.8,))
    assert isinstance(record, TextScoreRecord) == (name == "stsb")
    _text(tmp_path / ("test_matched.tsv" if name == "mnli" else "test.tsv"), test)
    (tested,) = text_rows(tmp_path, glue=name, split="test")
    assert (tested.read(0).label, tested.read(0).index) == (None, 7 if name == "mnli" else 0)


def test_broken_lines_of_glue(tmp_path: Path) -> None:
    (rows,) = text_rows(
        _text(tmp_path / "dev.tsv", "sentence\tlabel\nfine\t2\nfine\n \t1\n"), glue="sst2"
    )
    for row in range(3):
        with pytest.raises(DataError):
            rows.read(row)


def test_tables_of_texts(tmp_path: Path) -> None:
    (rows,) = text_rows(
        _text(tmp_path / "a.csv", 'text,label\n"a ""b"",\nc",good\n\nd,bad\ne\nf,\n')
    )
    assert [(rows.read(row).text, rows.read(row).label, rows.label(row)) for row in (0, 1)] == [
        ('a "b",\nc', "good", 2),
        ("d", "bad", 5),
    ]
    for row, message in [(2, "1 columns"), (3, "'label' is ''")]:
        with pytest.raises(DataError, match=message):
            rows.read(row)
    assert label_names([rows]) == ["bad", "good"]
    with pytest.raises(DataError, match="quotation mark"):
        text_rows(_text(tmp_path / "b.csv", 'text\n"' + "a" * 5_000_000))


def test_lines_of_texts(tmp_path: Path) -> None:
    lines = [
        {"premise": "a", "hypothesis": "b", "label": 1},
        {"premise": "c", "label": 0.5},
        "{",
        {"hypothesis": "d"},
    ]
    path = write_lines(tmp_path / "a.jsonl", lines)
    columns = {"text": "premise", "text2": "hypothesis"}
    (rows,) = text_rows(path, columns=columns)
    assert (rows.read(0).text2, rows.read(0).label) == ("b", "1")
    for row, message in [(2, "JSON"), (3, "'text'")]:
        with pytest.raises(DataError, match=message):
            rows.read(row)
    (scored,) = text_rows(path, columns=columns, scores=True)
    assert [scored.read(row).label for row in (0, 1)] == [1.0, 0.5]


class Dataset(dict[str, list[Any]]):
    """As much of `datasets.Dataset` as the reader uses."""

    column_names = property(list)
    names = ["entailment", "neutral", "contradiction"]  # noqa: RUF012

    @property
    def features(self) -> dict[str, Any]:
        return {
            name: SimpleNamespace(names=self.names if name == "label" else None) for name in self
        }


def test_sets_that_datasets_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [2, -1], "idx": [0, 1]}
    library = SimpleNamespace(load_from_disk=lambda path: {"validation_matched": Dataset(columns)})
    monkeypatch.setitem(sys.modules, "datasets", library)
    _text(tmp_path / "dataset_dict.json", json.dumps({"splits": ["train"]}))
    (rows,) = text_rows(tmp_path, glue="mnli", split="val")
    assert [
        (record.text, record.text2, record.label, record.index) for record in rows.records()
    ] == [
        ("a", "c", "contradiction", 0),
        ("b", "d", None, 1),
    ]
    (renamed,) = text_rows(tmp_path, split="validation_matched", columns={"text": "hypothesis"})
    assert renamed.read(0).text == "c"
    with pytest.raises(DataError, match=r"'train'.*validation_matched"):
        text_rows(tmp_path, split="train")


def test_class_folders(tmp_path: Path) -> None:
    for name in (
        "10/b.jpg",
        "10/deep/a.png",
        "9/A.JPEG",
        "9/.hidden.jpg",
        "9/notes.txt",
        ".git/a.jpg",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(0))
    (rows,) = image_rows(tmp_path)
    assert [(Path(record.image).name, record.label) for record in rows.records()] == [
        ("b.jpg", "10"),
        ("a.png", "10"),
        ("A.JPEG", "9"),
    ]
    assert label_names([rows]) == ["10", "9"]
    assert Path(rows.read(0).image).is_absolute()
