"""Images of requests: data URLs, base64 and, where allowed, URLs."""

from __future__ import annotations

import binascii
import struct
from urllib.parse import unquote_to_bytes

from xfm_fast.data.headers import png_chunks, read_header
from xfm_fast.errors import DataError
from xfm_fast.serve.budget import Budget
from xfm_fast.serve.problem import Problem
from xfm_fast.serve.web import WebFetcher


def image_content(
    value: str, name: str, fetcher: WebFetcher | None, most_pixels: int, budget: Budget
) -> tuple[bytes, int]:
    """File of an image that a request gives as data URL, base64 or URL, and the bytes that decoding it takes."""
    if value[:5].lower() == "data:":
        content = _data_url(value, name)
    elif is_url(value):
        if fetcher is None:
            raise Problem(
                422, f"{name} is a URL; send data:image/jpeg;base64,..., or start the service with --allow-urls"
            )
        content = fetcher.fetch(value)
    else:
        content = _base64(value.encode("utf-8", "replace"), name, value)
    return _check_header(content, name, most_pixels, budget)


def is_url(value: str) -> bool:
    """Whether the value is a URL of HTTP."""
    return value[:8].lower().startswith(("http:", "https:"))


def _data_url(value: str, name: str) -> bytes:
    head, comma, data = value.partition(",")
    if not comma:
        raise Problem(422, f"{name} is a data URL without a comma ({value[:40]!r}); write data:image/jpeg;base64,...")
    kind, *parameters = head[len("data:") :].split(";")
    if kind and not kind.strip().lower().startswith("image/"):
        raise Problem(422, f"{name} is a data URL of type {kind[:40]!r}; give an image, such as image/jpeg")
    if parameters and parameters[-1].strip().lower() == "base64":
        return _base64(unquote_to_bytes(data), name, data)
    raise Problem(422, f"{name} is a data URL without base64 ({value[:40]!r}); write data:image/jpeg;base64,...")


def _base64(data: bytes, name: str, shown: str) -> bytes:
    try:
        content = binascii.a2b_base64(data.translate(None, b"\r\n"), strict_mode=True)
    except ValueError as error:
        raise Problem(422, f"{name} ({len(data):,} characters, {shown[:16]!r}...) is not base64 ({error})") from None
    if not content:
        raise Problem(422, f"{name} is empty; send the file of an image")
    return content


def _check_header(content: bytes, name: str, most_pixels: int, budget: Budget) -> tuple[bytes, int]:
    """The file without compressed text, and the bytes that decoding it takes; raises where it costs too much."""
    try:
        width, height, depth = read_header(content)
        if content.startswith(b"\x89PNG"):
            content = _without_compressed_text(content)
    except (ValueError, IndexError, struct.error) as error:
        raise DataError(
            f"{name} ({len(content):,} bytes, {content[:8]!r}...) is no JPEG, PNG or WebP ({error}); convert it"
        ) from None
    pixels = width * height
    if pixels > most_pixels:
        raise Problem(
            413, f"{name} is {width}x{height} = {pixels:,} pixels, over the limit of {most_pixels:,}; shrink it"
        )
    budget.take_image(name, pixels, pixels * depth)
    return content, pixels * depth


def _without_compressed_text(content: bytes) -> bytes:
    """A PNG without colour profile and compressed texts, which Pillow inflates to up to 64 MB and nothing reads."""
    chunks, at, removed = [content[:8]], 8, False
    for kind, body in png_chunks(content):
        end = at + 12 + len(body)
        if kind in (b"iCCP", b"zTXt") or (kind == b"iTXt" and bytes(body[:82]).partition(b"\0")[2][:1] != b"\0"):
            removed = True
        else:
            chunks.append(content[at:end])
        at = end
    return b"".join(chunks) if removed else content
