"""The order in which an epoch visits rows: a pure function of (seed, epoch, position), kept nowhere."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

# Fewer leave some orders of five elements twice as likely as others.
_ROUNDS = 6
# Runs of rows that lie together on the disk, in each window.
_RUNS = 32
_WORD = 0xFFFFFFFFFFFFFFFF


def permuted(position: int, count: int, *key: int) -> int:
    """The place to which a random permutation of `count` elements takes `position`; the key says which permutation.

    The generalised Feistel cipher of Black and Rogaway (2002): positions become pairs of residues, each is shifted in
    turn by a random function of the other, and the rare result beyond `count` goes through again. It costs no memory,
    so that a loader of a billion rows is as small as one of ten, and any position can be asked for, which is what makes
    resuming exact.
    """
    width = math.isqrt(count - 1) + 1
    height = -(-count // width)
    words = _round_keys(key)
    while True:
        left, right = divmod(position, width)
        for even, odd in words:
            left = (left + _mixed(even, right)) % height
            right = (right + _mixed(odd, left)) % width
        position = left * width + right
        if position < count:
            return position


def shuffled(position: int, count: int, seed: int, epoch: int, window: int | None = None) -> int:
    """The row at a position of an epoch that visits each of `count` rows once.

    Args:
        position: 0 ... count - 1.
        count: rows of all files together.
        seed: of the stream.
        epoch: each has an order of its own.
        window: None shuffles all rows, which asks a disk for rows in random places: right for memory, SSDs and what
            the system has cached. A number of rows serves disks that seek slowly: runs of consecutive rows
            (`window` / 32 of them) come in random order, and rows are shuffled within windows of so many.
    """
    if window is None or window >= count:
        return permuted(position, count, seed, epoch)
    block, inside = divmod(position, window)
    start = block * window
    position = start + permuted(inside, min(window, count - start), seed, epoch, block)
    run = max(1, window // _RUNS)
    whole = count // run
    # The rows of the last, incomplete run stay last, where every window has its full length.
    if position >= whole * run:
        return position
    number, inside = divmod(position, run)
    return permuted(number, whole, seed, epoch, -1) * run + inside


def replacement(position: int, attempt: int, count: int, stride: int) -> int:
    """The position of a row that stands in for a broken one: `attempt` 0 is the row itself.

    Rows come from the same place of the following batches (`stride` positions apart), so that no batch holds a row
    twice while there is more than one batch, and every position is tried once in `count` attempts.
    """
    cycle = count // math.gcd(count, stride)
    return (position + attempt * stride + attempt // cycle) % count


def item_generator(seed: int, stream: int, epoch: int, position: int) -> np.random.Generator:
    """The random numbers of one item, the same in every worker and after every restart."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, epoch, position])))


@lru_cache(maxsize=1024)
def _round_keys(key: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(_mixed(*key, 2 * number), _mixed(*key, 2 * number + 1)) for number in range(_ROUNDS)]


def _mixed(*words: int) -> int:
    """SplitMix64's finaliser (Steele et al., 2014) over a sequence of integers."""
    value = 0x9E3779B97F4A7C15
    for word in words:
        value = (value ^ word & _WORD) * 0xBF58476D1CE4E5B9 & _WORD
        value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
        value ^= value >> 31
    return value
