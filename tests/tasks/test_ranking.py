"""Queries ranked together score as the model does pair by pair, for any pass size and cache."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from xfm_fast.config import XFMConfig
from xfm_fast.data.images import load_image
from xfm_fast.errors import DataError, InputError
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.ranking import MemoryCache, ModelRanks, Picture, Query, Ranker, Ranking

CAPTIONS = ((0, 5, 2), (0, 7, 8, 9, 10, 11, 2), (0, 6, 2), (0, 12, 13, 14, 2), (0, 5, 6, 2))


def picture(seed: int) -> Picture:
    noise = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    return Ranker.picture(stream.getvalue(), f"image {seed}")


@pytest.fixture(scope="module")
def model() -> XFM:
    sizes = {"vision_depth": 1, "text_layers": 1, "fusion_layers": 2}
    model = XFM(XFMConfig.preset("tiny", **sizes), heads=("contrastive", "matching")).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.requires_grad_(False)


def expected(model: XFM, query: Query) -> torch.Tensor:
    """Compute both logits `[I, C, 2]` of every pair, one pair at a time."""
    logits = torch.empty(len(query.pictures), len(query.captions), 2)
    for row, each in enumerate(query.pictures):
        memory = model.image_memory(
            model.encode_image(load_image(each.content, model.config.image_size)[None])
        )
        for column, ids in enumerate(query.captions):
            tokens = torch.tensor([ids])
            fused = model.fuse(model.encode_text(tokens), torch.ones_like(tokens), memory)
            logits[row, column] = model.match_logits(fused)[0]
    return logits


FIRST = Query((picture(1),), CAPTIONS)
SECOND = Query((picture(2), picture(1), picture(3), picture(2)), CAPTIONS[2:])


@pytest.fixture(scope="module")
def logits(model: XFM) -> dict[Query, torch.Tensor]:
    return {query: expected(model, query) for query in (FIRST, SECOND)}


@pytest.mark.parametrize(("budget", "memories"), [(1, 1), (9, 0), (2048, 100)])
def test_passes_and_cache_change_nothing(
    model: XFM, logits: dict[Query, torch.Tensor], budget: int, memories: int
) -> None:  # fmt: skip
    ranks = ModelRanks(model)
    ranks.token_budget = budget
    ranker = Ranker(ranks, 0)
    memory = model.image_memory(
        model.encode_image(torch.zeros(1, 3, *[model.config.image_size] * 2))
    ).nbytes
    ranker.cache = MemoryCache(memories * memory)
    for turn, queries in enumerate(([FIRST], [FIRST, SECOND], [SECOND, FIRST])):
        for query, ranking in zip(queries, ranker.rank(queries), strict=True):
            assert isinstance(ranking, Ranking)
            torch.testing.assert_close(ranking.scores, logits[query][..., 1], rtol=0, atol=1e-5)
            torch.testing.assert_close(
                ranking.matches, logits[query].softmax(-1)[..., 1], rtol=0, atol=1e-6
            )
            if memories != 1:
                cached = memories > 0 and (turn == 2 or (turn == 1 and query is FIRST))
                assert ranking.reused.all() == cached
    assert len(ranker.cache) == min(memories, 3)
    assert ranker.cache.nbytes == len(ranker.cache) * memory


def test_features_are_those_of_the_model_and_are_kept(
    model: XFM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = Ranker(ModelRanks(model), 1 << 20)
    pictures = [picture(1), picture(2), picture(1)]
    pixels = torch.stack([load_image(each.content, model.config.image_size) for each in pictures])
    images = model.project_image(model.encode_image(pixels))
    torch.testing.assert_close(ranker.embed_images(pictures), [*images], rtol=0, atol=1e-6)
    captions = [CAPTIONS[1], CAPTIONS[0], CAPTIONS[1]]
    texts = torch.cat(
        [model.project_text(model.encode_text(torch.tensor([ids]))) for ids in captions]
    )
    torch.testing.assert_close(ranker.embed_captions(captions), texts, rtol=0, atol=1e-6)
    monkeypatch.setattr(model, "encode_image", None)
    torch.testing.assert_close(ranker.embed_images(pictures[:2]), [*images[:2]], rtol=0, atol=1e-6)


def test_a_broken_image_or_an_ended_request_fails_one_query(model: XFM) -> None:
    ranker = Ranker(ModelRanks(model), 1 << 20)
    ended = picture(1)._replace(needed=lambda: False)
    # The same image is decoded for a request that still waits.
    gone, waits = ranker.rank(
        [Query((ended, picture(2)), CAPTIONS), Query((picture(2),), CAPTIONS)]
    )
    assert (type(gone), type(waits)) == (InputError, Ranking)
    assert all(isinstance(each, torch.Tensor) for each in ranker.embed_images([ended, picture(1)]))
    # Also where the first of them ends when its image is about to be decoded.
    answers = iter([True])
    leaves = picture(5)._replace(needed=lambda: next(answers, False))
    assert all(
        isinstance(each, Ranking)
        for each in ranker.rank([Query((each,), CAPTIONS) for each in (leaves, picture(5))])
    )
    broken = picture(4)._replace(content=picture(4).content[:60], key=b"broken")
    wrong, right = ranker.rank(
        [Query((picture(1), broken), CAPTIONS), Query((picture(1),), CAPTIONS)]
    )
    assert isinstance(wrong, DataError)
    assert "image 1 of the request" in str(wrong)
    assert isinstance(right, Ranking)
    features, failed = ranker.embed_images([picture(1), broken])
    assert isinstance(features, torch.Tensor)
    assert isinstance(failed, DataError)
    assert "image 1 of the request" in str(failed)
    # Each request is told of the image by the name that it has there.
    names = ["documents[3]", "query[0]"]
    errors = ranker.embed_images([broken._replace(name=name) for name in names])
    assert [str(each).partition(": ")[0] for each in errors] == names
    with pytest.raises(DataError, match="JPEG"):
        Ranker.picture(b"%!PS-Adobe-3.0", "image 0")
