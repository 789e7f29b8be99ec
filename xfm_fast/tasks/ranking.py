"""Batched image-caption scoring for servers.

Images are decoded and encoded once across captions and requests, and cached. Pairs of concurrent
requests run image by image within a token budget, without duplicates. The model is an `XFM`
(`ModelRanks`) or an export (`xfm_fast.export.session.tasks.SessionRanks`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
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

# Pillow reads formats that run other programs; from clients only these are accepted.
_ACCEPTED = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)
_DECODING_THREADS = min(8, os.cpu_count() or 1)
# An image is large if it needs more bytes to decode.
_LARGE_BYTES = 2 << 20
# Image memories of a pass; more of them gain little and take much room.
_IMAGES_PER_TILE = 16
# Images of an encoder batch.
_ENCODER_BATCH = {"cpu": 8, "cuda": 64}
# Features are small compared with memories: their cache has a 16th of the bytes, for many more
# images.
_FEATURES_SHARE = 16
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Picture(NamedTuple):
    """An encoded image: content hash, bytes to decode it (`peak`), whether its request goes on."""

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
        """Caption indices `[I, C]` per image, best first."""
        return self.scores.argsort(dim=1, descending=True, stable=True)

    @property
    def image_order(self) -> Tensor:
        """Image indices `[C, I]` per caption, best first."""
        return self.scores.t().argsort(dim=1, descending=True, stable=True)


class RankModel(Protocol):
    """Model interface of `Ranker`, as `ModelRanks` implements it; memories have `nbytes`."""

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
        device = "cpu" if model.device.type == "cpu" else "cuda"
        self.token_budget, self._batch = TOKEN_BUDGET[device], _ENCODER_BATCH[device]

    def captions(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed captions `[T, L]`, packed: `[sum(lengths), width]`."""
        embeds = []
        for ids, mask in self._slices(input_ids, attention_mask):
            packing = Packing.from_mask(mask)
            tokens = packing.pack(self.model.encode_text(ids, mask))
            # The first self-attention of fusion does not depend on the image.
            embeds.append(self.model.fusion_encoder.first_self_attention(tokens, packing))
        return torch.cat(embeds)

    def images(self, pixels: Tensor) -> Tensor:
        """Embed images `[B, 3, R, R]` → `[B, 1 + N, width]`."""
        return torch.cat([*self._encode_images(pixels)])

    def memories(self, embeds: Tensor) -> list[ImageMemory]:
        """Compute the memories of B images, each with its own storage."""
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
        """Compute match logits `[P, 2]` of P packed captions, `counts[b]` of them with image b."""
        memory = memories[0]
        if len(memories) > 1:
            layers = zip(*(image.layers for image in memories), strict=True)
            memory = ImageMemory(tuple(map(torch.cat, layers)))
        device = tokens.device
        fused = self.model.fusion_encoder(
            tokens,
            Sequences.from_lengths(lengths.to(device)),
            memory,
            ImageGroups(offsets(torch.tensor(counts, device=device))),
            first_token_only=True,
            self_attended=True,
        )
        return self.model.match_logits(fused[:, None])

    def caption_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features = []
        for ids, mask in self._slices(input_ids, attention_mask):
            features.append(self.model.project_text(self.model.encode_text(ids, mask)))
        return torch.cat(features)

    def image_features(self, pixels: Tensor) -> Tensor:
        return torch.cat([*map(self.model.project_image, self._encode_images(pixels))])

    def _encode_images(self, pixels: Tensor) -> Iterator[Tensor]:
        for batch in pixels.split(self._batch):
            yield self.model.encode_image(batch.to(self.model.device))

    def _slices(self, input_ids: Tensor, attention_mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Divide captions into slices within the token budget."""
        for start, stop in slices(attention_mask.sum(1).tolist(), self.token_budget):
            ids, mask = input_ids[start:stop], attention_mask[start:stop]
            yield ids.to(self.model.device), mask.to(self.model.device)


def _failure(picture: Picture, index: int, failures: dict[bytes, XFMError]) -> XFMError:
    """Return the error of a failed image, with its name."""
    error = failures[picture.key]
    return type(error)(f"{picture.name or f'image {index} of the request'}: {error}")


class MemoryCache:
    """LRU cache of values with `nbytes`, of at most `max_bytes`; 0 disables it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._values: OrderedDict[bytes, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def get(self, key: bytes) -> Any:
        """Return the value of a key or None; mark it as most recently used."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: bytes, value: Any) -> None:
        """Cache a value, which should own its storage."""
        replaced = self._values.pop(key, None)
        if replaced is not None:
            self.nbytes -= replaced.nbytes
        if value.nbytes > self.max_bytes:
            return
        self._values[key] = value
        self.nbytes += value.nbytes
        while self.nbytes > self.max_bytes:
            _, dropped = self._values.popitem(last=False)
            self.nbytes -= dropped.nbytes


class Ranker:
    """Answers batches of queries; `picture` is thread-safe, other methods need one thread at a
    time.

    `cache_bytes` limits cached image memories; a sixteenth of it is added for features.
    """

    def __init__(self, model: RankModel, cache_bytes: int) -> None:
        self.model = model
        self.cache = MemoryCache(cache_bytes)
        self.features = MemoryCache(cache_bytes // _FEATURES_SHARE)
        self._threads = ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decode")
        # One thread, since every thread retains the memory of its largest image.
        self._large = ThreadPoolExecutor(1, thread_name_prefix="decode-large")

    @staticmethod
    def picture(content: bytes, name: str) -> Picture:
        """Hash an image file without decoding it; an unaccepted format raises `DataError`."""
        if not _ACCEPTED.match(content):
            raise DataError(
                f"{name} ({len(content)} bytes, beginning with {content[:8]!r}) is not a JPEG, PNG or WebP"
            )
        return Picture(hashlib.sha256(content).digest(), content)

    def _decode(self, owners: Sequence[Picture]) -> Tensor | XFMError:
        """Decode an image, or return its error; all requests of its `owners` may have ended."""
        content = owners[0].content
        try:
            if not any(owner.needed() for owner in owners):
                return InputError("the request has ended")
            return load_image(content, self.model.config.image_size)
        except DataError as error:
            return error
        except MemoryError:
            return DataError(
                f"an image of {len(content)} bytes needs more memory to decode than there is; shrink it"
            )

    @torch.inference_mode()
    def rank(self, queries: Sequence[Query]) -> list[Ranking | XFMError]:
        """Answer queries together; a query with a broken image gets an error instead of a ranking."""
        pictures = [picture for query in queries for picture in query.pictures]
        cached = {picture.key for picture in pictures if picture.key in self.cache}
        failures: dict[bytes, XFMError] = {}
        captions = _numbered(ids for query in queries for ids in query.captions)
        logits = self._logits(queries, captions, cached, failures) if captions else {}
        answers: list[Ranking | XFMError] = []
        for query in queries:
            failed = [
                index for index, picture in enumerate(query.pictures) if picture.key in failures
            ]
            if failed:
                answers.append(_failure(query.pictures[failed[0]], failed[0], failures))
                continue
            rows = [captions[ids] for ids in query.captions]
            scores = torch.tensor(
                [[logits[picture.key][row] for row in rows] for picture in query.pictures]
            )
            if scores.isfinite().all():
                reused = torch.tensor([picture.key in cached for picture in query.pictures])
                answers.append(Ranking(scores[..., 1], scores.softmax(-1)[..., 1], reused))
            else:
                answers.append(
                    NonFiniteError(
                        f"the scores are not finite; {self.model.dtype_name} may be too narrow for these weights: "
                        "use fp32 or bf16"
                    )
                )
        return answers

    @torch.inference_mode()
    def embed_captions(self, captions: Sequence[tuple[int, ...]]) -> Tensor:
        """Compute contrastive features `[C, embed_dim]` fp32 of token-id captions, duplicates once."""
        rows = _numbered(captions)
        features = self.model.caption_features(*self._padded(rows)).float().cpu()
        return features[[rows[ids] for ids in captions]]

    @torch.inference_mode()
    def embed_images(self, pictures: Sequence[Picture]) -> list[Tensor | XFMError]:
        """Get contrastive features `[embed_dim]` fp32 of images from cache or model, or errors."""
        features: dict[bytes, Tensor] = {}
        new: dict[bytes, None] = {}
        for picture in pictures:
            cached = self.features.get(picture.key)
            if cached is None:
                new[picture.key] = None
            else:
                features[picture.key] = cached
        failures: dict[bytes, XFMError] = {}
        keys = [*new]
        tiles = [
            keys[start : start + _IMAGES_PER_TILE]
            for start in range(0, len(keys), _IMAGES_PER_TILE)
        ]
        for pixels in self._decode_tiles(tiles, pictures, failures):
            if pixels:
                computed = self.model.image_features(torch.stack([*pixels.values()])).float().cpu()
                for key, row in zip(pixels, computed, strict=True):
                    features[key] = row.clone()
                    self.features.put(key, features[key])
        return [
            _failure(picture, index, failures) if picture.key in failures else features[picture.key]
            for index, picture in enumerate(pictures)
        ]

    def _padded(self, captions: Iterable[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        rows = [torch.tensor(ids) for ids in captions]
        ids = pad_sequence(rows, True, self.model.config.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()

    def _decode_tiles(
        self,
        tiles: Sequence[Sequence[bytes]],
        pictures: Sequence[Picture],
        failures: dict[bytes, XFMError],
    ) -> Iterator[dict[bytes, Tensor]]:
        """Decode pixels `[3, R, R]` tile by tile, one tile ahead; errors go to `failures`."""
        owners: dict[bytes, list[Picture]] = {}
        for picture in pictures:
            owners.setdefault(picture.key, []).append(picture)

        def begin(tile: Sequence[bytes]) -> dict[bytes, Future[Tensor | XFMError]]:
            futures = {}
            for key in tile:
                large = max(owner.peak for owner in owners[key]) > _LARGE_BYTES
                threads = self._large if large else self._threads
                futures[key] = threads.submit(self._decode, owners[key])
            return futures

        ahead = begin(tiles[0]) if tiles else {}
        for index in range(len(tiles)):
            futures = ahead
            if index + 1 < len(tiles):
                ahead = begin(tiles[index + 1])
            pixels = {}
            for key, future in futures.items():
                result = future.result()
                if isinstance(result, XFMError):
                    failures[key] = result
                else:
                    pixels[key] = result
            yield pixels

    def _logits(
        self,
        queries: Sequence[Query],
        captions: dict[tuple[int, ...], int],
        cached: set[bytes],
        failures: dict[bytes, XFMError],
    ) -> dict[bytes, dict[int, list[float]]]:
        """Compute logits by image and caption row, each pair once; failed images go to `failures`."""
        ids, mask = self._padded(captions)
        # Packed, without padding; lengths stay on the host.
        tokens, lengths = self.model.captions(ids, mask), mask.sum(1)
        # Caption rows of each image, without repetitions.
        rows_of: dict[bytes, dict[int, None]] = {}
        for query in queries:
            rows = dict.fromkeys(captions[ids] for ids in query.captions)
            for picture in query.pictures:
                rows_of.setdefault(picture.key, {}).update(rows)
        # Cached memories come first, before new ones evict any of them.
        keys = sorted(rows_of, key=lambda key: key not in cached)
        texts = torch.tensor([row for key in keys for row in rows_of[key]])
        cu_pairs = [0, *accumulate(len(rows_of[key]) for key in keys)]
        tiles = [*passes(cu_pairs, lengths[texts], self.model.token_budget, _IMAGES_PER_TILE)]
        # An image is decoded for the first of its passes.
        new: list[list[bytes]] = []
        for tile in tiles:
            first_here = [keys[image] for image, start, _ in tile if start == cu_pairs[image]]
            new.append([key for key in first_here if key not in cached])
        pictures = [picture for query in queries for picture in query.pictures]
        starts = lengths.cumsum(0) - lengths
        logits: dict[bytes, dict[int, list[float]]] = {}
        memories: dict[bytes, Any] = {}
        for tile, pixels in zip(tiles, self._decode_tiles(new, pictures, failures), strict=True):
            computed: dict[bytes, Any] = {}
            if pixels:
                embeds = self.model.images(torch.stack([*pixels.values()]))
                computed = dict(zip(pixels, self.model.memories(embeds), strict=True))
            pieces = [
                (keys[image], start, stop)
                for image, start, stop in tile
                if keys[image] not in failures
            ]
            if not pieces:
                continue
            # A memory of the previous pass may have been evicted from the cache.
            memories |= computed
            memories = {
                key: memories[key] if key in memories else self.cache.get(key)
                for key, _, _ in pieces
            }
            for key, memory in computed.items():
                self.cache.put(key, memory)
            selected = torch.cat([texts[start:stop] for _, start, stop in pieces])
            rows = ragged_rows(starts[selected], lengths[selected]).to(tokens.device)
            scores = self.model.logits(
                tokens.index_select(0, rows),
                lengths[selected],
                [*memories.values()],
                [stop - start for _, start, stop in pieces],
            )
            values = iter(scores.float().tolist())
            for key, start, stop in pieces:
                row_logits = logits.setdefault(key, {})
                for row in texts[start:stop].tolist():
                    row_logits[row] = next(values)
        return logits


def _numbered(captions: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """Number distinct captions in order."""
    return {ids: row for row, ids in enumerate(dict.fromkeys(captions))}
