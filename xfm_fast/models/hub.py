"""Download models from the Hugging Face Hub by name, and upload what `save_pretrained` writes."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any, TypedDict, Unpack

from xfm_fast.checkpoint.files import (
    CONFIG_FILE,
    MODEL_FILE,
    TASK_FILE,
    TOKENIZER_FILE,
    model_folder,
)
from xfm_fast.errors import CheckpointError, StorageError, UnavailableError


class Download(TypedDict, total=False):
    """Options of a download, with the names of `huggingface_hub`."""

    revision: str | None  # branch, tag or commit
    token: str | bool | None  # user token for private models; True for the one of `hf auth login`
    cache_dir: str | Path | None
    local_files_only: bool  # use the cached copy, without a request
    force_download: bool


PREPROCESSOR_FILE, CARD_FILE = "preprocessor_config.json", "README.md"
_CARD = """---
library_name: xfm-fast
tags: [x-fm, image-text-retrieval, vision-language]
---

An X-FM ([arXiv 2301.05065](https://arxiv.org/abs/2301.05065)) of {parameters:,} parameters at {size} pixels.

```python
from xfm_fast import XFM

model = XFM.from_pretrained("{name}")
print(model.match("photo.jpg", ["a dog on a beach", "a red bicycle"]))
```
"""
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
        patterns = [CONFIG_FILE, MODEL_FILE, TASK_FILE, TOKENIZER_FILE, PREPROCESSOR_FILE]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, **download))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is not a folder and cannot be downloaded from the Hub ({_one_line(error)}); "
            "check the name and hf auth login"
        ) from error


def resolve(model: str | Path) -> Path:
    """Return the folder of weights of a run, folder or Hub name (downloaded), or an official file."""
    path = Path(os.path.expanduser(model))
    if not path.exists():
        path = local_folder(str(model))
    return model_folder(path) or path


def push(
    model: Any,
    name: str,
    *,
    private: bool | None = None,
    commit_message: str = "Upload X-FM",
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload what an `XFM` saves as `"org/name"`, as `XFM.push_to_hub` describes."""
    try:
        import huggingface_hub
    except ImportError:
        raise UnavailableError(
            "pushing a model needs huggingface_hub; install it (pip install huggingface_hub)"
        ) from None
    hub: Any = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            hub.create_repo(name, private=private, exist_ok=True)
            if not hub.file_exists(name, CARD_FILE):
                count = sum(parameter.numel() for parameter in model.parameters())
                card = _CARD.format(parameters=count, size=model.config.image_size, name=name)
                Path(folder, CARD_FILE).write_text(card, encoding="utf-8")
            commit = hub.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{name} cannot be uploaded to the Hub ({_one_line(error)}); check the name and hf auth login"
            ) from error
    return str(getattr(commit, "commit_url", commit))


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
