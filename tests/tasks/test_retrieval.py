"""Re-ranking: the official evaluation, its cost, its metric, and resuming."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import CASES, config, golden, load_json, load_tensors
from xfm_fast import XFM, Retriever, XFMConfig
from xfm_fast.errors import DataError
from xfm_fast.memory import open_mapped
from xfm_fast.tasks.reranking import UNSCORED, candidate_recall, recall, top_candidates
from xfm_fast.tasks.retrieval import rerank


def _official(case: str, dtype: torch.dtype) -> tuple[XFM, Tensor, Tensor, Tensor]:
    inputs = load_tensors(f"{case}/ft_inputs")
    size = load_json(f"{case}/config")["ft_res"]
    model = XFM.from_official(
        load_tensors(f"{case}/weights"), config(case).replace(image_size=size), dtype=dtype
    )
    mask = inputs["retrieval_eval/text_atts"]
    with torch.inference_mode():
        images = model.encode_image(inputs["retrieval_eval/image"])
        texts = model.encode_text(inputs["retrieval_eval/text_ids"], mask)
    return model, images, texts, mask


@pytest.fixture(scope="module")
def small() -> tuple[XFM, Tensor, Tensor, Tensor]:
    """Build a tiny model with 7 images and 23 texts whose embeddings are random."""
    torch.manual_seed(7)
    model = XFM(XFMConfig.preset("tiny")).eval()
    mask = torch.arange(9)[None] < torch.randint(1, 10, (23, 1))
    with torch.inference_mode():
        images = model.encode_image(torch.randn(7, 3, 32, 32))
        texts = model.encode_text(torch.randint(4, 500, (23, 9)), mask)
    return model, images, texts, mask


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("token_budget", [None, 7])
def test_equals_the_official_evaluation(
    case: str, dtype: torch.dtype, tolerance: float, token_budget: int | None
) -> None:
    model, images, texts, mask = _official(case, dtype)
    result = rerank(images, texts, mask, model=model, k=3, token_budget=token_budget)
    expected = load_tensors(f"{case}/ft_outputs")
    for ours, name in ((result.score_i2t, "score_i2t"), (result.score_t2i, "score_t2i")):
        official = expected[f"retrieval_eval/{name}"].double()
        assert torch.equal(ours == UNSCORED, official == UNSCORED)
        # The official evaluation keeps its matrices in float32.
        assert (ours.double() - official).abs().max() <= max(
            tolerance, torch.finfo(torch.float32).eps
        ) * 4


def test_embeddings_in_files_give_the_same_scores_and_order(
    small: tuple[XFM, Tensor, Tensor, Tensor], tmp_path
) -> None:
    model, _, texts, mask = small
    pixels = torch.randn(7, 3, 32, 32)
    retriever = Retriever(model)
    in_memory = retriever.embed_images(pixels.split(3))
    mapped = retriever.embed_images(pixels.split(2), path=tmp_path / "images.bin", count=7)
    torch.testing.assert_close(mapped.embeds, in_memory.embeds)
    again = open_mapped(tmp_path / "images.bin", (7, 17, 64), torch.float32)
    first = rerank(in_memory.embeds, texts, mask, model=model, k=5)
    second = rerank(again, texts, mask, model=model, k=5)
    assert torch.equal(first.candidates.texts, second.candidates.texts)
    torch.testing.assert_close(first.scores, second.scores)

    queries = retriever.embed_texts(
        [(torch.randint(4, 500, (3, 6)), None), (torch.randint(4, 500, (2, 8)), None)]
    )
    indices, scores = retriever.search_images(queries, mapped, k=3)
    full = retriever.rerank(mapped, queries, k=7)
    assert bool((scores.diff(dim=1) <= 0).all())
    torch.testing.assert_close(scores, full.score_t2i.gather(1, indices))
    indices, scores = retriever.search_texts(mapped, queries, k=3)
    torch.testing.assert_close(scores, full.score_i2t.gather(1, indices))
    # Every pair is a candidate in both directions, and scored once.
    assert full.receipt.pairs_scored == full.receipt.pairs_saved == 7 * 5
    assert full.receipt.flops_ratio > 2


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(0, 999),
)
def test_candidates_are_the_union_of_both_directions(
    i: int, t: int, per_image: int, per_text: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(i, 4, generator=generator), torch.randn(t, 4, generator=generator)
    candidates = top_candidates(image, text, per_image, per_text)
    similarity = image @ text.t()
    wanted_i2t = {
        (a, int(b)) for a in range(i) for b in similarity[a].topk(min(per_image, t)).indices
    }
    wanted_t2i = {
        (int(a), b) for b in range(t) for a in similarity[:, b].topk(min(per_text, i)).indices
    }
    pairs = list(zip(candidates.images.tolist(), candidates.texts.tolist(), strict=True))
    assert pairs == sorted(wanted_i2t | wanted_t2i)
    assert {p for p, f in zip(pairs, candidates.for_image.tolist(), strict=True) if f} == wanted_i2t
    assert {p for p, f in zip(pairs, candidates.for_text.tolist(), strict=True) if f} == wanted_t2i


@pytest.mark.parametrize("case", ["retrieval", "retrieval_topk"])
def test_recall_equals_the_official_metric(case: str) -> None:
    scores = np.load(golden("metrics/retrieval_scores.npz"))
    expected = load_json("metrics/metrics")[case]["result"]
    names = ("i2t", "t2i") if case == "retrieval" else ("i2t_topk30", "t2i_topk12")
    i2t, t2i = (torch.from_numpy(scores[name]) for name in names)
    result = recall(i2t, t2i, torch.arange(100) // 5)
    assert result == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(12, 20), st.integers(1, 60), st.integers(0, 999))
def test_recall_of_candidates_is_that_of_the_matrices(images: int, k: int, seed: int) -> None:
    """With more than ten wrong answers to every query, an unscored true one is no hit in the
    matrices either.
    """
    generator = torch.Generator().manual_seed(seed)
    image_of_text = torch.cat(
        [torch.arange(images), torch.randint(images, (images,), generator=generator)]
    )
    features = [torch.randn(n, 4, generator=generator) for n in (images, len(image_of_text))]
    candidates = top_candidates(features[0], features[1], k, k)
    # Few values, so that there are ties.
    scores = torch.randint(5, (candidates.pairs,), generator=generator).float()
    matrices = []
    for direction in (candidates.for_image, candidates.for_text):
        matrix = torch.full((images, len(image_of_text)), UNSCORED)
        matrix[candidates.images[direction], candidates.texts[direction]] = scores[direction]
        matrices.append(matrix)
    expected = recall(matrices[0], matrices[1].t(), image_of_text)
    assert candidate_recall(candidates, scores, image_of_text) == expected


def test_stopped_work_resumes(small: tuple[XFM, Tensor, Tensor, Tensor], tmp_path) -> None:
    model, images, texts, mask = small
    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 8:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"model": model, "k": 8, "token_budget": 40, "resume": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        rerank(images, texts, mask, progress=stop, **options)
    with (tmp_path / "scores.jsonl").open("ab") as file:
        file.write(b"00000000 [3, [1.0")  # torn by a kill
    again = rerank(images, texts, mask, **options)
    assert 0 < again.receipt.pairs_resumed <= calls[-1]
    uninterrupted = rerank(images, texts, mask, **{**options, "resume": None})
    torch.testing.assert_close(again.scores, uninterrupted.scores, rtol=1e-5, atol=1e-5)
    done = rerank(images, texts, mask, **options).receipt
    assert done.pairs_resumed == done.pairs_scored


def test_a_journal_of_other_work_is_refused(
    small: tuple[XFM, Tensor, Tensor, Tensor], tmp_path
) -> None:
    model, images, texts, mask = small
    rerank(images, texts, mask, model=model, k=2, resume=tmp_path)
    with pytest.raises(DataError, match="delete"):
        rerank(images, texts, mask, model=model, k=3, resume=tmp_path)
    # Of one patch of one image: the features, which are of token 0, do not see it.
    images = images.clone()
    images[-1, -1, 0] += 1e-3
    with pytest.raises(DataError):
        rerank(images, texts, mask, model=model, k=2, resume=tmp_path)
