"""Image search by text or by image: features in an index on disk, re-ranked with the fusion encoder.

index = build_index("photos", open_model("runs/base/model"))
for hit in search(open_index("photos"), open_model("runs/base/model"), "a red bicycle").hits: ...
"""

import warnings
from pathlib import Path
from typing import Literal

from xfm_fast.loading import Source
from xfm_fast.search.index import (
    IndexReport,
    SearchIndex,
    SearchModel,
    build_index,
    index_folder,
    open_index,
    open_model,
)
from xfm_fast.search.query import Found, Hit, match_images, search
from xfm_fast.search.sheet import write_sheet

Preset = Literal["tiny", "base"]

__all__ = [
    "Found",
    "Hit",
    "IndexReport",
    "SearchIndex",
    "SearchModel",
    "Source",
    "build_index",
    "index_folder",
    "match_images",
    "open_index",
    "open_model",
    "search",
    "write_sheet",
]


def ModelSource(weights: str | None = None, tokenizer: str | None = None, size: Preset = "tiny") -> Source:
    """Former name of `Source`."""
    warnings.warn("ModelSource is now xfm_fast.loading.Source", DeprecationWarning, stacklevel=2)
    return Source(weights, None if weights else size, tokenizer=Path(tokenizer) if tokenizer else None)
