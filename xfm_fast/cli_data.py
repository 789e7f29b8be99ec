"""`xfm-fast data`: check and convert data files, and write the shapes world."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xfm_fast.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from xfm_fast.data.checking import Report

data_app = typer.Typer(
    help="Check data files against a task, convert them, write the shapes world.", no_args_is_help=True
)

_IMAGE_KEY = typer.Option(help="Field of the image in line JSON.")
_CAPTION_KEY = typer.Option(help="Field of the text in line JSON.")
_IMAGE_ROOT = typer.Option(help="Folder of the images, where files hold paths instead of base64.")
_TOLERATE = typer.Option(min=0.0, max=1.0, help="Largest share of broken rows in a file.")


@data_app.command()
def check(
    paths: Annotated[list[str], typer.Argument(help="Files, folders, patterns, or several with commas.")],
    task: Annotated[
        str,
        typer.Option(
            help="pairs, regions, images, text; or retrieval, vqa, nlvr2, grounding, captioning (JSON arrays)."
        ),
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(help="To count tokens: RoBERTa's vocab.json and merges.txt, or a tokenizer.json.")
    ] = None,
    image_key: Annotated[str, _IMAGE_KEY] = "binary",
    caption_key: Annotated[str, _CAPTION_KEY] = "desc",
    image_root: Annotated[Path | None, _IMAGE_ROOT] = None,
    image_size: Annotated[int, typer.Option(min=32, help="Of the model, for the estimates.")] = 224,
    batch_size: Annotated[int, typer.Option(min=1, help="Of the memory estimate.")] = 96,
    tolerate_bad: Annotated[float, _TOLERATE] = 0.01,
    list_first: Annotated[int, typer.Option(min=0, help="How many broken rows to list.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Read every row and decode every image as a task would; say what is there, what is broken, what it will cost.

    Exit code 1: a file has more broken rows than are tolerated, and training on it would stop.
    """
    from rich.console import Console
    from rich.progress import Progress

    from xfm_fast.config import XFMConfig
    from xfm_fast.data import checking
    from xfm_fast.tokenizer import CaptionTokenizer

    # The official share of hidden patches, at any size.
    hidden = max(1, 75 * (image_size // 16) ** 2 // 196)
    options = checking.Options(
        config=XFMConfig.preset(
            "base", image_size=image_size, num_masking_patches=hidden, min_num_patches=min(16, hidden)
        ),
        batch_size=batch_size,
        tokenizer=None if tokenizer is None else CaptionTokenizer.from_files(tokenizer),
        image_key=image_key,
        caption_key=caption_key,
        image_root=image_root,
        tolerate_bad=tolerate_bad,
        most_problems=list_first,
    )
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("checking")
        report = checking.check(
            paths, task, options, progress=lambda done, of: progress.update(bar, completed=done, total=of)
        )
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        # A pipe or a log file has no width; the table needs some.
        _print_report(report, Console() if sys.stdout.isatty() else Console(width=140))
    if not report.ok:
        raise typer.Exit(1)


@data_app.command()
def convert(
    source: Annotated[list[str], typer.Argument(help="Line-JSON files or WebDataset shards; folders, patterns.")],
    destination: Annotated[Path, typer.Argument(help="Folder of the shards, or file of the lines; must not exist.")],
    to: Annotated[str, typer.Option(help="webdataset or lines.")],
    image_key: Annotated[str, _IMAGE_KEY] = "binary",
    caption_key: Annotated[str, _CAPTION_KEY] = "desc",
    image_root: Annotated[Path | None, _IMAGE_ROOT] = None,
    samples: Annotated[int, typer.Option(min=1, help="Most samples in a shard.")] = 10_000,
    megabytes: Annotated[int, typer.Option(min=1, help="A shard ends when it is this large.")] = 1024,
    tolerate_bad: Annotated[float, _TOLERATE] = 0.01,
    quarantine: Annotated[
        Path | None, typer.Option(help="File that lists the broken rows, which are left out.")
    ] = None,
) -> None:
    """Turn line JSON into WebDataset shards, or shards into line JSON; there and back is the identity."""
    from xfm_fast.data.converting import to_lines, to_shards
    from xfm_fast.data.quarantine import Quarantine

    if to not in ("webdataset", "lines"):
        raise DataError(f"to {to!r} is unknown; choose webdataset or lines")
    bad = Quarantine(quarantine, tolerate_bad=tolerate_bad, setting="--tolerate-bad")
    if to == "webdataset":
        done = to_shards(
            source, destination, image_key=image_key, caption_key=caption_key, image_root=image_root, quarantine=bad,
            samples_per_shard=samples, bytes_per_shard=megabytes << 20,
        )  # fmt: skip
    else:
        done = to_lines(
            source, destination, image_key=image_key, caption_key=caption_key, image_root=image_root, quarantine=bad
        )
    typer.echo(f"{done.rows} rows in {len(done.files)} file{'s' * (len(done.files) > 1)}: {destination}")
    if done.skipped:
        listed = f", listed in {quarantine}" if quarantine else "; --quarantine FILE lists them"
        typer.echo(f"{done.skipped} broken rows left out{listed}")
    for suffix, times in sorted(done.ignored.items()):
        typer.echo(f"{times} files .{suffix} left out: they are neither image, text nor JSON")


@data_app.command()
def shapes(
    destination: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder of the world; must not hold anything else.")
    ],
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another world.")] = 0,
    train: Annotated[int, typer.Option(min=1, help="Scenes to train on.")] = 10_000,
    val: Annotated[int, typer.Option(min=1, help="Scenes to choose by.")] = 500,
    test: Annotated[int, typer.Option(min=1, help="Scenes to report on; their combinations occur nowhere else.")] = 500,
) -> None:
    """Write the shapes world: scenes, captions, regions, questions and statements in the official formats."""
    from xfm_fast.data.shapes import write_world

    world = write_world(destination, seed=seed, images={"train": train, "val": val, "test": test})
    typer.echo(f"{destination}: {sum(world['rows'].values()):,} rows in {len(world['rows'])} files")


def _print_report(report: Report, console: Console) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    def table(title: str, *heads: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for head in heads:
            made.add_column(head, overflow="fold")
        return made

    files = table(f"files for {report.task}", "file", "rows", "broken", "")
    over = {each.file for each in report.over_limit}
    for each in report.files:
        share = f"[red]{each.broken / each.rows:.1%}, over {report.tolerate_bad:.1%}[/]" if each.file in over else ""
        files.add_row(escape(each.file), f"{each.rows:,}", f"{each.broken:,}", share)
    console.print(files)

    facts = table("content", "", "")
    facts.add_row("rows", f"{report.rows:,}, of which {report.broken:,} broken and {report.duplicates:,} repeated")
    if report.texts or report.tokens:
        facts.add_row("words of a text", _histogram(report.words))
        if report.tokens:
            facts.add_row("tokens of a text", _histogram(report.tokens))
        facts.add_row(
            "texts longer than the task reads", f"{report.cut:,} of {max(report.texts, report.tokens.total()):,}"
        )
    if report.images:
        found = report.as_dict()["images"]
        sides = [f"{name} {found[name]['least']:.0f} to {found[name]['most']:.0f}" for name in ("width", "height")]
        medians = "×".join(f"{found[name]['median']:.0f}" for name in ("width", "height"))
        formats = ", ".join(f"{times:,} {name}" for name, times in report.formats.most_common())
        facts.add_row("images", f"{formats}; {', '.join(sides)} pixels, median {medians}")
    if report.regions:
        facts.add_row("regions of an image", _histogram(report.regions))
        facts.add_row("regions that cannot be used", f"{report.unusable_regions:,}")
    console.print(facts)

    cost = table("estimates", "", "")
    cost.add_row(f"memory of a batch of {report.batch_size}", f"{report.batch_bytes / 1e6:,.1f} MB in float32")
    if report.seconds_per_item and report.hours_per_epoch is not None:
        rate = f"{1 / report.seconds_per_item:,.0f} rows/s, {report.hours_per_epoch:,.2f} hours for an epoch"
        cost.add_row("one worker on this machine", rate)
    console.print(cost)

    if report.problems:
        broken = table(f"the first {len(report.problems)} of {report.broken:,} broken rows", "file", "row", "reason")
        for problem in report.problems:
            broken.add_row(escape(problem.file), escape(str(problem.row)), escape(problem.reason))
        console.print(broken)
    word = "[green]good[/]" if report.ok else "[red]not usable[/]: mend the files or raise --tolerate-bad"
    console.print(f"{report.task}: {word}")


def _histogram(counts: Counter[int]) -> str:
    """Median and range, and the middle nine tenths, of a histogram."""
    total, below, marks = counts.total(), 0, []
    for value, times in sorted(counts.items()):
        while len(marks) < 3 and below + times > (0.05, 0.5, 0.95)[len(marks)] * total:
            marks.append(value)
        below += times
    if not marks:
        return "none"
    low, middle, high = marks
    return f"{min(counts)} to {max(counts)}, median {middle}, nine of ten from {low} to {high}"


def register(parent: typer.Typer) -> None:
    """Adds `data` to the one command line."""
    parent.add_typer(data_app, name="data")
