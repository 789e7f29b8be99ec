"""Search over HTTP: `POST /search` in an index, its pictures, and the page of `search.html`."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from time import perf_counter
from typing import Annotated, Any

from fastapi import Path, Request, Response
from pydantic import Field

from xfm_fast.errors import DataError
from xfm_fast.search import Hit, SearchIndex, search, thumbnail
from xfm_fast.serve.app import PAGES, PICTURE_PATH, Service
from xfm_fast.serve.model import Reading
from xfm_fast.serve.schema import Body, Problem, TextOrImage

# Pixels of the longest side of a picture in the grid, and alone.
_SIDES = (512, 2048)
# Other sites may not show pictures.
_PICTURE_HEADERS = {
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "private, max-age=300",
}


class SearchRequest(Body):
    """A text or an image to search for, and filters of the entries."""

    query: TextOrImage = Field(examples=["a dog on a beach"])
    top: Annotated[int, Field(ge=1, le=1000)] = 24
    path: str | None = Field(None, description="pattern of names, such as trip/*")
    where: dict[str, str] = Field({}, description="values of columns")


class Search:
    """The endpoints of an index, and the page that shows it; raises `DataError` if another model made it."""

    def __init__(self, service: Service, index: SearchIndex) -> None:
        self._service, self._index = service, index
        self._model = service.choose(None, "embed")
        index.check(self._model.encoder)
        # One picture is decoded at a time, in memory beside the ledger.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="picture")

    def add(self) -> None:
        """Add all endpoints to the service."""
        app = self._service.routes
        content = files(__package__ or "").joinpath("search.html").read_text("utf-8")
        headers = {"content-security-policy": _policy(content), "referrer-policy": "no-referrer"}
        page = Response(content, headers=headers, media_type="text/html")
        app.post("/search", response_model=None)(self.search)
        app.get("/search/index")(self.describe)
        app.get(PICTURE_PATH + "{row}", response_model=None)(self.picture)
        for _, path in PAGES:
            app.get(path, include_in_schema=False, response_model=None)(lambda: page)

    async def search(self, request: Request, body: SearchRequest) -> Response:
        """Find the entries that are nearest to a text or an image, the best first.

        The score is the cosine similarity; X-FM re-ranks the nearest pictures of a text by its fusion
        encoder.
        """
        start, account, service = perf_counter(), request.state.account, self._service
        lists, reading = {"query": [body.query]}, Reading("query")
        result = await service.compute(request, self._model, lists, reading)
        # Re-ranking reads pictures, which a bare index does not have.
        text = body.query if isinstance(body.query, str) and self._index.root else ""
        find = partial(
            search,
            self._index,
            self._model.encoder,
            text,
            feature=result.values[0],
            rank=None if text else "similarity",
            top=body.top,
            where=body.where,
            glob=body.path,
        )
        hits, lost = await account.run(service.batch_thread, find)
        content = {
            "hits": [_content(hit) for hit in hits],
            "searched": len(self._index),
            "milliseconds": 1000 * (perf_counter() - start),
            "lost": lost,
            "model": self._model.name,
            "random_weights": self._model.random,
            "truncated": result.truncated,
        }
        # Names of files need not be Unicode.
        answer = json.dumps(content).encode()
        account.hold(len(answer))
        return Response(answer, media_type="application/json")

    def describe(self) -> dict[str, Any]:
        """Describe the index, and what it is searched by."""
        index, model = self._index, self._model
        return {
            "model": model.name,
            "entries": len(index),
            "modality": index.modality,
            "queries": model.modalities,
            "columns": index.columns,
        }

    async def picture(
        self, request: Request, row: Annotated[int, Path(ge=0, lt=1 << 63)], large: bool = False
    ) -> Response:
        """Return the picture of an entry: a JPEG of at most 512 pixels, or of 2,048 if it is `large`."""
        account = request.state.account
        # No batch waits for it.
        account.submitted = True
        content = await account.run(self._thread, self._draw, row, _SIDES[large])
        return Response(content, headers=_PICTURE_HEADERS, media_type="image/jpeg")

    def _draw(self, row: int, side: int) -> bytes:
        try:
            (entry,) = self._index.entries([row])
            return thumbnail(self._index, entry, side)
        except DataError as error:
            raise Problem(404, str(error)) from None


def _policy(page: str) -> str:
    """Return the content security policy by which a page runs its script and reaches its service alone."""
    sources = "default-src 'none'; connect-src 'self'; img-src 'self' data: blob:"
    for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        sources += f"; {tag}-src 'sha256-{digest}'"
    return (
        f"{sources}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types"
    )


def _content(hit: Hit) -> dict[str, Any]:
    return {
        "row": hit.row,
        "name": hit.entry.name,
        "score": hit.score,
        "similarity": hit.similarity,
        "match": hit.match,
        "text": hit.entry.caption,
        "passage": hit.entry.passage,
        "columns": dict(hit.entry.fields),
    }
