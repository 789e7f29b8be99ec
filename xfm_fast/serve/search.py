"""Search over HTTP: `POST /search` in an index, its pictures, and the page of `search.html`."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from importlib.resources import files
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from pydantic import Field

from xfm_fast.errors import DataError
from xfm_fast.search import Hit, SearchIndex, search, thumbnail
from xfm_fast.serve.model import Reading
from xfm_fast.serve.routes import fields
from xfm_fast.serve.schema import Body, Problem, TextOrImage

if TYPE_CHECKING:
    from xfm_fast.serve.app import Service

PAGE_PATHS = ("/", "/search")
PICTURE_PATH = "/search/picture/"
# Pixels of the longest side of a picture in the grid, and alone.
_SIDES = (512, 2048)
# Decoding takes memory beside the ledger.
_DECODING_THREADS, _CACHED_PICTURES = 2, 256
# Other sites may not show pictures.
_PICTURE_HEADERS = {"cross-origin-resource-policy": "same-origin", "cache-control": "max-age=300"}


class SearchRequest(Body):
    """A text or an image to search for, and filters of the entries."""

    query: TextOrImage = Field(examples=["a dog on a beach"])
    top: Annotated[int, Field(ge=1, le=1000)] = 24
    path: str | None = Field(None, description="pattern of names", examples=["trip/*"])
    where: dict[str, str] = Field({}, description="values of columns", examples=[{"year": "2024"}])


class Search:
    """The endpoints of an index, and the page that shows it; raises `DataError` if none of the models made it."""

    def __init__(self, service: Service, index: SearchIndex) -> None:
        self._service, self._index = service, index
        models = [model for model in service.models if "embed" in model.abilities]
        matches = (model for model in models if model.encoder.fingerprint == index.fingerprint)
        self._model = next(matches, None) or service.choose(None, "embed")
        index.check(self._model.encoder)
        self._threads = ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="picture")
        self._draw = lru_cache(_CACHED_PICTURES)(self._draw)

    def add(self, app: FastAPI) -> None:
        """Add all endpoints to an application."""
        content = files(__package__ or "").joinpath("search.html").read_text("utf-8")
        headers = {"content-security-policy": _policy(content), "referrer-policy": "no-referrer"}
        page = Response(content, headers=headers, media_type="text/html")
        app.post("/search", response_model=None)(self.search)
        app.get("/search/index")(self.describe)
        app.get(PICTURE_PATH + "{row}", response_model=None)(self.picture)
        for path in PAGE_PATHS:
            app.get(path, include_in_schema=False, response_model=None)(lambda: page)

    async def search(self, request: Request, body: SearchRequest) -> Response:
        """Find the entries that are nearest to a text or an image, the best first.

        The score is the cosine similarity; X-FM re-ranks the nearest pictures of a text by its fusion
        encoder.
        """
        start, account, service = perf_counter(), request.state.account, self._service
        lists, reading = {"query": [body.query]}, Reading("query")
        result = await service.compute(request, self._model, lists, (), reading)
        find = partial(
            search,
            self._index,
            self._model.encoder,
            body.query if isinstance(body.query, str) else None,
            feature=result.values[0],
            top=body.top,
            where=body.where,
            glob=body.path,
        )
        # Re-ranking runs the model.
        hits, lost = await account.run(service.batch_thread, find)
        content = {
            "hits": [_content(hit) for hit in hits],
            "searched": len(self._index),
            "milliseconds": 1000 * (perf_counter() - start),
            "lost": lost,
            **fields(result, body),
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
        content = await account.run(self._threads, self._draw, row, _SIDES[large])
        return Response(content, headers=_PICTURE_HEADERS, media_type="image/jpeg")

    def _draw(self, row: int, side: int) -> bytes:
        try:
            return thumbnail(self._index, self._index.entries([row])[0], side)
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
        "columns": dict(hit.entry.fields),
    }
