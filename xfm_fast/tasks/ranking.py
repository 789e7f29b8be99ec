"""Batched image-caption scoring for servers.

Images are decoded and encoded once across captions and requests, and cached. Pairs of concurrent requests run image by
image within a token budget, without duplicates. The model is an `XFM` (`ModelRanks`) or an export
(`xfm_fast.export.session.tasks.SessionRanks`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xfm_fast.config import XFMConfig
from xfm_fast.data.images import load_image
from xfm_fast.errors import DataError, InputError, NonFiniteError, XFMError
from xfm_fast.models.fusion import ImageMemory
from xfm_fast.models.xfm import XFM
from xfm_fast.packing import ImageGroups, Packing, Sequences, offsets, ragged_rows
from xfm_fast.tasks.reranking import TOKEN_BUDGET, passes, slices

# Pillow reads formats that run other programs; from strangers only these are taken.
_TAKEN = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)
_DECODING_THREADS = min(8, os.cpu_count() or 1)
# Bytes to decode, beyond which an image is large.
_LARGE = 2 << 20
# Memories that lie side by side in a pass; more of them gain little and take much room.
_IMAGES_PER_TILE = 16
# Images that are encoded together.
_IMAGES = {"cpu": 8, "cuda": 64}
# Features are small compared with memories: this share holds features of many more images.
_FEATURES_PART = 16
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Picture(NamedTuple):
    """An encoded image: content hash `key`, bytes `peak` to decode it; `needed` is false once its request ended."""

    key: bytes
    content: bytes
    name: str = ""
    peak: int = 0
    needed: Callable[[], bool] = lambda: True


class Query(NamedTuple):
    """Images and tokenised captions to score pairwise."""

    pictures: tuple[Picture, ...]
    captions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Ranking:
    """Result of a query of I images and C captions."""

    scores: Tensor  # `[I, C]` fp32 match logits
    matches: Tensor  # `[I, C]` fp32 match probabilities, as `XFM.match` returns them
    reused: Tensor  # `[I]` boolean: the image was cached

    @property
    def caption_order(self) -> Tensor:
        """`[I, C]` caption indices per image, best first."""
        return self.scores.argsort(dim=1, descending=True, stable=True)

    @property
    def image_order(self) -> Tensor:
        """`[C, I]` image indices per caption, best first."""
        return self.scores.t().argsort(dim=1, descending=True, stable=True)


class RankModel(Protocol):
    """Model interface of `Ranker`, as `ModelRanks` implements it; the memory of an image has `nbytes`."""

    @property
    def config(self) -> XFMConfig: ...
    @property
    def dtype_name(self) -> str: ...
    @property
    def token_budget(self) -> int: ...
    def captions(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor: ...
    def images(self, pixels: Tensor) -> Tensor: ...
    def memories(self, embeds: Tensor) -> list[Any]: ...
    def logits(
        self, tokens: Tensor, lengths: Tensor, memories: Sequence[Any], counts: Sequence[int]
    ) -> Tensor: ...
    def caption_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor: ...
    def image_features(self, pixels: Tensor) -> Tensor: ...


class ModelRanks:
    """`RankModel` of an `XFM` in evaluation mode."""

    def __init__(self, model: XFM) -> None:
        self.model = model
        self.config = model.config
        self.dtype_name = _DTYPES[model.dtype]
        kind = "cpu" if model.device.type == "cpu" else "cuda"
        self.token_budget, self._images = TOKEN_BUDGET[kind], _IMAGES[kind]

    def captions(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Packed embeddings of captions `[T, L]`: `[sum(lengths), width]`."""
        parts = []
        for ids, mask in self._captions(input_ids, attention_mask):
            packing = Packing.from_mask(mask)
            tokens = packing.pack(self.model.encode_text(ids, mask))
            # The first self-attention of fusion does not depend on the image.
            parts.append(self.model.fusion_encoder.first_self_attention(tokens, packing))
        return torch.cat(parts)

    def images(self, pixels: Tensor) -> Tensor:
        """Image embeddings: `[B, 3, R, R]` → `[B, 1 + N, width]`."""
        parts = pixels.split(self._images)
        return torch.cat([self.model.encode_image(part.to(self.model.device)) for part in parts])

    def memories(self, embeds: Tensor) -> list[ImageMemory]:
        """Memories of B images, each with its own storage."""
        layers = self.model.image_memory(embeds).layers
        return [
            ImageMemory(tuple(layer[row : row + 1].clone() for layer in layers))
            for row in range(len(embeds))
        ]

    def logits(
        self,
        tokens: Tensor,
        lengths: Tensor,
        memories: Sequence[ImageMemory],
        counts: Sequence[int],
    ) -> Tensor:
        """Match logits `[P, 2]` of P packed captions, `counts[b]` of them with image b."""
        memory = memories[0]
        if len(memories) > 1:
            memory = ImageMemory(
                tuple(map(torch.cat, zip(*(each.layers for each in memories), strict=True)))
            )
        device = tokens.device
        fused = self.model.fusion_encoder(
            tokens, Sequences.from_lengths(lengths.to(device)), memory,
            ImageGroups(offsets(torch.tensor(counts, device=device))), first_token_only=True, self_attended=True,
        )  # fmt: skip
        return self.model.match_logits(fused[:, None])

    def caption_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        parts = self._captions(input_ids, attention_mask)
        return torch.cat(
            [self.model.project_text(self.model.encode_text(ids, mask)) for ids, mask in parts]
        )

    def image_features(self, pixels: Tensor) -> Tensor:
        parts = [
            self.model.encode_image(part.to(self.model.device))
            for part in pixels.split(self._images)
        ]
        return torch.cat([self.model.project_image(part) for part in parts])

    def _captions(
        self, input_ids: Tensor, attention_mask: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for first, last in slices(attention_mask.sum(1).tolist(), self.token_budget):
            ids, mask = input_ids[first:last], attention_mask[first:last]
            yield ids.to(self.model.device), mask.to(self.model.device)


def _failure(picture: Picture, number: int, failures: dict[bytes, XFMError]) -> XFMError:
    """Error of a failed image, with its name."""
    error = failures[picture.key]
    return type(error)(f"{picture.name or f'image {number} of the request'}: {error}")


class MemoryCache:
    """LRU cache of values with `nbytes`, limited to `most_bytes`; larger values are not cached, 0 disables it."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        self._kept: OrderedDict[bytes, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def get(self, key: bytes) -> Any:
        """Value of a key, marked as most recently used."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: bytes, value: Any) -> None:
        """Cache a value, which should own its storage."""
        earlier = self._kept.pop(key, None)
        if earlier is not None:
            self.nbytes -= earlier.nbytes
        if value.nbytes > self.most_bytes:
            return
        self._kept[key] = value
        self.nbytes += value.nbytes
        while self.nbytes > self.most_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.nbytes -= dropped.nbytes


class Ranker:
    """Answers batches of queries; `picture` is thread-safe, other methods need one thread at a time.

    `cache_bytes` limits cached image memories; a sixteenth of it is added for features.
    """

    def __init__(self, model: RankModel, cache_bytes: int) -> None:
        self.model = model
        self.cache: MemoryCache = MemoryCache(cache_bytes)
        self.features: MemoryCache = MemoryCache(cache_bytes // _FEATURES_PART)
        self._threads = ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decode")
        # One at a time, in one thread, since every thread keeps memory that it had for its largest image.
        self._large = ThreadPoolExecutor(1, thread_name_prefix="decode-large")

    @staticmethod
    def picture(content: bytes, name: str) -> Picture:
        """Hash an image file without decoding it; a format that is not accepted from clients raises `DataError`."""
        if not _TAKEN.match(content):
            raise DataError(
                f"{name} ({len(content)} bytes, beginning with {content[:8]!r}) is no JPEG, PNG or WebP"
            )
        return Picture(hashlib.sha256(content).digest(), content)

    def _decode(self, owners: Sequence[Picture]) -> Tensor | XFMError:
        """Pixels of an image, or its error; the requests that it belongs to may all have ended by now."""
        content = owners[0].content
        try:
            if not any(owner.needed() for owner in owners):
                return InputError("the request has ended")
            return load_image(content, self.model.config.image_size)
        except DataError as error:
            return error
        except MemoryError:
            size = len(content)
            return DataError(
                f"image {size} bytes needs more memory to decode than there is; shrink it"
            )

    @torch.inference_mode()
    def rank(self, queries: Sequence[Query]) -> list[Ranking | XFMError]:
        """Answer queries together; a query with a broken image gets an error, and the others a ranking."""
        known = {
            picture.key
            for query in queries
            for picture in query.pictures
            if picture.key in self.cache
        }
        logits, rows, failures = self._scores(queries, known)
        answers: list[Ranking | XFMError] = []
        for query in queries:
            failed = (
                number for number, picture in enumerate(query.pictures) if picture.key in failures
            )
            if (first := next(failed, None)) is not None:
                answers.append(_failure(query.pictures[first], first, failures))
                continue
            both = torch.tensor(
                [[logits[p.key][rows[ids]] for ids in query.captions] for p in query.pictures]
            )
            reused = torch.tensor([picture.key in known for picture in query.pictures])
            answers.append(Ranking(both[..., 1], both.softmax(-1)[..., 1], reused))
            if not both.isfinite().all():
                answers[-1] = NonFiniteError(
                    f"the scores are not finite; {self.model.dtype_name} may be too narrow for these weights: "
                    "use fp32 or bf16"
                )
        return answers

    @torch.inference_mode()
    def embed_captions(self, captions: Sequence[tuple[int, ...]]) -> Tensor:
        """Contrastive features `[C, embed_dim]` fp32 of token-id captions, duplicates computed once."""
        rows = {ids: row for row, ids in enumerate(dict.fromkeys(captions))}
        found = self.model.caption_features(*self._padded(rows)).float().cpu()
        return found[[rows[ids] for ids in captions]]

    @torch.inference_mode()
    def embed_images(self, pictures: Sequence[Picture]) -> list[Tensor | XFMError]:
        """Contrastive features `[embed_dim]` fp32 of images from cache or model, or errors."""
        found = {
            picture.key: kept
            for picture in pictures
            if (kept := self.features.get(picture.key)) is not None
        }
        new = list(dict.fromkeys(picture.key for picture in pictures if picture.key not in found))
        tiles = [
            new[first : first + _IMAGES_PER_TILE] for first in range(0, len(new), _IMAGES_PER_TILE)
        ]
        failures: dict[bytes, XFMError] = {}
        for pixels in self._decoded(tiles, pictures, failures):
            if not pixels:
                continue
            computed = self.model.image_features(torch.stack([*pixels.values()])).float().cpu()
            for key, row in zip(pixels, computed, strict=True):
                found[key] = row.clone()
                self.features.put(key, found[key])
        return [
            _failure(picture, number, failures) if picture.key in failures else found[picture.key]
            for number, picture in enumerate(pictures)
        ]

    def _padded(self, rows: dict[tuple[int, ...], int]) -> tuple[Tensor, Tensor]:
        ids = pad_sequence(
            [torch.tensor(row) for row in rows], True, self.model.config.pad_token_id
        )
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()

    def _decoded(
        self,
        tiles: Sequence[Sequence[bytes]],
        pictures: Sequence[Picture],
        failures: dict[bytes, XFMError],
    ) -> Iterator[dict[bytes, Tensor]]:
        """Pixels `[3, R, R]` per tile, prefetching one tile; errors go to `failures`."""
        owners: dict[bytes, list[Picture]] = {}
        for picture in pictures:
            owners.setdefault(picture.key, []).append(picture)

        def begin(tile: Sequence[bytes]) -> dict[bytes, Future[Tensor | XFMError]]:
            futures = {}
            for key in tile:
                large = max(owner.peak for owner in owners[key]) > _LARGE
                futures[key] = (self._large if large else self._threads).submit(
                    self._decode, owners[key]
                )
            return futures

        ahead = begin(tiles[0]) if tiles else {}
        for number in range(len(tiles)):
            current, ahead = ahead, begin(tiles[number + 1]) if number + 1 < len(tiles) else {}
            pixels = {}
            for key, future in current.items():
                made = future.result()
                if isinstance(made, XFMError):
                    failures[key] = made
                else:
                    pixels[key] = made
            yield pixels

    def _scores(
        self, queries: Sequence[Query], known: set[bytes]
    ) -> tuple[
        dict[bytes, dict[int, list[float]]], dict[tuple[int, ...], int], dict[bytes, XFMError]
    ]:
        """Logits by image and caption row, caption rows, and failed images."""
        failures: dict[bytes, XFMError] = {}
        logits: dict[bytes, dict[int, list[float]]] = {}
        rows = {
            ids: row
            for row, ids in enumerate(
                dict.fromkeys(ids for query in queries for ids in query.captions)
            )
        }
        if not rows:
            return logits, rows, failures
        ids, mask = self._padded(rows)
        # One after the other, without padding; their lengths stay on the host.
        tokens, lengths = self.model.captions(ids, mask), mask.sum(1)
        wanted: dict[bytes, dict[int, None]] = {}
        for query in queries:
            for picture in query.pictures:
                wanted.setdefault(picture.key, {}).update(
                    dict.fromkeys(rows[ids] for ids in query.captions)
                )
        pairs = {key: list(texts) for key, texts in wanted.items()}
        # Known memories come first, while none of them has made room for a new one.
        keys = sorted(pairs, key=lambda key: key not in known)
        texts = torch.tensor([text for key in keys for text in pairs[key]])
        starts, cu_pairs = (
            lengths.cumsum(0) - lengths,
            [0, *accumulate(len(pairs[key]) for key in keys)],
        )
        tiles = [*passes(cu_pairs, lengths[texts], self.model.token_budget, _IMAGES_PER_TILE)]
        # An image is decoded for the first of its passes.
        new = [
            [
                keys[image]
                for image, first, _ in tile
                if first == cu_pairs[image] and keys[image] not in known
            ]
            for tile in tiles
        ]
        pictures = [picture for query in queries for picture in query.pictures]
        memories: dict[bytes, Any] = {}
        for tile, pixels in zip(tiles, self._decoded(new, pictures, failures), strict=True):
            made: dict[bytes, Any] = {}
            if pixels:
                embeds = self.model.images(torch.stack([*pixels.values()]))
                made = dict(zip(pixels, self.model.memories(embeds), strict=True))
            pieces = [
                (keys[image], first, last)
                for image, first, last in tile
                if keys[image] not in failures
            ]
            if not pieces:
                continue
            known_here = memories | made
            memories = {
                key: known_here[key] if key in known_here else self.cache.get(key)
                for key, _, _ in pieces
            }
            for key, memory in made.items():
                self.cache.put(key, memory)
            chosen = torch.cat([texts[first:last] for _, first, last in pieces])
            packed = tokens.index_select(
                0, ragged_rows(starts[chosen], lengths[chosen]).to(tokens.device)
            )
            counts = [last - first for _, first, last in pieces]
            found = iter(
                self.model.logits(packed, lengths[chosen], [*memories.values()], counts)
                .float()
                .tolist()
            )
            for key, first, last in pieces:
                logits.setdefault(key, {}).update(
                    (text, next(found)) for text in texts[first:last].tolist()
                )
        return logits, rows, failures
