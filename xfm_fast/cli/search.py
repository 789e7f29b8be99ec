"""`xfm-fast index` and `search`: find your own images and texts by text or by image."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le
from cyclopts import Parameter
from cyclopts import default_name_transform as dashes

from xfm_fast.cli.console import first_process, note, progress, stdout, table
from xfm_fast.cli.options import UNFINISHED, Flat, Json
from xfm_fast.errors import InputError, XFMError
from xfm_fast.loading import EncoderSource, Source

_SHOWN = 5
# Characters of a text in a table.
_SNIPPET = 80
# Match probabilities that differ by less, away from 0 and 1, indicate an untrained head.
_ALIKE = 0.01
# After one process failed, the others end by themselves within these seconds, unless they wait for
# it to start.
_PATIENCE_S, _POLL_S = 10.0, 0.05
_EXPECTED = (None, 0, UNFINISHED)


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
class BuildOptions(IndexOptions):
    """The index, and how it is built.

    Attributes:
        column: Column of the texts in a table. [text, caption or title, if it lists no images]
        workers: Processes of this machine that share the work.
        check: Compare the whole index with its checksums first.
    """

    column: str | None = None
    workers: Annotated[int, Ge(1), Le(256)] = 1
    check: bool = False


@dataclass(frozen=True)
class SearchOptions(IndexOptions):
    """What to search for, and how to show it.

    Attributes:
        top: Images or texts to show.
        where: Value that a column of the table must have, as brand=acme; may be repeated.
        glob: Pattern of names, as 'trip/*'.
        candidates: Nearest images that X-FM's fusion encoder re-ranks; 0 ranks by features only.
        rank: Order of the candidates: match of the fusion encoder, similarity of features, or sum
            (match logit + similarity). [as recorded by X-FM's run, else match; similarity of other models]
        sheet: Contact sheet to write, a page .html.
    """

    top: Annotated[int, Ge(1)] = 12
    where: tuple[str, ...] = ()
    glob: str | None = None
    candidates: Annotated[int, Ge(0)] = 64
    rank: Literal["match", "similarity", "sum"] | None = None
    sheet: Path | None = None


def index(
    collection: Annotated[Path, Parameter(name="FOLDER|FILE")],
    /,
    *,
    options: Flat[BuildOptions] = BuildOptions(),
    source: Flat[EncoderSource] = EncoderSource(),
    as_json: Json = False,
) -> int:
    """Index images or texts for search, or update the index: only what is new or changed is read.

    The model is any of sentence-transformers (texts; CLIP: texts or images), or X-FM. An
    interrupted command resumes. Unreadable files are listed and skipped. Several processes share
    the work, with the same result: --workers, or torchrun --nproc-per-node=8 -m xfm_fast.cli index
    FOLDER.

    Args:
        collection: Folder of images, with captions next to them or in captions.csv; CSV, JSON or
            JSON lines with image and optional caption; JSON lines with binary and desc; WebDataset
            shard. Or folder of .txt and .md files; CSV, TSV or JSON lines with text (--column).
    """
    from xfm_fast.search import build_index, index_folder, open_encoder, open_index
    from xfm_fast.search.store import INDEX_FILE
    from xfm_fast.training.distributed import join_processes, stop_on_signal

    target = options.index or index_folder(collection)
    is_new = not (target / INDEX_FILE).is_file()
    if options.check and not is_new and first_process():
        open_index(target).verify()
    source = _choose_model(source, None if is_new else target)
    settings = vars(source) | vars(options) | {"workers": None, "check": None}
    if options.workers > 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        arguments = [
            f"--{dashes(name)}={value}" for name, value in settings.items() if value is not None
        ]
        return _run_processes(
            options.workers, ["index", *arguments, *["--json"] * as_json, "--", str(collection)]
        )
    with (
        join_processes(source.device) as processes,
        stop_on_signal() as stop,
        progress("indexing") as advance,
    ):
        model = processes.together(lambda: open_encoder(source))
        try:
            report = build_index(
                collection,
                model,
                target,
                images=options.images,
                column=options.column,
                processes=processes,
                progress=advance,
                stop=stop,
            )
        except RuntimeError as error:
            if "closed by peer" in str(error) or "reset by peer" in str(error):
                raise XFMError(
                    "another process of this command has ended; the same command resumes"
                ) from error
            raise
    if not processes.first:
        return UNFINISHED if report.interrupted else 0
    if report.interrupted:
        note("stopped; the same command resumes")
        return UNFINISHED
    if as_json:
        print(
            json.dumps(
                asdict(report) | {"folder": str(report.folder), "random": source.random is not None}
            )
        )
        return 0
    _note_skipped(report.faults, "")
    skipped = f", {len(report.faults):,} left out" if report.faults else ""
    if report.truncated:
        skipped += f"; of {report.truncated:,} the model reads only the beginning"
    print(
        f"indexed: {report.entries:,} {report.modality}s, {report.added:,} of them read now, "
        f"{report.removed:,} gone{skipped}"
    )
    command = f"xfm-fast search {collection} ..."
    for name in ("model", "config", "image_size", "tokenizer", "index", "images"):
        if settings[name] is not None:
            command += f" --{dashes(name)} {settings[name]}"
    print(f"saved: {report.folder}; try it: {command}")
    return 0


def search(
    collection: Annotated[Path, Parameter(name="FOLDER|FILE")],
    query: Annotated[str, Parameter(name="TEXT|IMAGE")],
    /,
    *,
    options: Flat[SearchOptions] = SearchOptions(),
    source: Flat[EncoderSource] = EncoderSource(),
    as_json: Json = False,
) -> int:
    """Search indexed images or texts by a text, or by a similar image.

    Args:
        collection: The indexed folder or file.
        query: A text or an image file; an argument that is not an existing file is a text.
    """
    from rich.markup import escape

    from xfm_fast.search import open_encoder, open_index, write_sheet
    from xfm_fast.search import search as find

    if options.sheet is not None and options.sheet.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--sheet {options.sheet}: a contact sheet is a page; name it .html")
    where = {}
    for condition in options.where:
        column, is_condition, value = condition.partition("=")
        if not is_condition:
            raise InputError(f"--where {condition}: give a column and its value, as brand=acme")
        if where.setdefault(column, value) != value:
            raise InputError(f"--where {condition}: {column} is {where[column]} already; give one")
    opened = open_index(collection, options.index, images=options.images)
    source = _choose_model(source, opened.folder)
    target = Path(query) if os.path.isfile(query) else query
    result = find(
        opened,
        open_encoder(source),
        target,
        top=options.top,
        candidates=options.candidates,
        rank=options.rank,
        where=where,
        glob=options.glob,
    )
    matches = [hit.match for hit in result.hits if hit.match is not None]
    if len(matches) > 1 and 0.1 < min(matches) <= max(matches) < min(0.9, min(matches) + _ALIKE):
        note("match scores hardly differ, as from an untrained head; try --rank similarity")
    _note_skipped(result.lost, "; index again")
    if as_json:
        rows = [
            {"rank": rank, "path": hit.location, "caption": hit.entry.caption}
            | {"fields": hit.entry.fields}
            | {name: getattr(hit, name) for name in ("match", "similarity", "score")}
            for rank, hit in enumerate(result.hits, start=1)
        ]
        print(json.dumps({"query": query, "random": source.random is not None, "hits": rows}))
    else:
        headings = ("", "match", "similarity")
        rows = table("", *headings, opened.modality, "", right=headings)
        for rank, hit in enumerate(result.hits, start=1):
            match = "" if hit.match is None else f"{hit.match:.1%}"
            snippet = " ".join((hit.entry.caption or "").split())[:_SNIPPET]
            scores = (str(rank), match, f"{hit.similarity:.3f}")
            rows.add_row(*scores, escape(hit.location), escape(snippet))
        stdout().print(rows)
    if options.sheet is not None:
        written = write_sheet(options.sheet, target, result, opened)
        note(f"saved: {written}") if as_json else print(f"saved: {written}")
    return 0


def _run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run a command in several processes, as torchrun does; returns the exit code."""
    from xfm_fast.benchmarks.machine import allowed_cores
    from xfm_fast.training.distributed import stop_on_signal

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"OMP_NUM_THREADS": str(max(1, allowed_cores() // count))} | os.environ
    common |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ExitStack() as stack:
        # Rank 0 prints, also the failures of processes that it is connected to.
        errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, count)]
        stop = stack.enter_context(stop_on_signal())
        children: list[subprocess.Popen[bytes]] = []
        failed: int | None = None
        try:
            for rank, file in enumerate([None, *errors]):
                command = [sys.executable, "-m", "xfm_fast.cli", *arguments]
                environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                output = None if rank == 0 else subprocess.DEVNULL
                # Ctrl-C reaches this session only, so that children get one signal.
                child = subprocess.Popen(
                    command, env=environment, stdout=output, stderr=file, start_new_session=True
                )
                children.append(child)
            signalled, deadline = False, math.inf
            while None in [child.poll() for child in children] and time.monotonic() < deadline:
                if signalled:
                    time.sleep(_POLL_S)
                elif stop.wait(_POLL_S):
                    signalled = True
                    for child in children:
                        child.send_signal(signal.SIGTERM)
                for rank, child in enumerate(children):
                    if failed is None and child.returncode not in _EXPECTED:
                        failed, deadline = rank, time.monotonic() + _PATIENCE_S
        finally:
            for child in children:
                child.kill()
                child.wait()
        code = 0 if failed is None else children[failed].returncode
        if code < 0:
            raise XFMError(
                f"process {failed} of {count} was killed by signal {-code}; the same command resumes, with fewer "
                "--workers if memory ran out"
            )
        if failed and children[0].returncode < 0:
            errors[failed - 1].seek(0)
            lines = errors[failed - 1].read().decode(errors="replace").strip().splitlines()
            reason = lines[-1].removeprefix("xfm-fast: ") if lines else f"exit code {code}"
            raise XFMError(f"process {failed} of {count} could not start: {reason}")
        return code or children[0].returncode


def _choose_model(source: EncoderSource, index: Path | None) -> EncoderSource:
    """Return the model of the options, or the random one of the index in a folder."""
    from xfm_fast.search import open_index

    if source.model is None and source.random is None:
        recorded = Source() if index is None else open_index(index).model
        if recorded.model is not None:
            raise InputError(f"the index uses {recorded}; if you trust it, add --model {recorded}")
        if recorded.random is None:
            raise InputError(
                "give the model as --model: a model of sentence-transformers or an X-FM: a run, a folder of weights, a "
                "Hub name or an export"
            )
        if recorded.tokenizer is not None and source.tokenizer is None:
            raise InputError(
                f"the index uses a tokenizer; if you trust it, add --tokenizer {recorded.tokenizer}"
            )
        source = replace(source, random=recorded.random)
    source.check()
    if source.random and first_process():
        note(
            f"THE WEIGHTS ARE RANDOM ({source}): results are meaningless. Give trained weights with --model"
        )
    return source


def _note_skipped(reasons: Mapping[str, str], advice: str) -> None:
    for name, reason in list(reasons.items())[:_SHOWN]:
        note(f"skipped {name}: {reason}{advice}")
    if len(reasons) > _SHOWN:
        note(f"skipped {len(reasons) - _SHOWN} more; --json lists all")
