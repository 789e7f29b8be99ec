"""What the export commands share: the model that is exported, what it is compared on, and how the outcome is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from xfm_fast.cli.options import PRESETS, choice
from xfm_fast.errors import DataError, InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from xfm_fast.benchmarks.material.photographs import Collection
    from xfm_fast.config import XFMConfig
    from xfm_fast.export.manifest import Manifest
    from xfm_fast.export.reference import Examples
    from xfm_fast.models.xfm import XFM
    from xfm_fast.tokenizer import CaptionTokenizer

_PHOTOS, _CAPTIONS = 4, 48


@dataclass(frozen=True)
class Subject:
    """A model to export.

    Attributes:
        source: where its weights come from, without paths of this machine.
        tokenizer: of its captions, where one was given.
    """

    model: XFM
    source: str
    tokenizer: CaptionTokenizer | None

    @property
    def tokenizer_sha256(self) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.sha256()


def load_subject(
    checkpoint: Path | None,
    preset: str | None,
    *,
    config: Path | None = None,
    image_size: int | None = None,
    tokenizer: Path | None = None,
) -> Subject:
    """The model that the options name: weights of a checkpoint, or random ones of a preset.

    Args:
        checkpoint: official file, or a folder that `save_pretrained` wrote.
        preset: `tiny` or `base`, with random weights.
        config: sizes of an official file; those of base by default.
        image_size: position tables are interpolated to it; by default the size of the checkpoint.
        tokenizer: vocabulary of the model.

    Raises:
        InputError: both or neither of checkpoint and preset are given.
        XFMError: a file cannot be read or does not fit.
    """
    if (checkpoint is None) == (preset is None):
        raise InputError("name either --checkpoint (its weights) or --preset (random weights), one of the two")
    if preset is not None:
        choice("preset", preset, PRESETS)
    if config is not None and (checkpoint is None or checkpoint.is_dir()):
        raise InputError("--config gives the sizes of an official checkpoint file; leave it out here")
    if checkpoint is None:
        model, source = _random(preset, image_size), f"random weights of preset {preset}"
    elif checkpoint.is_dir():
        model, source = _pretrained(checkpoint, image_size), f"checkpoint {checkpoint.resolve().name}"
    else:
        model, source = _official(checkpoint, config, image_size), f"checkpoint {checkpoint.name}"
    vocabulary = None
    if tokenizer is not None:
        from xfm_fast.tokenizer import CaptionTokenizer

        vocabulary = CaptionTokenizer.from_files(tokenizer)
        vocabulary.check(model.config)
    return Subject(model.requires_grad_(False).eval(), source, vocabulary)


def _random(preset: str | None, image_size: int | None) -> XFM:
    import torch

    from xfm_fast.benchmarks.material.subjects import random_state
    from xfm_fast.config import XFMConfig
    from xfm_fast.models.xfm import XFM

    config = _resized(XFMConfig.preset(preset), image_size)  # pyright: ignore[reportArgumentType]
    heads = ("contrastive", "matching", "boxes")
    with torch.device("meta"):
        model = XFM(config, heads=heads)
    # Unlike in a fresh model nothing is zero, so that a comparison sees every term.
    model.load_state_dict(random_state(config, heads, seed=0), assign=True)
    return model


def _pretrained(folder: Path, image_size: int | None) -> XFM:
    from xfm_fast.models.xfm import XFM

    model = XFM.from_pretrained(folder)
    if image_size is not None and image_size != model.config.image_size:
        model.set_image_size(image_size)
    return model


def _official(file: Path, sizes: Path | None, image_size: int | None) -> XFM:
    from xfm_fast import checkpoint
    from xfm_fast.checkpoint.position_table import window_of
    from xfm_fast.config import XFMConfig
    from xfm_fast.models.xfm import XFM

    state = checkpoint.read_state_dict(file)
    config = XFMConfig.preset("base") if sizes is None else XFMConfig.from_official(sizes)
    table = next((value for name, value in state.items() if name.endswith(".relative_position_bias_table")), None)
    if image_size is None and table is not None:
        image_size = window_of(table) * config.patch_size
    config = _resized(config, image_size)
    ours, _ = checkpoint.to_ours(state, config)
    return XFM.from_official(state, config, heads=checkpoint.heads_in(ours))


def _resized(config: XFMConfig, image_size: int | None) -> XFMConfig:
    if image_size is None or image_size == config.image_size:
        return config
    # Masking is of no concern to an export, and its numbers need not fit every size.
    return config.replace(image_size=image_size, num_masking_patches=1, min_num_patches=1)


def say(message: str) -> None:
    """Progress, for whoever is watching."""
    if sys.stderr.isatty():
        typer.echo(f"xfm-fast: {message}", err=True)


def examples_for(subject: Subject, data: Path | None, sizes: Mapping[str, int]) -> Examples:
    """What an export with these fixed sizes is compared on; says so where it is not photographs."""
    from xfm_fast.export import verification

    examples, note = load_examples(subject, data, longest=sizes.get("length", verification.LONGEST))
    if note:
        typer.echo(f"xfm-fast: {note}", err=True)
    return examples


def load_examples(subject: Subject, data: Path | None, *, longest: int) -> tuple[Examples, str]:
    """Photographs and captions to compare on, and a note for the user (empty when there is nothing to say).

    Args:
        data: a folder of images with captions; by default the bundled photographs, and generated images where those
            are not installed.
        longest: tokens of the longest text.
    """
    from xfm_fast.benchmarks.material import photographs
    from xfm_fast.export.reference import generated_examples

    config = subject.model.config
    if data is not None:
        return _examples(photographs.from_folder(data, most=_PHOTOS), subject, longest), ""
    try:
        collection = photographs.bundled()
    except DataError as error:
        return generated_examples(config, longest=longest), f"compared on generated images, not photographs: {error}"
    return _examples(collection, subject, longest), ""


def _examples(collection: Collection, subject: Subject, longest: int) -> Examples:
    from xfm_fast.export.reference import make_examples
    from xfm_fast.tokenizer import CaptionTokenizer

    config, tokenizer = subject.model.config, subject.tokenizer
    if tokenizer is None:
        # Any ids serve to compare an export with its model.
        tokenizer = CaptionTokenizer.train_on_texts(collection.captions, config.vocab_size)
    captions = collection.texts(min(_CAPTIONS, len(collection.captions)))
    rows = tokenizer.encode_ids(captions, max(longest, 3))
    photos = range(min(_PHOTOS, len(collection.names)))
    origin = f"{len(photos)} photographs and {len(rows)} captions"
    return make_examples(collection.pixels(photos, config.image_size), rows, config, origin=origin, longest=longest)


def print_manifest(manifest: Manifest, folder: Path) -> None:
    """Tables of the files and of the comparison, and the verdict."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A pipe or a log file has no width; the tables need some.
    console = Console() if sys.stdout.isatty() else Console(width=140)

    def table(title: str, *heads: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for head in heads:
            made.add_column(head, overflow="fold")
        return made

    sizes = {record.name: record.bytes for record in manifest.files}
    title = f"{manifest.kind} {manifest.dtype} for {manifest.consumer}, {manifest.source}"
    files = table(escape(title), "graph", "file", "MB", "s", "inputs", "outputs")
    for graph in manifest.graphs:
        called = [", ".join(f"{t.name} {t.dims}" for t in tensors) for tensors in (graph.inputs, graph.outputs)]
        megabytes = sum(sizes[name] for name in graph.files) / 1e6
        files.add_row(graph.name, graph.file, f"{megabytes:.1f}", f"{graph.build_seconds:.1f}", *map(escape, called))
    console.print(files)
    if manifest.verification is not None:
        _print_verification(manifest, console, table)
    verdict = {"verified": "[green]verified[/]", "failed": "[bold red]failed[/]", "unverified": "[yellow]unverified[/]"}
    reason = f": {escape(manifest.reason)}" if manifest.reason else ""
    console.print(f"{verdict[manifest.status]}{reason} ({escape(str(folder))})", soft_wrap=True, highlight=False)


def _print_verification(manifest: Manifest, console: Console, table: Callable[..., Table]) -> None:
    from rich.markup import escape

    record = manifest.verification
    assert record is not None

    def number(value: float | None) -> str:
        return "[red]not finite[/]" if value is None else f"{value:.1e}"

    shown = table(
        escape(f"against the model, by {record.runtime}, on {record.examples}"),
        "graph", "output", "shapes", "max error", "allowed", "mean error", "least cosine", "",
    )  # fmt: skip
    for check in record.checks:
        cosine = "" if check.least_cosine is None else ("nan" if check.cosine is None else f"{check.cosine:.6f}")
        shown.add_row(
            check.graph, check.output, str(len(check.shapes)), number(check.max_error), f"{check.allowed:.1e}",
            number(check.mean_error), cosine, "ok" if check.passed else "[bold red]differs[/]",
        )  # fmt: skip
    console.print(shown)
    for ranks in record.ranks:
        console.print(
            f"ranks by {ranks.graph}: {ranks.agreement:.1%} of {ranks.candidates} candidates agree "
            f"(at least {ranks.least:.0%}; scores within {ranks.tie:.1e} are ties; {ranks.identical:.1%} identical)"
            + ("" if ranks.passed else " [bold red]differs[/]"),
            highlight=False,
        )
