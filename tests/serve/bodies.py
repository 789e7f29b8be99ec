"""Bodies of requests, valid and not, made to cost a service as much as they can: by seed, and by mutation."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

MOST_BYTES = 1_000_000
PATHS = {"/v1/rerank": "documents", "/v1/embeddings": "input", "/v1/score": "text_2"}
TOKENS = (
    "0",
    "{}",
    "[]",
    '""',
    "null",
    "1.5",
    '"ab"',
    '{"a":0}',
    "[[[]]]",
    '{"text":1}',
    '{"image":"a"}',
    "[0]",
    '{"content":[]}',
)
LETTERS = ("a", "é", "漢", "😀", "\\u00e9", '\\"', "\\\\", ",", "[", "ab ", "漢 ")
Gene = dict[str, Any]


def gene(rng: random.Random) -> Gene:
    """Choices that a body is made of."""
    return {
        "path": rng.choice([*PATHS]),
        "kind": rng.choice([*KINDS]),
        "token": rng.choice(TOKENS),
        "letter": rng.choice(LETTERS),
        "field": rng.choice(["documents", "input", "text_2", "other", "content"]),
        "count": rng.choice([1, 2, 8, 15, 64, 256, 10_000, 1_000_000]),
        "side": rng.choice([8, 200, 500, 1000, 1300, 1800, 2600, 3300, 4096]),
        "form": rng.choice([*FORMS]),
        "depth": rng.choice([1, 10, 60, 900]),
        "cut": rng.choice([0, 0, 0, 1]),
    }


def mutated(parent: Gene, rng: random.Random) -> Gene:
    """The choices of a body with one or two made anew."""
    fresh = gene(rng)
    return parent | {name: fresh[name] for name in rng.sample([*parent], rng.randint(1, 2))}


def body(choices: Gene) -> bytes:
    """At most `MOST_BYTES` of JSON, or nearly."""
    made = KINDS[choices["kind"]](choices)[:MOST_BYTES]
    return made[: len(made) // 2] if choices["cut"] else made


def _wrap(choices: Gene, name: str, items: str) -> bytes:
    head = {"/v1/rerank": '"query": "a", ', "/v1/score": '"text_1": "a", '}.get(choices["path"], "")
    return f'{{{head}"{name}": {items}}}'.encode()


def _many(choices: Gene) -> bytes:
    token = choices["token"]
    count = min(choices["count"], (MOST_BYTES - 100) // (len(token.encode()) + 1))
    items = f"[{','.join([token] * count)}]"
    if choices["field"] == "content":
        return _wrap(choices, PATHS[choices["path"]], f'[{{"content": {items}}}]')
    return _wrap(choices, choices["field"], items)


def _nested(choices: Gene) -> bytes:
    depth = choices["depth"]
    one = "[" * depth + "]" * depth if choices["token"] != "{}" else '{"a":' * depth + "0" + "}" * depth
    count = min(choices["count"], (MOST_BYTES - 100) // (len(one) + 1))
    return _wrap(choices, choices["field"], f"[{','.join([one] * count)}]")


def _texts(choices: Gene) -> bytes:
    count, letter = min(choices["count"], 256), choices["letter"]
    rng = random.Random(0)
    length = min(1990, (MOST_BYTES - 100) // count // len(letter.encode()) - 4)
    letters = (
        [letter, *(chr(ord(letter[0]) + n) for n in range(1, 20))] if len(letter) == 1 and letter > "," else [letter]
    )
    items = ",".join(f'"{"".join(rng.choices(letters, k=max(1, length // len(letter))))}"' for _ in range(count))
    return _wrap(choices, PATHS[choices["path"]], f"[{items}]")


def _string(choices: Gene) -> bytes:
    letter = choices["letter"]
    text = letter * ((MOST_BYTES - 100) // len(letter.encode()))
    items = {"documents": f'["{text}"]', "input": f'"{text}"', "text_2": f'{{"image": "{text}"}}'}
    return _wrap(choices, PATHS[choices["path"]], items.get(choices["field"], f'"a", "{text}": 0'))


def _keys(choices: Gene) -> bytes:
    count = min(choices["count"], 80_000)
    return _wrap(choices, PATHS[choices["path"]], "[" + ",".join(f'{{"k{n}":0}}' for n in range(count)) + "]")


def _numbers(choices: Gene) -> bytes:
    number = "9" * min(choices["count"], 4300)
    count = min(choices["side"], (MOST_BYTES - 100) // (len(number) + 1))
    return _wrap(choices, choices["field"], "[" + ",".join([number] * count) + "]")


def _images(choices: Gene) -> bytes:
    content = FORMS[choices["form"]](choices["side"], choices["count"])
    room = MOST_BYTES * 3 // 4 - 1000
    count = max(1, min(choices["count"], 256, room // (len(content) + 40)))
    # Trailing bytes, which decoders pass over, make each an image of its own.
    items = [
        {"image": base64.b64encode(content + n.to_bytes(3, "big")).decode()} for n in range(count)
    ]  # fmt: skip
    return _wrap(choices, PATHS[choices["path"]], json.dumps(items))


KINDS: dict[str, Callable[[Gene], bytes]] = {
    "many": _many, "nested": _nested, "texts": _texts, "string": _string, "keys": _keys, "numbers": _numbers,
    "images": _images,
}  # fmt: skip


def _saved(side: int, mode: str, kind: str, **settings: Any) -> bytes:
    lines = np.zeros((side, side, 3), np.uint8)
    lines[::7] = 200
    stream = io.BytesIO()
    Image.fromarray(lines).convert(mode).save(stream, kind, **settings)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(side: int, pixels: bytes, before: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def png_with_more(side: int, more: int) -> bytes:
    """A PNG whose data inflate to as many MB more than its pixels take."""
    packer = zlib.compressobj()
    packed = packer.compress(bytes(side * (3 * side + 1))) + packer.flush(zlib.Z_FULL_FLUSH)
    # From one flush to the next, a stream may be repeated.
    packed += (packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)) * more
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def _texts_of_png(side: int, count: int) -> bytes:
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20)))
    profile = chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(1 << 20)))
    return _png(8, bytes(8 * 25), (text + profile) * min(count, 60))


def _chunks_of_png(side: int, count: int) -> bytes:
    return _png(8, bytes(8 * 25), chunk(b"teXt", b"") * min(count, 50_000))


def scans(side: int, count: int) -> bytes:
    """A progressive JPEG that passes over its pixels again and again."""
    content = _saved(side, "RGB", "JPEG", progressive=True, quality=1)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * min(count, 500) + b"\xff\xd9"


def _segments(side: int, count: int) -> bytes:
    content = _saved(8, "RGB", "JPEG")
    return content[:2] + b"\xff\xfe\0\2" * min(count, 150_000) + content[2:]


@lru_cache(64)
def _form(side: int, mode: str, kind: str, settings: tuple[tuple[str, Any], ...]) -> bytes:
    return _saved(side, mode, kind, **dict(settings))


def _of(mode: str, kind: str, **settings: Any) -> Callable[[int, int], bytes]:
    return lambda side, count: _form(side, mode, kind, tuple(settings.items()))


FORMS: dict[str, Callable[[int, int], bytes]] = {
    "png": _of("RGB", "PNG"), "png-alpha": _of("RGBA", "PNG"), "png-grey": _of("L", "PNG"),
    "png-deep": _of("I;16", "PNG"),
    "png-palette": _of("P", "PNG"), "jpeg": _of("RGB", "JPEG", quality=1), "jpeg-cmyk": _of("CMYK", "JPEG", quality=1),
    "progressive": _of("RGB", "JPEG", quality=1, progressive=True, subsampling=0),
    "webp": _of("RGB", "WEBP", quality=1, method=0), "webp-lossless": _of("RGBA", "WEBP", lossless=True, method=0),
    "png-more": lambda side, count: png_with_more(8, min(count, 300)), "png-texts": _texts_of_png,
    "png-chunks": _chunks_of_png, "jpeg-scans": scans, "jpeg-segments": _segments,
}  # fmt: skip
