"""The retrieval evaluation of a user's own images and captions: ours in full, the official one as time allows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from xfm_fast.benchmarks.contenders.engine import wait_for
from xfm_fast.benchmarks.contenders.official_algorithm import OfficialTwin
from xfm_fast.benchmarks.contenders.registry import DTYPES, OFFICIAL
from xfm_fast.benchmarks.receipts import Sizes, receipt
from xfm_fast.benchmarks.rows import Coco, Evaluation, Interval, Parity, finite
from xfm_fast.benchmarks.scenario_setting import Setting
from xfm_fast.benchmarks.scenarios import MAX_TOKENS, relative_error
from xfm_fast.benchmarks.suite import FP32_BAND
from xfm_fast.tasks.retrieval import UNSCORED, RerankResult, Retriever

RERANKING = "fusion, keys and values included"
_IMAGES, _TEXTS = 8, 64


def measured_evaluation(setting: Setting, projected: Coco, sizes: Sizes) -> Coco:
    """Run the evaluation of the setting's collection.

    Args:
        projected: what was expected, from which the official procedure's embedding is taken.
        sizes: of the collection.
    """
    material, image_size, dtype = setting.material, projected.image_size, setting.dtypes[0]
    collection = material.collection
    retriever = Retriever(material.subjects.model(image_size, DTYPES[dtype]))
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        setting.progress.step(name)
        begun = time.perf_counter()
        yield
        wait_for(material.device)
        seconds[name] = time.perf_counter() - begun

    ids, mask = material.tokenizer.encode(collection.captions, MAX_TOKENS)
    # Both procedures read the same pixels, so decoding is not part of either.
    batches = [
        collection.pixels(range(start, min(start + _IMAGES, sizes.images)), image_size).to(DTYPES[dtype])
        for start in range(0, sizes.images, _IMAGES)
    ]
    with timed("embed images"):
        images = retriever.embed_images(batches)
    with timed("embed texts"):
        texts = retriever.embed_texts(zip(ids.split(_TEXTS), mask.split(_TEXTS), strict=True))
    with timed("re-ranking"):
        result = retriever.rerank(images, texts, sizes.k)
    spent = result.receipt
    steps = receipt(material.config(image_size), replace(sizes, lengths=mask.sum(1).tolist()), spent.pairs_scored)
    total = sum(seconds.values())
    ours = Evaluation(
        procedure="xfm-fast",
        dtype=dtype,
        kind="measured",
        pairs=spent.pairs_scored,
        flops=steps[-1].flops,
        flops_per_s=steps[-1].flops / total,
        seconds=seconds,
        total_s=Interval(value=total),
        measured_share=1.0,
    )
    setting.progress.step("official procedure")
    twin = material.subjects.twin(image_size, torch.float32)
    check = _OfficialRerank(twin, images.embeds.float(), ids.to(material.device), mask.to(material.device))
    error, official_s, pairs = check.run(result, setting.scale.budget_s)
    share = pairs / sizes.pairs
    expected = next(e for e in projected.evaluations if e.procedure == OFFICIAL)
    parts = expected.seconds | {RERANKING: official_s / share}
    official = expected.model_copy(
        update={
            "kind": "measured in part",
            "flops": steps[0].flops,
            "flops_per_s": steps[0].flops / sum(parts.values()),
            "seconds": parts,
            "total_s": Interval(value=sum(parts.values())),
            "measured_share": share,
        }
    )
    # The scores of ours pass through encoders of this type, those of the official procedure begin with its own texts.
    band = 3 * FP32_BAND if dtype == "fp32" else 8 * torch.finfo(DTYPES[dtype]).eps
    others = [e for e in projected.evaluations if e.procedure != OFFICIAL and e.dtype != dtype]
    return projected.model_copy(
        update={
            "origin": f"{collection.origin}, measured",
            "evaluations": [official, ours, *others],
            "receipt": steps,
            "speed_up": Interval(value=official.total_s.value / total),
            "parity": Parity(
                error=finite(error),
                band=band,
                passed=error <= band,
                against=f"{OFFICIAL} fp32",
                note=f"match scores of {pairs} pairs",
            ),
            "recall": result.recall(torch.tensor(collection.photo_of)),
            "note": f"{spent.pairs_saved} of {spent.pairs_official} pairs are candidates in both directions",
        }
    )


class _OfficialRerank:
    """Re-ranks image by image, then text by text, until the time is spent, and compares the scores with ours."""

    def __init__(self, twin: OfficialTwin, images: Tensor, ids: Tensor, mask: Tensor) -> None:
        self._twin, self._images, self._mask = twin, images, mask
        with torch.inference_mode():
            parts = zip(ids.split(_TEXTS), mask.split(_TEXTS), strict=True)
            self._texts = torch.cat([twin.encode_text(*part) for part in parts])

    def run(self, result: RerankResult, budget_s: float) -> tuple[float, float, int]:
        """Largest error of the scores, seconds, and pairs; at least one query of either direction."""
        error, seconds, pairs = 0.0, 0.0, 0
        matrices = (result.score_i2t, result.score_t2i)
        # Directions take turns, so that a part is a part of both.
        turns = [
            (turn, direction, row) for direction in (0, 1) for turn, row in enumerate(_spread(len(matrices[direction])))
        ]
        for turn, direction, row in sorted(turns):
            if turn and seconds > budget_s:
                break
            scores = matrices[direction][row]
            chosen = (scores != UNSCORED).nonzero()[:, 0]
            begun = time.perf_counter()
            theirs = self._rerank(direction, row, chosen)
            wait_for(self._images.device)
            seconds += time.perf_counter() - begun
            pairs += len(chosen)
            error = max(error, relative_error(scores[chosen], theirs.cpu()))
        return error, seconds, pairs

    @torch.inference_mode()
    def _rerank(self, direction: int, row: int, chosen: Tensor) -> Tensor:
        if direction == 0:
            return self._twin.rerank_image(self._images[row], self._texts[chosen], self._mask[chosen])
        return self._twin.rerank_text(self._texts[row], self._mask[row], self._images[chosen])


def _spread(count: int) -> list[int]:
    """All numbers below count, in an order whose every beginning is spread over them."""
    return sorted(range(count), key=lambda number: int(f"{number:032b}"[::-1], 2))
