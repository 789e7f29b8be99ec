"""`xfm-fast export aoti`: a package of each graph, compiled by PyTorch for this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from xfm_fast.cli import export

if TYPE_CHECKING:
    from xfm_fast.export.consumers import DType

DEVICE = typer.Option(help="cpu or cuda: where the packages run, which is this machine.")


def aoti(
    out: Annotated[Path, export.OUT],
    checkpoint: Annotated[Path | None, export.CHECKPOINT] = None,
    preset: Annotated[str | None, export.PRESET] = None,
    config: Annotated[Path | None, export.CONFIG] = None,
    dtype: Annotated[str, export.DTYPE] = "fp32",
    graphs: Annotated[str, export.GRAPHS] = "",
    device: Annotated[str, DEVICE] = "cpu",
    image_size: Annotated[int | None, export.IMAGE_SIZE] = None,
    fixed: Annotated[str, export.FIXED] = "",
    all_tokens: Annotated[bool, export.ALL_TOKENS] = False,
    tokenizer: Annotated[Path | None, export.TOKENIZER] = None,
    data: Annotated[Path | None, export.DATA] = None,
) -> None:
    """Compile AOTInductor packages, run them, and compare them with the model."""
    from xfm_fast.cli import export_model
    from xfm_fast.export import exporting, package_target, packages, verification

    # What is wrong with the options shows before a checkpoint is read.
    names, sizes = exporting.parse_graphs(graphs), exporting.parse_fixed(fixed)
    package_target.check_compiling(device, dtype)
    subject = export_model.load_subject(checkpoint, preset, config=config, image_size=image_size, tokenizer=tokenizer)
    examples = export_model.examples_for(subject, data, sizes)
    packages.export_packages(
        subject.model,
        out,
        dtype=cast("DType", dtype),
        device=device,
        graphs=names or None,
        fixed=sizes,
        all_tokens=all_tokens,
        source=subject.source,
        tokenizer_sha256=subject.tokenizer_sha256,
        progress=export_model.say,
    )
    export_model.say("comparing with the model")
    export.finish(verification.verify_export(out, subject.model, examples), out)


def register(export_app: typer.Typer) -> None:
    """Add the command to `export`."""
    export_app.command()(aoti)
