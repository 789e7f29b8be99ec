"""From encoded images and captions to match scores: what the `rank` model of a repository does with its requests.

An image is decoded and encoded once, however many captions and requests name it; its memory is kept for later requests.
Pairs of all requests that came together run image by image in passes of the fusion graph, nothing scored twice.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from xfm_fast.data.images import load_image
from xfm_fast.errors import DataError, InputError, NonFiniteError, XFMError
from xfm_fast.packing import Packing, ragged_rows
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

from ..expected import padded_texts
from ..manifest import GraphRecord
from ..request import RankLimits
from ..session import Session, SessionMemory
from ..slots import Slot

# Pillow reads formats that run other programs; from strangers only these are taken.
_TAKEN = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)
_DECODING_THREADS = 8
# Memories that lie side by side in a pass; more of them gain little and take much room.
_IMAGES_PER_TILE = 16


class Query(NamedTuple):
    """A request that was found good.

    Attributes:
        images: contents of image files.
        keys: hashes of the images' contents.
        captions: token ids.
    """

    images: tuple[bytes, ...]
    keys: tuple[bytes, ...]
    captions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Ranking:
    """The answer to a request of I images and C captions.

    Attributes:
        scores: `[I, C]` fp32 match logits; the higher, the better a caption describes an image.
        reused: `[I]` boolean: the memory of the image was there from an earlier request.
    """

    scores: Tensor
    reused: Tensor

    @property
    def caption_order(self) -> Tensor:
        """`[I, C]`: for every image the numbers of the captions, the best first."""
        return self.scores.argsort(dim=1, descending=True, stable=True)

    @property
    def image_order(self) -> Tensor:
        """`[C, I]`: for every caption the numbers of the images, the best first."""
        return self.scores.t().argsort(dim=1, descending=True, stable=True)


class Ranker:
    """Answers requests over a session, several at a time.

    Args:
        session: one with the graphs `vision`, `text`, `image_memory` and `fusion`.
        tokenizer: the model's.
        limits: bounds of a request.
        cache_bytes: room for image memories between requests.
    """

    def __init__(self, session: Session, tokenizer: CaptionTokenizer, limits: RankLimits, cache_bytes: int) -> None:
        self.session, self.tokenizer, self.limits = session, tokenizer, limits
        self.cache = MemoryCache(cache_bytes)
        self._threads = ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decode")

    def query(self, images: Sequence[bytes], captions: Sequence[bytes]) -> Query:
        """Check a request and tokenise its captions, cleaned and cut as the official evaluation does.

        Raises:
            InputError: none or too many images or captions, or one that is too large.
            DataError: a caption that is no UTF-8 or without words.
        """
        limits = self.limits
        for noun, items, most in (("images", images, limits.images), ("captions", captions, limits.captions)):
            if not items:
                raise InputError(f"the request has no {noun}; give 1 to {most}")
            if len(items) > most:
                raise InputError(f"the request has {len(items)} {noun}; give at most {most}, and the rest in another")
        for number, content in enumerate(images):
            if len(content) > limits.image_bytes:
                raise InputError(
                    f"image {number} has {len(content):,} bytes, over the limit of {limits.image_bytes:,}; shrink it"
                )
            if not _TAKEN.match(content):
                raise DataError(
                    f"image {number} ({len(content)} bytes, beginning with {content[:8]!r}) is no JPEG, PNG or WebP"
                )
        texts = [self._text(number, caption) for number, caption in enumerate(captions)]
        rows = self.tokenizer.encode_ids(texts, limits.tokens)
        return Query(tuple(images), tuple(hashlib.sha256(image).digest() for image in images), tuple(map(tuple, rows)))

    def _text(self, number: int, caption: bytes) -> str:
        try:
            text = caption.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"caption {number} is no UTF-8 ({error}); encode it so") from None
        if len(text) > self.limits.caption_characters:
            raise InputError(
                f"caption {number} has {len(text):,} characters, over the limit of "
                f"{self.limits.caption_characters:,}; shorten it"
            )
        try:
            return pre_caption(text)
        except DataError as error:
            raise DataError(f"caption {number}: {error}") from None

    @torch.inference_mode()
    def rank(self, queries: Sequence[Query]) -> list[Ranking | XFMError]:
        """Answer requests together; a request with an image that cannot be decoded gets the error, the others do not.

        Raises:
            ExportError: a graph failed, which concerns them all.
        """
        known = {key for query in queries for key in query.keys if key in self.cache}
        pixels, failures = self._decoded(queries, known)
        answers: list[Ranking | XFMError | None] = []
        for query in queries:
            broken = (number for number, key in enumerate(query.keys) if key in failures)
            first = next(broken, None)
            reason = None if first is None else f"image {first} of the request: {failures[query.keys[first]]}"
            answers.append(None if reason is None else DataError(reason))
        good = [number for number, answer in enumerate(answers) if answer is None]
        for number, ranking in zip(good, self._ranked([queries[n] for n in good], pixels, known), strict=True):
            answers[number] = ranking
            if not ranking.scores.isfinite().all():
                answers[number] = NonFiniteError(
                    f"the scores are not finite; {self.session.manifest.dtype} may be too narrow for these weights: "
                    "export in fp32 or bf16"
                )
        return [answer for answer in answers if answer is not None]

    def _decoded(self, queries: Sequence[Query], known: set[bytes]) -> tuple[dict[bytes, Tensor], dict[bytes, str]]:
        """Pixels `[3, R, R]` of the images whose memory is not known, and what is wrong with the others."""
        contents = {
            key: content
            for query in queries
            for key, content in zip(query.keys, query.images, strict=True)
            if key not in known
        }
        size = self.session.config.image_size

        def decode(content: bytes) -> Tensor | str:
            try:
                return load_image(content, size)
            except DataError as error:
                return str(error)
            except MemoryError:
                return f"image {len(content)} bytes needs more memory to decode than there is; shrink it"

        pixels: dict[bytes, Tensor] = {}
        failures: dict[bytes, str] = {}
        for key, made in zip(contents, self._threads.map(decode, contents.values()), strict=True):
            if isinstance(made, str):
                failures[key] = made
            else:
                pixels[key] = made
        return pixels, failures

    def _ranked(self, queries: Sequence[Query], pixels: dict[bytes, Tensor], known: set[bytes]) -> list[Ranking]:
        if not queries:
            return []
        rows = {ids: row for row, ids in enumerate(dict.fromkeys(ids for query in queries for ids in query.captions))}
        ids, mask = padded_texts(list(rows), self.session.config.pad_token_id)
        embedded = self.session.encode_text(ids, mask)
        # One after the other, without padding; their lengths stay on the host.
        tokens, lengths = Packing.from_mask(mask.to(embedded.device)).pack(embedded), mask.sum(1)
        wanted: dict[bytes, dict[int, None]] = {}
        for query in queries:
            for key in query.keys:
                wanted.setdefault(key, {}).update(dict.fromkeys(rows[ids] for ids in query.captions))
        pairs = {key: list(texts) for key, texts in wanted.items()}
        new = [key for key in pairs if key not in known]
        embeds: dict[bytes, Tensor] = {}
        if new:
            encoded = self.session.encode_image(torch.stack([pixels[key] for key in new]))
            embeds = dict(zip(new, encoded.split(1), strict=True))
        scores: dict[bytes, dict[int, float]] = {}
        # Known memories come first, while none of them has made room for a new one.
        for tile in self._tiles(sorted(pairs, key=lambda key: key not in known), pairs, lengths):
            scores |= self._scored(tile, pairs, embeds, tokens, lengths)
        return [
            Ranking(
                torch.tensor([[scores[key][rows[ids]] for ids in query.captions] for key in query.keys]),
                torch.tensor([key in known for key in query.keys]),
            )
            for query in queries
        ]

    def _tiles(self, keys: Sequence[bytes], pairs: dict[bytes, list[int]], lengths: Tensor) -> list[list[bytes]]:
        """Images whose captions fill a pass together."""
        tiles: list[list[bytes]] = []
        room = 0
        for key in keys:
            cost = int(lengths[pairs[key]].sum())
            if not tiles or cost > room or len(tiles[-1]) == _IMAGES_PER_TILE:
                tiles.append([])
                room = self.session.limits.budget
            tiles[-1].append(key)
            room -= cost
        return tiles

    def _scored(
        self,
        tile: Sequence[bytes],
        pairs: dict[bytes, list[int]],
        embeds: dict[bytes, Tensor],
        tokens: Tensor,
        lengths: Tensor,
    ) -> dict[bytes, dict[int, float]]:
        """Scores of the captions of each image, by caption."""
        texts = torch.tensor([text for key in tile for text in pairs[key]])
        image_of = [place for place, key in enumerate(tile) for _ in pairs[key]]
        counts = lengths[texts]
        starts = lengths.cumsum(0) - lengths
        chosen = tokens.index_select(0, ragged_rows(starts[texts], counts).to(tokens.device))
        outputs = self.session.fuse_packed(chosen, counts, self._memory(tile, embeds), image_of)
        found = iter(outputs["match_logits"][:, 1].float().cpu().tolist())
        return {key: {text: next(found) for text in pairs[key]} for key in tile}

    def _memory(self, tile: Sequence[bytes], embeds: dict[bytes, Tensor]) -> SessionMemory:
        new = [key for key in tile if key in embeds]
        made: dict[bytes, Tensor] = {}
        if new:
            memory = self.session.image_memory(torch.cat([embeds[key] for key in new])).tensor
            made = dict(zip(new, memory.split(1), strict=True))
        rows = []
        for key in tile:
            kept = made[key] if key in made else self.cache.get(key)
            assert kept is not None, "known memories are read before new ones are kept"
            rows.append(kept)
        for key in new:
            self.cache.put(key, made[key].clone())
        return SessionMemory(rows[0] if len(rows) == 1 else torch.cat(rows))


class MemoryCache:
    """Tensors by the hash of what they were made from; the one not used for longest makes room.

    Args:
        most_bytes: limit of all tensors together. One that is larger by itself is not kept; 0 keeps none.

    Attributes:
        nbytes: size of the tensors that are kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.nbytes = 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def get(self, key: bytes) -> Tensor | None:
        """The tensor of a key, which is then the one used last."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: bytes, value: Tensor) -> None:
        """Keep a tensor. It should own its storage, of which a view would keep the whole."""
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


Infer = Callable[[str, Mapping[str, Tensor], Sequence[str]], dict[str, Tensor]]
"""Runs a model by its name: inputs by name and the names of the outputs → outputs that the caller owns.

Raises `ExportError` when the model is not there or fails.
"""


def model_name(prefix: str, graph: str) -> str:
    """The name of the model that serves a graph."""
    return f"{prefix}_{graph}"


class ServedRuntime:
    """A `Runtime` whose graphs are models of the server.

    Args:
        infer: how a model is run.
        prefix: beginning of the models' names.
        device: where tensors go in and come out.
    """

    enqueues = False

    def __init__(self, infer: Infer, prefix: str, device: torch.device) -> None:
        self.description = f"models {prefix}_* of the server ({device})"
        self.device = device
        self._infer, self._prefix = infer, prefix

    def load(self, record: GraphRecord, path: Path) -> ServedGraph:
        """The model of a graph; the server has loaded it, or has not yet."""
        return ServedGraph(self._infer, model_name(self._prefix, record.name), [out.name for out in record.outputs])


class ServedGraph:
    """A `LoadedGraph` in the server."""

    def __init__(self, infer: Infer, name: str, outputs: Sequence[str]) -> None:
        self._infer, self._name, self._outputs = infer, name, outputs

    def run(self, inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """See `LoadedGraph`."""
        return self._infer(self._name, inputs, self._outputs)
