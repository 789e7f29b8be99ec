"""Image-text retrieval: embed, rank by feature similarity, re-rank with the fusion encoder image by image.

The official evaluation re-projects an image's tokens to keys and values for every caption, runs every caption padded,
and scores the pairs of both directions separately. Here the union of both directions' pairs is scored once, in
image-major order: an image's memory is computed once, all its captions are one query sequence, and nothing is padded.
The scores are the same; the receipt says what it cost.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from xfm_fast import flops
from xfm_fast.config import XFMConfig
from xfm_fast.errors import DataError, InputError
from xfm_fast.mapped import create_mapped
from xfm_fast.models.fusion import ImageMemory
from xfm_fast.models.xfm import XFM
from xfm_fast.packing import ImageGroups, Packing, Sequences, offsets, ragged_rows
from xfm_fast.tasks.candidates import Candidates, top_candidates
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

    def memory(self, image_embeds: Tensor) -> Any:
        """What all texts of the images `[B, 1 + N, width]` share."""
        ...

    def scores(self, tokens: Tensor, sequences: Sequences, memory: Any, groups: ImageGroups) -> Tensor:
        """Match score of every prepared text with its image: `[P]`."""
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

    def memory(self, image_embeds: Tensor) -> ImageMemory:
        return self.model.image_memory(image_embeds)

    def scores(self, tokens: Tensor, sequences: Sequences, memory: ImageMemory, groups: ImageGroups) -> Tensor:
        fused = self.model.fusion_encoder(
            tokens, sequences, memory, groups, first_token_only=True, self_attended=True
        )
        return self.model.match_logits(fused[:, None])[:, 1]

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
    """Embedded texts without padding: packed `tokens` `[sum(lengths), text_width]`, `lengths` `[T]`, `features` `[T, E]`."""

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
        matrix = torch.full((self.receipt.images, self.receipt.texts), UNSCORED)
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
        """R@1/5/10 both ways; see `recall`."""
        return recall(self.score_i2t, self.score_t2i, image_of_text)


class Retriever:
    """Embeds collections and searches them.

    Args:
        model: an `XFM` with the contrastive and matching heads; it is put into evaluation mode.
        token_budget: caption tokens per pass of the fusion encoder; chosen for the device by default.
    """

    def __init__(self, model: XFM, *, token_budget: int | None = None) -> None:
        self.model = model.eval()
        self.scorer: PairScorer = ModelScorer(model)
        self.token_budget = token_budget

    @torch.inference_mode()
    def embed_images(
        self, batches: Iterable[Tensor], *, path: str | Path | None = None, count: int | None = None
    ) -> ImageIndex:
        """Embed batches of pixels `[B, 3, R, R]`.

        Args:
            batches: in the order of the collection.
            path: file that receives the embeddings, for a collection that does not fit into memory.
            count: number of images, needed with `path`.
        """
        config, stored = self.model.config, None
        if path is not None:
            if count is None:
                raise InputError("count=None: the number of images is needed to lay out the file at path; pass count")
            stored = create_mapped(path, (count, config.num_image_tokens, config.vision_width), self.model.dtype)
        embeds: list[Tensor] = []
        features: list[Tensor] = []
        done = 0
        for pixels in batches:
            embedded = self.model.encode_image(pixels.to(self.model.device))
            features.append(self.model.project_image(embedded))
            if stored is None:
                embeds.append(embedded)
            else:
                if done + len(embedded) > len(stored):
                    raise InputError(f"more than count={count} images were given; pass their true number")
                stored[done : done + len(embedded)] = embedded.cpu()
            done += len(embedded)
        if not features:
            raise InputError("no images were given")
        if stored is not None and done != len(stored):
            raise InputError(f"{done} images were given but count={count}; pass their true number")
        return ImageIndex(torch.cat(embeds) if stored is None else stored, torch.cat(features))

    @torch.inference_mode()
    def embed_texts(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> TextIndex:
        """Embed batches of (input_ids, attention_mask), both `[B, L]`."""
        tokens: list[Tensor] = []
        lengths: list[Tensor] = []
        features: list[Tensor] = []
        for input_ids, attention_mask in batches:
            if attention_mask is None:
                attention_mask = input_ids.ne(self.model.config.pad_token_id)
            input_ids, attention_mask = input_ids.to(self.model.device), attention_mask.to(self.model.device)
            embedded = self.model.encode_text(input_ids, attention_mask)
            packing = Packing.from_mask(attention_mask)
            tokens.append(packing.pack(embedded))
            lengths.append(packing.cu_seqlens.diff().long())
            features.append(self.model.project_text(embedded))
        if not features:
            raise InputError("no texts were given")
        return TextIndex(torch.cat(tokens), torch.cat(lengths), torch.cat(features))

    def rerank(
        self,
        images: ImageIndex,
        texts: TextIndex,
        k: int = 256,
        *,
        resume: str | Path | None = None,
        progress: Progress | None = None,
    ) -> RerankResult:
        """Score the k best candidates of every image and of every text; see the function `rerank`."""
        candidates = top_candidates(images.features, texts.features, _positive(k), k)
        return _score(self.scorer, images, texts, candidates, self.token_budget, resume, progress)

    def search_images(self, texts: TextIndex, images: ImageIndex, k: int = 16) -> tuple[Tensor, Tensor]:
        """For every text the k most similar images, best match first: indices and match scores, `[T, k]` each."""
        candidates = top_candidates(images.features, texts.features, 0, _positive(k))
        result = _score(self.scorer, images, texts, candidates, self.token_budget, None, None)
        return _best(result.score_t2i, k)

    def search_texts(self, images: ImageIndex, texts: TextIndex, k: int = 16) -> tuple[Tensor, Tensor]:
        """For every image the k most similar texts, best match first: indices and match scores, `[I, k]` each."""
        candidates = top_candidates(images.features, texts.features, _positive(k), 0)
        result = _score(self.scorer, images, texts, candidates, self.token_budget, None, None)
        return _best(result.score_i2t, k)


def rerank(
    image_embeds: Tensor,
    text_embeds: Tensor,
    attention_mask: Tensor,
    *,
    model: XFM,
    k: int = 256,
    image_features: Tensor | None = None,
    text_features: Tensor | None = None,
    token_budget: int | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> RerankResult:
    """Re-rank the union of both directions' top-k pairs, each pair once, image by image.

    Args:
        image_embeds: `[I, 1 + N, vision_width]` from `encode_image`; may be memory-mapped (`xfm_fast.mapped`).
        text_embeds: `[T, L, text_width]` from `encode_text`.
        attention_mask: `[T, L]`, non-zero for real tokens.
        model: with the contrastive and matching heads.
        k: candidates per image and per text (the official `k_test`), at most as many as there are.
        image_features, text_features: `[I, E]`, `[T, E]`; projected from the embeddings when not given.
        token_budget: caption tokens per pass of the fusion encoder.
        resume: folder that keeps the scores of finished images. A later call with the same work continues there.
        progress: called with (pairs done, pairs in all).

    Returns:
        Scores as the official evaluation has them, and a receipt.
    """
    model.eval()
    with torch.inference_mode():
        if image_features is None:
            image_features = torch.cat([_image_features(model, part) for part in image_embeds.split(64)])
        if text_features is None:
            text_features = model.project_text(text_embeds)
        packing = Packing.from_mask(attention_mask)
        texts = TextIndex(packing.pack(text_embeds), packing.cu_seqlens.diff().long(), text_features)
    retriever = Retriever(model, token_budget=token_budget)
    return retriever.rerank(ImageIndex(image_embeds, image_features), texts, k, resume=resume, progress=progress)


def _image_features(model: XFM, image_embeds: Tensor) -> Tensor:
    return model.project_image(image_embeds[:, :1].to(model.device))


def _positive(k: int) -> int:
    if k < 1:
        raise InputError(f"k={k}; at least one candidate per query is needed")
    return k


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = scores.topk(min(k, scores.shape[1]), dim=1)
    return indices, values


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
def _score(
    scorer: PairScorer,
    images: ImageIndex,
    texts: TextIndex,
    candidates: Candidates,
    token_budget: int | None,
    resume: str | Path | None,
    progress: Progress | None,
) -> RerankResult:
    if resume is None:
        return _run(scorer, images, texts, candidates, token_budget, None, progress)
    with ScoreJournal(Path(resume) / "scores.bin", _fingerprint(scorer, images, texts, candidates)) as journal:
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
    scores = torch.full((candidates.pairs,), UNSCORED)
    finished: set[int] = set()
    if journal is not None:
        finished = _restore(journal, candidates, scores)
    resumed = int(candidates.cu_pairs.diff()[sorted(finished)].sum()) if finished else 0
    done = resumed
    starts = offsets(texts.lengths)[:-1].long()
    prepared: Tensor | None = None
    memory, memory_of = None, None
    spent = flops.Count()
    for tile in _tiles(candidates, texts.lengths.cpu(), finished, budget, most):
        if prepared is None:
            prepared = _prepare(scorer, texts, budget)
            spent += flops.first_self_attention(scorer.config, texts.lengths)
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
        spent += flops.fusion(
            scorer.config, lengths, images.embeds.shape[1], first_token_only=True, self_attended=True
        )
        scores[pairs] = scored.float().cpu()
        done += len(pairs)
        if journal is not None:
            _record(journal, candidates, tile, scores)
        if progress is not None:
            progress(done, candidates.pairs)
    return RerankResult(candidates, scores, _receipt(scorer.config, images, texts, candidates, resumed, spent))


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
            raise DataError(f"{journal.path} holds {len(values)} scores for image {image}, which does not fit; delete it")
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
    """Of everything that decides the scores. Image embeddings may be too large to read twice: their features stand in."""
    digest = hashlib.sha256(scorer.fingerprint().encode())
    digest.update(f"{[*images.embeds.shape]} {images.embeds.dtype} {texts.tokens.dtype}".encode())
    for tensor in (images.features, texts.features, texts.tokens, texts.lengths, candidates.cu_pairs, candidates.texts):
        digest.update(f"{_checksum(tensor):08x}".encode())
    return digest.hexdigest()


def _checksum(tensor: Tensor, start: int = 0) -> int:
    data = tensor.detach().cpu().contiguous().flatten()
    return zlib.crc32(data.view(torch.uint8).numpy().data, start) if data.numel() else start


def recall(score_i2t: Tensor, score_t2i: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """The official retrieval metric, in percent.

    Ties count against the true answer, so that a pair that was never scored is never a hit; the official code leaves
    their order to an unstable sort.

    Args:
        score_i2t: `[I, T]`; score_t2i: `[T, I]`.
        image_of_text: `[T]` the image that each text describes.

    Returns:
        `txt_r1/5/10` (image to text: the best rank of an image's texts), `img_r1/5/10` (text to image), their means
        `txt_r_mean`, `img_r_mean`, and `r_mean`, the mean of both.
    """
    images, texts = score_i2t.shape
    if score_t2i.shape != (texts, images) or image_of_text.shape != (texts,):
        raise InputError(
            f"score_i2t {[*score_i2t.shape]}, score_t2i {[*score_t2i.shape]} and image_of_text "
            f"{[*image_of_text.shape]} do not belong together; they must be [I, T], [T, I] and [T]"
        )
    if texts and not 0 <= int(image_of_text.min()) <= int(image_of_text.max()) < images:
        raise InputError(f"image_of_text names image {int(image_of_text.max())}; there are {images}, numbered from 0")
    positive = image_of_text[None, :] == torch.arange(images)[:, None]
    unmatched = ~positive.any(1)
    if bool(unmatched.any()):
        raise InputError(f"image {int(unmatched.long().argmax())} has no text in image_of_text; leave it out")
    best = score_i2t.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    text_rank = ((score_i2t >= best) & ~positive).sum(1)
    true = score_t2i.gather(1, image_of_text[:, None])
    image_rank = (score_t2i >= true).sum(1) - 1
    result: dict[str, float] = {}
    for name, ranks in (("txt", text_rank), ("img", image_rank)):
        for depth in (1, 5, 10):
            result[f"{name}_r{depth}"] = 100.0 * int((ranks < depth).sum()) / len(ranks)
        result[f"{name}_r_mean"] = sum(result[f"{name}_r{depth}"] for depth in (1, 5, 10)) / 3
    result["r_mean"] = (result["txt_r_mean"] + result["img_r_mean"]) / 2
    return result
