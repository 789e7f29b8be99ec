"""Shuffling as a pure function of (seed, epoch, position), without stored state."""

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
    """Position after a keyed random permutation of `count` elements.

    The generalised Feistel cipher of Black and Rogaway (2002), with cycle walking for results beyond `count`. It uses
    no memory and gives random access, so resuming is exact.
    """
    width = math.isqrt(count - 1) + 1
    height = -(-count // width)
    words = _round_keys(key)
    while True:
        left, right = divmod(position, width)
        for even, odd in words:
            left = (left + _splitmix64(even, right)) % height
            right = (right + _splitmix64(odd, left)) % width
        position = left * width + right
        if position < count:
            return position


def shuffled(position: int, count: int, seed: int, epoch: int, window: int | None = None) -> int:
    """Row at a position of an epoch that visits each of `count` rows once.

    `window=None` shuffles all rows. A number of rows limits seeks on slow disks: runs of `window` / 32 consecutive rows
    come in random order, and rows are shuffled within windows.
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
    """Position of the row that replaces a broken one (`attempt` 0 is the row itself).

    Replacements come from the same place of the following batches (`stride` positions apart), so that no batch repeats
    a row, and `count` attempts try every position once.
    """
    cycle = count // math.gcd(count, stride)
    return (position + attempt * stride + attempt // cycle) % count


def item_generator(seed: int, stream: int, epoch: int, position: int) -> np.random.Generator:
    """Random generator of one item, independent of workers and restarts."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, epoch, position])))


@lru_cache(maxsize=1024)
def _round_keys(key: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(_splitmix64(*key, 2 * number), _splitmix64(*key, 2 * number + 1)) for number in range(_ROUNDS)]


def _splitmix64(*words: int) -> int:
    """SplitMix64's finaliser (Steele et al., 2014) over a sequence of integers."""
    value = 0x9E3779B97F4A7C15
    for word in words:
        value = (value ^ word & _WORD) * 0xBF58476D1CE4E5B9 & _WORD
        value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
        value ^= value >> 31
    return value
