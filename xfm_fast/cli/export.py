"""`xfm-fast export`: graphs of a model for other runtimes, each compared with the model before it is called done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from xfm_fast.cli.bridge import bridge

if TYPE_CHECKING:
    from xfm_fast.export.consumers import Consumer, DType
    from xfm_fast.export.manifest import Manifest

export_app = typer.Typer(
    help="Export to ONNX and engines, verified against the model. Exit code 1: the export differs from the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CHECKPOINT = typer.Option(help="Official .th/.pth, .safetensors, or a folder that save_pretrained wrote.")
PRESET = typer.Option(help="Instead of a checkpoint: random weights of tiny or base.")
CONFIG = typer.Option(help="Official YAML, or a JSON of sizes, of a checkpoint file that is not of base size.")
OUT = typer.Option(help="Folder that receives the files and manifest.json.")
DTYPE = typer.Option(help="fp32, fp16 or bf16.")
GRAPHS = typer.Option(help="vision, text, image_memory, fusion, match, with commas. [all but match]")
FIXED = typer.Option(help="Axes of one size, such as batch=1,length=40. [all dynamic]")
ALL_TOKENS = typer.Option("--all-tokens", help="fusion returns every token, not token 0.")
IMAGE_SIZE = typer.Option(min=1, help="Interpolate position tables to this size.")
TOKENIZER = typer.Option(help="RoBERTa's vocab.json and merges.txt (their folder), or a tokenizer.json.")
DATA = typer.Option(help="Folder of images with captions to verify on, instead of the photographs.")


@export_app.command()
def onnx(
    out: Annotated[Path, OUT],
    checkpoint: Annotated[Path | None, CHECKPOINT] = None,
    preset: Annotated[str | None, PRESET] = None,
    config: Annotated[Path | None, CONFIG] = None,
    dtype: Annotated[str, DTYPE] = "fp32",
    graphs: Annotated[str, GRAPHS] = "",
    consumer: Annotated[
        str, typer.Option("--for", help="onnxruntime, tensorrt, tensorrt-rtx or openvino: who reads the files.")
    ] = "onnxruntime",
    opset: Annotated[
        int | None, typer.Option(help="Of ONNX, 20 to 24; by default what the consumer profits from.")
    ] = None,
    image_size: Annotated[int | None, IMAGE_SIZE] = None,
    fixed: Annotated[str, FIXED] = "",
    all_tokens: Annotated[bool, ALL_TOKENS] = False,
    tokenizer: Annotated[Path | None, TOKENIZER] = None,
    data: Annotated[Path | None, DATA] = None,
) -> None:
    """Write ONNX files, run them, and compare them with the model."""
    from xfm_fast.cli import export_model
    from xfm_fast.export import consumers, exporting, verification

    # What is wrong with the options shows before a checkpoint is read.
    names, sizes = exporting.parse_graphs(graphs), exporting.parse_fixed(fixed)
    consumers.profile(consumer, dtype, opset)
    exporting.require_onnx()
    subject = export_model.load_subject(checkpoint, preset, config=config, image_size=image_size, tokenizer=tokenizer)
    examples = export_model.examples_for(subject, data, sizes)
    exporting.export_onnx(
        subject.model,
        out,
        consumer=cast("Consumer", consumer),
        dtype=cast("DType", dtype),
        graphs=names or None,
        opset=opset,
        fixed=sizes,
        all_tokens=all_tokens,
        source=subject.source,
        tokenizer_sha256=subject.tokenizer_sha256,
        progress=export_model.say,
    )
    export_model.say("comparing with the model")
    finish(verification.verify_export(out, subject.model, examples), out)


@export_app.command()
def verify(folder: Annotated[Path, typer.Argument(help="Folder of an export.")]) -> None:
    """Check the files of an export and compare it once more with what the model computed."""
    from xfm_fast.export import verification

    finish(verification.verify(folder), folder)


def finish(manifest: Manifest, folder: Path) -> None:
    """Show the outcome of an export; exit code 1 when it differs from the model."""
    from xfm_fast.cli import export_model

    export_model.print_manifest(manifest, folder)
    if manifest.status == "failed":
        raise typer.Exit(1)


def _commands() -> typer.Typer:
    from xfm_fast.cli import export_engines, export_packages, export_serving, export_session

    export_engines.register(export_app)
    export_packages.register(export_app)
    export_session.register(export_app)
    export_serving.register(export_app)
    return export_app


app = bridge(_commands(), "export")
