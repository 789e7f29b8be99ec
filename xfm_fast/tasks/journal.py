"""Append-only journals of results, from which killed work resumes."""

from __future__ import annotations

import json
import os
import zlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from xfm_fast.io import parse_json, storing, write_bytes


def checksum(tensor: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's bytes, continuing from `start`."""
    data = tensor.detach().cpu().contiguous().flatten()
    return zlib.crc32(data.view(torch.uint8).numpy().data, start) if data.numel() else start


def read_journal(path: Path) -> tuple[str | None, list[Any]]:
    """Identity and entries up to the first damaged one; the identity of a missing or empty journal is None."""
    try:
        # The part after the last line feed is empty, or was not completed.
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return None, []
    values: list[Any] = []
    for line in lines:
        crc, _, text = line.partition(b" ")
        try:
            if int(crc, 16) != zlib.crc32(text):
                break
            values.append(parse_json(text))
        except ValueError:
            break
    if not values or not isinstance(values[0], str):
        return None, []
    return values[0], values[1:]


class Journal:
    """JSON values, one a line after its CRC-32; the first line is an `identity` of what determines them.

    Opening it keeps the complete `entries` of the same identity, and drops all others.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        with self._storing():
            found, entries = read_journal(path)
            self.entries = entries if found == identity else []
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes({path: b"".join(map(_line, [identity, *self.entries]))})
            self._file: BinaryIO = path.open("ab")

    def append(self, value: Any) -> None:
        """Append a value and flush it."""
        with self._storing():
            self._file.write(_line(value))
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._storing(), self._file:
            os.fsync(self._file.fileno())

    def _storing(self) -> AbstractContextManager[None]:
        return storing(self.path, "its complete entries stay: free space and resume")


def _line(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)
