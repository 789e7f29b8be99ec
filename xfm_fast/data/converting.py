"""Conversion between line JSON and WebDataset shards, which preserves image bytes."""

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

    The image becomes a binary file (25% smaller than base64), a string caption becomes `.txt`,
    everything else goes to `.json`. With `image_root` images are read from paths. `quarantine` logs
    broken rows, which are skipped.
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
    report = Conversion([])
    image = ImageOptions(
        image_key=image_key, image_root=None if image_root is None else Path(image_root)
    )
    samples = _good_rows(data, report, image, caption_key, quarantine or Quarantine())
    with new_folder(folder, f"shards in {folder}") as temporary:
        sample = next(samples, None)
        while sample is not None:
            path = temporary / f"{len(report.files):06d}.tar"
            with path.open("xb") as file:
                count = 0
                with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as shard:
                    while sample is not None:
                        if count >= samples_per_shard or (count and file.tell() >= bytes_per_shard):
                            break
                        row, record = sample
                        for suffix, content in _members(record, image_key, caption_key).items():
                            member = tarfile.TarInfo(f"{row:09d}.{suffix}")
                            member.size, member.mode = len(content), 0o644
                            shard.addfile(member, io.BytesIO(content))
                        count += 1
                        sample = next(samples, None)
                file.flush()
                os.fsync(file.fileno())
            report.rows += count
            report.files.append(folder / path.name)
        if not report.files:
            raise DataError("no row can be used, so there is nothing to convert")
    return report


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
    report = Conversion([file])
    image = ImageOptions(
        image_key=image_key, image_root=None if image_root is None else Path(image_root)
    )

    def write(out: BinaryIO) -> None:
        for _, record in _good_rows(data, report, image, caption_key, quarantine or Quarantine()):
            value = record.get(image_key)
            if isinstance(value, bytes):
                record[image_key] = base64.b64encode(value).decode()
            out.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            report.rows += 1
        if not report.rows:
            raise DataError("no row can be used, so there is nothing to convert")

    make_folder(file.parent)
    write_files({file: write})
    return report


def _good_rows(
    data: Paths, report: Conversion, image: ImageOptions, caption_key: str, quarantine: Quarantine
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the record of every usable row, with images that are read from paths."""
    index, key = 0, image.image_key
    for rows in open_records(data, image_key=key, caption_key=caption_key).files:
        for row in range(len(rows)):
            try:
                record = dict(rows.read(row))
                _embed_images(record, image)
                if isinstance(rows, ShardFile):
                    readable = ("json", *IMAGE_SUFFIXES, *TEXT_SUFFIXES)
                    report.ignored.update(
                        suffix for suffix in rows.suffixes(row) if suffix not in readable
                    )
            except DataError as error:
                report.skipped += 1
                quarantine.add(rows, row, error)
                continue
            yield index, record
            index += 1


def _embed_images(record: dict[str, Any], image: ImageOptions) -> None:
    """Check a record's images, and replace paths by contents: bytes, or base64 in a list."""
    value = record.get(image.image_key)
    if value is None:
        return
    values = value if isinstance(value, list) else [value]
    sources = [image_source(item, image) for item in values]
    # Paths of `image_root`, or of a table, whose reader makes them relative to its folder.
    if any(isinstance(source, Path) for source in sources):
        contents = [read_image(source)[1] for source in sources]
        if isinstance(value, list):
            record[image.image_key] = [base64.b64encode(content).decode() for content in contents]
        else:
            record[image.image_key] = contents[0]


def _members(record: dict[str, Any], image_key: str, caption_key: str) -> dict[str, bytes]:
    """Split a record into the files of a sample."""
    fields = dict(record)
    members: dict[str, bytes] = {}
    content = value = fields.get(image_key)
    if isinstance(value, str):
        content = None
        with suppress(ValueError):
            decoded = binascii.a2b_base64(value)
            # Decode only what encodes to the same text again.
            if binascii.b2a_base64(decoded, newline=False).decode() == value:
                content = decoded
    if content and isinstance(content, bytes):
        members[_image_suffix(content)] = content
        del fields[image_key]
    caption = fields.get(caption_key)
    if isinstance(caption, str):
        # JSON may hold half a surrogate pair, which UTF-8 cannot.
        with suppress(UnicodeEncodeError):
            members["txt"] = caption.encode()
            del fields[caption_key]
    if fields or not members:
        members["json"] = json.dumps(fields, separators=(",", ":")).encode()
    return members


def _image_suffix(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    for magic, suffix in _MAGIC.items():
        if content.startswith(magic):
            return suffix
    return "img"
