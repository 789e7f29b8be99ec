"""Files of the kernels: written whole or not at all, and the folder of what may be made again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def is_stream(path: Path) -> bool:
    """True for a device, pipe or socket: it is written through, since a rename would replace it by a file."""
    return path.exists() and not (path.is_file() or path.is_dir())


def write_whole(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a file atomically: readers, and a failure at any moment, see the old content or the new."""
    if is_stream(path):
        path.write_bytes(content)
        return
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def cache_folder(name: str) -> Path:
    """`~/.cache/xfm-fast/<name>`, or in `$XDG_CACHE_HOME`; one that cannot be made where there is no home."""
    given, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    own = os.path.join(home if os.path.isabs(home) else os.devnull, ".cache")
    return Path(given if os.path.isabs(given) else own) / "xfm-fast" / name
