"""Score candidate pairs image by image: one memory per image, all its captions one query sequence, nothing padded.

Passes are cut by a budget of caption tokens. With a journal, the scores of finished images outlive the process.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from xfm_fast import flops
from xfm_fast.config import XFMConfig
from xfm_fast.errors import DataError
from xfm_fast.models.fusion import ImageMemory
from xfm_fast.models.xfm import XFM
from xfm_fast.packing import ImageGroups, Sequences, offsets, ragged_rows
from xfm_fast.tasks.candidates import Candidates
from xfm_fast.tasks.recall import recall
from xfm_fast.tasks.score_journal import ScoreJournal

# Score of a pair that was no candidate, as in the official evaluation.
UNSCORED = -100.0

# Query tokens of one pass through the fusion encoder: enough to fill the matrix units, few enough to stay in cache.
_TOKEN_BUDGET = {"cpu": 2048, "cuda": 32768}
# Image memories held at a time; a 384-pixel image of the base model takes 42 MB in fp32.
_MEMORY_BYTES = 1 << 30

Progress = Callable[[int, int], None]


class PairScorer(Protocol):
    """What re-ranking needs of a model; an exported engine can offer it too."""

    config: XFMConfig

    def prepare(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        """The part of fusion that does not depend on the image, once per text: `[T, width]` → `[T, width]`."""
        ...

    def preparation_flops(self, lengths: Tensor) -> flops.Count:
        """What `prepare` costs for texts of these lengths."""
        ...

    def memory(self, image_embeds: Tensor) -> Any:
        """What all texts of the images `[B, 1 + N, width]` share."""
        ...

    def scores(self, tokens: Tensor, sequences: Sequences, memory: Any, groups: ImageGroups) -> Tensor:
        """Match score of every prepared text with its image: `[P]`."""
        ...

    def fusion_flops(self, lengths: Tensor, groups: ImageGroups, image_tokens: int) -> flops.Count:
        """What `scores` costs for texts of these lengths."""
        ...

    def fingerprint(self) -> str:
        """Identifies the weights that decide the scores."""
        ...


class ModelScorer:
    """Scores pairs with an `XFM` in memory."""

    def __init__(self, model: XFM) -> None:
        self.model = model
        self.config = model.config

    def prepare(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        return self.model.fusion_encoder.first_self_attention(tokens, sequences)

    def preparation_flops(self, lengths: Tensor) -> flops.Count:
        return flops.first_self_attention(self.config, lengths)

    def memory(self, image_embeds: Tensor) -> ImageMemory:
        return self.model.image_memory(image_embeds)

    def scores(self, tokens: Tensor, sequences: Sequences, memory: ImageMemory, groups: ImageGroups) -> Tensor:
        fused = self.model.fusion_encoder(tokens, sequences, memory, groups, first_token_only=True, self_attended=True)
        return self.model.match_logits(fused[:, None])[:, 1]

    def fusion_flops(self, lengths: Tensor, groups: ImageGroups, image_tokens: int) -> flops.Count:
        return flops.fusion(self.config, lengths, image_tokens, first_token_only=True, self_attended=True)

    def fingerprint(self) -> str:
        checksum = 0
        for name, tensor in self.model.state_dict().items():
            if name.startswith(("fusion_encoder.roberta.encoder", "itm_head")):
                checksum = _checksum(tensor, checksum)
        return f"{checksum:08x}"


@dataclass(frozen=True)
class ImageIndex:
    """Embedded images: `embeds` `[I, 1 + N, vision_width]` (in memory or in a file) and `features` `[I, embed_dim]`."""

    embeds: Tensor
    features: Tensor

    def __len__(self) -> int:
        return self.features.shape[0]


@dataclass(frozen=True)
class TextIndex:
    """Embedded texts, unpadded: `tokens` `[sum(lengths), text_width]`, `lengths` `[T]`, `features` `[T, embed_dim]`."""

    tokens: Tensor
    lengths: Tensor
    features: Tensor

    def __len__(self) -> int:
        return self.features.shape[0]


class Receipt(NamedTuple):
    """What a re-ranking cost, and what the official procedure would have cost."""

    images: int
    texts: int
    pairs_official: int
    pairs_scored: int
    pairs_resumed: int
    tokens: int
    padded_tokens: int
    flops: float
    flops_official: float

    @property
    def pairs_saved(self) -> int:
        """Pairs that are candidates in both directions and were scored once."""
        return self.pairs_official - self.pairs_scored

    @property
    def flops_ratio(self) -> float:
        """How many times the FLOPs the official procedure spends."""
        return self.flops_official / self.flops if self.flops else 1.0


@dataclass(frozen=True)
class RerankResult:
    """Scores of the candidate pairs, as a list and as the official matrices."""

    candidates: Candidates
    scores: Tensor
    receipt: Receipt

    def _matrix(self, chosen: Tensor) -> Tensor:
        matrix = self.scores.new_full((self.receipt.images, self.receipt.texts), UNSCORED)
        matrix[self.candidates.images[chosen], self.candidates.texts[chosen]] = self.scores[chosen]
        return matrix

    @cached_property
    def score_i2t(self) -> Tensor:
        """`[I, T]` image-to-text scores (raw match logits), -100 where the text is no candidate of the image."""
        return self._matrix(self.candidates.for_image)

    @cached_property
    def score_t2i(self) -> Tensor:
        """`[T, I]` text-to-image scores, -100 where the image is no candidate of the text."""
        return self._matrix(self.candidates.for_text).t().contiguous()

    def recall(self, image_of_text: Tensor) -> dict[str, float]:
        """R@1/5/10 both ways, given the image `[T]` that each text describes."""
        return recall(self.score_i2t, self.score_t2i, image_of_text)


class _Piece(NamedTuple):
    """Pairs `start:stop` of one image that run in one pass."""

    image: int
    start: int
    stop: int


def _tiles(candidates: Candidates, lengths: Tensor, skip: set[int], budget: int, most: int) -> Iterator[list[_Piece]]:
    """Passes of at most `budget` tokens over at most `most` images; an image with more tokens is cut into several."""
    cu_tokens = offsets(lengths[candidates.texts]).tolist()
    cu_pairs = candidates.cu_pairs.tolist()
    tile: list[_Piece] = []
    room = budget
    for image in range(len(cu_pairs) - 1):
        start, end = cu_pairs[image], cu_pairs[image + 1]
        if image in skip:
            continue
        while start < end:
            if tile and (len(tile) == most or cu_tokens[end] - cu_tokens[start] > room):
                yield tile
                tile, room = [], budget
            stop = start + 1
            while stop < end and cu_tokens[stop + 1] - cu_tokens[start] <= room:
                stop += 1
            tile.append(_Piece(image, start, stop))
            room -= cu_tokens[stop] - cu_tokens[start]
            start = stop
    if tile:
        yield tile


@torch.inference_mode()
def score_candidates(
    scorer: PairScorer,
    images: ImageIndex,
    texts: TextIndex,
    candidates: Candidates,
    token_budget: int | None,
    resume: str | Path | None,
    progress: Progress | None,
) -> RerankResult:
    """Score every candidate pair once; see `xfm_fast.tasks.retrieval.rerank` for the arguments."""
    if resume is None:
        return _run(scorer, images, texts, candidates, token_budget, None, progress)
    fingerprint = _fingerprint(scorer, images, texts, candidates)
    with ScoreJournal(Path(resume) / "scores.bin", fingerprint, _score_dtype(texts)) as journal:
        return _run(scorer, images, texts, candidates, token_budget, journal, progress)


def _run(
    scorer: PairScorer,
    images: ImageIndex,
    texts: TextIndex,
    candidates: Candidates,
    token_budget: int | None,
    journal: ScoreJournal | None,
    progress: Progress | None,
) -> RerankResult:
    device = texts.tokens.device
    budget = _TOKEN_BUDGET.get(device.type, _TOKEN_BUDGET["cuda"]) if token_budget is None else token_budget
    per_image = flops.image_memory_values(scorer.config, images.embeds.shape[1]) * texts.tokens.element_size()
    most = max(1, _MEMORY_BYTES // per_image)
    scores = torch.full((candidates.pairs,), UNSCORED, dtype=_score_dtype(texts))
    finished: set[int] = set()
    if journal is not None:
        finished = _restore(journal, candidates, scores)
    resumed = int(candidates.cu_pairs.diff()[sorted(finished)].sum()) if finished else 0
    done = resumed
    starts = offsets(texts.lengths)[:-1].long()
    memory, memory_of = None, None
    spent = flops.Count()
    prepared = texts.tokens
    if done < candidates.pairs:
        prepared = _prepare(scorer, texts, budget)
        spent += scorer.preparation_flops(texts.lengths)
    for tile in _tiles(candidates, texts.lengths.cpu(), finished, budget, most):
        chosen = [piece.image for piece in tile]
        if chosen != memory_of:
            memory = scorer.memory(_images(images.embeds, chosen).to(device))
            memory_of = chosen
            spent += flops.image_memory(scorer.config, len(chosen), images.embeds.shape[1])
        pairs = torch.cat([torch.arange(piece.start, piece.stop) for piece in tile])
        selected = candidates.texts[pairs].to(device)
        lengths = texts.lengths[selected]
        tokens = prepared.index_select(0, ragged_rows(starts[selected], lengths))
        groups = ImageGroups(offsets(torch.tensor([piece.stop - piece.start for piece in tile], device=device)))
        scored = scorer.scores(tokens, Sequences.from_lengths(lengths), memory, groups)
        spent += scorer.fusion_flops(lengths, groups, images.embeds.shape[1])
        scores[pairs] = scored.to("cpu", scores.dtype)
        done += len(pairs)
        if journal is not None:
            _record(journal, candidates, tile, scores)
        if progress is not None:
            progress(done, candidates.pairs)
    return RerankResult(candidates, scores, _receipt(scorer.config, images, texts, candidates, resumed, spent))


def _score_dtype(texts: TextIndex) -> torch.dtype:
    """Half-precision models keep fp32 scores: they are ranked and compared."""
    return torch.promote_types(texts.tokens.dtype, torch.float32)


def _prepare(scorer: PairScorer, texts: TextIndex, budget: int) -> Tensor:
    """The image-independent part of fusion for all texts, in slices of about `budget` tokens."""
    bounds = offsets(texts.lengths).tolist()
    parts: list[Tensor] = []
    start = 0
    while start < len(texts):
        stop = start + 1
        while stop < len(texts) and bounds[stop + 1] - bounds[start] <= budget:
            stop += 1
        tokens = texts.tokens[bounds[start] : bounds[stop]]
        parts.append(scorer.prepare(tokens, Sequences.from_lengths(texts.lengths[start:stop])))
        start = stop
    return torch.cat(parts)


def _images(embeds: Tensor, chosen: list[int]) -> Tensor:
    if chosen[-1] - chosen[0] == len(chosen) - 1:
        return embeds[chosen[0] : chosen[-1] + 1]
    return embeds[torch.tensor(chosen)]


def _restore(journal: ScoreJournal, candidates: Candidates, scores: Tensor) -> set[int]:
    cu_pairs = candidates.cu_pairs.tolist()
    finished: set[int] = set()
    for image, values in journal.records():
        if image + 1 >= len(cu_pairs) or len(values) != cu_pairs[image + 1] - cu_pairs[image]:
            raise DataError(
                f"{journal.path} holds {len(values)} scores for image {image}, which does not fit; delete it"
            )
        scores[cu_pairs[image] : cu_pairs[image + 1]] = values
        finished.add(image)
    return finished


def _record(journal: ScoreJournal, candidates: Candidates, tile: list[_Piece], scores: Tensor) -> None:
    """Images whose last pair was scored in this pass."""
    cu_pairs = candidates.cu_pairs
    for piece in tile:
        first, last = int(cu_pairs[piece.image]), int(cu_pairs[piece.image + 1])
        if piece.stop == last:
            journal.append(piece.image, scores[first:last])
    journal.sync()


def _receipt(
    config: XFMConfig, images: ImageIndex, texts: TextIndex, candidates: Candidates, resumed: int, spent: flops.Count
) -> Receipt:
    scored = candidates.pairs
    image_tokens = images.embeds.shape[1]
    padded = int(texts.lengths.max())
    official = int(candidates.for_image.sum()) + int(candidates.for_text.sum())
    return Receipt(
        images=len(images),
        texts=len(texts),
        pairs_official=official,
        pairs_scored=scored,
        pairs_resumed=resumed,
        tokens=int(texts.lengths[candidates.texts].sum()),
        padded_tokens=official * padded,
        flops=spent.total,
        flops_official=flops.official_fusion(config, official, padded, image_tokens).total,
    )


def _fingerprint(scorer: PairScorer, images: ImageIndex, texts: TextIndex, candidates: Candidates) -> str:
    """Of everything that decides the scores; features stand in for image embeddings too large to read twice."""
    digest = hashlib.sha256(scorer.fingerprint().encode())
    digest.update(f"{[*images.embeds.shape]} {images.embeds.dtype} {texts.tokens.dtype}".encode())
    for tensor in (images.features, texts.features, texts.tokens, texts.lengths, candidates.cu_pairs, candidates.texts):
        digest.update(f"{_checksum(tensor):08x}".encode())
    return digest.hexdigest()


def _checksum(tensor: Tensor, start: int = 0) -> int:
    data = tensor.detach().cpu().contiguous().flatten()
    return zlib.crc32(data.view(torch.uint8).numpy().data, start) if data.numel() else start
