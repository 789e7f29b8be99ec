"""Results as files: a JSON document and an HTML page per run, and copies under fixed names; whole or not at all."""

from __future__ import annotations

import json
import math
import re
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from xfm_fast.benchmarks import machine
from xfm_fast.benchmarks.page import render
from xfm_fast.checkpoint.files import write_bytes
from xfm_fast.errors import StorageError


class Saved(NamedTuple):
    """Where a run was written."""

    document: Path
    page: Path


def save(content: dict[str, Any], folder: str | Path) -> Saved:
    """Write `<timestamp>.json` and `.html`, and the same as `latest.json` and `latest.html`.

    All four appear complete or not at all; results of earlier runs are never overwritten.

    Raises:
        StorageError: the folder cannot be made or written, or the disk is full.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} cannot be made ({error.strerror}); choose another folder with --out") from error
    stem = _free_stem(folder, datetime.fromisoformat(content["date"]).strftime("%Y%m%dT%H%M%SZ"))
    document = _document(content)
    page = render(content).encode()
    write_bytes(
        {
            folder / f"{stem}.json": document,
            folder / f"{stem}.html": page,
            folder / "latest.json": document,
            folder / "latest.html": page,
        }
    )
    return Saved(folder / f"{stem}.json", folder / f"{stem}.html")


def reference_folder() -> Path | None:
    """The folder of results that are kept with the source code; None where this is not a checkout of it."""
    root = Path(__file__).resolve().parents[1]
    folder = root / "benchmarks" / "results"
    return folder if (root / ".git").exists() and folder.is_dir() else None


def save_reference(content: dict[str, Any], folder: Path) -> Path:
    """Write the results of a GPU as `<benchmark>-<gpu>.json`, in place of those of an earlier run on such a GPU.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    gpu = re.sub(r"[^a-z0-9]+", "-", content["machine"]["gpus"][0]["name"].lower()).strip("-")
    path = folder / f"{content['benchmark']}-{gpu}.json"
    write_bytes({path: _document(content)})
    return path


def save_as(content: dict[str, Any], path: Path) -> None:
    """Write a document alone, under a name of the user's choice, with the commit that it was measured at.

    Raises:
        StorageError: the file cannot be written, or the disk is full.
    """
    write_bytes({path: _document(content | {"commit": machine.commit()})})


def _document(content: dict[str, Any]) -> bytes:
    return json.dumps(_finite(content), indent=1, allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    """JSON has no infinity, which is the error of a result that holds NaN; null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _free_stem(folder: Path, stem: str) -> str:
    candidates = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next((name for name in candidates if not (folder / f"{name}.json").exists()), stem)
