"""Every format that a stranger may have written, damaged at random: read, or refused by an error of ours, in bounds.

`make fuzz` gives each format 100,000 inputs; `test_fuzz.py` a few. An input is a whole file of the format after some
edits: bytes flipped, cut, repeated, moved, or replaced by numbers and words that readers trip over. In JSON also the
values: replaced by values of another type, infinite, huge or nested ones and names outside the folder, dropped, or
repeated. Where a checksum would refuse nearly all of them, the edits are done to what it covers and the sum is
computed again: the pickle in a checkpoint, the header of a safetensors file, the chunks of a PNG, the files of a
manifest.

Two bounds hold for every input: resident memory rises by at most 256 MiB at any moment of the read, or by 1 GiB for
images, whose pixels Pillow's limit bounds; and the read takes at most 10 seconds of the processor's time (asked of
`make fuzz` alone; the files are of a few kilobytes).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import sqlite3
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import chdir, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save

from tests.data.record_files import pair, picture, tiny_tokenizer, write_tar
from xfm_fast.checkpoint import read_state_dict
from xfm_fast.config import XFMConfig
from xfm_fast.data.collection import retrieval_rows
from xfm_fast.data.files import read_plain_pickle
from xfm_fast.data.images import decode_image, decode_pixels
from xfm_fast.data.records import LineFile, ShardFile
from xfm_fast.data.tables import read_table
from xfm_fast.errors import DataError, InputError, XFMError
from xfm_fast.export.manifest import Manifest, new_manifest
from xfm_fast.finetuning.prediction import requests_in
from xfm_fast.finetuning.recipe import load_finetune_recipe
from xfm_fast.finetuning.run import recipe_of
from xfm_fast.io import parse_json, parse_yaml
from xfm_fast.memory import PeakMemory
from xfm_fast.search import nearest, open_index
from xfm_fast.search.store import INDEX_FILE, INDEX_TABLES, connect
from xfm_fast.tasks.evaluation import Journal, read_journal
from xfm_fast.tasks.retrieval import RetrievalOptions
from xfm_fast.tasks.task import explanation, make_task, task_of
from xfm_fast.tasks.vqa import vqa_rows
from xfm_fast.tasks.weak_grounding import read_detections
from xfm_fast.tokenizer import CaptionTokenizer
from xfm_fast.training import checkpoints
from xfm_fast.training.metrics import read_log
from xfm_fast.training.recipe import read_recipe

MOST_BYTES = 256 << 20
# An image may say that it has 89 million pixels, and decoding takes up to 11 bytes of each: twice 4 and the 3 of RGB.
MOST_BYTES_OF_IMAGES = 1 << 30
MOST_SECONDS = 10.0
Edit = tuple[str, float, float, bytes]
_NUMBERS = [
    struct.pack(form, value)
    for form in ("<I", ">I", "<Q", ">Q")
    for value in (0, 1, 1 << 31, (1 << 32) - 1)
]
_WORDS = [
    *(
        b"\0" * 16,
        b"\xff" * 8,
        b"\n",
        b"\r\n",
        b'"',
        b"null",
        b"true",
        b"-1",
        b"1e999",
        b"NaN",
        b"9" * 30,
    ),
    *(
        b"[" * 200,
        b"{" * 200,
        b"&a [*a]",
        b"!!python/object/apply:os.system [x]",
        b"\\ud800",
        b"\xc3\x28",
        b"\xef\xbb\xbf",
    ),
    *(
        b"../../x",
        b"/etc/passwd",
        b"PK\x03\x04",
        b"cos\nsystem\n",
        b"\x8c\x02os\x8c\x06system\x93",
        b"\x80\x04",
    ),
    *(b"\xef\xbb\xbf", b"R", b"\x85", b".", b"q\xff", b"j\xff\xff\xff\x7f"),
]
_CONTENTS = _NUMBERS + _WORDS
_KINDS = ("turn", "cut", "end", "repeat", "move", "insert", "replace", "fill")


def edits(draw: random.Random) -> list[Edit]:
    """One to five edits."""
    return [
        (
            draw.choice(_KINDS),
            draw.random(),
            draw.random(),
            draw.choice([draw.choice(_CONTENTS), draw.randbytes(3)]),
        )
        for _ in range(draw.randint(1, 5))
    ]


def edited(data: bytes, changes: list[Edit]) -> bytes:
    """The data with all edits done, one after the other."""
    for kind, first, second, content in changes:
        at, length = int(first * len(data)), 1 + int(second * second * len(data) / 4)
        if kind == "turn":
            data = (
                data[:at] + bytes(byte ^ content[0] for byte in data[at : at + 1]) + data[at + 1 :]
            )
        elif kind == "cut":
            data = data[:at] + data[at + length :]
        elif kind == "end":
            data = data[:at]
        elif kind == "repeat":
            data = data[:at] + data[at : at + length] * 3 + data[at + length :]
        elif kind == "move":
            part, rest = data[at : at + length], data[:at] + data[at + length :]
            to = int(second * len(rest))
            data = rest[:to] + part + rest[to:]
        elif kind == "insert":
            data = data[:at] + content + data[at:]
        elif kind == "replace":
            data = data[:at] + content + data[at + len(content) :]
        else:
            data = data[:at] + content[:1] * length + data[at + length :]
    return data


_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2.5, 1 << 31, 1 << 63, -(1 << 63) - 1, 10**30, 1e308, float("inf"), float("-inf"),
    float("nan"), "", "x", "a\0b", "../x", "/dev/zero", "/etc/passwd", "a\udcff", "x" * 5000, "²", [], {}, [None],
    [[1, 2]], {"a": {"b": None}}, {"": 0},
)  # fmt: skip


def changed(data: bytes, choose: random.Random) -> bytes:
    """The JSON document (or its lines) with one to three values replaced, dropped, repeated or renamed."""
    lines = len(data.splitlines()) > 1 and not data.lstrip().startswith((b"[", b"{\n"))
    document: Any = [json.loads(line) for line in data.splitlines()] if lines else json.loads(data)
    for _ in range(choose.randint(1, 3)):
        document = _change(document, choose)
    if lines and isinstance(document, list):
        return b"".join(json.dumps(line).encode() + b"\n" for line in document)
    return json.dumps(document).encode()


def _change(value: Any, choose: random.Random) -> Any:
    if not isinstance(value, dict | list) or not value or choose.random() < 0.15:
        return choose.choice(_VALUES)
    inside = dict(value) if isinstance(value, dict) else list(value)
    key: Any = (
        choose.choice([*inside]) if isinstance(inside, dict) else choose.randrange(len(inside))
    )
    kind = choose.randrange(8)
    if kind == 0:
        inside.pop(key)
    elif kind == 1 and isinstance(inside, dict):
        inside[choose.choice(["x", "a\0b", "", key + "_"])] = inside.pop(key)
    elif kind == 1:
        inside += [inside[key]] * choose.choice([1, 50])  # type: ignore[operator]
    elif kind == 2:
        inside[key] = [inside[key]]
    else:
        inside[key] = _change(inside[key], choose)
    return inside


@dataclass(frozen=True)
class Format:
    """A format: whole files of it, how one becomes a file again after edits, and what reads it.

    Attributes:
        whole: contents that are read without an error before any edit.
        read: of a folder that holds the file `name`; raises `refuses` or returns.
        packed: puts an edited part into a file whose checksums are right.
        refuses: the errors that it may raise.
        others: files that lie beside it.
        most_bytes: by which memory may rise.
        values: it is JSON, and its values are changed too.
    """

    name: str
    whole: tuple[bytes, ...]
    read: Callable[[Path], Any]
    packed: Callable[[bytes], bytes] = lambda data: data
    refuses: tuple[type[Exception], ...] = (XFMError,)
    others: dict[str, bytes] = field(default_factory=dict)
    most_bytes: int = MOST_BYTES
    values: bool = False


_STATE = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b.bias": torch.ones(5, dtype=torch.bfloat16),
}


def _saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _entries(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {entry.filename: opened.read(entry) for entry in opened.infolist()}


def _repacked(inner: bytes) -> bytes:
    """A checkpoint with another pickle in it and sums that are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in _entries(_saved(_STATE)).items():
            archive.writestr(name, inner if name.endswith("data.pkl") else data)
    return buffer.getvalue()


_PICKLES = tuple(
    next(data for name, data in _entries(_saved(content)).items() if name.endswith("data.pkl"))
    for content in (_STATE, {"model": _STATE, "epoch": 3, "args": argparse.Namespace(lr=0.1)})
)


def _safetensors(header: bytes) -> bytes:
    whole = save(_STATE)
    return (
        len(header).to_bytes(8, "little")
        + header
        + whole[8 + int.from_bytes(whole[:8], "little") :]
    )


def _chunks(png: bytes) -> bytes:
    """A PNG without its signature, as chunks without their sums: `kind`, length, content."""
    out, at = b"", 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        out += png[at + 4 : at + 8] + png[at : at + 4] + png[at + 8 : at + 8 + length]
        at += 12 + length
    return out


def _png(chunks: bytes) -> bytes:
    out, at = b"\x89PNG\r\n\x1a\n", 0
    while at + 8 <= len(chunks):
        kind, length = chunks[at : at + 4], int.from_bytes(chunks[at + 4 : at + 8], "big")
        body = chunks[at + 8 : at + 8 + length]
        out += (
            len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        )
        at += 8 + len(body)
    return out


_TRAINING_STATE = json.dumps(
    {
        "format": 1, "step": 8, "batches": {"text": 8}, "world_size": 1, "scaler": {},
        "optimizer": {"groups": [["a"]], "numbers": {}}, "cpu_kernels": [[["linear", "float32", "aten"]]], "recipe": {},
    }
).encode()  # fmt: skip


def _read_training(folder: Path) -> Any:
    checkpoint = folder / "checkpoints" / "step-00000008"
    files = {
        "state.json": (folder / "state.json").read_bytes(), "training.safetensors": save(_STATE),
        "model/config.json": b"{}", "model/model.safetensors": save(_STATE),
    }  # fmt: skip
    for name, data in files.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(data)
    sums = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": sums}))
    return checkpoints.newest(folder / "checkpoints")


def _tar() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        members = {}
        for number in range(3):
            members |= {
                f"{number}.jpg": picture(number),
                f"{number}.txt": b"a cat",
                f"{number}.json": b'{"a": [1]}',
            }
        return write_tar(Path(folder) / "a.tar", members).read_bytes()


def _read_shard(folder: Path) -> None:
    rows = ShardFile(folder / "a.tar")
    for row in range(len(rows)):
        with suppress(DataError):
            rows.read(row)


def _read_lines(folder: Path) -> None:
    rows = LineFile(folder / "a.jsonl")
    for row in range(len(rows)):
        with suppress(DataError):
            decode_pixels(str(rows.read(row).get("binary")).encode())


def _journal() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        with Journal(Path(folder) / "s", "f") as journal:
            for image in range(4):
                journal.append([image, [float(image)] * (image + 2)])
        return (Path(folder) / "s").read_bytes()


def _image(
    name: str,
    whole: bytes,
    decode: Callable[..., Any],
    packed: Callable[[bytes], bytes] = lambda data: data,
) -> Format:
    return Format(
        name, (whole,), lambda folder: decode((folder / name).read_bytes(), name), packed,
        most_bytes=MOST_BYTES_OF_IMAGES,
    )  # fmt: skip


def _tokenizer_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tiny_tokenizer().save(path)
        whole = json.loads(path.read_bytes())
    merges = "#version: 0.2\n" + "\n".join(
        m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]
    )
    return {
        "tokenizer.json": json.dumps(whole).encode(),
        "vocab.json": json.dumps(whole["model"]["vocab"]).encode(),
        "merges.txt": merges.encode(),
    }


def _refs() -> bytes:
    reference = {
        "image_id": 5,
        "file_name": "COCO_5.jpg",
        "split": "val",
        "sentences": [{"raw": "a cat"}],
    }
    return pickle.dumps([{"ref_id": n, "ann_id": n} | reference for n in range(3)], protocol=2)


_PAIRS = [{"image": f"{name}.jpg", "caption": "a cat", "image_id": f"{name}1"} for name in "ab"]
_ARRAY = json.dumps(_PAIRS).encode()
_QUESTION = {
    "image": "a.jpg",
    "question": "what?",
    "question_id": 1,
    "answer": ["yes", "no"],
    "dataset": "vqa",
}
_QUESTIONS = json.dumps([_QUESTION]).encode()
_CONFIG = json.dumps({"preset": "tiny", "image_size": 32}).encode()
_RECIPE = (Path(checkpoints.__file__).parent / "recipes" / "pretrain_tiny_shapes.yaml").read_bytes()
_YAML = yaml.safe_dump({"a": [1, 2.5, None, "x"], "b": {"c": True}}).encode()
_LOG = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'


def _config() -> bytes:
    return XFMConfig.preset("tiny").to_json().encode()


def _manifest() -> bytes:
    made = new_manifest(
        source="a model", weights_sha256="0", tokenizer_sha256=None, config={}, dtype="fp32", consumer="onnxruntime",
        opset=23, attention="primitives", all_tokens=False, fixed={"batch": 1}, versions={}, graphs=[], files=[],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder))
        return (Path(folder) / "manifest.json").read_bytes()


_ENTRY = {
    "row": 0,
    "name": "a.jpg",
    "passage": 0,
    "size": 5,
    "modified": 7,
    "item": None,
    "fields": '{"a": "b"}',
}
_ENTRIES = (
    json.dumps(_ENTRY) + "\n" + json.dumps(_ENTRY | {"name": "b.jpg", "row": 1}) + "\n"
).encode()
_FEATURES = {"features-000000000000.f32": struct.pack("<16f", *range(16))}
_HEADER = json.dumps(
    {
        "width": 8, "modality": "image", "path": ".", "images": None, "column": None, "model": {"size": "tiny"},
        "fingerprint": "0", "features": "features-000000000000.f32", "rows": 2, "commit": 1, "columns": ["a"],
    }
).encode()  # fmt: skip


def _database(folder: Path, header: bytes, entries: bytes) -> bytes:
    """An index with this header and these entries, whatever they are."""
    path = folder / INDEX_FILE
    path.unlink(missing_ok=True)
    with connect(path, INDEX_TABLES, write=True) as connection:
        connection.execute("INSERT INTO header VALUES (CAST(? AS TEXT))", (header,))
        for line in entries.splitlines():
            row = json.loads(line)
            values = [row.get(name) if isinstance(row, dict) else row for name in _ENTRY]
            with suppress(sqlite3.Error, OverflowError, ValueError):
                connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", values)
    return path.read_bytes()


def _index() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return _database(Path(folder), _HEADER, _ENTRIES)


def _read_index(folder: Path) -> None:
    index = open_index(folder, folder)
    choices: tuple[dict[str, Any], ...] = ({}, {"glob": "*.jpg"}, {"where": {"a": "b"}})
    for options in choices:
        with suppress(DataError, InputError):
            nearest(index, np.ones(8, np.float32), 3, **options)
    for entry in index.entries():
        with suppress(DataError):
            index.load(entry)


def _read_header(folder: Path) -> None:
    _database(folder, (folder / "header.json").read_bytes(), _ENTRIES)
    _read_index(folder)


def _read_entries(folder: Path) -> None:
    try:
        _database(folder, _HEADER, (folder / "entries.jsonl").read_bytes())
    except ValueError:
        # No database holds these values.
        return
    _read_index(folder)


@cache
def _retrieval() -> Any:
    tokenizer = tiny_tokenizer()
    config = XFMConfig.preset("tiny", vocab_size=max(320, tokenizer.vocab_size))
    return make_task(RetrievalOptions(), config, tokenizer)


_REQUESTS = b'{"image": "a.jpg", "text": "a cat"}\n{"images": ["b.jpg"], "text": ["a dog"]}\n'


def _task() -> bytes:
    return explanation(_retrieval())["task.json"]


def _run_recipe() -> bytes:
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        recipe = load_finetune_recipe("retrieval_tiny_shapes", [])
    return json.dumps(recipe.model_dump(mode="json")).encode()


def _state_in(name: str) -> Callable[[Path], Any]:
    return lambda folder: read_state_dict(folder / name)


def _table(folder: Path) -> Any:
    return read_table(folder / "a.csv", {"image": "image", "caption": "caption"})


def _formats() -> list[Format]:
    tokens, png, header = _tokenizer_files(), picture(1, form="PNG"), save(_STATE)
    header = header[8 : 8 + int.from_bytes(header[:8], "little")]
    plain = (ValueError, yaml.YAMLError)

    def without(name: str) -> dict[str, bytes]:
        return {each: data for each, data in tokens.items() if each not in (name, "tokenizer.json")}

    return [
        Format("checkpoint.th", (_saved(_STATE),), _state_in("checkpoint.th")),
        Format("pickle.th", _PICKLES, _state_in("pickle.th"), _repacked),
        Format(
            "legacy.th",
            (_saved(_STATE, _use_new_zipfile_serialization=False),),
            _state_in("legacy.th"),
        ),
        Format("a.safetensors", (save(_STATE),), _state_in("a.safetensors")),
        Format("header.safetensors", (header,), _state_in("header.safetensors"), _safetensors),
        Format(
            "a.yaml",
            (_YAML, _RECIPE),
            lambda f: parse_yaml((f / "a.yaml").read_bytes()),
            refuses=plain,
        ),
        Format(
            "recipe.yaml", (_RECIPE,), lambda f: read_recipe(f / "recipe.yaml", "xfm_fast.training")
        ),
        Format("a.csv", (b"image,caption\na.jpg,a cat\nb.jpg,a dog\n",), _table),
        Format(
            "a.jsonl",
            ("".join(json.dumps(pair(n)) + "\n" for n in range(3)).encode(),),
            _read_lines,
        ),
        Format("a.tar", (_tar(),), _read_shard),
        Format("refs(unc).p", (_refs(),), lambda f: read_plain_pickle(f / "refs(unc).p")),
        _image("a.jpg", picture(2), decode_pixels),
        _image("a.png", png, decode_pixels),
        _image("chunks.png", _chunks(png), decode_image, _png),
        _image("a.webp", picture(3, form="WEBP"), decode_image),
        _image("a.gif", picture(4, form="GIF", mode="P"), decode_image),
        Format(
            "merges.txt",
            (tokens["merges.txt"],),
            CaptionTokenizer.from_files,
            others=without("merges.txt"),
        ),
        Format(
            "vocab.json",
            (tokens["vocab.json"],),
            CaptionTokenizer.from_files,
            others=without("vocab.json"),
        ),
        Format(INDEX_FILE, (_index(),), _read_index, others=_FEATURES),
        Format("scores.jsonl", (_journal(),), lambda f: read_journal(f / "scores.jsonl")),
        *(
            Format(name, contents, read, values=True, **more)
            for name, contents, read, more in _json_formats(tokens)
        ),
    ]


def _json_formats(
    tokens: dict[str, bytes],
) -> list[tuple[str, tuple[bytes, ...], Callable[[Path], Any], dict[str, Any]]]:
    """Name, contents, reader and further fields of formats whose values are changed too."""
    boxes = b'{"1": [[1, 2, 3, 4]]}', b'[{"image_id": 1, "box": [1, 2, 3, 4]}]'
    tokenizer, plain = tokens["tokenizer.json"], {"refuses": (ValueError,)}
    return [
        ("state.json", (_TRAINING_STATE,), _read_training, {}),
        ("a.json", (_ARRAY, _CONFIG), lambda f: parse_json((f / "a.json").read_bytes()), plain),
        ("task.json", (_task(),), task_of, {}),
        ("recipe.json", (_run_recipe(),), recipe_of, {}),
        (
            "requests.jsonl",
            (_REQUESTS,),
            lambda f: requests_in(_retrieval(), f / "requests.jsonl"),
            {},
        ),
        ("header.json", (_HEADER,), _read_header, {"others": _FEATURES}),
        ("entries.jsonl", (_ENTRIES,), _read_entries, {"others": _FEATURES}),
        ("config.json", (_config(),), lambda f: XFMConfig.load(f / "config.json"), {}),
        ("manifest.json", (_manifest(),), Manifest.load, {}),
        ("pairs.json", (_ARRAY,), lambda f: [*retrieval_rows(f / "pairs.json")[0].records()], {}),
        (
            "questions.json",
            (_QUESTIONS,),
            lambda f: [*vqa_rows(f / "questions.json")[0].records()],
            {},
        ),
        ("boxes.json", boxes, lambda f: read_detections(f / "boxes.json"), {}),
        (
            "tokenizer.json",
            (tokenizer,),
            lambda f: CaptionTokenizer.from_files(f / "tokenizer.json"),
            {},
        ),
        ("log.jsonl", (_LOG,), lambda f: read_log(f / "log.jsonl"), {}),
    ]


FORMATS = {each.name: each for each in _formats()}


def attack(
    form: Format,
    inputs: int,
    *,
    number: int = 0,
    most_seconds: float | None = None,
    values: bool = False,
) -> Counter[str]:
    """Give a format so many inputs with edited bytes, or with changed values; how each ended, by error class.

    Raises:
        AssertionError: an input broke a bound, or brought an error that is none of ours.
    """
    ends: Counter[str] = Counter()
    folder = Path(
        tempfile.mkdtemp(prefix="xfm-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    )

    def end_of(data: bytes) -> str:
        (folder / form.name).write_bytes(data)
        for name, content in form.others.items():
            (folder / name).write_bytes(content)
        begun = time.process_time()
        with PeakMemory() as memory:
            try:
                form.read(folder)
                end = "read"
            except form.refuses as error:
                # What is said must be printable, whatever stood in the file.
                str(error).encode()
                end = type(error).__name__
        spent, rise = time.process_time() - begun, memory.peak - memory.start
        assert most_seconds is None or spent <= most_seconds, f"{spent:.1f} s"
        assert rise <= form.most_bytes, f"{rise >> 20} MiB"
        return end

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for whole in form.whole:
                ends[f"whole: {end_of(form.packed(whole))}"] += 1
            for at in range(inputs):
                draw = random.Random(f"{form.name} {number} {at}")
                whole = draw.choice(form.whole)
                data = form.packed(changed(whole, draw) if values else edited(whole, edits(draw)))
                try:
                    ends[end_of(data)] += 1
                except Exception as error:
                    raise AssertionError(
                        f"input {at} of seed {number}, {data[:500]!r}: {error!r}"
                    ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ends


def main() -> int:
    """Attack every format; 1 where one broke."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="of each format")
    parser.add_argument("--format", default="", help="only those whose name holds this")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1 << 32), help="for another day's inputs"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.inputs:,} inputs a format, seed {options.seed}", flush=True)
    broken = 0
    for form in FORMATS.values():
        for values in (False, True) if form.values else (False,):
            if options.format not in form.name:
                continue
            what = f"{form.name}, {'values' if values else 'bytes'}"
            try:
                ends = attack(
                    form,
                    options.inputs,
                    number=options.seed,
                    most_seconds=MOST_SECONDS,
                    values=values,
                )
                print(
                    f"{what}: {', '.join(f'{name} {count:,}' for name, count in ends.most_common())}",
                    flush=True,
                )
            except AssertionError as error:
                broken += 1
                print(f"{what}: BROKEN: {error}", flush=True)
    print(f"{broken} formats broken")
    return int(broken > 0)


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.exit(main())
