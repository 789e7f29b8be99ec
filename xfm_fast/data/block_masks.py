"""Which patches masked image modelling hides: rectangles, then single patches (BEiT, arXiv 2106.08254)."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from xfm_fast.errors import InputError

ATTEMPTS = 10
"""How often a rectangle is drawn before the rest is filled with single patches."""
_LOWEST_ASPECT = math.log(0.3)


def block_mask(grid: int, count: int, least: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """A mask with exactly `count` ones.

    Rectangles are added while patches are wanted: area uniform between `least` and the number still wanted, log of the
    aspect ratio uniform in ±log(0.3), place uniform. A rectangle counts if it is smaller than the grid in both
    directions, hides at least one patch more and no more than wanted; if `ATTEMPTS` in a row do not, uniformly random
    patches make up the rest.

    Args:
        grid: patches per side.
        count: patches to hide.
        least: smallest area that is drawn.

    Returns:
        `[grid * grid]`, row by row.

    Raises:
        InputError: more patches are to be hidden than there are, or the smallest area is not positive.
    """
    if not 0 <= count <= grid * grid:
        raise InputError(f"count={count} patches cannot be hidden among {grid * grid}; lower it")
    if least < 1:
        raise InputError(f"least={least} is no area of a rectangle; use at least 1")
    # The grid is one integer, a bit per patch: overlap and union of rectangles are then single operations.
    columns = _columns(grid)
    mask, remaining = 0, count
    while remaining:
        for area_draw, aspect_draw, top_draw, left_draw in rng.random((ATTEMPTS, 4)).tolist():
            area = least + area_draw * (remaining - least)
            aspect = math.exp(_LOWEST_ASPECT * (1 - 2 * aspect_draw))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= grid or width >= grid:
                continue
            top, left = int(top_draw * (grid - height + 1)), int(left_draw * (grid - width + 1))
            rectangle = (((1 << width) - 1) * columns[height]) << (top * grid + left)
            new = (rectangle & ~mask).bit_count()
            if 0 < new <= remaining:
                mask |= rectangle
                remaining -= new
                break
        else:
            break
    bits = np.frombuffer(mask.to_bytes((grid * grid + 7) // 8, "little"), dtype=np.uint8)
    out = np.unpackbits(bits, count=grid * grid, bitorder="little").view(np.bool_)
    if remaining:
        out[rng.choice(np.flatnonzero(~out), remaining, replace=False)] = True
    return out


@lru_cache
def _columns(grid: int) -> list[int]:
    """For every height a column of that many patches, at the left upper corner."""
    return [sum(1 << (row * grid) for row in range(height)) for height in range(grid)]
