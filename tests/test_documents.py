"""Whatever is written in JSON or YAML is read or refused by `ValueError`, in bounded time and memory."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from xfm_fast import documents
from xfm_fast.benchmarks import files
from xfm_fast.checkpoint import read_state_dict
from xfm_fast.config import XFMConfig
from xfm_fast.data.files import find_files
from xfm_fast.data.files import read_json as read_annotations
from xfm_fast.data.records import LineFile
from xfm_fast.documents import is_plain_name, parse_json, parse_yaml, read_bytes
from xfm_fast.errors import CheckpointError, ConfigError, DataError, ExportError, StorageError, XFMError
from xfm_fast.export.manifest import Manifest
from xfm_fast.export.model_repository import Receipt
from xfm_fast.tasks.heatmap import read_detections
from xfm_fast.tokenizer import CaptionTokenizer
from xfm_fast.training.metrics import read_log
from xfm_fast.training.recipe import override, read_recipe

DEEP = "[" * 100_000
HOSTILE = {
    "deep": (DEEP, "nested"),
    "deep but parsed": ("[" * 100 + "]" * 100, "nested more than 64 deep"),
    "half a pair": (r'{"a": "\ud800"}', r"half of a surrogate pair, \\ud800"),
    "half a pair as a key": (r'{"\udfff": 1}', r"half of a surrogate pair, \\udfff"),
    "long number": ("1" + "0" * 4000, "more than 64 bits"),
    "longer number": ("1" * 10_000, "Exceeds the limit"),
}
LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))])


@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_hostile_texts(parse: Callable[[str], Any], text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}|more than"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("&a [*a]", "nested more than 64 deep"),
        ("a: &a {b: *a}", "nested more than 64 deep"),
        (LAUGHS, "aliases"),
        ("2026-13-45", "month must be"),
        ("!!timestamp x", "a tag does not fit"),
        ("a: 0x" + "f" * 20, "more than 64 bits"),
        (b"\xff\xfe", "not UTF-8"),
        (" " * (1 << 21), "more than 1,048,576 bytes"),
    ],
)
def test_hostile_yaml(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(st.sampled_from("{}[]&*!:-?|>'\"\\,#% \nab01.e\x00\ud800"), max_size=60))
def test_nothing_else_is_raised(text: str | bytes) -> None:
    for parse, errors in ((parse_json, (ValueError,)), (parse_yaml, (ValueError, yaml.YAMLError))):
        with suppress(*errors):
            json.dumps(parse(text), default=str, ensure_ascii=False, skipkeys=True).encode()


def test_only_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a file"):
            read_bytes(path, 10)
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match="not a file"):
            find_files(str(path))
        with pytest.raises(DataError, match="not a file"):
            read_annotations(path, "a list")
        with pytest.raises(CheckpointError, match="not a file"):
            read_state_dict(path)
    (tmp_path / "long").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_bytes(tmp_path / "long", 10)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("a.onnx", True), ("ä", True), *((n, False) for n in ("", ".", "..", "a/b", "/a", "a\\b", "a\0", "x" * 256))],
)
def test_plain_names(name: str, plain: bool) -> None:
    assert is_plain_name(name) == plain


def _override(path: Path) -> None:
    override({}, [f"steps={path.read_text()}"])


READERS: dict[str, tuple[str, Callable[[Path], Any], type[XFMError]]] = {
    "config": ("c.json", XFMConfig.load, ConfigError),
    "official config": ("c.yaml", XFMConfig.from_official, ConfigError),
    "recipe": ("r.yaml", lambda path: read_recipe(path, "xfm_fast.training"), ConfigError),
    "override": ("o", _override, ConfigError),
    "results": ("r.json", files.load, DataError),
    "annotations": ("a.json", lambda path: read_annotations(path, "a list"), DataError),
    "detections": ("p.json", read_detections, DataError),
    "manifest": ("manifest.json", lambda path: Manifest.load(path.parent), ExportError),
    "receipt": ("repository.json", lambda path: Receipt.load(path.parent), StorageError),
    "tokenizer": ("tokenizer.json", CaptionTokenizer.from_files, DataError),
    "record": ("r.jsonl", lambda path: LineFile(path).read(0), DataError),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", [DEEP, r'{"a": "\ud800"}', '{"a": ' + "9" * 5000 + "}"], ids=["deep", "pair", "long"])
def test_every_reader_refuses_by_its_own_error(tmp_path: Path, reader: str, text: str) -> None:
    name, read, error = READERS[reader]
    (tmp_path / name).write_text(text)
    with pytest.raises(error) as caught:
        read(tmp_path / name)
    str(caught.value).encode()


def test_a_damaged_log_is_read_where_it_is_whole(tmp_path: Path) -> None:
    lines = [
        b'{"step": 1}',
        b'{"step": 2, "\xff": 3}',
        b"\0\0\0",
        b"[1]",
        b'{"a": 1}',
        DEEP.encode(),
        b'{"step": 3}',
        b'{"st',
    ]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 3]


def test_bounds_leave_room_for_what_is_written() -> None:
    inner: Any = {}
    for _ in range(documents.MOST_DEPTH - 2):
        inner = {"a": inner}
    assert parse_json(json.dumps(inner)) == inner
    assert parse_json('["\\ud83d\\ude00", 18446744073709551615]') == ["😀", 2**64 - 1]
