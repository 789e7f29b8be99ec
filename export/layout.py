"""Packed rows: captions of different lengths side by side in rows of one length, and the tensors that graphs take.

Padding to the longest caption costs every layer; packed rows waste only their ends. A longer row costs more attention,
which is a small share of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import ceil, inf

import numpy as np
import torch
from torch import Tensor

# Tokens of a row that are tried: about as many as a caption has, to where attention begins to count.
_TARGETS = (32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Rows:
    """Captions by number, packed into rows of `length` tokens."""

    texts: tuple[tuple[int, ...], ...]
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of all rows, padding included."""
        return len(self.texts) * self.length


def pack_rows(
    texts: Sequence[int],
    lengths: Sequence[int],
    width: int,
    *,
    most_rows: int | None = None,
    most_length: int | None = None,
    padded: Callable[[int], int] = lambda length: length,
) -> Rows | None:
    """The cheapest packing by padded tokens and attention cost; None where no packing fits the limits."""
    order = sorted(texts, key=lengths.__getitem__, reverse=True)
    total, longest = sum(lengths[text] for text in texts), lengths[order[0]]
    top_rows = min(len(order), most_rows or len(order))
    counts = {ceil(total / max(target, longest)) for target in (longest, *_TARGETS)}
    best, cheapest = None, inf
    for count in sorted(count for count in counts if count <= top_rows) or [top_rows]:
        rows, length = _fill_rows(order, lengths, count)
        while most_length is not None and length > most_length and count < top_rows:
            count += 1
            rows, length = _fill_rows(order, lengths, count)
        if most_length is not None and length > most_length:
            continue
        length = padded(length)
        # Of a layer 24 w² operations a token are products and 4 w L attention, at a third of their speed.
        cost = count * length * (1 + length / (2 * width))
        if cost < cheapest:
            best, cheapest = Rows(rows, length), cost
    return best


def _fill_rows(order: Sequence[int], lengths: Sequence[int], count: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Greedy packing into `count` rows, longest caption first; returns the rows and the tokens of the fullest."""
    rows: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, row) for row in range(count)]
    heapify(loads)
    for text in order:
        load, row = loads[0]
        rows[row].append(text)
        heapreplace(loads, (load + lengths[text], row))
    return tuple(map(tuple, rows)), max(load for load, _ in loads)


@dataclass(frozen=True)
class Layout:
    """Token positions of one pass: B images (1 without images) with R rows of L tokens each."""

    source: Tensor  # [N] token numbers over all captions, concatenated
    place: Tensor  # [N] position of each among all B R L
    segments: Tensor  # [B, R, L], see `graphs.PackedTextGraph`
    firsts: Tensor  # [B, T, 2]
    texts: Tensor  # [P] caption numbers
    found: Tensor  # [P] position of the results of each among all B T

    @classmethod
    def of(cls, images: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], length: int) -> Layout:
        """The layout of captions: `images` holds the rows of every image, the same number of rows each."""
        counts = [sum(map(len, rows)) for rows in images]
        rows = len(images[0])
        texts = np.array([text for image in images for row in image for text in row])
        row = np.repeat(np.arange(len(images) * rows), [len(row) for image in images for row in image])
        sizes = np.asarray(lengths)[texts]
        behind = np.cumsum(sizes) - sizes
        # Tokens before the first text of a row; rows without one have no say.
        begins = np.zeros(len(images) * rows, dtype=np.int64)
        begins[row[::-1]] = behind[::-1]
        offset = behind - begins[row]
        # Of every token: which of the texts here it belongs to, and its place in it.
        of = np.repeat(np.arange(len(texts)), sizes)
        inner = np.arange(len(of)) - behind[of]
        place = row[of] * length + offset[of] + inner
        starts = np.cumsum(lengths) - np.asarray(lengths)
        image = np.repeat(np.arange(len(images)), counts)
        # The texts of an image are numbered as they come, wherever they lie.
        number = np.empty(len(texts), dtype=np.int64)
        number[np.lexsort((texts, image))] = np.concatenate([np.arange(count) for count in counts])
        segments = np.zeros(len(images) * rows * length, dtype=np.int64)
        segments[place] = number[of] + 1
        firsts = np.zeros((len(images), max(counts), 2), dtype=np.int64)
        firsts[image, number] = np.stack([row % rows, offset], axis=1)
        return cls(
            source=torch.from_numpy(starts[texts][of] + inner),
            place=torch.from_numpy(place),
            segments=torch.from_numpy(segments).view(len(images), rows, length),
            firsts=torch.from_numpy(firsts),
            texts=torch.from_numpy(texts),
            found=torch.from_numpy(image * max(counts) + number),
        )

    def spread(self, values: Tensor, padding: int = 0) -> Tensor:
        """Scatter token values, `[tokens of all captions, ...]` → `[B, R, L, ...]`, with `padding` elsewhere."""
        out = values.new_full((self.segments.numel(), *values.shape[1:]), padding)
        out[self.place.to(values.device)] = values.index_select(0, self.source.to(values.device))
        return out.view(*self.segments.shape, *values.shape[1:])
