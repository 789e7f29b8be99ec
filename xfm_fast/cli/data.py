"""`xfm-fast data` and `embed`: check and convert data files, write the shapes world, embed shards."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le
from cyclopts import Parameter

from xfm_fast.cli.console import named_progress, note, progress, stdout, table
from xfm_fast.cli.options import DATA, UNFINISHED, Flat, Json, command_group
from xfm_fast.embedding import EmbedOptions, ShardReport, embed_shard, plan
from xfm_fast.encoders import EncoderSource, open_encoder
from xfm_fast.errors import DataError, InputError

if TYPE_CHECKING:
    from rich.console import Console

    from xfm_fast.tasks.checking import Report

data = command_group(
    "data",
    group=DATA,
    help="Check data files against a task, convert them, write the shapes world.",
)


@dataclass(frozen=True)
class RowOptions:
    """Fields of JSON lines and shards, and the tolerated share of broken rows.

    Attributes:
        image_key: Field of the image in JSON lines.
        caption_key: Field of the text in JSON lines.
        image_root: Folder of the images, if files contain paths instead of base64.
        tolerate_bad: Largest share of broken rows in a file.
    """

    image_key: str = "binary"
    caption_key: str = "desc"
    image_root: Path | None = None
    tolerate_bad: Annotated[float, Ge(0), Le(1)] = 0.01


@dataclass(frozen=True)
class CheckOptions:
    """The task to read the rows for.

    Attributes:
        task: pairs, regions, images, text; or a task of fine-tuning, such as retrieval or vqa.
        tokenizer: For token counts: RoBERTa's vocab.json and merges.txt, or a tokenizer.json.
        tokenized: Texts contain WordPiece's ' ##', which is removed.
    """

    task: str
    tokenizer: Path | None = None
    tokenized: bool = False


@data.command
def check(
    paths: list[str],
    /,
    *,
    options: Flat[CheckOptions],
    rows: Flat[RowOptions] = RowOptions(),
    as_json: Json = False,
) -> int:
    """Read every row and decode every image as a task would; report content, broken rows, and time and memory.

    Exit code 1: a file has more broken rows than tolerated, and training on it would stop.

    Args:
        paths: Files, folders, patterns, or several with commas.
    """
    from xfm_fast.config import XFMConfig
    from xfm_fast.tasks import checking
    from xfm_fast.tokenizer import CaptionTokenizer

    tokenizer = None
    if options.tokenizer is not None:
        tokenizer = CaptionTokenizer.from_files(options.tokenizer)
    settings = checking.Options(
        config=XFMConfig.preset("base"),
        tokenizer=tokenizer,
        tokenized=options.tokenized,
        max_problems=sys.maxsize if as_json else 20,
        **vars(rows),
    )
    with progress("checking") as advance:
        report = checking.check(paths, options.task, settings, progress=advance)
    if as_json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        _print_report(report, stdout())
    return 0 if report.ok else 1


@data.command(name="convert")
def convert_rows(
    source: list[str],
    destination: Path,
    /,
    *,
    samples: Annotated[int, Ge(1)] = 10_000,
    rows: Flat[RowOptions] = RowOptions(),
) -> None:
    """Convert JSON lines to WebDataset shards, or shards to JSON lines, without loss.

    Args:
        source: JSON-lines files or WebDataset shards; folders, patterns.
        destination: Folder of the shards, or a .jsonl file; must not exist.
        samples: Maximum samples per shard.
    """
    from xfm_fast.data.converting import to_lines, to_shards
    from xfm_fast.data.streams import Quarantine
    from xfm_fast.data.tables import LINE_SUFFIXES

    bad = Quarantine(None, tolerate_bad=rows.tolerate_bad, setting="--tolerate-bad")
    keys: Any = {
        "image_key": rows.image_key,
        "caption_key": rows.caption_key,
        "image_root": rows.image_root,
    }
    if destination.suffix.lower() in LINE_SUFFIXES:
        done = to_lines(source, destination, **keys, quarantine=bad)
    else:
        done = to_shards(source, destination, **keys, quarantine=bad, samples_per_shard=samples)
    print(f"{done.rows} rows in {len(done.files)} file{'s' * (len(done.files) > 1)}: {destination}")
    if done.skipped:
        print(f"{done.skipped} broken rows left out; xfm-fast data check --json lists them")
    for suffix, times in sorted(done.ignored.items()):
        print(f"{times} files .{suffix} left out: they are neither image, text nor JSON")


@data.command
def shapes(
    out: Path,
    /,
    *,
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 0,
    train: Annotated[int, Ge(1)] = 10_000,
) -> None:
    """Write the shapes world: scenes, captions, regions, questions and statements in the official formats.

    Args:
        out: Folder of the world; must not contain anything else.
        seed: Random seed of the world.
        train: Training scenes; validation and test have a twentieth as many, with combinations of
            colour and shape that training lacks.
    """
    from xfm_fast.data.shapes import write_world

    held_out = max(1, train // 20)
    world = write_world(out, seed=seed, images={"train": train, "val": held_out, "test": held_out})
    print(f"{out}: {sum(world['rows'].values()):,} rows in {len(world['rows'])} files")


def embed(
    shards: Annotated[list[str], Parameter(name="SHARDS")],
    /,
    *,
    out: str,
    shard: str = "0/1",
    options: Flat[EmbedOptions] = EmbedOptions(),
    source: Flat[EncoderSource] = EncoderSource(),
) -> int:
    """Embed shards of texts or images, each to a Parquet file with id, text and embedding.

    Finished files are skipped, so an interrupted command resumes. Processes of torchrun share the
    shards. Rows that cannot be embedded have a null.

    Args:
        shards: Parquet, CSV, TSV or JSON-lines files or WebDataset archives; patterns, folders, or .txt
            files that list them; paths or URLs.
        out: Folder of the Parquet files, a path or URL.
        shard: I/N embeds every Nth shard from the Ith on, for job arrays; I counts from 0.
    """
    import torch

    from xfm_fast.training.distributed import stop_on_signal

    share = re.fullmatch(r"(\d+)/(\d+)", shard)
    if share is None or int(share[1]) >= int(share[2]):
        raise InputError(f"--shard {shard}: give I/N with I from 0 to N - 1, such as 0/8")
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    start, step = int(share[1]) * processes + rank, int(share[2]) * processes
    items = plan(shards, out)[start::step]
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    encoder = open_encoder(source)
    reports: list[ShardReport] = []
    with stop_on_signal() as stop, named_progress() as show:
        for index, item in enumerate(items):

            def advance(rows: int, index: int = index, name: str = item["shard"]) -> None:
                show(f"{name}: {rows:,} rows", index, len(items))
                if stop.is_set():
                    raise KeyboardInterrupt

            try:
                reports.append(embed_shard(encoder, **item, options=options, progress=advance))
            except DataError as error:
                note(str(error))
            except KeyboardInterrupt:
                note("stopped; the same command resumes")
                return UNFINISHED
    for report in reports:
        if report.missing:
            note(f"{report.missing:,} rows have no embedding, such as {report.reason}")
    rows = sum(report.rows for report in reports)
    before = sum(report.existed for report in reports)
    print(f"embedded: {rows:,} rows of {len(reports):,} shards, {before:,} of them before: {out}")
    if len(reports) < len(items):
        raise DataError(
            f"{len(items) - len(reports)} of {len(items)} shards are not embedded; mend them, and run the command again"
        )
    return 0


def _print_report(report: Report, console: Console) -> None:
    from rich.markup import escape

    files = table(f"files for {report.task}", "file", "rows", "broken", "")
    over = {file.file for file in report.over_limit}
    for file in report.files:
        share = ""
        if file.file in over:
            share = f"[red]{file.broken / file.rows:.1%}, over {report.tolerate_bad:.1%}[/]"
        files.add_row(escape(file.file), f"{file.rows:,}", f"{file.broken:,}", share)
    console.print(files)

    facts = table("content", "", "")
    facts.add_row(
        "rows",
        f"{report.rows:,}, of which {report.broken:,} broken and {report.duplicates:,} repeated",
    )
    if report.texts or report.tokens:
        facts.add_row("words of a text", _histogram(report.words))
        if report.tokens:
            facts.add_row("tokens of a text", _histogram(report.tokens))
        facts.add_row(
            "texts longer than the task reads",
            f"{report.cut:,} of {max(report.texts, report.tokens.total()):,}",
        )
    if report.images:
        sizes = report.as_dict()["images"]
        sides = [
            f"{name} {sizes[name]['least']:.0f} to {sizes[name]['most']:.0f}"
            for name in ("width", "height")
        ]
        medians = "×".join(f"{sizes[name]['median']:.0f}" for name in ("width", "height"))
        formats = ", ".join(f"{times:,} {name}" for name, times in report.formats.most_common())
        facts.add_row("images", f"{formats}; {', '.join(sides)} pixels, median {medians}")
        if report.turned or report.transparent:
            facts.add_row(
                "images read upright, on white", f"{report.turned:,}, {report.transparent:,}"
            )
    if report.regions:
        facts.add_row("regions of an image", _histogram(report.regions))
        facts.add_row("regions that cannot be used", f"{report.unusable_regions:,}")
    if report.seconds_per_row and report.hours_per_epoch is not None:
        rate = f"{1 / report.seconds_per_row:,.0f} rows/s, {report.hours_per_epoch:,.2g} hours for an epoch"
        facts.add_row("one training worker on this machine", rate)
        facts.add_row("memory of a batch of 64 rows", f"{64 * report.bytes_per_row / 1e6:,.1f} MB")
    console.print(facts)

    if report.problems:
        broken = table(
            f"the first {len(report.problems)} of {report.broken:,} broken rows",
            "file",
            "row",
            "reason",
        )
        for problem in report.problems:
            broken.add_row(escape(problem.file), escape(str(problem.row)), escape(problem.reason))
        console.print(broken)
    verdict = "[green]good[/]"
    if not report.ok:
        verdict = "[red]not usable[/]: mend the files or raise --tolerate-bad"
    console.print(f"{report.task}: {verdict}")


def _histogram(counts: Counter[int]) -> str:
    """Format the range, the median, and the middle 90% of a histogram."""
    total, below, quantiles = counts.total(), 0, []
    for value, times in sorted(counts.items()):
        while len(quantiles) < 3 and below + times > (0.05, 0.5, 0.95)[len(quantiles)] * total:
            quantiles.append(value)
        below += times
    if not quantiles:
        return "none"
    low, middle, high = quantiles
    return f"{min(counts)} to {max(counts)}, median {middle}, nine of ten from {low} to {high}"
