"""Models on the Hugging Face Hub, fetched by name and pushed as `save_pretrained` writes them, and AutoModel."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, Protocol

from xfm_fast.checkpoint.files import CONFIG_FILE, MODEL_FILE
from xfm_fast.errors import CheckpointError, StorageError, UnavailableError
from xfm_fast.models.processor import TOKENIZER_FILE


class Saves(Protocol):
    """A model that writes its folder."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder."""
        ...


_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """A folder as it is; of a model on the Hub, such as `"org/name"`, the copy in the Hub's cache, fetched if need be.

    Args:
        revision: branch, tag or commit on the Hub.

    Raises:
        CheckpointError: there is neither a folder nor a model of that name, or the Hub cannot be reached.
    """
    path = Path(name)
    if isinstance(name, Path) or path.exists() or not _NAME.fullmatch(name):
        return path
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{name} is no folder here; if it is a model on the Hugging Face Hub, install huggingface_hub"
        ) from None
    try:
        # Nothing else is fetched, whatever lies there.
        wanted = [CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE]
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is no folder here, and cannot be fetched from the Hugging Face Hub ({_line(error)}); check the "
            "name, the connection, and that you may read it (hf auth login)"
        ) from error


def push(
    model: Saves, name: str, *, private: bool = False, message: str = "Upload X-FM", token: str | None = None
) -> str:
    """Make the model `name`, such as `"org/name"`, on the Hub hold what `save_pretrained` writes; returns its address.

    Raises:
        UnavailableError: `huggingface_hub` is not installed.
        StorageError: the Hub cannot be reached, or refuses.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UnavailableError(
            "pushing a model needs huggingface_hub; install it (pip install huggingface_hub)"
        ) from None
    hub: Any = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            hub.create_repo(name, private=private, exist_ok=True)
            done = hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{name} could not be pushed to the Hugging Face Hub ({_line(error)}); check the name, the connection, "
                "and that you may write to it (hf auth login)"
            ) from error
    return str(getattr(done, "commit_url", done))


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
