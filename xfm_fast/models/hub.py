"""Download of models from the Hugging Face Hub by name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypedDict, Unpack

from xfm_fast.checkpoint.files import (
    CONFIG_FILE,
    MODEL_FILE,
    TASK_FILE,
    TOKENIZER_FILE,
    model_folder,
)
from xfm_fast.errors import CheckpointError


class Download(TypedDict, total=False):
    """Options of a download, with the names of `huggingface_hub`."""

    revision: str | None  # branch, tag or commit
    token: str | bool | None  # user token for private models; True for the one of `hf auth login`
    cache_dir: str | Path | None
    local_files_only: bool  # use the cached copy, without a request
    force_download: bool


PREPROCESSOR_FILE, TOKENIZER_SETTINGS = "preprocessor_config.json", "tokenizer_config.json"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_folder(name: str | Path, **download: Unpack[Download]) -> Path:
    """Return the path of a folder; for a Hub name (`"org/name"`), download it into the cache if missing.

    Raises `CheckpointError` if there is no folder or model of that name or the Hub cannot be reached,
    and `TypeError` for an unknown option.
    """
    if unknown := download.keys() - Download.__annotations__.keys():
        raise TypeError(
            f"{', '.join(sorted(unknown))}: unknown argument; use {', '.join(Download.__annotations__)}"
        )
    path = Path(name)
    if isinstance(name, Path) or path.exists() or not _NAME.fullmatch(name):
        return path
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{name} is not a folder; to download it from the Hugging Face Hub, install huggingface_hub"
        ) from None
    try:
        # Only these files are downloaded.
        patterns = [
            CONFIG_FILE,
            MODEL_FILE,
            TASK_FILE,
            TOKENIZER_FILE,
            TOKENIZER_SETTINGS,
            PREPROCESSOR_FILE,
        ]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, **download))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is not a folder and cannot be downloaded from the Hub ({first_line(error)}); "
            "check the name and hf auth login"
        ) from error


def resolve(model: str | Path) -> Path:
    """Return the folder of weights of a run, folder or Hub name (downloaded), or an official file."""
    path = Path(os.path.expanduser(model))
    if not path.exists():
        path = local_folder(str(model))
    return model_folder(path) or path


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
