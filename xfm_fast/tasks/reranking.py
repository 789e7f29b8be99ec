"""Re-ranking of candidate pairs, the R@k metric and a score journal for resuming.

Pairs are the union of both directions' candidates. All captions of an image are one packed query
sequence over one memory; passes are limited by a caption token budget.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from xfm_fast import flops
from xfm_fast.config import XFMConfig
from xfm_fast.errors import DataError, InputError
from xfm_fast.io import hold
from xfm_fast.models.fusion import ImageMemory
from xfm_fast.models.xfm import XFM
from xfm_fast.packing import ImageGroups, Sequences, offsets, ragged_rows
from xfm_fast.tasks.evaluation import Journal, checksum, read_journal

# Score of a pair that was no candidate, as in the official evaluation.
UNSCORED = -100.0

# Query tokens of one pass through the fusion encoder: enough to fill the matrix units, few enough
# to stay in cache.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 32768}
# Image memories held at a time; a 384-pixel image of the base model takes 42 MB in fp32.
_MEMORY_BYTES = 1 << 30
# Similarities are ranked in slices of this many values, so that a large collection needs no full
# matrix.
_SLICE_VALUES = 1 << 26
# Pairs whose features are gathered at a time: 128 MB at 256 features.
_SLICE_PAIRS = 1 << 16

Progress = Callable[[int, int], None]
Rank = Literal["match", "similarity", "sum"]
"""Ranking rule of candidate pairs; see `rank_score`."""
RANKS: tuple[Rank, ...] = get_args(Rank)


class PairScorer(Protocol):
    """Model interface of re-ranking, as `ModelScorer` implements it."""

    config: XFMConfig

    def prepare(self, tokens: Tensor, sequences: Sequences) -> Tensor: ...
    def memory(self, image_embeds: Tensor) -> Any: ...
    def scores(
        self, tokens: Tensor, sequences: Sequences, memory: Any, groups: ImageGroups
    ) -> Tensor: ...
    def fingerprint(self) -> str: ...


class ModelScorer:
    """Scores pairs with an in-memory `XFM`."""

    def __init__(self, model: XFM) -> None:
        self.model = model
        self.config = model.config

    def prepare(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        """Compute the image-independent part of fusion, once per text: `[T, width]` → `[T, width]`."""
        return self.model.fusion_encoder.first_self_attention(tokens, sequences)

    def memory(self, image_embeds: Tensor) -> ImageMemory:
        """Compute the memory of images `[B, 1 + N, width]`, shared by their texts."""
        return self.model.image_memory(image_embeds)

    def scores(
        self, tokens: Tensor, sequences: Sequences, memory: ImageMemory, groups: ImageGroups
    ) -> Tensor:
        """Compute the match score `[P]` of every prepared text with its image."""
        fused = self.model.fusion_encoder(
            tokens, sequences, memory, groups, first_token_only=True, self_attended=True
        )
        # In half precision many pairs would have equal scores, and ties count against the true one.
        with torch.autocast(fused.device.type, enabled=False):
            return self.model.match_logits(fused[:, None].to(self.model.dtype))[:, 1]

    def fingerprint(self) -> str:
        """Digest the weights that determine scores."""
        crc = 0
        for name, tensor in self.model.state_dict().items():
            if name.startswith(("fusion_encoder.roberta.encoder", "itm_head")):
                crc = checksum(tensor, crc)
        return f"{crc:08x}"


@dataclass(frozen=True)
class ImageIndex:
    """Embedded images; `embeds` may be memory-mapped."""

    embeds: Tensor  # `[I, 1 + N, vision_width]`
    features: Tensor  # `[I, embed_dim]`

    def __len__(self) -> int:
        return self.features.shape[0]


@dataclass(frozen=True)
class TextIndex:
    """Embedded texts without padding."""

    tokens: Tensor  # `[sum(lengths), text_width]`
    lengths: Tensor  # `[T]`
    features: Tensor  # `[T, embed_dim]`

    def __len__(self) -> int:
        return self.features.shape[0]


class Receipt(NamedTuple):
    """Cost of a re-ranking against the official procedure."""

    images: int
    texts: int
    pairs_official: int  # pairs scored officially, both directions separately
    pairs_scored: int
    pairs_resumed: int  # scores read from a journal
    tokens: int  # text tokens over all scored pairs
    padded_tokens: int  # text tokens in the official procedure
    flops: float
    flops_official: float

    @property
    def pairs_saved(self) -> int:
        """Pairs that are candidates in both directions."""
        return self.pairs_official - self.pairs_scored

    @property
    def flops_ratio(self) -> float:
        """Official FLOPs over FLOPs spent."""
        return self.flops_official / self.flops if self.flops else 1.0

    @classmethod
    def of(
        cls,
        config: XFMConfig,
        candidates: Candidates,
        lengths: Tensor,
        image_tokens: int,
        *,
        resumed: int = 0,
    ) -> Receipt:
        """Count the cost of scoring candidates with `lengths` `[T]`, with one memory per image."""
        pair_lengths, images = lengths[candidates.texts], candidates.cu_pairs.shape[0] - 1
        longest = int(lengths.max()) if len(lengths) else 0
        official = int(candidates.for_image.sum()) + int(candidates.for_text.sum())
        spent = flops.first_self_attention(config, lengths)
        spent += flops.image_memory(config, images, image_tokens)
        spent += flops.fusion(
            config, pair_lengths, image_tokens, first_token_only=True, self_attended=True
        )
        return cls(
            images=images,
            texts=lengths.shape[0],
            pairs_official=official,
            pairs_scored=candidates.pairs,
            pairs_resumed=resumed,
            tokens=int(pair_lengths.sum()),
            padded_tokens=official * longest,
            flops=spent.total,
            flops_official=flops.official_fusion(config, official, longest, image_tokens).total,
        )


@dataclass(frozen=True)
class RerankResult:
    """Candidate scores as a list and as the official matrices."""

    candidates: Candidates
    scores: Tensor
    receipt: Receipt

    def _matrix(self, mask: Tensor) -> Tensor:
        """Return scores `[I, T]` of the candidates in the mask `[Q]`."""
        matrix = self.scores.new_full((self.receipt.images, self.receipt.texts), UNSCORED)
        matrix[self.candidates.images[mask], self.candidates.texts[mask]] = self.scores[mask]
        return matrix

    @cached_property
    def score_i2t(self) -> Tensor:
        """`[I, T]` image-to-text match logits, -100 for non-candidates."""
        return self._matrix(self.candidates.for_image)

    @cached_property
    def score_t2i(self) -> Tensor:
        """`[T, I]` text-to-image match logits, -100 for non-candidates."""
        return self._matrix(self.candidates.for_text).t().contiguous()

    def recall(self, image_of_text: Tensor) -> dict[str, float]:
        """Compute R@1/5/10 in both directions; `image_of_text` `[T]` is the image of each text."""
        return recall(self.score_i2t, self.score_t2i, image_of_text)


def slices(lengths: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Divide texts into ranges within the token budget; a single text may exceed it."""
    first = room = 0
    for index, length in enumerate(lengths):
        if length > room:
            if index:
                yield first, index
            first, room = index, max(budget, length)
        room -= length
    if lengths:
        yield first, len(lengths)


def passes(
    cu_pairs: Sequence[int],
    lengths: Tensor,
    budget: int,
    max_images: int,
    skip: Collection[int] = (),
) -> Iterator[list[tuple[int, int, int]]]:
    """Split the pairs of images into passes of at most `budget` text tokens and `max_images`
    images.

    Image i has the pairs `cu_pairs[i]` to `cu_pairs[i + 1]`, whose texts have `lengths` tokens. A
    pass is a list of (image, first pair, last pair + 1); an image with many pairs spans several
    passes.
    """
    cu_tokens = offsets(lengths).tolist()
    pieces: list[tuple[int, int, int]] = []
    room = budget
    for image, (start, end) in enumerate(pairwise(cu_pairs)):
        while start < end and image not in skip:
            full = len(pieces) == max_images or cu_tokens[end] - cu_tokens[start] > room
            if pieces and full:
                yield pieces
                pieces, room = [], budget
            stop = start + 1
            while stop < end and cu_tokens[stop + 1] - cu_tokens[start] <= room:
                stop += 1
            pieces.append((image, start, stop))
            room -= cu_tokens[stop] - cu_tokens[start]
            start = stop
    if pieces:
        yield pieces


@torch.inference_mode()
def score_candidates(
    scorer: PairScorer,
    images: ImageIndex,
    texts: TextIndex,
    candidates: Candidates,
    token_budget: int | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    *,
    prepared: bool = False,
) -> RerankResult:
    """Score every candidate pair once (see `rerank`); `prepared` texts come from `prepare_texts`."""
    device, config = texts.tokens.device, scorer.config
    image_tokens = images.embeds.shape[1]
    budget = token_budget or TOKEN_BUDGET.get(device.type, TOKEN_BUDGET["cuda"])
    bytes_per_image = flops.image_memory_values(config, image_tokens) * texts.tokens.element_size()
    max_images = max(1, _MEMORY_BYTES // bytes_per_image)
    # fp32 for half-precision models, since scores are compared.
    dtype = torch.promote_types(texts.tokens.dtype, torch.float32)
    scores = torch.full((candidates.pairs,), UNSCORED, dtype=dtype)
    with ExitStack() as stack:
        journal = None
        finished: set[int] = set()
        if resume is not None:
            path = Path(resume) / "scores.jsonl"
            identity = _fingerprint(scorer, images, texts, candidates)
            stack.enter_context(hold(path.with_name(f".{path.name}.lock"), f"the journal {path}"))
            if read_journal(path)[0] not in (None, identity):
                raise DataError(
                    f"{path} holds the scores of other work (other weights, embeddings or k); delete it to start over "
                    "or name another folder. Embeddings that are computed again, not kept in a file, can differ in the "
                    "last bit: torch.use_deterministic_algorithms(True) in both runs prevents it"
                )
            journal = stack.enter_context(Journal(path, identity))
            finished = _restore(journal, scores, candidates)
        done = resumed = int(candidates.cu_pairs.diff()[sorted(finished)].sum()) if finished else 0
        tokens = texts.tokens
        if done < candidates.pairs and not prepared:
            tokens = prepare_texts(scorer, texts, budget)
        # The host schedules by lengths of its own: a pass is prepared while the one before it runs.
        host_lengths = texts.lengths.cpu()
        pair_lengths = host_lengths[candidates.texts]
        starts = offsets(texts.lengths)[:-1].long()
        memory, memory_images = None, None
        for pieces in passes(
            candidates.cu_pairs.tolist(), pair_lengths, budget, max_images, finished
        ):
            pass_images = [image for image, _, _ in pieces]
            if pass_images != memory_images:
                memory = scorer.memory(_select_images(images.embeds, pass_images).to(device))
                memory_images = pass_images
            pairs = torch.cat([torch.arange(start, stop) for _, start, stop in pieces])
            selected = candidates.texts[pairs].to(device)
            lengths, counts = texts.lengths[selected], pair_lengths[pairs]
            rows = ragged_rows(starts[selected], lengths, int(counts.sum()))
            pairs_of_image = torch.tensor(
                [stop - start for _, start, stop in pieces], device=device
            )
            pass_scores = scorer.scores(
                tokens.index_select(0, rows),
                Sequences.from_lengths(lengths, int(counts.max())),
                memory,
                ImageGroups(offsets(pairs_of_image)),
            )
            scores[pairs] = pass_scores.to("cpu", scores.dtype)
            done += len(pairs)
            if journal is not None:
                for image, _, stop in pieces:
                    first, last = candidates.cu_pairs[image : image + 2].tolist()
                    # An image is recorded when its last pair is scored.
                    if stop == last:
                        journal.append([image, scores[first:last].tolist()])
            if progress is not None:
                progress(done, candidates.pairs)
        receipt = Receipt.of(config, candidates, host_lengths, image_tokens, resumed=resumed)
        return RerankResult(candidates, scores, receipt)


def _restore(journal: Journal, scores: Tensor, candidates: Candidates) -> set[int]:
    """Copy the scores of a journal; return the images that it has."""
    finished: set[int] = set()
    try:
        for image, values in journal.entries:
            start, stop = candidates.cu_pairs[image], candidates.cu_pairs[image + 1]
            if len(values) != stop - start:
                raise ValueError(f"{len(values)} scores for image {image}")
            scores[start:stop] = torch.tensor(values, dtype=scores.dtype)
            finished.add(image)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise DataError(
            f"{journal.path.parent} holds scores that do not fit ({error}); delete it"
        ) from None
    return finished


def _select_images(embeds: Tensor, images: list[int]) -> Tensor:
    """Select ascending images by a slice if possible, which reads mapped embeddings in place."""
    if images[-1] - images[0] == len(images) - 1:
        return embeds[images[0] : images[-1] + 1]
    return embeds[torch.tensor(images)]


def prepare_texts(scorer: PairScorer, texts: TextIndex, budget: int) -> Tensor:
    """Compute the image-independent part of fusion `[sum(lengths), width]`, in slices of about
    `budget` tokens.

    The slicing can change the last bit.
    """
    host_lengths = texts.lengths.cpu()
    bounds, prepared = offsets(host_lengths).tolist(), []
    for start, stop in slices(host_lengths.tolist(), budget):
        longest = int(host_lengths[start:stop].max())
        sequences = Sequences.from_lengths(texts.lengths[start:stop], longest)
        prepared.append(scorer.prepare(texts.tokens[bounds[start] : bounds[stop]], sequences))
    return torch.cat(prepared)


def _fingerprint(
    scorer: PairScorer, images: ImageIndex, texts: TextIndex, candidates: Candidates
) -> str:
    """Digest everything that determines the scores, including patch embeddings."""
    digest = hashlib.sha256(scorer.fingerprint().encode())
    digest.update(f"{[*images.embeds.shape]} {images.embeds.dtype} {texts.tokens.dtype}".encode())
    embeds = 0
    # Slice by slice, because they may lie in a file that is larger than memory.
    for chunk in images.embeds.split(64):
        embeds = checksum(chunk, embeds)
    digest.update(f"{embeds:08x}".encode())
    for tensor in (
        images.features,
        texts.features,
        texts.tokens,
        texts.lengths,
        candidates.cu_pairs,
        candidates.texts,
    ):
        digest.update(f"{checksum(tensor):08x}".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Candidates:
    """Unique pairs to score, ordered by image, then text."""

    cu_pairs: Tensor  # `[I + 1]` offsets of images in the pair list
    texts: Tensor  # `[Q]` text of each pair
    for_image: Tensor  # `[Q]` boolean: candidate of the image-to-text direction
    for_text: Tensor  # `[Q]` boolean: candidate of the text-to-image direction

    @property
    def pairs(self) -> int:
        return self.texts.shape[0]

    @property
    def images(self) -> Tensor:
        """`[Q]` image of each pair."""
        return torch.arange(self.cu_pairs.shape[0] - 1).repeat_interleave(self.cu_pairs.diff())

    def of_images(self, start: int, stop: int) -> Candidates:
        """Select the pairs of images `start:stop`, renumbered from 0."""
        cu_pairs = self.cu_pairs[start : stop + 1]
        pairs = slice(int(cu_pairs[0]), int(cu_pairs[-1]))
        return Candidates(
            cu_pairs - cu_pairs[0], self.texts[pairs], self.for_image[pairs], self.for_text[pairs]
        )


@torch.no_grad()
def top_candidates(
    image_features: Tensor, text_features: Tensor, per_image: int, per_text: int
) -> Candidates:
    """Find the most similar texts per image and images per text by L2-normalised features."""
    images, texts = image_features.shape[0], text_features.shape[0]
    texts_of_image = _top(image_features, text_features, min(per_image, texts))
    images_of_text = _top(text_features, image_features, min(per_text, images))
    by_image = torch.arange(images)[:, None] * texts + texts_of_image
    by_text = images_of_text * texts + torch.arange(texts)[:, None]
    by_image, by_text = by_image.flatten().sort().values, by_text.flatten().sort().values
    pairs = torch.cat([by_image, by_text]).unique()
    cu_pairs = offsets(torch.bincount(pairs // max(1, texts), minlength=images)).long()
    return Candidates(
        cu_pairs, pairs % max(1, texts), _contained(pairs, by_image), _contained(pairs, by_text)
    )


def _top(queries: Tensor, collection: Tensor, k: int) -> Tensor:
    """Return the indices `[Q, k]` of the most similar rows of the collection."""
    rows = max(1, _SLICE_VALUES // max(1, collection.shape[0]))
    indices = [(chunk @ collection.t()).topk(k, dim=1).indices for chunk in queries.split(rows)]
    return torch.cat(indices).cpu() if indices else torch.empty(0, k, dtype=torch.long)


def pair_similarity(
    candidates: Candidates, image_features: Tensor, text_features: Tensor
) -> Tensor:
    """Compute the cosine `[Q]` of the features of every candidate pair."""
    images, texts = candidates.images.split(_SLICE_PAIRS), candidates.texts.split(_SLICE_PAIRS)
    cosines = [
        (image_features[image].double() * text_features[text].double()).sum(-1)
        for image, text in zip(images, texts, strict=True)
    ]
    return torch.cat(cosines).to(torch.promote_types(image_features.dtype, torch.float32))


def rank_score(rank: Rank, match: Tensor, similarity: Tensor) -> Tensor:
    """Combine the scores by which pairs are ranked (higher is better).

    `match`: match logit, the official X-FM rule; `similarity`: feature cosine; `sum`: both added,
    as in BLIP and LAVIS.
    """
    if rank == "sum":
        return match + similarity
    return match if rank == "match" else similarity


def best_rank(metrics: Mapping[str, float]) -> Rank:
    """Return the rule with the highest `RULE/r_mean`; ties go to the first of `RANKS`."""
    return max(RANKS, key=lambda rank: metrics[f"{rank}/r_mean"])


def _contained(values: Tensor, ordered: Tensor) -> Tensor:
    """Return which values occur in the `ordered` ones."""
    if not ordered.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    index = torch.searchsorted(ordered, values).clamp_(max=ordered.numel() - 1)
    return ordered[index] == values


def recall(score_i2t: Tensor, score_t2i: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """Compute the official retrieval metric in percent, with ties counted against the true answer.

    From `score_i2t` `[I, T]`, `score_t2i` `[T, I]` and `image_of_text` `[T]`: `txt_r1/5/10` (image
    to text, best rank of an image's texts), `img_r1/5/10` (text to image), `txt_r_mean`,
    `img_r_mean` and `r_mean`.
    """
    images, texts = score_i2t.shape
    if score_t2i.shape != (texts, images) or image_of_text.shape != (texts,):
        raise InputError(
            f"score_i2t {[*score_i2t.shape]}, score_t2i {[*score_t2i.shape]} and image_of_text "
            f"{[*image_of_text.shape]} do not belong together; they must be [I, T], [T, I] and [T]"
        )
    if texts and not 0 <= int(image_of_text.min()) <= int(image_of_text.max()) < images:
        raise InputError(
            f"image_of_text names image {int(image_of_text.max())}; there are {images}, numbered from 0"
        )
    positive = image_of_text[None, :] == torch.arange(images)[:, None]
    unmatched = ~positive.any(1)
    if bool(unmatched.any()):
        raise InputError(
            f"image {int(unmatched.long().argmax())} has no text in image_of_text; leave it out"
        )
    best = score_i2t.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    text_rank = ((score_i2t >= best) & ~positive).sum(1)
    true = score_t2i.gather(1, image_of_text[:, None])
    image_rank = (score_t2i >= true).sum(1) - 1
    return _shares(text_rank, image_rank)


def candidate_recall(
    candidates: Candidates, scores: Tensor, image_of_text: Tensor
) -> dict[str, float]:
    """Compute `recall` from candidate scores `[Q]`, without the full matrices."""
    texts, images = candidates.texts, candidates.images
    true = image_of_text[texts] == images

    def ranks(queries: Tensor, mask: Tensor, count: int) -> Tensor:
        """Count per query the wrong candidates that are not below the best true one."""
        hits, misses = mask & true, mask & ~true
        best = scores.new_zeros(count).scatter_reduce(
            0, queries[hits], scores[hits], "amax", include_self=False
        )
        missed = queries[misses]
        ahead = torch.bincount(missed[scores[misses] >= best[missed]], minlength=count)
        # A true answer that was no candidate is never a hit.
        has_true = torch.zeros(count, dtype=torch.bool).index_fill(0, queries[hits], True)
        return torch.where(has_true, ahead, torch.iinfo(torch.long).max)

    return _shares(
        ranks(images, candidates.for_image, candidates.cu_pairs.shape[0] - 1),
        ranks(texts, candidates.for_text, image_of_text.shape[0]),
    )


def _shares(text_rank: Tensor, image_rank: Tensor) -> dict[str, float]:
    """Compute recalls from the number of wrong items ranked before the first true one."""
    result: dict[str, float] = {}
    for name, ranks in (("txt", text_rank), ("img", image_rank)):
        for depth in (1, 5, 10):
            result[f"{name}_r{depth}"] = 100.0 * int((ranks < depth).sum()) / len(ranks)
        result[f"{name}_r_mean"] = sum(result[f"{name}_r{depth}"] for depth in (1, 5, 10)) / 3
    result["r_mean"] = (result["txt_r_mean"] + result["img_r_mean"]) / 2
    return result
