"""Image search by text or by image: features in an index on disk, re-ranked with the fusion
encoder.

index = build_index("photos", open_model("runs/base/model"))
for hit in search(open_index("photos"), open_model("runs/base/model"), "a red bicycle").hits: ...
"""

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
from xfm_fast.search.query import Hit, SearchResult, match_images, search, write_sheet

__all__ = [
    "Hit",
    "IndexReport",
    "SearchIndex",
    "SearchModel",
    "SearchResult",
    "Source",
    "build_index",
    "index_folder",
    "match_images",
    "open_index",
    "open_model",
    "search",
    "write_sheet",
]
