"""Results documents as files: read, written with their page under a timestamp, and kept with the source code."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from xfm_fast.errors import DataError, StorageError
from xfm_fast.io import advice, read_json, write_bytes

from .record import SCHEMA_VERSION, Document


def load(path: str | Path) -> Document:
    """Read a results document.

    Raises:
        DataError: the file cannot be read, is not JSON, is damaged, or is of another schema, whose version is named.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name a results file that exists") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); name a file that xfm-fast bench wrote") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {version!r}, and this xfm-fast reads version {SCHEMA_VERSION}; measure again "
            "with xfm-fast bench, or use the xfm-fast that wrote it"
        )
    try:
        return Document.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{path} is damaged: {where}: {advice(first)} ({error.error_count()} faults); measure again"
        ) from None


class Saved(NamedTuple):
    """The files of a run."""

    document: Path
    page: Path


def save(document: Document, folder: str | Path, page: str) -> Saved:
    """Write `<timestamp>.json` and `.html`, and the same as `latest.json` and `latest.html`.

    All four appear complete or not at all; results of earlier runs are never overwritten.

    Args:
        page: HTML of the document.

    Raises:
        StorageError: the folder cannot be made or written, or the disk is full.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} cannot be made ({error.strerror}); choose another folder with --out") from error
    stem = datetime.fromisoformat(document.date).strftime("%Y%m%dT%H%M%SZ")
    candidates = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    stem = next((name for name in candidates if not (folder / f"{name}.json").exists()), stem)
    content, html = document.encoded(), page.encode()
    files = {f"{name}.{kind}": text for name in (stem, "latest") for kind, text in (("json", content), ("html", html))}
    write_bytes({folder / name: text for name, text in files.items()})
    return Saved(folder / f"{stem}.json", folder / f"{stem}.html")


def save_as(document: Document, path: Path) -> None:
    """Write a document alone, under a name of the user's choice.

    Raises:
        StorageError: the file cannot be written, or the disk is full.
    """
    write_bytes({path: document.encoded()})


def reference_folder() -> Path | None:
    """The folder of results that are kept with the source code; None where this is not a checkout of it."""
    root = Path(__file__).resolve().parents[1]
    folder = root / "benchmarks" / "results"
    return folder if (root / ".git").exists() and folder.is_dir() else None


def save_reference(document: Document, folder: Path) -> Path:
    """Write the results of a GPU as `<benchmark>-<gpu>.json`, in place of those of an earlier run on such a GPU.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    gpu = re.sub(r"[^a-z0-9]+", "-", document.machine["gpus"][0]["name"].lower()).strip("-")
    path = folder / f"{document.benchmark}-{gpu}.json"
    save_as(document, path)
    return path
