"""Write a model repository: complete under another name first, then put in its place, with a receipt of every file."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from xfm_fast import __version__
from xfm_fast.checkpoint.files import sync_folder, write_bytes
from xfm_fast.errors import InputError, StorageError
from xfm_fast.tokenizer import CaptionTokenizer

from .. import manifest as manifests
from ..manifest import FileRecord, Kind, Manifest, Status
from ..pipeline import prepare_folder
from ..request import RepositoryOptions
from . import backends
from .configs import render
from .planning import TOKENIZER_FILE, PlannedModel, check_apart, plan_models

FORMAT_VERSION = 1
RECEIPT_FILE = "repository.json"
"""Beside the folders of the models, where Triton does not look."""

# Scripts, configurations and the vocabulary.
_ROOM = 8 << 20

Progress = Callable[[str], None]


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
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise StorageError(
                f"{path} cannot be read ({error.strerror or error}); write the repository again"
            ) from None
        except ValidationError as error:
            raise StorageError(f"{path} is damaged ({error.errors()[0]['msg']}); write the repository again") from None


def write_model_repository(
    folder: str | Path,
    out: str | Path,
    options: RepositoryOptions | None = None,
    *,
    tokenizer: CaptionTokenizer | None = None,
    overwrite: bool = False,
    progress: Progress = lambda message: None,
) -> Receipt:
    """Make a repository of an export: a model for every graph and, with the rank pipeline, one over them all.

    Args:
        folder: of the export; its files are compared with its manifest first, and copied.
        out: the repository. A failure at any moment leaves what was there before.
        options: see there.
        tokenizer: of the model, for the rank pipeline.
        overwrite: replace a repository that was made so, and nothing else.
        progress: is told what is being done.

    Raises:
        ExportError, InputError, DataError, UnavailableError: see `plan_models`; or the export is damaged.
        StorageError: `out` is there already, cannot be written, or there is no room for it.
    """
    folder, out = Path(folder), Path(out)
    options = options or RepositoryOptions()
    options.check()
    check_apart(folder, out)
    check_free(out, overwrite)
    progress("comparing the export with its manifest")
    manifest = Manifest.load(folder)
    models = plan_models(manifest, options, tokenizer)
    served = {name for model in models for record in model.graphs for name in record.files}
    needed = sum(file.bytes for file in manifest.files if file.name in served)
    prepare_folder(out.resolve().parent, needed + _ROOM)
    temporary = out.resolve().with_name(f".{out.resolve().name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        for model in models:
            progress(f"writing {model.name}")
            _write_model(model, folder, temporary, tokenizer)
        receipt = _receipt(manifest, models, options, tokenizer, temporary)
        write_bytes({temporary / RECEIPT_FILE: receipt.model_dump_json(indent=1).encode() + b"\n"})
        _put_in_place(temporary, out.resolve())
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
