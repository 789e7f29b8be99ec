"""Contact sheets of what was found: a self-contained page, or one picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import jinja2
from PIL import Image, ImageDraw, ImageFont

from xfm_fast.checkpoint import write_bytes
from xfm_fast.errors import DataError, InputError, StorageError
from xfm_fast.search.index import SearchIndex
from xfm_fast.search.query import Found, Hit

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__ or "", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_SIDE = 320
_COLUMNS, _CELL, _EDGE, _LINE = 4, 240, 12, 16
_INK, _PAPER, _EMPTY = (32, 32, 32), (255, 255, 255), (225, 225, 225)


def write_sheet(path: str | Path, query: str | Path, found: Found, index: SearchIndex) -> Path:
    """Write hits with their pictures and scores.

    Args:
        path: `.html` for a page that holds all it needs, `.png` for a picture.
        query: what was searched for.
        found: the result of `search`.
        index: what was searched.

    Raises:
        InputError: the suffix is another one.
        StorageError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm", ".png"):
        raise InputError(f"a contact sheet is .html or .png, and {path} is neither; name one of these")
    thumbnails = [_thumbnail(hit, index, _CELL if path.suffix.lower() == ".png" else _SIDE) for hit in found.hits]
    warning = f"The weights are random ({index.model}), so this order means nothing." if index.model.random else None
    title = query.name if isinstance(query, Path) else query
    if path.suffix.lower() == ".png":
        content = _picture(title, found.hits, thumbnails, warning)
    else:
        cells = [
            {"hit": hit, "image": _data_url(image), "number": number}
            for number, (hit, image) in enumerate(zip(found.hits, thumbnails, strict=True), start=1)
        ]
        page = _TEMPLATES.get_template("sheet.html").render(
            title=title, cells=cells, warning=warning, searched=len(index.entries), where=str(index.path),
            model=str(index.model), lost=found.lost,
        )  # fmt: skip
        content = page.encode("utf-8", "replace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"folder {path.parent} cannot be made ({error.strerror or error}); choose another") from None
    write_bytes({path: content})
    return path


def _thumbnail(hit: Hit, index: SearchIndex, side: int) -> Image.Image | None:
    try:
        image = (hit.image or index.load(hit.entry)).copy()
    except DataError:
        # It was there when it was indexed; the sheet shows an empty place.
        return None
    image.thumbnail((side, side))
    return image


def _data_url(image: Image.Image | None) -> str | None:
    if image is None:
        return None
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _picture(title: str, hits: Sequence[Hit], thumbnails: Sequence[Image.Image | None], warning: str | None) -> bytes:
    font = ImageFont.load_default(13)
    heads = [title, *([warning] if warning else [])]
    top = _EDGE + len(heads) * (_LINE + 4)
    step = _CELL + 2 * _LINE + _EDGE
    columns = min(_COLUMNS, max(1, len(hits)))
    size = _EDGE + columns * (_CELL + _EDGE), top + -(-len(hits) // columns) * step + _EDGE
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, head in enumerate(heads):
        place = (_EDGE, _EDGE + number * (_LINE + 4))
        draw.text(place, _fitting(head, size[0] - 2 * _EDGE, font), (190, 0, 0) if number else _INK, font)
    for number, (hit, image) in enumerate(zip(hits, thumbnails, strict=True)):
        left = _EDGE + number % columns * (_CELL + _EDGE)
        upper = top + number // columns * step
        if image is None:
            draw.rectangle((left, upper, left + _CELL, upper + _CELL), _EMPTY)
        else:
            sheet.paste(image, (left + (_CELL - image.width) // 2, upper + (_CELL - image.height) // 2))
        for line, text in enumerate((f"{number + 1}. {scores(hit)}", Path(hit.location).name)):
            draw.text((left, upper + _CELL + line * _LINE), _fitting(text, _CELL, font), _INK, font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def scores(hit: Hit) -> str:
    """The numbers of a hit in words."""
    similar = f"similarity {hit.similarity:.3f}"
    return similar if hit.match is None else f"match {hit.match:.1%}, {similar}"


def _fitting(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


_TEMPLATES.filters["scores"] = scores
