"""Validates the structure of JPEG, PNG and WebP files before decoding, against decompression bombs.

All functions raise `ValueError`, in time linear in the file size.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

_PNG = b"\x89PNG\r\n\x1a\n"
# Markers of JPEG; stuffed zeros, restarts and fill bytes are none.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
# Chunks that may say that an image is turned, which takes a copy.
_TURNING = {b"eXIf", b"iTXt"}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
# Every scan of a progressive JPEG passes over all pixels; encoders write about ten.
_MOST_SCANS = 64
# Segments of JPEG and chunks of PNG, which Pillow reads one by one in Python; encoders write chunks of 4 KB and more.
_MOST_PARTS = 1024
_PART_BYTES = 512
# Compressed input and inflated output of one step.
_PIECE, _INFLATED = 1 << 16, 1 << 20


class Header(NamedTuple):
    """Image size, and peak decoder memory in bytes per pixel."""

    width: int
    height: int
    depth: int


def read_header(data: bytes) -> Header:
    """Parse the header of a JPEG, PNG or WebP file; an invalid or abusive file raises `ValueError`."""
    if data.startswith(_PNG):
        kinds = set()
        width = height = bits = colours = 0
        for kind, body in png_chunks(data):
            kinds.add(kind)
            if kind == b"IHDR":
                width, height, bits, colours = struct.unpack(">IIBB", body[:10])
        if bits == 16 and colours == 0:
            return Header(width, height, 32)
        return Header(width, height, 20 if b"tRNS" in kinds or colours & 4 else 9 if kinds & _TURNING else 5)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        if data[12:16] == b"VP8X":
            return Header(_number(data, 24, 3) + 1, _number(data, 27, 3) + 1, 32 if data[20] & 0x10 else 20)
        if data[12:16] == b"VP8L" and data[20] == 0x2F:
            sizes = _number(data, 21, 4)
            return Header((sizes & 0x3FFF) + 1, (sizes >> 14 & 0x3FFF) + 1, 32 if sizes >> 28 & 1 else 20)
        if data[12:16] == b"VP8 ":
            return Header(_number(data, 26, 2) & 0x3FFF, _number(data, 28, 2) & 0x3FFF, 20)
    raise ValueError("it is no JPEG, PNG or WebP")


def png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Types and bodies of the chunks of a PNG file; a truncated file raises `ValueError`."""
    view, at = memoryview(data), len(_PNG)
    most = _MOST_PARTS + len(data) // _PART_BYTES
    for number in range(most):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if at + 12 + length > len(data):
            raise ValueError("it ends within a chunk")
        if (kind == b"IHDR") != (number == 0) or (number == 0 and length != 13):
            raise ValueError("its first chunk is no header, or another is")
        yield kind, view[at + 8 : at + 8 + length]
        if kind == b"IEND":
            return
        at += 12 + length
    raise ValueError(f"it has more than {most:,} chunks")


def check_png(data: bytes) -> None:
    """Reject a PNG file whose pixel data is shorter or longer than its header states."""
    inflate, found, expected = zlib.decompressobj(), 0, 0
    for kind, body in png_chunks(data):
        if kind == b"IHDR":
            expected = _png_bytes(*struct.unpack(">IIBBBBB", body))
        for start in range(0, len(body) if kind == b"IDAT" else 0, _PIECE):
            rest: bytes | memoryview = body[start : start + _PIECE]
            while rest and not inflate.eof:
                found += len(inflate.decompress(rest, min(_INFLATED, expected - found + 1)))
                if found > expected:
                    raise ValueError(f"it holds more than the {expected} bytes of its pixels")
                rest = inflate.unconsumed_tail
            if inflate.eof:
                break
    if found < expected:
        raise ValueError(f"it holds {found} bytes of pixels instead of {expected}")


def _png_bytes(width: int, height: int, bits: int, colours: int, _: int, __: int, interlaced: int) -> int:
    bits *= {2: 3, 4: 2, 6: 4}.get(colours, 1)
    # Rows of one byte more than their pixels; seven small images where it is interlaced (Adam7).
    passes = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
    expected = 0
    for x, step_x, y, step_y in passes if interlaced else ((0, 1, 0, 1),):
        columns, rows = len(range(x, width, step_x)), len(range(y, height, step_y))
        expected += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    return expected


def _jpeg(data: bytes) -> Header:
    at, scans, largest = 2, 0, Header(0, 0, 0)
    turned = b"Exif" in data[: 1 << 17]
    for _ in range(_MOST_PARTS):
        found = _MARKER.search(data, at)
        if found is None or found[1] == b"\xd9":
            return largest
        kind, at = found[1][0], found.end()
        if kind in (0x01, 0xD8):
            continue
        if kind in _FRAMES and len(data) >= at + 8:
            height, width, parts = struct.unpack(">HHB", data[at + 3 : at + 8])
            depth = (9 if turned or parts > 3 else 5) + (2 * parts if kind in _PROGRESSIVE else 0)
            largest = max(largest, Header(width, height, depth), key=lambda each: each.width * each.height * each.depth)
        scans += kind == 0xDA
        if scans > _MOST_SCANS:
            raise ValueError(f"it has more than {_MOST_SCANS} scans")
        at += int.from_bytes(data[at : at + 2], "big")
    raise ValueError(f"it has more than {_MOST_PARTS:,} segments")


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")
