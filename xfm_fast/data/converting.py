"""Converts between line JSON and WebDataset shards, preserving image bytes."""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from xfm_fast.data.files import Paths, new_folder
from xfm_fast.data.images import image_source, read_image
from xfm_fast.data.options import ImageOptions
from xfm_fast.data.records import IMAGE_SUFFIXES, TEXT_SUFFIXES, ShardFile, open_records
from xfm_fast.data.streams import Quarantine
from xfm_fast.errors import DataError
from xfm_fast.io import make_folder, write_files

SAMPLES_PER_SHARD = 10_000
BYTES_PER_SHARD = 1 << 30

_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
}


@dataclass
class Conversion:
    """Files and rows written; `skipped` counts broken rows, `ignored` unsupported sample files by suffix."""

    files: list[Path]
    rows: int = 0
    skipped: int = 0
    ignored: Counter[str] = field(default_factory=Counter)


def to_shards(
    data: Paths,
    folder: str | os.PathLike[str],
    *,
    image_key: str = "binary",
    caption_key: str = "desc",
    image_root: str | os.PathLike[str] | None = None,
    quarantine: Quarantine | None = None,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    bytes_per_shard: int = BYTES_PER_SHARD,
) -> Conversion:
    """Write rows as WebDataset shards `<folder>/000000.tar`, ..., atomically and deterministically.

    The image becomes a binary file (25% smaller than base64), a string caption becomes `.txt`, everything else goes to
    `.json`. With `image_root` images are read from paths. `quarantine` logs broken rows, which are skipped.
    """
    folder = Path(folder)
    if samples_per_shard < 1 or bytes_per_shard < 1:
        raise DataError(
            f"shards of {samples_per_shard} samples and {bytes_per_shard} bytes hold nothing; use 1 or more"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder} exists and would be overwritten; choose another folder or remove it"
        )
    done = Conversion([])
    image = ImageOptions(
        image_key=image_key, image_root=None if image_root is None else Path(image_root)
    )
    samples = (
        (row, _members(record, image_key, caption_key))
        for row, record in _good_rows(data, done, image, caption_key, quarantine or Quarantine())
    )
    with new_folder(folder, f"shards in {folder}") as temporary:
        pending = next(samples, None)
        while pending is not None:
            path = temporary / f"{len(done.files):06d}.tar"
            with path.open("xb") as file:
                count = 0
                with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as shard:
                    while pending is not None and (
                        not count or (count < samples_per_shard and file.tell() < bytes_per_shard)
                    ):
                        row, members = pending
                        for suffix, content in members.items():
                            member = tarfile.TarInfo(f"{row:09d}.{suffix}")
                            member.size, member.mode = len(content), 0o644
                            shard.addfile(member, io.BytesIO(content))
                        count += 1
                        pending = next(samples, None)
                file.flush()
                os.fsync(file.fileno())
                done.rows += count
            done.files.append(folder / path.name)
        if not done.files:
            raise DataError("no row can be used, so there is nothing to convert")
    return done


def to_lines(
    data: Paths,
    file: str | os.PathLike[str],
    *,
    image_key: str = "binary",
    caption_key: str = "desc",
    image_root: str | os.PathLike[str] | None = None,
    quarantine: Quarantine | None = None,
) -> Conversion:
    """Write rows as one line-JSON file with base64 images, atomically."""
    file = Path(file)
    if file.exists():
        raise DataError(f"{file} exists and would be overwritten; choose another name or remove it")
    done = Conversion([file])
    image = ImageOptions(
        image_key=image_key, image_root=None if image_root is None else Path(image_root)
    )

    def write(out: BinaryIO) -> None:
        for _, record in _good_rows(data, done, image, caption_key, quarantine or Quarantine()):
            value = record.get(image_key)
            if isinstance(value, bytes):
                record[image_key] = base64.b64encode(value).decode()
            out.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            done.rows += 1
        if not done.rows:
            raise DataError("no row can be used, so there is nothing to convert")

    make_folder(file.parent)
    write_files({file: write})
    return done


def _good_rows(
    data: Paths, done: Conversion, image: ImageOptions, caption_key: str, quarantine: Quarantine
) -> Iterator[tuple[int, dict[str, Any]]]:
    number, key = 0, image.image_key
    for rows in open_records(data, image_key=key, caption_key=caption_key).files:
        for row in range(len(rows)):
            try:
                record = dict(rows.read(row))
                # Read paths and decode base64, so that broken images are skipped.
                value = record.get(key)
                several = isinstance(value, list)
                values = value if several else [] if value is None else [value]
                sources = [image_source(each, image) for each in values]
                # Paths of `image_root`, or of a table, whose reader makes them relative to its folder.
                if any(isinstance(source, Path) for source in sources):
                    read = [read_image(source)[1] for source in sources]
                    record[key] = (
                        [base64.b64encode(each).decode() for each in read] if several else read[0]
                    )
                if isinstance(rows, ShardFile):
                    known = ("json", *IMAGE_SUFFIXES, *TEXT_SUFFIXES)
                    done.ignored.update(
                        suffix for suffix in rows.suffixes(row) if suffix not in known
                    )
            except DataError as error:
                done.skipped += 1
                quarantine.add(rows, row, error)
                continue
            yield number, record
            number += 1


def _members(record: dict[str, Any], image_key: str, caption_key: str) -> dict[str, bytes]:
    """Files of a sample."""
    fields = dict(record)
    members: dict[str, bytes] = {}
    content = value = fields.get(image_key)
    if isinstance(value, str):
        content = None
        with suppress(ValueError):
            # The bytes that base64 stands for, if encoding them gives the same text again.
            decoded = binascii.a2b_base64(value)
            content = (
                decoded if binascii.b2a_base64(decoded, newline=False).decode() == value else None
            )
    if content and isinstance(content, bytes):
        webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
        known = (suffix for magic, suffix in _MAGIC.items() if content.startswith(magic))
        members["webp" if webp else next(known, "img")] = content
        del fields[image_key]
    caption = fields.get(caption_key)
    if isinstance(caption, str):
        # Half a surrogate pair, which JSON can say, is no text that a file could hold.
        with suppress(UnicodeEncodeError):
            members["txt"] = caption.encode()
            del fields[caption_key]
    if fields or not members:
        members["json"] = json.dumps(fields, separators=(",", ":")).encode()
    return members
