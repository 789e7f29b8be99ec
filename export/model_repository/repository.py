"""A model repository: its models, decided before anything is written, and its files.

They are complete under another name first, then put in their place, with a receipt of every file.
"""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from xfm_fast import __version__
from xfm_fast.checkpoint.files import sync_folder, write_bytes
from xfm_fast.documents import advice, read_json
from xfm_fast.errors import ExportError, InputError, StorageError
from xfm_fast.models.processor import find_tokenizer
from xfm_fast.tokenizer import CaptionTokenizer

from .. import manifest as manifests
from ..graphs import GraphName
from ..manifest import AxisRecord, FileRecord, GraphRecord, Kind, Manifest, Status
from ..pipeline import Progress, prepare_folder, silent
from ..request import RepositoryOptions, ServedDevice
from ..slots import graph_slots, largest
from . import backends
from .configs import ModelBackend, graph_config, most_batch, rank_config, render
from .ranking import model_name

FORMAT_VERSION = 1
RECEIPT_FILE = "repository.json"
"""Beside the folders of the models, where Triton does not look."""

RANK_GRAPHS: tuple[GraphName, ...] = ("vision", "text", "image_memory", "fusion")
TOKENIZER_FILE = "tokenizer.json"

# Triton's own backends; other exports run in a session of its Python backend.
_NATIVE: dict[Kind, ModelBackend] = {"tensorrt": "tensorrt", "onnx": "onnxruntime"}
# What the official evaluation cuts captions to.
_OFFICIAL_TOKENS = 40
# Scripts, configurations and the vocabulary.
_ROOM = 8 << 20


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelReceipt(_Record):
    """A model: what runs it, and the rows that Triton may put into a batch (0: none)."""

    name: str
    backend: str
    graphs: list[str]
    max_batch_size: int


class Receipt(_Record):
    """The origin and the contents of a repository; `files` are named by their path in it."""

    format: int = FORMAT_VERSION
    created: str
    xfm_fast: str
    commit: str | None
    kind: Kind
    dtype: str
    source: str
    weights_sha256: str
    tokenizer_sha256: str | None
    status: Status
    backend: str
    device: str
    models: list[ModelReceipt]
    files: list[FileRecord]

    @classmethod
    def load(cls, folder: str | Path) -> Receipt:
        """Read the receipt of a repository.

        Raises:
            StorageError: there is none, or it is damaged.
        """
        path = Path(folder) / RECEIPT_FILE
        try:
            return cls.model_validate(read_json(path))
        except OSError as error:
            raise StorageError(
                f"{path} cannot be read ({error.strerror or error}); write the repository again"
            ) from None
        except ValueError as error:
            reason = advice(error.errors()[0]) if isinstance(error, ValidationError) else error
            raise StorageError(f"{path} is damaged ({reason}); write the repository again") from None


def write_model_repository(
    folder: str | Path,
    out: str | Path,
    options: RepositoryOptions | None = None,
    *,
    tokenizer: CaptionTokenizer | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Receipt:
    """Make a repository of an export: a model for every graph and, with the rank pipeline, one over them all.

    Args:
        folder: the export; its files are compared with its manifest first, and copied.
        out: the repository. A failure at any moment leaves what was there before.
        tokenizer: the model's, for the rank pipeline; by default that of the export.
        overwrite: replace a repository that was made so. Files in it that are not of its receipt are kept.

    Raises:
        ExportError, InputError, DataError, UnavailableError: see `plan_models`; or the export is damaged.
        StorageError: `out` is there already, cannot be written, or there is no room for it.
    """
    folder, out = Path(folder), Path(out)
    options = options or RepositoryOptions()
    options.check()
    export, repository = folder.resolve(), out.resolve()
    if export == repository or export in repository.parents or repository in export.parents:
        raise InputError(f"{out} and the export {folder} lie in each other; choose a folder apart for the repository")
    check_free(out, overwrite)
    progress("comparing the export with its manifest")
    manifest = Manifest.load(folder)
    if tokenizer is None and options.pipeline == "rank":
        tokenizer = find_tokenizer(folder, manifest.xfm_config)
    models = plan_models(manifest, options, tokenizer)
    served = {name for model in models for record in model.graphs for name in record.files}
    needed = sum(file.bytes for file in manifest.files if file.name in served)
    prepare_folder(repository.parent, needed + _ROOM)
    temporary = repository.with_name(f".{repository.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        for model in models:
            progress(f"writing {model.name}")
            _write_model(model, folder, temporary, tokenizer)
        receipt = _receipt(manifest, models, options, tokenizer, temporary)
        write_bytes({temporary / RECEIPT_FILE: receipt.model_dump_json(indent=1).encode() + b"\n"})
        if (repository / RECEIPT_FILE).is_file():
            _keep_foreign(repository, temporary)
        _put_in_place(temporary, repository)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{out} cannot be written ({error.strerror or error}); nothing there was changed: free space or choose "
            "another folder with --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return receipt


def check_free(out: Path, overwrite: bool) -> None:
    """See that nothing lies where the repository goes, or only what may be replaced.

    Raises:
        StorageError: something does; says what would help.
    """
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    except OSError as error:
        raise StorageError(f"{out} cannot be read ({error.strerror or error}); choose another folder") from None
    if not (out / RECEIPT_FILE).is_file():
        raise StorageError(
            f"{out} is there and is no repository that xfm-fast wrote (it has no {RECEIPT_FILE}); choose another folder"
        )
    if not overwrite:
        raise StorageError(f"{out} holds a repository already; replace it with --overwrite, or choose another folder")


def _write_model(model: PlannedModel, folder: Path, root: Path, tokenizer: CaptionTokenizer | None) -> None:
    home = root / model.name
    version = home / "1"
    version.mkdir(parents=True)
    for record in model.graphs:
        for name in record.files:
            shutil.copyfile(folder / name, version / name)
            with (version / name).open("rb") as file:
                os.fsync(file.fileno())
    contents = {home / "config.pbtxt": render(model.config).encode()}
    if model.script is not None:
        source = Path(backends.__file__).with_name(f"{model.script}.py")
        contents[version / "model.py"] = source.read_bytes()
    write_bytes(contents)
    manifest = model.manifest
    if not model.graphs:
        if tokenizer is None:
            raise InputError("the rank model needs a tokenizer")
        tokenizer.save(version / TOKENIZER_FILE)
        manifest = manifest.model_copy(update={"files": manifests.record_files(version, [TOKENIZER_FILE])})
    manifest.save(version)


def _receipt(
    manifest: Manifest,
    models: list[PlannedModel],
    options: RepositoryOptions,
    tokenizer: CaptionTokenizer | None,
    root: Path,
) -> Receipt:
    files = [
        FileRecord(name=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=manifests.sha256(path))
        for path in sorted(root.rglob("*"))
        if path.is_file()
    ]
    return Receipt(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        xfm_fast=__version__,
        commit=manifests.commit(),
        kind=manifest.kind,
        dtype=manifest.dtype,
        source=manifest.source,
        weights_sha256=manifest.weights_sha256,
        tokenizer_sha256=tokenizer.sha256() if tokenizer and options.pipeline == "rank" else None,
        status=manifest.status,
        backend=models[0].backend,
        device=options.device,
        models=[
            ModelReceipt(
                name=model.name,
                backend=model.backend,
                graphs=[record.name for record in model.manifest.graphs],
                max_batch_size=model.config["max_batch_size"],
            )
            for model in models
        ],
        files=files,
    )


def _keep_foreign(earlier: Path, made: Path) -> None:
    """Put what others laid into the earlier repository into the new one as well."""
    ours = {file.name for file in Receipt.load(earlier).files} | {RECEIPT_FILE}
    for path in sorted(earlier.rglob("*")):
        name = path.relative_to(earlier).as_posix()
        if name in ours or (path.is_dir() and not path.is_symlink()):
            continue
        kept = made / name
        if os.path.lexists(kept):
            raise StorageError(
                f"{path} is no file of xfm-fast, and the new repository has one of this name; move it to another place"
            )
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, kept, follow_symlinks=False)


def _put_in_place(made: Path, out: Path) -> None:
    """Two renames where something is replaced; if the second fails the first is undone."""
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


@dataclass(frozen=True)
class PlannedModel:
    """A model of the repository.

    Attributes:
        name: its folder's.
        backend: what runs it.
        config: content of `config.pbtxt`.
        manifest: description of the part of the export that lies in its version folder.
        graphs: records whose files lie there.
        script: name of the `model.py` of a Python model, in `backends/`.
    """

    name: str
    backend: ModelBackend
    config: dict[str, Any]
    manifest: Manifest
    graphs: tuple[GraphRecord, ...]
    script: str | None


def plan_models(
    manifest: Manifest, options: RepositoryOptions, tokenizer: CaptionTokenizer | None
) -> list[PlannedModel]:
    """The models of a repository.

    Args:
        tokenizer: the model's; the rank pipeline needs it.

    Raises:
        ExportError: the export was found to differ from its model, lacks graphs of the pipeline, or is of a kind that
            the backend does not run.
        InputError: there is no tokenizer, or an option is off.
        DataError: the tokenizer does not belong to the model.
        UnavailableError: an option that is not known.
    """
    options.check()
    if manifest.status == "failed":
        raise ExportError(
            f"this export differs from the model that it was made from ({manifest.reason}); before serving "
            "it export it again, in another dtype or for another consumer"
        )
    if manifest.packed:
        raise ExportError(
            "the models of a repository take padded texts, and the graphs of this export take them in rows; export "
            "without --packed"
        )
    backend, native = options.backend, _NATIVE.get(manifest.kind)
    if backend == "auto":
        backend = native or "python"
    if backend not in ("python", native):
        remedy = f"use {native} or python" if native else "use the python backend"
        raise ExportError(f"Triton's {backend} backend does not run an export to {manifest.kind}; {remedy}")
    device = _device(manifest, options.device)
    models = []
    for record in manifest.graphs:
        name = model_name(options.prefix, record.name)
        # Packages are code, which a session wants to be asked for; a repository is code as a whole.
        runtime = "aoti" if manifest.kind == "aoti" else "auto"
        config = graph_config(name, record, backend, options, device, runtime)
        files = [file for file in manifest.files if file.name in record.files]
        part = manifest.model_copy(update={"graphs": [record], "files": files})
        script = "graph" if backend == "python" else None
        models.append(PlannedModel(name, backend, config, part, (record,), script))
    if options.pipeline == "rank":
        models.append(_rank_model(manifest, options, tokenizer, device))
    return models


def _device(manifest: Manifest, wanted: ServedDevice) -> ServedDevice:
    """The device that compiled files are bound to, else the one that is wanted."""
    if manifest.kind == "onnx":
        return wanted
    bound: ServedDevice = "cpu" if manifest.package is not None and manifest.package.device == "cpu" else "gpu"
    if wanted not in ("auto", bound):
        raise ExportError(
            f"this export to {manifest.kind} runs on a {bound.upper()} and the device asked for is {wanted}; choose "
            f"{bound}, or make another export"
        )
    return bound


def _rank_model(
    manifest: Manifest, options: RepositoryOptions, tokenizer: CaptionTokenizer | None, device: ServedDevice
) -> PlannedModel:
    missing = [graph for graph in RANK_GRAPHS if graph not in manifest.graph_names]
    if missing:
        raise ExportError(
            f"the rank pipeline needs the graphs {', '.join(RANK_GRAPHS)} and this export lacks {', '.join(missing)}; "
            "export them with --graphs, or choose the pipeline 'graphs'"
        )
    if all(output.name != "match_logits" for output in manifest.graph("fusion").outputs):
        raise ExportError(
            "the rank pipeline needs match logits, and the model was exported without its 'matching' head; export a "
            "model with it, or choose the pipeline 'graphs'"
        )
    if tokenizer is None:
        raise InputError(
            "the rank pipeline reads captions and no tokenizer was given; give the model's with --tokenizer, or choose "
            "the pipeline 'graphs'"
        )
    tokenizer.check(manifest.xfm_config)
    if manifest.tokenizer_sha256 not in (None, tokenizer.sha256()):
        raise InputError(
            f"the vocabulary in {tokenizer.origin} has sha256 {tokenizer.sha256()[:16]}… and the export was made with "
            f"{str(manifest.tokenizer_sha256)[:16]}…; give the one that the model was trained with"
        )
    records = [_capped(manifest.graph(graph), options.most_batch) for graph in RANK_GRAPHS]
    longest = [largest(graph_slots(record), "length") for record in records if record.name in ("text", "fusion")]
    tokens = min(_OFFICIAL_TOKENS, options.limits.tokens, manifest.xfm_config.max_text_length, *filter(None, longest))
    if tokens < 3:
        raise ExportError(
            f"the graphs of this export take texts of {tokens} tokens, which hold no word between <s> and </s>; export "
            "with a greater length"
        )
    name = model_name(options.prefix, "rank")
    config = rank_config(name, TOKENIZER_FILE, replace(options.limits, tokens=tokens), options, device)
    part = manifest.model_copy(update={"graphs": records, "files": []})
    return PlannedModel(name, "python", config, part, (), "rank")


def _capped(record: GraphRecord, most: int) -> GraphRecord:
    """The graph as Triton serves it, which takes no more rows than `max_batch_size`."""
    rows = most_batch(record, most)
    if not rows or record.profiles:
        return record
    batch = AxisRecord(least=record.axes["batch"].least, most=rows)
    return record.model_copy(update={"axes": record.axes | {"batch": batch}})
