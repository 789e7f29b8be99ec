"""A model repository: plan the models, write them to a temporary folder, and rename it into place with a receipt."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from xfm_fast import __version__
from xfm_fast.checkpoint.files import sync_folder, write_bytes
from xfm_fast.documents import advice, read_json
from xfm_fast.errors import ExportError, InputError, StorageError
from xfm_fast.models.processor import find_tokenizer
from xfm_fast.tokenizer import CaptionTokenizer

from ..manifest import AxisRecord, FileRecord, GraphRecord, Kind, Manifest, Status, commit, record_files
from ..pipeline import Progress, prepare_folder, silent
from ..request import DEFAULT_GRAPHS, RepositoryOptions
from ..slots import graph_slots, largest
from .configs import PLATFORMS, graph_config, most_batch, rank_config, render

RECEIPT_FILE = "repository.json"
"""Next to the folders of the models, where Triton does not look."""

TOKENIZER_FILE = "tokenizer.json"

_RANK_SCRIPT = f"from {__package__}.rank import TritonPythonModel as TritonPythonModel\n"
# Captions are truncated to this length in the official evaluation.
_OFFICIAL_TOKENS = 40
# Configurations and vocabulary.
_ROOM = 8 << 20


class ModelReceipt(BaseModel):
    """A model, its platform, and the rows that Triton may batch (0: no batching)."""

    name: str
    platform: str
    max_batch_size: int


class Receipt(BaseModel):
    """The origin and the files of a repository, by path."""

    created: str
    xfm_fast: str
    commit: str | None
    kind: Kind
    dtype: str
    source: str
    weights_sha256: str
    tokenizer_sha256: str | None
    status: Status
    models: list[ModelReceipt]
    files: list[FileRecord]

    @classmethod
    def load(cls, folder: str | Path) -> Receipt:
        """Read the receipt of a repository; raises `StorageError` where it is missing or damaged."""
        path = Path(folder) / RECEIPT_FILE
        try:
            return cls.model_validate(read_json(path))
        except OSError as error:
            raise StorageError(f"{path} cannot be read ({error.strerror or error}); choose another folder") from None
        except ValueError as error:
            reason = advice(error.errors()[0]) if isinstance(error, ValidationError) else error
            raise StorageError(f"{path} is damaged ({reason}); choose another folder") from None


@dataclass(frozen=True)
class PlannedModel:
    """A model of the repository: that of a graph, or `rank` with the manifest of its graphs."""

    name: str
    config: dict[str, Any]
    graph: GraphRecord | None = None
    manifest: Manifest | None = None


def write_model_repository(
    folder: str | Path,
    out: str | Path,
    options: RepositoryOptions | None = None,
    *,
    tokenizer: CaptionTokenizer | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Receipt:
    """Write a repository with a model for every graph of an export and, by default, `rank` over them."""
    folder, out = Path(folder), Path(out)
    options = options or RepositoryOptions()
    options.check()
    export, repository = folder.resolve(), out.resolve()
    if export == repository or export in repository.parents or repository in export.parents:
        raise InputError(f"{out} and the export {folder} contain each other; choose a separate folder")
    check_free(out, overwrite)
    progress("comparing the export with its manifest")
    manifest = Manifest.load(folder)
    if tokenizer is None and options.pipeline == "rank":
        tokenizer = find_tokenizer(folder, manifest.xfm_config)
    models = plan_models(manifest, options, tokenizer)
    served = {name for model in models if model.graph for name in model.graph.files}
    prepare_folder(repository.parent, sum(file.bytes for file in manifest.files if file.name in served) + _ROOM)
    temporary = repository.with_name(f".{repository.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        for model in models:
            progress(f"writing {model.name}")
            _write_model(model, folder, temporary / model.name, tokenizer)
        receipt = Receipt(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            xfm_fast=__version__,
            commit=commit(),
            **manifest.model_dump(include={"kind", "dtype", "source", "weights_sha256", "status"}),
            tokenizer_sha256=tokenizer.sha256() if tokenizer and options.pipeline == "rank" else None,
            models=[
                ModelReceipt(
                    name=model.name,
                    platform=model.config.get("platform", "python"),
                    max_batch_size=model.config["max_batch_size"],
                )
                for model in models
            ],
            files=record_files(temporary, _files(temporary)),
        )
        write_bytes({temporary / RECEIPT_FILE: receipt.model_dump_json(indent=1).encode() + b"\n"})
        _move_into_place(temporary, repository)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{out} cannot be written ({error.strerror or error}) and is unchanged; free space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return receipt


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def check_free(out: Path, overwrite: bool) -> None:
    """Raise `StorageError` unless `out` is free, or a repository without foreign files that may be replaced."""
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    except OSError as error:
        raise StorageError(f"{out} cannot be read ({error.strerror or error}); choose another folder") from None
    if not (out / RECEIPT_FILE).is_file():
        raise StorageError(f"{out} has no {RECEIPT_FILE}, so xfm-fast did not write it; choose another folder")
    if not overwrite:
        raise StorageError(f"{out} holds a repository already; replace it with --overwrite, or choose another folder")
    if foreign := _files(out) - {file.name for file in Receipt.load(out).files} - {RECEIPT_FILE}:
        raise StorageError(f"{out / min(foreign)} is not a file of xfm-fast; move it before --overwrite")


def _write_model(model: PlannedModel, export: Path, home: Path, tokenizer: CaptionTokenizer | None) -> None:
    version = home / "1"
    version.mkdir(parents=True)
    for name in model.graph.files if model.graph else ():
        shutil.copyfile(export / name, version / name)
        with (version / name).open("rb") as file:
            os.fsync(file.fileno())
    contents = {home / "config.pbtxt": render(model.config).encode()}
    if model.manifest is not None and tokenizer is not None:
        contents[version / "model.py"] = _RANK_SCRIPT.encode()
        tokenizer.save(version / TOKENIZER_FILE)
        model.manifest.model_copy(update={"files": record_files(version, [TOKENIZER_FILE])}).save(version)
    write_bytes(contents)


def _move_into_place(made: Path, out: Path) -> None:
    """Two renames where a repository is replaced; a failure of the second undoes the first."""
    earlier = made.with_name(f"{made.name}.old")
    if out.exists():
        out.rename(earlier)
    try:
        made.rename(out)
    except OSError:
        if earlier.exists():
            earlier.rename(out)
        raise
    sync_folder(out.parent)
    with suppress(OSError):
        shutil.rmtree(earlier)


def plan_models(
    manifest: Manifest, options: RepositoryOptions, tokenizer: CaptionTokenizer | None
) -> list[PlannedModel]:
    """The models of a repository; raises an `XFMError` for exports, options and tokenizers that do not fit."""
    options.check()
    if manifest.status == "failed":
        raise ExportError(f"this export failed verification ({manifest.reason}); export again in another --dtype")
    if manifest.packed:
        raise ExportError("the graphs take packed captions and Triton's models padded ones; export without --packed")
    if manifest.kind not in PLATFORMS:
        raise ExportError(f"Triton runs {' and '.join(PLATFORMS)}, not {manifest.kind}; export to one of them")
    if manifest.kind == "tensorrt":
        if options.device == "cpu":
            raise ExportError("device cpu does not run engines of tensorrt; leave out --device, or export to onnx")
        options = replace(options, device="gpu")
    models = [
        PlannedModel(name, graph_config(name, record, manifest.kind, options), graph=record)
        for record in manifest.graphs
        for name in [f"{options.prefix}_{record.name}"]
    ]
    if options.pipeline == "rank":
        models.append(_plan_rank(manifest, options, tokenizer))
    return models


def _plan_rank(manifest: Manifest, options: RepositoryOptions, tokenizer: CaptionTokenizer | None) -> PlannedModel:
    graphs = "choose --pipeline graphs"
    if missing := [graph for graph in DEFAULT_GRAPHS if graph not in manifest.graph_names]:
        raise ExportError(f"rank needs the graphs {', '.join(missing)}; export them with --graphs, or {graphs}")
    if all(output.name != "match_logits" for output in manifest.graph("fusion").outputs):
        raise ExportError(f"rank needs match logits; export a model with the 'matching' head, or {graphs}")
    if tokenizer is None:
        raise InputError(f"rank reads captions and there is no tokenizer; give one with --tokenizer, or {graphs}")
    tokenizer.check(manifest.xfm_config)
    if manifest.tokenizer_sha256 not in (None, tokenizer.sha256()):
        raise InputError(
            f"{tokenizer.origin} has sha256 {tokenizer.sha256()[:16]}… and the export's tokenizer "
            f"{str(manifest.tokenizer_sha256)[:16]}…; give the tokenizer of the export"
        )
    records = [_capped(manifest.graph(graph), options.most_batch) for graph in DEFAULT_GRAPHS]
    longest = [largest(graph_slots(record), "length") for record in records if record.name in ("text", "fusion")]
    tokens = min(_OFFICIAL_TOKENS, manifest.xfm_config.max_text_length, *filter(None, longest))
    if tokens < 3:
        raise ExportError(f"the graphs take captions of {tokens} tokens, too few for a word; export with more")
    name = f"{options.prefix}_rank"
    config = rank_config(name, tokens, options)
    return PlannedModel(name, config, manifest=manifest.model_copy(update={"graphs": records, "files": []}))


def _capped(record: GraphRecord, most: int) -> GraphRecord:
    """The graph with the batch limit of Triton, `max_batch_size`."""
    rows = most_batch(record, most)
    if not rows or record.profiles:
        return record
    batch = AxisRecord(least=record.axes["batch"].least, most=rows)
    return record.model_copy(update={"axes": record.axes | {"batch": batch}})
