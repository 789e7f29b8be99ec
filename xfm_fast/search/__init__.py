"""Search of images or texts by any model that embeds them, and its index on disk.

encoder = open_encoder("runs/base/model")  # or a name of sentence-transformers
index = build_index("photos", encoder)
for hit in search(open_index("photos"), encoder, "a red bicycle").hits: ...
"""

from xfm_fast.encoders import open_encoder
from xfm_fast.loading import Source
from xfm_fast.search.index import IndexReport, SearchIndex, build_index, index_folder, open_index
from xfm_fast.search.query import (
    Hit,
    SearchResult,
    match_images,
    nearest,
    search,
    thumbnail,
    write_sheet,
)

__all__ = [
    "Hit",
    "IndexReport",
    "SearchIndex",
    "SearchResult",
    "Source",
    "build_index",
    "index_folder",
    "match_images",
    "nearest",
    "open_encoder",
    "open_index",
    "search",
    "thumbnail",
    "write_sheet",
]
