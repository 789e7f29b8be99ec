"""The nearest features of a query: all compared, in blocks, or beyond 200,000 of them found by a graph of neighbours.

The graph is that of the package `usearch` (HNSW, arXiv 1603.09320). It says which rows to compare; the similarities are
those of the features themselves, so that a wrong graph can lose images, and not misjudge them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from xfm_fast.errors import DataError, UnavailableError

LARGE = 200_000
"""Images beyond which a graph is made: comparing all of them, 200 MB of features of the base model, takes as long as
reading these from memory."""

Graph = Literal["auto", "always", "never"]
# Rows that are compared at a time: 64 MB of features of the base model.
_BLOCK = 1 << 16
# Neighbours that a search of the graph keeps in view, at least: with 128 it misses about 1 of 100.
_LEAST_VIEW = 128
_INSTALL = "install usearch (pip install 'xfm-fast[search]')"


def wants_graph(graph: Graph, images: int) -> bool:
    """True where a graph is to be made.

    Raises:
        UnavailableError: it was asked for by name, and `usearch` is not installed.
    """
    if graph == "never" or (graph == "auto" and images <= LARGE):
        return False
    installed = _usearch() is not None
    if not installed and graph == "always":
        raise UnavailableError(f"a graph of neighbours needs a package that is not installed; {_INSTALL}")
    return installed


def lacks_graph(images: int) -> str | None:
    """A remark for those who search many images without a graph; None where one is of no use, or can be made."""
    if images <= LARGE or _usearch() is not None:
        return None
    return f"{images:,} images are compared one by one; to search them by a graph, {_INSTALL} and index again"


def graph_of(features: np.ndarray) -> bytes:
    """The graph of features `[I, E]`, as it is stored."""
    usearch = _usearch()
    assert usearch is not None
    made = usearch.Index(ndim=features.shape[1], metric="ip", dtype="f16")
    for start in range(0, len(features), _BLOCK):
        block = np.ascontiguousarray(features[start : start + _BLOCK])
        made.add(np.arange(start, start + len(block), dtype=np.uint64), block)
    return bytes(made.save())


def open_graph(path: Path, images: int, width: int, size: int) -> Any | None:
    """A stored graph, mapped; None where `usearch` is not installed, without which all features are compared.

    Raises:
        DataError: it is not the one that was stored.
    """
    if (usearch := _usearch()) is None:
        return None
    said = usearch.Index.metadata(os.fspath(path)) if path.stat().st_size == size else None
    if said is None or (said["count_present"], said["dimensions"]) != (images, width):
        raise DataError(f"the graph {path} is damaged; delete its folder and index again")
    return usearch.Index.restore(os.fspath(path), view=True)


def nearest(features: np.ndarray, query: Tensor, k: int, graph: Any | None = None) -> tuple[Tensor, Tensor]:
    """The `k` rows of `features` `[I, E]` with the largest dot product with `query` `[E]`, and these, largest first.

    Exact without a graph. With one, rows that it does not lead to are missed.
    """
    asked = query.numpy()
    if graph is not None:
        graph.expansion_search = max(_LEAST_VIEW, 2 * k)
        rows = torch.from_numpy(np.sort(graph.search(asked, k).keys.astype(np.int64)))
        values, order = torch.from_numpy(features[rows.numpy()] @ asked).sort(descending=True, stable=True)
        return rows[order], values
    rows, best = torch.empty(0, dtype=torch.long), torch.empty(0)
    for start in range(0, len(features), _BLOCK):
        found = torch.from_numpy(features[start : start + _BLOCK] @ asked)
        values, places = found.topk(min(k, len(found)))
        values, order = torch.cat([best, values]).sort(descending=True, stable=True)
        best, rows = values[:k], torch.cat([rows, places + start])[order][:k]
    return rows, best


def _usearch() -> Any | None:
    try:
        import usearch.index
    except ImportError:
        return None
    return usearch.index
