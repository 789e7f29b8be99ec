"""The scores of a long re-ranking, image by image, in a file that survives a killed process and a full disk."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from xfm_fast.errors import DataError, StorageError

_MAGIC = b"xfm-fast scores 1\n"
# Image, number of scores, CRC-32 of the scores.
_RECORD = struct.Struct("<III")


class ScoreJournal:
    """Append-only records `(image, scores)`. Opening it drops a torn record at the end; what precedes it is kept.

    Args:
        path: the file; created when absent.
        fingerprint: of the work (weights, embeddings, candidates). A file made for other work is refused.
        dtype: of the scores; part of the fingerprint.
    """

    def __init__(self, path: str | Path, fingerprint: str, dtype: torch.dtype = torch.float32) -> None:
        self.path = Path(path)
        self.dtype = dtype
        self._header = _MAGIC + f"{fingerprint} {dtype}\n".encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115
            self._check_header()
        except OSError as error:
            raise self._failure(error) from None

    def _check_header(self) -> None:
        found = self._file.read(len(self._header))
        if found == self._header:
            return
        if found and not self._header.startswith(found):
            raise DataError(
                f"{self.path} holds the scores of other work (other weights, embeddings or k); "
                "delete it to start anew or name another folder. Embeddings that are computed again, not kept in a "
                "file, can differ in the last bit: torch.use_deterministic_algorithms(True) in both runs prevents it"
            )
        self._file.seek(0)
        self._file.truncate()
        self._file.write(self._header)
        self.sync()

    def records(self) -> Iterator[tuple[int, Tensor]]:
        """Every whole record, in the order written; the file is cut behind the last one."""
        self._file.seek(len(self._header))
        end = self._file.tell()
        while len(head := self._file.read(_RECORD.size)) == _RECORD.size:
            image, count, checksum = _RECORD.unpack(head)
            body = self._file.read(self.dtype.itemsize * count)
            if len(body) != self.dtype.itemsize * count or zlib.crc32(body, image) != checksum:
                break
            end = self._file.tell()
            yield image, torch.frombuffer(bytearray(body), dtype=self.dtype) if count else torch.empty(0)
        self._file.seek(end)
        self._file.truncate()

    def append(self, image: int, scores: Tensor) -> None:
        """Record the scores `[n]` of one image."""
        body = scores.to("cpu", self.dtype).contiguous().numpy().tobytes()
        try:
            self._file.write(_RECORD.pack(image, len(scores), zlib.crc32(body, image)) + body)
        except OSError as error:
            raise self._failure(error) from None

    def sync(self) -> None:
        """Make everything appended so far durable."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.path} cannot be written ({error.strerror}); the scores recorded before are kept: free space and "
            "resume"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError as failure:
            # Closing flushes: a disk that filled up fails here once more, and the first failure is the one to report.
            if kind is None:
                raise self._failure(failure) from None
