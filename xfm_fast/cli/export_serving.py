"""`xfm-fast export model-repository`: a folder that NVIDIA's Triton Inference Server serves an export from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from xfm_fast.export.model_repository.writing import Receipt

OUT = typer.Option(help="The repository; must not be there yet, or see --overwrite.")
BACKEND = typer.Option(help="auto, tensorrt, onnxruntime, or python: a session of this package in Triton.")
TOKENIZER = typer.Option(help="RoBERTa's vocab.json and merges.txt (their folder), or a tokenizer.json; for rank.")
PIPELINE = typer.Option(help="rank: a model from JPEG files and captions to scores too; graphs: none.")
DEVICE = typer.Option(help="auto, cpu or gpu: where models run.")
BATCH = typer.Option(min=1, help="Rows of a batch, for graphs that take any number.")
DELAY = typer.Option(min=0, help="Microseconds that a request may wait for others.")
CACHE = typer.Option(min=0, help="Megabytes of image memories that the rank model keeps between requests.")


def model_repository(
    folder: Annotated[Path, typer.Argument(help="Folder of an export.")],
    out: Annotated[Path, OUT],
    backend: Annotated[str, BACKEND] = "auto",
    tokenizer: Annotated[Path | None, TOKENIZER] = None,
    pipeline: Annotated[str, PIPELINE] = "rank",
    prefix: Annotated[str, typer.Option(help="Of the names of the models.")] = "xfm",
    device: Annotated[str, DEVICE] = "auto",
    most_batch: Annotated[int, BATCH] = 32,
    queue_delay: Annotated[int, DELAY] = 500,
    instances: Annotated[int, typer.Option(min=1, help="Of each graph's model.")] = 1,
    most_images: Annotated[int, typer.Option(min=1, help="Of a rank request.")] = 16,
    most_captions: Annotated[int, typer.Option(min=1, help="Of a rank request.")] = 1024,
    cache_mb: Annotated[int, CACHE] = 1024,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier repository.")] = False,
) -> None:
    """Write a model repository of NVIDIA's Triton Inference Server from an export."""
    from xfm_fast.cli import export_model
    from xfm_fast.export.model_repository.planning import RepositoryOptions
    from xfm_fast.export.model_repository.ranking import RankLimits
    from xfm_fast.export.model_repository.writing import check_free, write_model_repository
    from xfm_fast.tokenizer import CaptionTokenizer

    options = RepositoryOptions(
        backend=backend,  # pyright: ignore[reportArgumentType]
        pipeline=pipeline,  # pyright: ignore[reportArgumentType]
        prefix=prefix,
        device=device,  # pyright: ignore[reportArgumentType]
        most_batch=most_batch,
        queue_delay=queue_delay,
        instances=instances,
        cache_bytes=cache_mb << 20,
        limits=RankLimits(images=most_images, captions=most_captions),
    )
    options.check()
    check_free(out, overwrite)
    vocabulary = None if tokenizer is None else CaptionTokenizer.from_files(tokenizer)
    receipt = write_model_repository(
        folder, out, options, tokenizer=vocabulary, overwrite=overwrite, progress=export_model.say
    )
    _print(receipt, out)


def _print(receipt: Receipt, out: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A pipe or a log file has no width; the table needs some.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    title = f"{receipt.kind} {receipt.dtype}, {receipt.source} ({receipt.status})"
    console.print(f"[bold]{escape(title)}[/]", soft_wrap=True, highlight=False)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head, side in (("model", "left"), ("backend", "left"), ("most rows", "right"), ("MB", "right")):
        shown.add_column(head, justify=side)  # pyright: ignore[reportArgumentType]
    for model in receipt.models:
        size = sum(file.bytes for file in receipt.files if file.name.startswith(f"{model.name}/"))
        shown.add_row(model.name, model.backend, str(model.max_batch_size or "as sent"), f"{size / 1e6:.1f}")
    console.print(shown)
    typer.echo(f"serve it with: tritonserver --model-repository={out}")


def register(export_app: typer.Typer) -> None:
    """Add the command to `export`."""
    export_app.command("model-repository")(model_repository)
