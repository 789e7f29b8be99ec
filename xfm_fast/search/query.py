"""Search by features, re-ranking of the best candidates with the fusion encoder, and the contact sheet."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xfm_fast.data.collection import Entry
from xfm_fast.encoders import Encoder, XFMEncoder
from xfm_fast.errors import DataError, InputError, UnavailableError, explain_types, needs
from xfm_fast.io import make_folder, write_bytes
from xfm_fast.models.processor import batches, image_pixels, open_image, text_tokens
from xfm_fast.search.index import SearchIndex
from xfm_fast.search.store import BLOCK_ROWS
from xfm_fast.tasks.reranking import Rank, rank_score

# Pixels of a picture in a sheet.
_THUMBNAIL = 320
# Above the largest cosine by more than rounding.
_MOST_COSINE = 1.01


class Hit(NamedTuple):
    """An image or a text; `match` is None unless the fusion encoder scored it."""

    location: str
    similarity: float  # cosine
    match: float | None  # probability
    entry: Entry
    score: float  # the order of hits
    row: int  # of the features, see `SearchIndex.entries`


class SearchResult(NamedTuple):
    """Hits, best first, and the reasons why indexed images cannot be read any more."""

    hits: list[Hit]
    lost: dict[str, str]


@explain_types
def search(
    index: SearchIndex,
    encoder: Encoder,
    query: str | Path | Image.Image,
    *,
    top: int = 12,
    candidates: int = 64,
    batch_size: int = 16,
    rank: Rank | None = None,
    where: Mapping[str, str] | None = None,
    glob: str | None = None,
    feature: np.ndarray | None = None,
) -> SearchResult:
    """Find the images or texts that a text describes, or that are similar to an image.

    The features of all entries that fit the filters are compared. Of X-FM, the fusion encoder then
    scores the nearest `candidates` images together with a text.

    Args:
        index: of the same model.
        encoder: see `open_encoder`.
        query: a text; or, as a `Path` or open, an image.
        top: most hits to return.
        candidates: images to score together with the text; 0 ranks by features.
        batch_size: candidates that are computed together.
        rank: `match`: the probability of a match; `similarity`: features only, no image is read;
            `sum`: match logit + cosine, see `xfm_fast.tasks.reranking.rank_score`. By default that
            of the model's run; `similarity` for models other than X-FM.
        where: values that columns of the collection's table must have.
        glob: pattern of names, such as `trip/*`; `*` also matches `/`.
        feature: of the query, if it is known, as in `nearest`.

    Raises:
        DataError: the index is of another model, the image is broken, the text empty.
        UnavailableError: the model does not embed such a query, or has no matching head.
        InputError: `top` or `candidates` are out of range, or there is no such column.
    """
    if top < 1 or candidates < 0:
        raise InputError(f"top={top}, candidates={candidates}; use at least 1 and 0")
    index.check(encoder)
    text = query if isinstance(query, str) and index.modality == "image" else None
    if isinstance(encoder, XFMEncoder):
        rank = rank or encoder.rank
    elif rank in ("match", "sum"):
        raise UnavailableError(f"rank={rank} is of X-FM, not of {encoder.source}; leave it out")
    if feature is None:
        feature = _query_feature(encoder, query)
    hits = nearest(index, feature, max(top, candidates), where=where, glob=glob)
    lost: dict[str, str] = {}
    if isinstance(encoder, XFMEncoder) and text is not None and candidates and rank != "similarity":
        matches, lost = _rerank(index, encoder, text, hits[:candidates], rank, batch_size)
        hits = [*matches, *hits[candidates:]]
    return SearchResult(hits[:top], lost)


def _rerank(
    index: SearchIndex,
    encoder: XFMEncoder,
    text: str,
    hits: Sequence[Hit],
    rank: Rank | None,
    batch_size: int,
) -> tuple[list[Hit], dict[str, str]]:
    """Order images by the fusion encoder; returns also the reasons why some cannot be read."""
    config = encoder.model.config
    if not ("matching" in encoder.model.heads and config.fusion_layers):
        raise UnavailableError(
            f"{encoder.source} has no matching head to score candidates with; use rank=similarity"
        )
    opened, pixels, lost = list[Hit](), list[Tensor](), dict[str, str]()
    for hit in hits:
        try:
            pixels.append(image_pixels([index.load(hit.entry)], config.image_size))
            opened.append(hit)
        except DataError as error:
            if index.root is None:
                raise
            lost[hit.location] = str(error)
    logits = match_images(encoder, pixels, text, batch_size)
    matches = logits.softmax(1)[:, 1]
    cosines = torch.tensor([hit.similarity for hit in opened])
    scores = rank_score(rank, logits[:, 1], cosines) if rank == "sum" else matches
    scored = [
        hit._replace(match=match, score=score)
        for hit, match, score in zip(opened, matches.tolist(), scores.tolist(), strict=True)
    ]
    return sorted(scored, key=_order), lost


def _query_feature(encoder: Encoder, query: str | Path | Image.Image) -> np.ndarray:
    modality = "text" if isinstance(query, str) else "image"
    if modality not in encoder.modalities:
        remedy = {
            "text": "give --tokenizer, or search by an image",
            "image": "search by a text",
        }
        raise UnavailableError(
            f"{encoder.source} does not embed {modality}s as it is; {remedy[modality]}"
        )
    if isinstance(query, str) and not query.isprintable():
        query = query.encode("utf-8", "replace").decode()
    item = query if isinstance(query, str) else open_image(query)
    return encoder.run(encoder.prepare([item], "query"))[0].numpy()


@explain_types
def nearest(
    index: SearchIndex,
    feature: np.ndarray,
    top: int,
    *,
    where: Mapping[str, str] | None = None,
    glob: str | None = None,
) -> list[Hit]:
    """Find the entries with the largest cosines to a feature `[width]`, best first; for any thread.

    Args:
        index: as in `search`.
        feature: of the query, of any length.
        top: most hits to return.
        where, glob: as in `search`.

    Raises:
        DataError: the index is damaged, or the feature not finite.
        InputError: it has another width, or there is no such column.
    """
    feature = np.asarray(feature, np.float32)
    norm = np.linalg.norm(feature)
    if not np.isfinite(norm):
        raise DataError("the feature of the query is not finite; check the model")
    with index.store.read() as snapshot:
        if feature.shape != (snapshot.header.width,):
            raise InputError(
                f"feature has the shape {feature.shape}; this index needs ({snapshot.header.width},)"
            )
        allowed = snapshot.select(where or {}, glob)
        query = torch.from_numpy(feature / max(norm, 1e-12))
        rows, similarities = largest_products(snapshot.features, query, top, allowed)
        if not (similarities.abs() <= _MOST_COSINE).all():
            raise ValueError("its features are not normalised")
        hits = [
            Hit(index.location(entry), similarity, None, entry, similarity, row)
            for (row, entry), similarity in zip(
                snapshot.entries(rows.tolist()), similarities.tolist(), strict=True
            )
        ]
    return sorted(hits, key=_order)


def largest_products(
    features: np.ndarray, query: Tensor, k: int, allowed: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Return indices and values of the `k` largest dot products of `features` `[I, E]` with `query` `[E]`, sorted.

    Only rows that are `allowed` `[I]` count.
    """
    rows, best = torch.empty(0, dtype=torch.long), torch.empty(0)
    for start in range(0, len(features), BLOCK_ROWS):
        mask = torch.from_numpy(allowed[start : start + BLOCK_ROWS])
        count = int(mask.sum())
        if not count:
            continue
        products = torch.from_numpy(features[start : start + BLOCK_ROWS] @ query.numpy())
        if count < len(products):
            products.masked_fill_(~mask, -torch.inf)
        values, indices = products.topk(min(k, count))
        values, order = torch.cat([best, values]).sort(descending=True, stable=True)
        best, rows = values[:k], torch.cat([rows, indices + start])[order][:k]
    return rows, best


def match_images(
    encoder: XFMEncoder, images: Sequence[Tensor], text: str, batch_size: int
) -> Tensor:
    """Compute the matching head's logits `[I, 2]` of a text with images `[1, 3, R, R]` each."""
    model = encoder.model
    logits = [torch.empty(0, 2)]
    with torch.no_grad():
        input_ids, mask = text_tokens([text], encoder.tokenizer, model.config, model.device)
        embeds = model.encode_text(input_ids, mask)
        for batch in batches(images, batch_size):
            pixels = torch.cat([*batch]).to(model.device)
            memory = model.image_memory(model.encode_image(pixels))
            texts, masks = embeds.expand(len(batch), -1, -1), mask.expand(len(batch), -1)
            fused = model.fuse(texts, masks, memory, first_token_only=True)
            logits.append(model.match_logits(fused).float().cpu())
    return torch.cat(logits)


def _order(hit: Hit) -> tuple[float, float, str]:
    return -hit.score, -hit.similarity, hit.location


@explain_types
def write_sheet(
    path: str | Path,
    query: str | Path | Image.Image,
    result: SearchResult,
    index: SearchIndex,
) -> Path:
    """Write a contact sheet: a self-contained page of the hits with their pictures or texts and scores.

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
        title=query if isinstance(query, str) else getattr(query, "name", "an image"),
        cells=[{"hit": hit, "image": _data_url(hit, index)} for hit in result.hits],
        modality=index.modality,
        warning=warning,
        searched=len(index),
        where=str(index.path),
        model=str(index.model),
        lost=result.lost,
    )
    make_folder(path.parent)
    write_bytes({path: page.encode("utf-8", "replace")})
    return path


def thumbnail(index: SearchIndex, entry: Entry, side: int = _THUMBNAIL) -> bytes:
    """Encode a picture of at most `side` pixels as JPEG; raises `DataError` as `SearchIndex.load` does."""
    image = index.load(entry, side)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def _data_url(hit: Hit, index: SearchIndex) -> str | None:
    """Encode a picture as a data URL; None for a text, or if it cannot be read."""
    try:
        content = thumbnail(index, hit.entry)
    except DataError:
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
