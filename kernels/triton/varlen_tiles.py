"""Which tile of which packed sequence a program owns."""

# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

_CHUNK = tl.constexpr(256)


@triton.jit
def locate_tile(cu_ptr, sequences, tile, BLOCK: tl.constexpr):
    """The sequence that a tile number belongs to, and the tile's first row in it, possibly beyond the sequence's end.

    Sequence s owns the numbers from cu[s] // BLOCK + s up to those of s + 1. The count of sequences that begin at or
    before a number is found in one vectorised read per 256 sequences.
    """
    count = 0
    for first in range(0, sequences, _CHUNK):
        s = first + tl.arange(0, _CHUNK)
        begin = tl.load(cu_ptr + s, mask=s < sequences, other=0)
        count += tl.sum(((begin // BLOCK + s <= tile) & (s < sequences)).to(tl.int32), 0)
    s = count - 1
    start = (tile - (tl.load(cu_ptr + s) // BLOCK + s)) * BLOCK
    return s, start.to(tl.int32)
