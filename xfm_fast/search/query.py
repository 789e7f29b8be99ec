"""Search by features, re-ranking of the best candidates with the fusion encoder, and the contact sheet."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xfm_fast.data.collection import Entry
from xfm_fast.errors import DataError, InputError, UnavailableError, explain_types, needs
from xfm_fast.io import make_folder, write_bytes
from xfm_fast.models.processor import batches, image_pixels, text_tokens
from xfm_fast.search.index import SearchIndex, SearchModel
from xfm_fast.tasks.reranking import Rank, rank_score

# Rows per GEMV: 64 MB of features of the base model.
_BLOCK_ROWS = 1 << 16
# Pixels of a picture in a sheet.
_THUMBNAIL = 320


class Hit(NamedTuple):
    """An image; `match` and `image` are None unless the fusion encoder scored it."""

    location: str
    similarity: float  # cosine
    match: float | None  # probability
    entry: Entry
    image: Image.Image | None
    score: float  # the order of hits


class SearchResult(NamedTuple):
    """Hits, best first, and the reasons why indexed images cannot be read any more."""

    hits: list[Hit]
    lost: dict[str, str]


@explain_types
def search(
    index: SearchIndex,
    model: SearchModel,
    query: str | Path,
    *,
    top: int = 12,
    candidates: int = 64,
    batch_size: int = 16,
    rank: Rank | None = None,
) -> SearchResult:
    """Find the images that a text describes, or that are similar to an image.

    The features of all images are compared. The fusion encoder then scores the nearest `candidates`
    together with the text. Images are compared by features only.

    Args:
        index: of the same model.
        model: see `open_model`.
        query: a text; or, as a `Path`, an image.
        top: most hits to return.
        candidates: images to score together with the text; 0 ranks by features.
        batch_size: candidates that are computed together.
        rank: `match`: the probability of a match; `similarity`: features only, no image is read;
            `sum`: match logit + cosine, see `xfm_fast.tasks.reranking.rank_score`. By default that
            of the model's run.

    Raises:
        DataError: the index is of another model, the image is broken, the text empty.
        UnavailableError: the model has no tokenizer, or no matching head.
        InputError: `top` or `candidates` are out of range.
    """
    if top < 1 or candidates < 0:
        raise InputError(f"top={top}, candidates={candidates}; use at least 1 and 0")
    index.check(model)
    xfm, rank = model.model, rank or model.rank
    if isinstance(query, str) and model.tokenizer is None:
        raise UnavailableError(
            f"{model.source} has no tokenizer for the text; give --tokenizer, or search by an image"
        )
    text = query if isinstance(query, str) and candidates > 0 and rank != "similarity" else None
    if text is not None and not ("matching" in xfm.heads and xfm.config.fusion_layers):
        raise UnavailableError(
            f"{model.source} has no matching head to score candidates with; use rank=similarity"
        )
    with torch.no_grad():
        if isinstance(query, Path):
            pixels = image_pixels([query], xfm.config, xfm.device)
            features = xfm.project_image(xfm.encode_image(pixels))
        else:
            input_ids, mask = text_tokens([query], model.tokenizer, xfm.config, xfm.device)
            features = xfm.project_text(xfm.encode_text(input_ids, mask))
    depth = top if text is None else max(top, candidates)
    rows, similarities = nearest(index.features, features[0].float().cpu(), depth)
    if not similarities.isfinite().all():
        raise DataError(
            f"{index.folder} holds features that are not finite; delete it and index again"
        )
    hits = []
    for row, similarity in zip(rows.tolist(), similarities.tolist(), strict=True):
        entry = index.entries[row]
        location = index.collection.location(entry)
        hits.append(Hit(location, similarity, None, entry, None, similarity))
    if text is None:
        return SearchResult(sorted(hits, key=_order), {})
    opened, lost = [], {}
    for hit in hits[:candidates]:
        try:
            opened.append(hit._replace(image=index.load(hit.entry)))
        except DataError as error:
            lost[hit.location] = str(error)
    logits = match_images(model, [hit.image for hit in opened if hit.image], text, batch_size)
    matches = logits.softmax(1)[:, 1]
    cosines = torch.tensor([hit.similarity for hit in opened])
    scores = matches if rank == "match" else rank_score(rank, logits[:, 1], cosines)
    scored = [
        hit._replace(match=match, score=score)
        for hit, match, score in zip(opened, matches.tolist(), scores.tolist(), strict=True)
    ]
    unscored = sorted(hits[candidates:], key=_order)
    return SearchResult([*sorted(scored, key=_order), *unscored][:top], lost)


def nearest(features: np.ndarray, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return indices and values of the `k` largest dot products of `features` `[I, E]` with `query` `[E]`, sorted."""
    rows, best = torch.empty(0, dtype=torch.long), torch.empty(0)
    for start in range(0, len(features), _BLOCK_ROWS):
        products = torch.from_numpy(features[start : start + _BLOCK_ROWS] @ query.numpy())
        values, indices = products.topk(min(k, len(products)))
        values, order = torch.cat([best, values]).sort(descending=True, stable=True)
        best, rows = values[:k], torch.cat([rows, indices + start])[order][:k]
    return rows, best


def match_images(
    opened: SearchModel, images: Sequence[Image.Image], text: str, batch_size: int
) -> Tensor:
    """Compute the matching head's logits `[I, 2]` of the text with each image; the text is encoded once."""
    model: Any = opened.model
    logits = [torch.empty(0, 2)]
    with torch.no_grad():
        input_ids, mask = text_tokens([text], opened.tokenizer, model.config, model.device)
        embeds = model.encode_text(input_ids, mask)
        for batch in batches(images, batch_size):
            pixels = image_pixels(batch, model.config, model.device)
            memory = model.image_memory(model.encode_image(pixels))
            texts, masks = embeds.expand(len(batch), -1, -1), mask.expand(len(batch), -1)
            fused = model.fuse(texts, masks, memory, first_token_only=True)
            logits.append(model.match_logits(fused).float().cpu())
    return torch.cat(logits)


def _order(hit: Hit) -> tuple[float, float, str]:
    return -hit.score, -hit.similarity, hit.location


@explain_types
def write_sheet(
    path: str | Path, query: str | Path, result: SearchResult, index: SearchIndex
) -> Path:
    """Write a contact sheet: a self-contained page of the hits with their pictures and scores.

    Args:
        path: of an `.html` file.
        query: of the search.
        result: of `search`.
        index: that was searched.

    Raises:
        InputError: another suffix.
        StorageError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path}: a contact sheet is an HTML page; name it .html")
    with needs("cli"):
        import jinja2
    loader = jinja2.PackageLoader(__package__ or "", "templates")
    templates = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    warning = None
    if index.model.random:
        warning = f"The weights are random ({index.model}), so this order means nothing."
    page = templates.get_template("sheet.html").render(
        title=query.name if isinstance(query, Path) else query,
        cells=[{"hit": hit, "image": _thumbnail(hit, index)} for hit in result.hits],
        warning=warning,
        searched=len(index.entries),
        where=str(index.path),
        model=str(index.model),
        lost=result.lost,
    )
    make_folder(path.parent)
    write_bytes({path: page.encode("utf-8", "replace")})
    return path


def _thumbnail(hit: Hit, index: SearchIndex) -> str | None:
    """Encode a picture as a data URL; None if it has disappeared since it was indexed."""
    try:
        image = (hit.image or index.load(hit.entry)).copy()
    except DataError:
        return None
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
