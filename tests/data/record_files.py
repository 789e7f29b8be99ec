"""Small data files of every kind for the tests of readers."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xfm_fast.config import XFMConfig
from xfm_fast.tokenizer import CaptionTokenizer


def picture(
    seed: int, size: tuple[int, int] = (40, 30), form: str = "JPEG", mode: str = "RGB"
) -> bytes:
    """Encode an image, different for every seed."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size).convert(mode).save(buffer, form)
    return buffer.getvalue()


def base64_picture(seed: int, **options: Any) -> str:
    return base64.b64encode(picture(seed, **options)).decode()


def pair(index: int) -> dict[str, Any]:
    return {"binary": base64_picture(index), "desc": f"picture number {index} of a cat"}


def pairs(count: int) -> list[dict[str, Any]]:
    return [pair(index) for index in range(count)]


def region(index: int) -> dict[str, Any]:
    elements = [
        {"bb": [2, 3, 10 + index % 5, 8], "caption": "a cat", "attributes": ["red"]},
        {"bb": [15, 10, 20, 15], "caption": ["the dog", "a dog"]},
    ]
    return {"binary": base64_picture(index), "caption": f"whole {index}", "elems": elements}


def write_lines(path: Path, rows: Iterable[Any], *, end: str = "\n") -> Path:
    """Rows as line JSON; strings are written as they are."""
    path.write_bytes(
        b"".join(
            ((row if isinstance(row, str) else json.dumps(row)) + end).encode() for row in rows
        )
    )
    return path


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def tiny_config(**overrides: Any) -> XFMConfig:
    return XFMConfig.preset("tiny", **overrides)


def tiny_tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train_on_texts(
        ["picture number of a cat", "the dog", "whole", "red"], 320
    )
