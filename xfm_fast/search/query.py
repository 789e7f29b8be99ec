"""A search: the nearest features of all, and of these the best by the fusion encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from xfm_fast.data.collection import Entry
from xfm_fast.data.images import decode_image, evaluation_transform
from xfm_fast.errors import DataError, InputError, UnavailableError
from xfm_fast.models.processor import batches, text_tokens
from xfm_fast.models.xfm import XFM
from xfm_fast.search.index import SearchIndex
from xfm_fast.search.model import SearchModel
from xfm_fast.search.neighbours import nearest
from xfm_fast.tasks.reranking import Rank, rank_score


class Hit(NamedTuple):
    """An image that was found.

    Attributes:
        location: its path, or its name in a file of many.
        similarity: cosine of its features and the query's.
        match: probability that the text describes it; None where the fusion encoder was not asked.
        entry: its entry of the index.
        image: it, opened; None where that was not needed.
        score: orders hits; of those that the fusion encoder read, by the rule `rank` of `search`.
    """

    location: str
    similarity: float
    match: float | None
    entry: Entry
    image: Image.Image | None
    score: float


class Found(NamedTuple):
    """Hits, best first, and the reasons why indexed images could no longer be read."""

    hits: list[Hit]
    lost: dict[str, str]


def search(
    index: SearchIndex,
    model: SearchModel,
    query: str | Path,
    *,
    top: int = 12,
    candidates: int = 64,
    batch_size: int = 16,
    exact: bool = False,
    rank: Rank | None = None,
) -> Found:
    """Find the images that a text describes, or that resemble an image.

    The nearest `candidates` of all features, which are compared exactly unless the index has a graph of neighbours, are
    scored by the fusion encoder, which reads each of these images together with the text. Resemblance of images is that
    of their features.

    Args:
        index: of the same model.
        model: see `open_model`.
        query: a text; or, as a `Path`, an image.
        top: hits to return, at most.
        candidates: images to score together with the text; 0 leaves it at features.
        batch_size: candidates that are computed together.
        exact: compare all features, although there is a graph.
        rank: `match`: the probability of a match; `similarity`: features alone, no image is read; `sum`: match logit +
            cosine, see `xfm_fast.tasks.reranking.rank_score`. By default that of the model's run.

    Raises:
        DataError: the index is of another model, the image is broken, the text empty.
        UnavailableError: the model has no tokenizer, or no matching head.
        InputError: `top` or `candidates` cannot be.
    """
    if top < 1 or candidates < 0:
        raise InputError(f"top={top}, candidates={candidates}; there must be at least 1 and 0")
    index.check(model)
    xfm = model.model
    if isinstance(query, str) and xfm.tokenizer is None:
        raise UnavailableError(
            f"{model.source} has no tokenizer to read the text with; give one (--tokenizer), or search by an image"
        )
    rank = rank or model.rank
    rerank = isinstance(query, str) and candidates > 0 and rank != "similarity"
    if rerank and not ("matching" in xfm.heads and xfm.config.fusion_layers):
        raise UnavailableError(
            f"{model.source} has no matching head to score candidates with; search by features alone (rank=similarity)"
        )
    if isinstance(query, Path):
        # Read here, so that a broken one is not taken for one of the collection.
        features = xfm.encode(decode_image(query))
    else:
        features = xfm.encode(query)
    wanted = max(top, candidates) if rerank else top
    rows, similarities = nearest(index.features, features.float().cpu(), wanted, None if exact else index.graph)
    entries = [index.entries[row] for row in rows.tolist()]
    hits = [
        Hit(index.collection.location(entry), similarity, None, entry, None, similarity)
        for entry, similarity in zip(entries, similarities.tolist(), strict=True)
    ]
    lost: dict[str, str] = {}
    if rerank and isinstance(query, str):
        opened = []
        for hit in hits[:candidates]:
            try:
                opened.append(hit._replace(image=index.load(hit.entry)))
            except DataError as error:
                lost[hit.location] = str(error)
        logits = match_images(xfm, [hit.image for hit in opened if hit.image], query, batch_size)
        matches = logits.softmax(1)[:, 1]
        similar = torch.tensor([hit.similarity for hit in opened])
        scores = matches if rank == "match" else rank_score(rank, logits[:, 1], similar)
        scored = [
            hit._replace(match=match, score=score)
            for hit, match, score in zip(opened, matches.tolist(), scores.tolist(), strict=True)
        ]
        # Where fewer candidates are scored than hits are wanted, the others follow.
        hits = sorted(scored, key=_order) + sorted(hits[candidates:], key=_order)
    else:
        hits = sorted(hits, key=_order)
    return Found(hits[:top], lost)


def match_images(model: XFM, images: Sequence[Image.Image], text: str, batch_size: int) -> Tensor:
    """Both logits of the matching head for the text with each image: `[I, 2]`; the text is encoded once."""
    device = model.device
    transform = evaluation_transform(model.config.image_size)
    found = [torch.empty(0, 2)]
    with torch.no_grad():
        input_ids, mask = text_tokens([text], model.tokenizer, model.config, device)
        embeds = model.encode_text(input_ids, mask)
        for some in batches(images, batch_size):
            pixels = torch.stack([transform(image) for image in some]).to(device)
            memory = model.image_memory(model.encode_image(pixels))
            count = len(some)
            fused = model.fuse(embeds.expand(count, -1, -1), mask.expand(count, -1), memory, first_token_only=True)
            found.append(model.match_logits(fused).float().cpu())
    return torch.cat(found)


def _order(hit: Hit) -> tuple[float, float, str]:
    return -hit.score, -hit.similarity, hit.location
