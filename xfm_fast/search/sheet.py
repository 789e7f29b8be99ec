"""Contact sheets of search results: a self-contained page, or one picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from xfm_fast.errors import DataError, InputError, StorageError, explain_types, needs
from xfm_fast.io import write_bytes
from xfm_fast.search.index import SearchIndex
from xfm_fast.search.query import Found, Hit

_SIDE = 320
_COLUMNS, _CELL, _EDGE, _LINE = 4, 240, 12, 16
_INK, _RED, _PAPER, _EMPTY = (32, 32, 32), (190, 0, 0), (255, 255, 255), (225, 225, 225)


@explain_types
def write_sheet(path: str | Path, query: str | Path, found: Found, index: SearchIndex) -> Path:
    """Write hits with their pictures and scores.

    Args:
        path: `.html` for a self-contained page, `.png` for a picture.
        query: of the search.
        found: the result of `search`.
        index: that was searched.

    Raises:
        InputError: another suffix.
        StorageError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm", ".png"):
        raise InputError(f"{path}: a contact sheet is .html or .png; use one of these")
    as_picture = path.suffix.lower() == ".png"
    thumbnails = [_thumbnail(hit, index, _CELL if as_picture else _SIDE) for hit in found.hits]
    warning = f"The weights are random ({index.model}), so this order means nothing." if index.model.random else None
    title = query.name if isinstance(query, Path) else query
    if as_picture:
        content = _picture(title, found.hits, thumbnails, warning)
    else:
        cells = [
            {"hit": hit, "image": _data_url(image), "number": number}
            for number, (hit, image) in enumerate(zip(found.hits, thumbnails, strict=True), start=1)
        ]
        with needs("cli"):
            import jinja2
        loader = jinja2.PackageLoader(__package__ or "", "templates")
        templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
        templates.filters["scores"] = scores
        page = templates.get_template("sheet.html").render(
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
    """None for an image that is gone since it was indexed."""
    try:
        image = (hit.image or index.load(hit.entry)).copy()
    except DataError:
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
    columns = min(_COLUMNS, max(1, len(hits)))
    top, step = 2 * (_EDGE + _LINE), _CELL + 2 * _LINE + _EDGE
    size = _EDGE + columns * (_CELL + _EDGE), top + -(-len(hits) // columns) * step
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_EDGE, _EDGE), title, _INK, font)
    draw.text((_EDGE, _EDGE + _LINE), warning or "", _RED, font)
    for number, (hit, image) in enumerate(zip(hits, thumbnails, strict=True)):
        # Texts that are too long end with the cell.
        cell = Image.new("RGB", (_CELL, _CELL + 2 * _LINE), _PAPER)
        if image is None:
            cell.paste(_EMPTY, (0, 0, _CELL, _CELL))
        else:
            cell.paste(image, ((_CELL - image.width) // 2, (_CELL - image.height) // 2))
        for line, text in enumerate((f"{number + 1}. {scores(hit)}", Path(hit.location).name)):
            ImageDraw.Draw(cell).text((0, _CELL + line * _LINE), text, _INK, font)
        sheet.paste(cell, (_EDGE + number % columns * (_CELL + _EDGE), top + number // columns * step))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def scores(hit: Hit) -> str:
    """The scores of a hit, for a caption."""
    similarity = f"similarity {hit.similarity:.3f}"
    return similarity if hit.match is None else f"match {hit.match:.1%}, {similarity}"
