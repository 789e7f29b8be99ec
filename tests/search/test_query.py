"""Searches: exact by features, re-ranked by the fusion encoder, and shown."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.search.conftest import write_model, write_picture
from xfm_fast.checkpoint.files import TASK_FILE
from xfm_fast.encoders import XFMEncoder, open_encoder
from xfm_fast.errors import DataError, InputError, UnavailableError
from xfm_fast.models.processor import image_pixels
from xfm_fast.models.xfm import XFM
from xfm_fast.search import (
    SearchIndex,
    Source,
    build_index,
    match_images,
    open_index,
    search,
    write_sheet,
)
from xfm_fast.search import query as query_module

TEXT = "a red circle"


def test_nearest_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32)
    query = torch.from_numpy(features[700])
    products = torch.from_numpy(features) @ query
    monkeypatch.setattr(query_module, "BLOCK_ROWS", 64)
    some = np.random.default_rng(1).random(1000) < 0.1
    some[64:192] = False
    for allowed in (np.ones(1000, bool), some, np.zeros(1000, bool)):
        expected = [row for row in products.argsort(descending=True).tolist() if allowed[row]]
        for k in (1, 100, 2000):
            rows, values = query_module.largest_products(features, query, k, allowed)
            assert rows.tolist() == expected[:k]
            torch.testing.assert_close(values, products[rows])


@pytest.fixture(scope="module")
def indexed(model: XFMEncoder, tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    """Build an index that tests share."""
    folder = tmp_path_factory.mktemp("indexed")
    for index in range(7):
        write_picture(folder / ("trip" if index % 2 else ".") / f"{index}.png", index)
    build_index(folder, model)
    return open_index(folder)


def test_candidates_are_ordered_by_their_match(indexed: SearchIndex, model: XFMEncoder) -> None:
    result = search(indexed, model, TEXT, candidates=4, top=20, batch_size=3)
    paths = [Path(hit.location) for hit in result.hits]
    similar = model.model.similarity(paths, TEXT)
    np.testing.assert_allclose([hit.similarity for hit in result.hits], similar, atol=1e-5)
    # The nearest four by features come first, by their match; the others follow by features.
    assert {*paths[:4]} == {paths[index] for index in similar.argsort(descending=True)[:4]}
    matches: list[Any] = [hit.match for hit in result.hits]
    np.testing.assert_allclose(
        matches[:4], [model.model.match(path, TEXT) for path in paths[:4]], atol=1e-5
    )
    assert matches[:4] == sorted(matches[:4], reverse=True)
    assert matches[4:] == [None] * 3
    assert [hit.location for hit in search(indexed, model, TEXT, candidates=4, top=2).hits] == [
        *map(str, paths[:2])
    ]


def test_the_ranking_rule_is_named_or_recorded(indexed: SearchIndex, model: XFMEncoder) -> None:
    """`sum` is the match logit + the cosine; what a run recorded is the default."""
    result = search(indexed, model, TEXT, rank="sum", top=20)
    paths = [Path(hit.location) for hit in result.hits]
    with torch.no_grad():
        pixels = [image_pixels([path], model.model.config.image_size) for path in paths]
        logits = match_images(model, pixels, TEXT, 7)[:, 1]
    expected = logits + model.model.similarity(paths, TEXT)
    np.testing.assert_allclose([hit.score for hit in result.hits], expected, atol=1e-5)
    assert [hit.score for hit in result.hits] == sorted(
        (hit.score for hit in result.hits), reverse=True
    )
    assert search(indexed, replace(model, rank="sum"), TEXT, top=20).hits == result.hits
    by_features = search(indexed, model, TEXT, candidates=0, top=20)
    assert [hit.score for hit in by_features.hits] == sorted(
        (h.similarity for h in by_features.hits), reverse=True
    )
    assert search(indexed, model, TEXT, rank="similarity", top=20) == by_features


def test_an_image_finds_itself(indexed: SearchIndex, model: XFMEncoder) -> None:
    hit = search(indexed, model, indexed.path / "trip/3.png", top=1).hits[0]
    assert hit.location == str(indexed.path / "trip/3.png")
    assert hit.similarity == pytest.approx(1, abs=1e-5)


def test_bad_queries(indexed: SearchIndex, model: XFMEncoder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\?!"):
        search(indexed, model, "?!")
    with pytest.raises(DataError, match=r"nowhere\.png"):
        search(indexed, model, Path("nowhere.png"))
    with pytest.raises(InputError, match="top=0"):
        search(indexed, model, TEXT, top=0)
    with pytest.raises(DataError, match="other"):
        search(indexed, open_encoder(write_model(tmp_path / "other", seed=1)), TEXT)


def test_models_that_cannot_search(indexed: SearchIndex, weights: Path, tmp_path: Path) -> None:
    XFM.from_pretrained(weights, heads=["contrastive"]).save_pretrained(tmp_path / "bare")
    bare = open_encoder(tmp_path / "bare")
    assert isinstance(bare, XFMEncoder)
    with pytest.raises(UnavailableError, match="matching"):
        search(indexed, bare, TEXT)
    assert search(indexed, bare, TEXT, candidates=0).hits
    bare.model.tokenizer = None
    with pytest.raises(UnavailableError, match="--tokenizer"):
        search(indexed, bare, TEXT)
    XFM.from_pretrained(weights, heads=["matching"]).save_pretrained(tmp_path / "blind")
    with pytest.raises(UnavailableError, match="contrastive"):
        open_encoder(tmp_path / "blind")
    (tmp_path / "bare" / TASK_FILE).write_text('{"format": 1, "task": {"kind": "nlvr2"}}')
    with pytest.raises(UnavailableError, match="nlvr2"):
        open_encoder(tmp_path / "bare")


def test_a_page(photos: Path, tmp_path: Path) -> None:
    model = open_encoder(Source(random="tiny"))
    write_picture(photos / "<b>.png", 8)
    build_index(photos, model)
    index = open_index(photos)
    (photos / "0.png").unlink()
    result = search(index, model, TEXT, top=20)
    assert [*result.lost] == [str(photos / "0.png")]
    # An image that is gone after the search leaves its place empty.
    Path(result.hits[0].location).unlink()
    page = write_sheet(tmp_path / "out" / "sheet.html", "a <red> circle", result, index).read_text()
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == 6
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (80, 60)
    assert "a &lt;red&gt; circle" in page
    assert "&lt;b&gt;.png" in page
    assert "<b>" not in page
    assert "The weights are random" in page
    assert "http" not in page
    with pytest.raises(InputError, match=r"sheet\.gif"):
        write_sheet(tmp_path / "sheet.gif", TEXT, result, index)
