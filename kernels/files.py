"""Files: written atomically, streams, and the cache folder."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path
from typing import BinaryIO

_DESCRIPTOR = re.compile(r"/dev/(?:std(?P<name>in|out|err)|fd/(\d+))|/proc/self/fd/(\d+)")
_STANDARD = {"in": 0, "out": 1, "err": 2}


def is_stream(path: Path) -> bool:
    """Return whether a path is a device, pipe or socket, or names an open file such as /dev/stdout and /dev/fd/3.

    They are written through, since a rename would replace them by a file.
    """
    return _descriptor(path) is not None or (
        path.exists() and not (path.is_file() or path.is_dir())
    )


def _descriptor(path: Path) -> int | None:
    match = _DESCRIPTOR.fullmatch(os.path.abspath(path))
    if match is None:
        return None
    return _STANDARD[match["name"]] if match["name"] else int(match[2] or match[3])


def open_stream(path: Path) -> BinaryIO:
    """Open a stream (see `is_stream`) to write; a pipe that no process reads raises `OSError` instead of waiting."""
    if (descriptor := _descriptor(path)) is not None:
        # Opened by its name, a file behind it would be overwritten from its start.
        return os.fdopen(os.dup(descriptor), "wb")
    try:
        file = open(path, "wb", opener=open_at_once)  # noqa: SIM115, the caller closes it
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "no process reads this pipe", str(path)) from None
        raise
    if hasattr(os, "set_blocking"):
        os.set_blocking(file.fileno(), True)
    return file


def open_at_once(path: str, flags: int) -> int:
    """Open as `os.open` does, without waiting for a reader of a pipe; an `opener` of `open`."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def write_whole(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a file atomically: readers, and a failure at any moment, see the old content or the new."""
    if is_stream(path):
        with open_stream(path) as file:
            file.write(content)
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
    """Return `~/.cache/xfm-fast/<name>`, or in `$XDG_CACHE_HOME`; without a home, a path that cannot be created."""
    caches, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    if not os.path.isabs(caches):
        caches = os.path.join(home if os.path.isabs(home) else os.devnull, ".cache")
    return Path(caches) / "xfm-fast" / name
