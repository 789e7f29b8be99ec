"""Indexes of texts and of any model: passages, rows of tables, filters, and CLIP across modalities."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.library_models import embed, write_clip, write_embedder, write_reranker
from tests.search.conftest import write_picture
from tests.search.test_index import features_of
from xfm_fast.encoders import Encoder, LibraryEncoder, XFMEncoder, open_encoder
from xfm_fast.errors import DataError, InputError, UnavailableError
from xfm_fast.search import build_index, nearest, open_index, search, thumbnail, write_sheet
from xfm_fast.search.index import split_passages


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> LibraryEncoder:
    encoder = open_encoder(write_embedder(tmp_path_factory.mktemp("embedder")))
    assert isinstance(encoder, LibraryEncoder)
    return encoder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return open_encoder(write_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.md").write_text("# a red circle\n\n" + "\n\n".join(["a blue star"] * 60))
    (folder / "deep/b.TXT").write_bytes(b"\xef\xbb\xbfa green square")
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes("Füße".encode("latin-1"))
    (folder / "other.pdf").write_bytes(b"none")
    return folder


def test_passages_of_text_files(notes: Path, embedder: LibraryEncoder) -> None:
    report = build_index(notes, embedder)
    assert report.modality == "text"
    assert sorted(report.faults) == ["empty.txt", "latin.txt"]
    assert "not UTF-8" in report.faults["latin.txt"]
    opened = open_index(notes)
    entries = opened.entries()
    assert len(entries) == len(opened) == report.entries == report.added
    passages = [entry for entry in entries if entry.name == "a.md"]
    assert [entry.passage for entry in passages] == [*range(1, len(passages) + 1)]
    assert len(passages) > 2
    assert "\n\n".join(entry.caption or "" for entry in passages) == (notes / "a.md").read_text()
    # The features are the model's own for documents.
    captions = [entry.caption for entry in entries]
    expected = embed(embedder, captions, role="document", normalize_embeddings=True).numpy()
    with opened.store.read() as snapshot:
        np.testing.assert_allclose(snapshot.features, expected, atol=1e-5)
    best = search(opened, embedder, "a green square", top=3)
    query = embed(embedder, ["a green square"], role="query", normalize_embeddings=True)[0].numpy()
    order = (expected @ query).argsort()[::-1][:3]
    assert [hit.row for hit in best.hits] == order.tolist()
    assert best.hits[0].similarity == pytest.approx((expected @ query).max(), abs=1e-5)
    locations = {hit.location for hit in search(opened, embedder, "a star", top=99).hits}
    assert {str(notes / "deep/b.TXT"), str(notes / "a.md#1")} < locations


def test_changed_and_shortened_files(notes: Path, embedder: LibraryEncoder) -> None:
    build_index(notes, embedder)
    before = features_of(notes)
    (notes / "a.md").write_text("a red circle")
    (notes / "deep/b.TXT").unlink()
    (notes / "c.txt").write_text("a star")
    report = build_index(notes, embedder)
    assert (report.entries, report.added, report.removed) == (2, 2, 1)
    assert {*features_of(notes)} == {("a.md", 0), ("c.txt", 0)}
    assert ("a.md", 2) in before
    assert build_index(notes, embedder).added == 0


def test_truncation_is_reported(tmp_path: Path, embedder: LibraryEncoder) -> None:
    assert embedder.max_tokens == 48
    path = tmp_path / "a.csv"
    path.write_text("text\na star\n" + "star " * 60 + "\n")
    assert build_index(path, embedder).truncated == 1
    # Passages hold about as many characters as the model reads.
    (tmp_path / "long").mkdir()
    (tmp_path / "long/a.txt").write_text("triangle " * 500)
    report = build_index(tmp_path / "long", embedder)
    assert (report.entries > 20, report.truncated) == (True, 0)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("", 5), ("a b", 5), ("one\n\ntwo\n \nthree", 10), ("x" * 23, 5), ("a " * 100, 7), ("ä\n\nö " * 50, 12),
        ("\n\n\n", 3), ("word " * 3 + "y" * 40 + " end", 10), ("a\r\n\r\nb", 10), ("x", 1), ("ab cd", 1),
    ],
)  # fmt: skip
def test_a_split_keeps_all_words_in_order(text: str, limit: int) -> None:
    passages = split_passages(text, limit)
    assert all(0 < len(passage) <= limit for passage in passages)
    assert "".join("".join(passages).split()) == "".join(text.split())
    assert "" not in passages


def test_a_split_of_one_long_word_takes_linear_time() -> None:
    assert len(split_passages("x" * (1 << 20), 1000)) == 1049
    assert len(split_passages("\n" * (1 << 20), 1000)) == 0
    assert len(split_passages(" " * (1 << 20) + "x", 1000)) == 1


def _write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [[*rows[0]], *([str(value) for value in row.values()] for row in rows)]
        path.write_text("".join(mark.join(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_rows_of_a_table_and_filters(tmp_path: Path, embedder: LibraryEncoder, suffix: str) -> None:
    rows = [
        {"name": f"{color} {shape}", "brand": color, "year": 2020 + number % 3}
        for number, (color, shape) in enumerate(
            (color, shape) for color in ("red", "blue") for shape in ("circle", "star", "square")
        )
    ]
    path = _write_table(tmp_path / f"a{suffix}", rows)
    with pytest.raises(DataError, match="--column"):
        build_index(path, embedder)
    with pytest.raises(DataError, match=r"'nope'.*'brand'"):
        build_index(path, embedder, column="nope")
    report = build_index(path, embedder, column="name")
    assert (report.entries, report.added) == (6, 6)
    opened = open_index(path)
    assert {*opened.columns} == {"brand", "year"}
    first = 1 if suffix == ".jsonl" else 2
    assert [(entry.name, entry.caption) for entry in opened.entries()] == [
        (f"a{suffix}#{number}", row["name"]) for number, row in enumerate(rows, first)
    ]
    everything = search(opened, embedder, "a red star", top=99).hits
    for where in ({}, {"brand": "red"}, {"brand": "red", "year": "2021"}, {"year": "1"}):
        expected = [
            hit for hit in everything
            if all(hit.entry.fields[column] == value for column, value in where.items())
        ]  # fmt: skip
        assert search(opened, embedder, "a red star", top=99, where=where).hits == expected
    hits = search(opened, embedder, "a red star", glob=f"*#{first}").hits
    assert [hit.entry.name for hit in hits] == [f"a{suffix}#{first}"]
    assert not search(opened, embedder, "a red star", glob="[" * 60 + "*a" * 5000).hits
    with pytest.raises(InputError, match=r"'color'.*'brand', 'year'"):
        search(opened, embedder, "a red star", where={"color": "red"})
    # Only rows whose text has changed are computed again; other columns are renewed.
    rows[0] |= {"brand": "acme"}
    rows[1] |= {"name": "green star"}
    rows.append({"name": "a dot", "brand": "b\"'%", "year": 1})
    _write_table(path, rows)
    report = build_index(path, embedder, column="name")
    if suffix == ".jsonl":
        assert (report.entries, report.added, report.removed) == (7, 2, 0)
        assert [
            hit.entry.caption
            for hit in search(open_index(path), embedder, "a", where={"brand": "b\"'%"}).hits
        ] == ["a dot"]
    hits = search(open_index(path), embedder, "a star", where={"brand": "acme"}).hits
    assert [hit.entry.caption for hit in hits] == ["red circle"]


def test_broken_rows_are_listed(tmp_path: Path, embedder: LibraryEncoder) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        '{"text": "a star"}',
        "{",
        "[1]",
        '{"text": 5}',
        '{"text": " "}',
        '{"text": "a \\ud800 dot"}',
    ]
    path.write_text("\n".join(lines))
    report = build_index(path, embedder)
    assert sorted(report.faults) == [f"a.jsonl#{number}" for number in (2, 3, 4, 5, 6)]
    assert [entry.caption for entry in open_index(path).entries()] == ["a star"]
    assert search(open_index(path), embedder, "a star \udcff").hits


def test_clip_finds_pictures_by_texts_and_pictures_and_texts(
    photos: Path, notes: Path, clip: Encoder
) -> None:
    (photos / "0.txt").write_text("a caption")
    report = build_index(photos, clip)
    assert (report.modality, report.entries) == ("image", 7)
    opened = open_index(photos)
    hits = search(opened, clip, photos / "0.png", top=3).hits
    assert hits[0].location == str(photos / "0.png")
    assert hits[0].similarity == pytest.approx(1, abs=1e-5)
    with Image.open(photos / "0.png") as image:
        assert [hit.row for hit in search(opened, clip, image, top=3).hits] == [
            hit.row for hit in hits
        ]
    hits = search(opened, clip, "a red circle", top=9).hits
    assert len(hits) == 7
    assert hits[0].match is None
    features = features_of(photos)
    query = clip.run(clip.prepare(["a red circle"], "query"))[0].numpy()
    for hit in hits:
        feature = np.frombuffer(features[hit.entry.name, 0], np.float32)
        assert hit.similarity == pytest.approx(feature @ query / np.linalg.norm(query), abs=1e-5)
    assert thumbnail(opened, hits[0].entry).startswith(b"\xff\xd8")
    with pytest.raises(UnavailableError, match="rank=match"):
        search(opened, clip, "a red circle", rank="match")
    # A collection of texts alone is indexed as such, and found by pictures too.
    assert build_index(notes, clip).modality == "text"
    opened = open_index(notes)
    assert search(opened, clip, photos / "0.png", top=3).hits
    with pytest.raises(DataError, match="texts"):
        opened.load(opened.entries()[0])


def test_a_model_of_texts_reads_the_texts_beside_pictures(
    photos: Path, embedder: LibraryEncoder, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"no texts \(\.txt, \.md\)"):
        build_index(photos, embedder)
    (photos / "0.txt").write_text("a red circle")
    assert build_index(photos, embedder).entries == 1
    with pytest.raises(UnavailableError, match="images"):
        search(open_index(photos), embedder, photos / "0.png")
    (tmp_path / "a.csv").write_text("image,caption\n0.png,a star\n")
    assert build_index(tmp_path / "a.csv", embedder).modality == "text"


def test_columns_of_pictures(photos: Path, clip: Encoder, embedder: LibraryEncoder) -> None:
    (photos / "captions.csv").write_text(
        "image,caption,album\n0.png,a star,one\n./2.png,a dot,two\n0.png,again,three\n"
    )
    build_index(photos, clip)
    opened = open_index(photos)
    assert opened.columns == ("album",)
    hits = search(opened, clip, "a star", where={"album": "one"}).hits
    assert [(hit.entry.name, hit.entry.captions) for hit in hits] == [
        ("0.png", ("a star", "again"))
    ]
    with pytest.raises(DataError, match="another --index"):
        build_index(photos / "captions.csv", clip, photos / ".xfm-index")


def test_xfm_indexes_texts(notes: Path, model: XFMEncoder) -> None:
    (notes / "marks.txt").write_text("?!")
    report = build_index(notes, model)
    assert "marks.txt" in report.faults
    hits = search(open_index(notes), model, "a green square", top=1).hits
    assert hits[0].location == str(notes / "deep/b.TXT")
    assert hits[0].match is None


def test_models_that_do_not_embed(notes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ranking"):
        build_index(notes, open_encoder(write_reranker(tmp_path / "reranker")))


def test_features_from_outside(notes: Path, embedder: LibraryEncoder) -> None:
    build_index(notes, embedder)
    opened = open_index(notes)
    feature = embed(embedder, ["a star"], role="query")[0].numpy()
    hits = nearest(opened, 3 * feature, 2)
    assert hits == search(opened, embedder, "", top=2, feature=3 * feature).hits
    same = search(opened, embedder, "a star", top=2).hits
    assert [hit.row for hit in same] == [hit.row for hit in hits]
    with pytest.raises(InputError, match="shape"):
        nearest(opened, feature[:5], 2)
    with pytest.raises(DataError, match="finite"):
        nearest(opened, feature * np.nan, 2)


def test_a_page_of_texts(notes: Path, embedder: LibraryEncoder, tmp_path: Path) -> None:
    (notes / "a.md").write_text("a <b>red</b> circle")
    build_index(notes, embedder)
    opened = open_index(notes)
    result = search(opened, embedder, "a star")
    page = write_sheet(tmp_path / "a.html", "a star", result, opened).read_text()
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in page
    assert "2 of 2 texts" in page
    assert "data:image" not in page


def test_an_index_without_its_texts(notes: Path, embedder: LibraryEncoder) -> None:
    folder = build_index(notes, embedder).folder
    hits = search(open_index(folder), embedder, "a green square").hits
    assert hits[0].location == str(notes / "deep/b.TXT")


def test_names_that_are_not_unicode(tmp_path: Path, embedder: LibraryEncoder) -> None:
    name = os.fsdecode(b"caf\xe9 '\"%?#.txt")
    (tmp_path / name).write_text("a star")
    build_index(tmp_path, embedder)
    hits = search(open_index(tmp_path), embedder, "a star", glob="caf*").hits
    assert [hit.entry.name for hit in hits] == [name]
    assert build_index(tmp_path, embedder).added == 0


def test_a_picture_of_a_stranger(photos: Path, clip: Encoder) -> None:
    """Refuse pictures outside the named folder, also as thumbnails."""
    build_index(photos, clip)
    entry = open_index(photos).entries()[0]
    write_picture(photos.parent / "private.png", 1)
    for name in ("../private.png", str(photos.parent / "private.png")):
        stranger = type(entry)(name, entry.size, entry.modified)
        with pytest.raises(DataError, match="outside"):
            thumbnail(open_index(photos), stranger)
