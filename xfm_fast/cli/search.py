"""`xfm-fast index` and `search`: find your own images by text or by image."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge
from cyclopts import Parameter
from cyclopts import default_name_transform as dashes

from xfm_fast.cli.console import note, progress, stdout, table
from xfm_fast.cli.options import UNFINISHED, Flat, Json
from xfm_fast.errors import InputError
from xfm_fast.loading import Source

_SHOWN = 5
# Match probabilities that differ by less, away from 0 and 1, indicate an untrained head.
_ALIKE = 0.01


@dataclass(frozen=True)
class IndexOptions:
    """The index.

    Attributes:
        index: Folder of the index. [.xfm-index in the folder, or next to the file]
        images: Folder of the images, if a file lists their paths. [the file's]
    """

    index: Path | None = None
    images: Path | None = None


@dataclass(frozen=True)
class SearchOptions(IndexOptions):
    """What to search for, and how to show it.

    Attributes:
        top: Images to show.
        candidates: Nearest images that the fusion encoder re-ranks; 0 ranks by features only.
        rank: Order of the candidates: match of the fusion encoder, similarity of features, or sum (match logit +
            similarity). [as recorded by the model's run, else match]
        sheet: Contact sheet to write, a page .html.
    """

    top: Annotated[int, Ge(1)] = 12
    candidates: Annotated[int, Ge(0)] = 64
    rank: Literal["match", "similarity", "sum"] | None = None
    sheet: Path | None = None


def index(
    collection: Annotated[Path, Parameter(name="FOLDER|FILE")],
    /,
    *,
    options: Flat[IndexOptions] = IndexOptions(),
    source: Flat[Source] = Source(),
    as_json: Json = False,
) -> int:
    """Index images for search, or update the index: only new and changed images are read.

    An interrupted command resumes. Unreadable images are listed and skipped.

    Args:
        collection: Folder of images, with captions next to them or in captions.csv; CSV, JSON or JSON lines with image
            and optional caption; JSON lines with binary and desc; WebDataset shard.
    """
    from xfm_fast.search import build_index, index_folder, open_index, open_model
    from xfm_fast.search.index import INDEX_FILE
    from xfm_fast.training.distributed import stop_on_signal

    target = options.index or index_folder(collection)
    known = open_index(target).model if (target / INDEX_FILE).is_file() else None
    source = _choose_model(source, known)
    with stop_on_signal() as stop, progress("indexing") as advance:
        report = build_index(
            collection, open_model(source), target, images=options.images, progress=advance, stop=stop
        )  # fmt: skip
    if report.interrupted:
        note("stopped; the same command resumes")
        return UNFINISHED
    if as_json:
        print(json.dumps(asdict(report) | {"folder": str(report.folder), "random": source.random is not None}))
        return 0
    _note_skipped(report.faults, "")
    left = f", {len(report.faults):,} left out" if report.faults else ""
    print(f"indexed: {report.images:,} images, {report.added:,} of them read now, {report.removed:,} gone{left}")
    values = vars(source) | vars(options)
    names = ("model", "config", "image_size", "tokenizer", "index", "images")
    repeated = "".join(f" --{dashes(name)} {values[name]}" for name in names if values[name] is not None)
    print(f"saved: {report.folder}; try it: xfm-fast search {collection} ...{repeated}")
    return 0


def search(
    where: Annotated[Path, Parameter(name="FOLDER|FILE")],
    query: Annotated[str, Parameter(name="TEXT|IMAGE")],
    /,
    *,
    options: Flat[SearchOptions] = SearchOptions(),
    source: Flat[Source] = Source(),
    as_json: Json = False,
) -> int:
    """Search indexed images by a text, or by a similar image.

    Args:
        where: The indexed folder or file.
        query: A text or an image file; an argument that is not an existing file is a text.
    """
    from rich.markup import escape

    from xfm_fast.search import open_index, open_model, write_sheet
    from xfm_fast.search import search as find

    if options.sheet is not None and options.sheet.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--sheet {options.sheet}: a contact sheet is a page; name it .html")
    opened = open_index(where, options.index, images=options.images)
    source = _choose_model(source, opened.model)
    target = Path(query) if os.path.isfile(query) else query
    settings = {"top": options.top, "candidates": options.candidates, "rank": options.rank}
    found = find(opened, open_model(source), target, **settings)
    matches = [hit.match for hit in found.hits if hit.match is not None]
    if len(matches) > 1 and 0.1 < min(matches) <= max(matches) < min(0.9, min(matches) + _ALIKE):
        note("match scores hardly differ, as from an untrained head; try --rank similarity")
    _note_skipped(found.lost, "; index again")
    if as_json:
        rows = [
            {"rank": rank, "path": hit.location, "caption": hit.entry.caption}
            | {name: getattr(hit, name) for name in ("match", "similarity", "score")}
            for rank, hit in enumerate(found.hits, start=1)
        ]
        print(json.dumps({"query": query, "random": source.random is not None, "hits": rows}))
    else:
        rows = table("", "", "match", "similarity", "image", right=("", "match", "similarity"))
        for rank, hit in enumerate(found.hits, start=1):
            match = "" if hit.match is None else f"{hit.match:.1%}"
            rows.add_row(str(rank), match, f"{hit.similarity:.3f}", escape(hit.location))
        stdout().print(rows)
    if options.sheet is not None:
        written = write_sheet(options.sheet, target, found, opened)
        note(f"saved: {written}") if as_json else print(f"saved: {written}")
    return 0


def _choose_model(source: Source, known: Source | None) -> Source:
    """The model of the options, or the random one of the index; another model of an index needs a matching option."""
    if source.model is None and source.random is None:
        if known is not None and known.random is None:
            raise InputError(f"the index uses {known}; if you trust it, add --model {known}")
        if known is not None and known.tokenizer is not None and source.tokenizer is None:
            raise InputError(f"the index uses a tokenizer; if you trust it, add --tokenizer {known.tokenizer}")
        source = replace(source, random="tiny" if known is None else known.random)
    source.check()
    if source.random:
        note(f"THE WEIGHTS ARE RANDOM ({source}): results are meaningless. Give trained weights with --model")
    return source


def _note_skipped(reasons: Mapping[str, str], advice: str) -> None:
    for name, reason in list(reasons.items())[:_SHOWN]:
        note(f"skipped {name}: {reason}{advice}")
    if len(reasons) > _SHOWN:
        note(f"skipped {len(reasons) - _SHOWN} more; --json lists all")
