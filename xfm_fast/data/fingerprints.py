"""Fingerprints of images: to hold images out of training, and to know the images that weights were
trained on.

A fingerprint is a digest of the encoded bytes, so that it is the same in tables, folders, lines and
shards.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import compress
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xfm_fast.data.images import read_image
from xfm_fast.data.records import image_at
from xfm_fast.errors import CheckpointError, DataError
from xfm_fast.io import open_to_append, read_bytes, storing

FINGERPRINT_FILE = "trained_images.bin"
"""Sorted digests of the images that the weights in a folder have been trained on."""

# Bounds on the number of images that are held out.
_MIN_HELD_OUT, _MAX_HELD_OUT = 10, 1000
# Limits on the digests of a loader process, and of a fingerprint, which then has 128 MB.
_MAX_OF_PROCESS, _MAX_DIGESTS = 1 << 20, 1 << 24
_DIGEST = np.dtype(">u8")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST.itemsize).digest()


def _digests(rows: int, contents: Callable[[int], Iterable[bytes]]) -> list[list[bytes]]:
    """Return the digests of the images of each row; none for a row that cannot be read."""

    def digests_of(row: int) -> list[bytes]:
        try:
            return [_digest(content) for content in contents(row)]
        except DataError:
            return []

    with ThreadPool() as pool:
        return pool.map(digests_of, range(rows))


def held_out(
    rows: int, contents: Callable[[int], Iterable[bytes]], share: float
) -> NDArray[np.bool_]:
    """Return the mask of rows to hold out: an image of theirs has a digest below `share` of the
    largest possible.

    At least 10 images (or a quarter of fewer than 40) and at most 1,000, by the smallest digests.
    Between these limits, the choice of an image does not depend on the others.
    """
    digests = _digests(rows, contents)
    ordered = sorted({digest for row in digests for digest in row})
    if len(ordered) < 2:
        raise DataError(
            f"{len(ordered)} of {rows} images can be read, too few to hold some out; set hold_out=0"
        )
    count = bisect_left(ordered, int(share * 2**64).to_bytes(8, "big"))
    count = max(count, 1, min(_MIN_HELD_OUT, len(ordered) // 4))
    held = {*ordered[: min(count, _MAX_HELD_OUT)]}
    return np.array([not held.isdisjoint(row) for row in digests])


def contents_of(names: list[str], root: Path) -> Callable[[int], Iterable[bytes]]:
    """Return the function that reads the image of a name below `root` (see `image_at`)."""
    return lambda row: [read_image(image_at(root / names[row]))[1]]


class SeenImages:
    """Recorder of the images that a loader's processes read: a file of digests, which survives a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digests: set[bytes] = set()

    def __call__(self, content: bytes) -> None:
        """Record an encoded image."""
        digest = _digest(content)
        if digest not in self._digests and len(self._digests) < _MAX_OF_PROCESS:
            self._digests.add(digest)
            with (
                storing(self.path, "set checkpoint.folder to another folder"),
                open_to_append(self.path) as file,
            ):
                file.write(digest)


def read_fingerprint(path: Path) -> NDArray[np.uint64]:
    """Read the digests in a file; none if there is no file."""
    try:
        content = read_bytes(path, _MAX_DIGESTS * _DIGEST.itemsize)
    except (FileNotFoundError, NotADirectoryError):
        content = b""
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); delete it, or copy the folder again"
        ) from None
    return np.frombuffer(content, _DIGEST, len(content) // _DIGEST.itemsize)


def fingerprint_of(run: Path, initial: Path | None) -> dict[str, bytes]:
    """Return the fingerprint file of a run: the images that it and its initial weights were trained on."""
    paths = [*run.glob("seen-*.bin")]
    if initial is not None:
        paths.append(initial / FINGERPRINT_FILE)
    if not paths:
        return {}
    digests = np.unique(np.concatenate([read_fingerprint(path) for path in paths]))[:_MAX_DIGESTS]
    return {FINGERPRINT_FILE: digests.astype(_DIGEST).tobytes()} if len(digests) else {}


def trained_on(folder: Path, names: list[str], root: Path) -> list[str]:
    """Return the names of images below `root` that the weights in a folder have been trained on."""
    fingerprint = read_fingerprint(folder / FINGERPRINT_FILE)
    if not len(fingerprint):
        return []
    rows = _digests(len(names), contents_of(names, root))
    readable = [name for name, row in zip(names, rows, strict=True) if row]
    digests = np.frombuffer(b"".join(row[0] for row in rows if row), _DIGEST)
    return [*compress(readable, np.isin(digests, fingerprint))]
