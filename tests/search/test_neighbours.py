"""The first stage: exact in blocks, and by a graph of neighbours where there are many images."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.runner import invoke
from xfm_fast.errors import DataError, UnavailableError
from xfm_fast.search import SearchModel, build_index, index_folder, neighbours, open_index, search

TEXT = "a red circle"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven images are many."""
    pytest.importorskip("usearch")
    monkeypatch.setattr(neighbours, "LARGE", 6)


def test_exact_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32)
    asked = torch.from_numpy(features[700])
    whole = torch.from_numpy(features) @ asked
    monkeypatch.setattr(neighbours, "_BLOCK", 64)
    for k in (1, 100, 2000):
        rows, values = neighbours.nearest(features, asked, k)
        assert rows.tolist() == whole.argsort(descending=True)[:k].tolist()
        torch.testing.assert_close(values, whole[rows])


def test_a_graph_finds_nearly_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("usearch")
    monkeypatch.setattr(neighbours, "_BLOCK", 700)
    made = np.random.default_rng(0).standard_normal((2000, 24)).astype(np.float32)
    features = made / np.linalg.norm(made, axis=1, keepdims=True)
    stored = neighbours.graph_of(features)
    path = tmp_path / "graph"
    path.write_bytes(stored)
    graph = neighbours.open_graph(path, 2000, 24, len(stored))
    found = 0
    for number in range(20):
        asked = torch.from_numpy(features[number * 100])
        rows, values = neighbours.nearest(features, asked, 10, graph)
        exact, _ = neighbours.nearest(features, asked, 10)
        torch.testing.assert_close(values, torch.from_numpy(features)[rows] @ asked)
        assert rows[0] == number * 100
        found += len({*rows.tolist()} & {*exact.tolist()})
    assert found >= 190
    with pytest.raises(DataError, match=r"graph .* is damaged"):
        neighbours.open_graph(path, 2001, 24, len(stored))
    path.write_bytes(stored[:-1])
    with pytest.raises(DataError, match=r"graph .* is damaged"):
        neighbours.open_graph(path, 2000, 24, len(stored))


@pytest.mark.usefixtures("few")
def test_many_images_are_searched_by_a_graph(photos: Path, model: SearchModel) -> None:
    build_index(photos, model)
    indexed = open_index(photos)
    assert indexed.graph is not None
    found, exact = (search(indexed, model, TEXT, exact=way) for way in (False, True))
    assert [hit.location for hit in found.hits] == [hit.location for hit in exact.hits]
    np.testing.assert_allclose([hit.score for hit in found.hits], [hit.score for hit in exact.hits], atol=1e-5)
    # The index is renewed without one, and with one again.
    assert build_index(photos, model, graph="never").added == 0
    assert open_index(photos).graph is None
    assert not [*index_folder(photos).glob("graph-*")]
    build_index(photos, model)
    assert open_index(photos).graph is not None


@pytest.mark.usefixtures("few")
def test_without_the_package_an_index_with_a_graph_is_searched_exactly(
    photos: Path, model: SearchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(photos, model)
    monkeypatch.setattr(neighbours, "_usearch", lambda: None)
    assert len(search(open_index(photos), model, TEXT).hits) == 7


def test_without_the_package(photos: Path, weights: Path, model: SearchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "LARGE", 6)
    monkeypatch.setitem(sys.modules, "usearch", None)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(UnavailableError, match=r"a graph of neighbours needs .*xfm-fast\[search\]"):
        build_index(photos, model, graph="always")
    assert not index_folder(photos).exists()
    done = invoke(["index", photos, "--model", weights])
    assert done.exit_code == 0
    assert "7 images are compared one by one; to search them by a graph, install usearch" in done.stderr
