"""Block masks: the exact number, the same masks as a plain generator, and the statistics of the official one."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from xfm_fast.data.block_masks import ATTEMPTS, block_mask
from xfm_fast.errors import InputError

DRAWS = 20_000


def plain_block_mask(grid: int, count: int, least: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """The rule as it is told, on an array."""
    mask = np.zeros((grid, grid), dtype=bool)
    while mask.sum() < count:
        remaining = count - int(mask.sum())
        accepted = False
        for area, aspect, top, left in rng.random((ATTEMPTS, 4)):
            target = least + area * (remaining - least)
            ratio = math.exp(math.log(0.3) + aspect * (math.log(1 / 0.3) - math.log(0.3)))
            height, width = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if height >= grid or width >= grid:
                continue
            y, x = math.floor(top * (grid - height + 1)), math.floor(left * (grid - width + 1))
            rectangle = np.zeros_like(mask)
            rectangle[y : y + height, x : x + width] = True
            if 0 < (rectangle & ~mask).sum() <= remaining:
                mask |= rectangle
                accepted = True
                break
        if not accepted:
            break
    flat = mask.flatten()
    missing = count - int(flat.sum())
    if missing:
        flat[rng.choice(np.flatnonzero(~flat), missing, replace=False)] = True
    return flat


@given(grid=st.integers(1, 16), share=st.floats(0, 1), least=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_exactly_that_many_and_the_same_as_the_plain_generator(grid: int, share: float, least: int, seed: int) -> None:
    count = round(share * grid * grid)
    mask = block_mask(grid, count, least, np.random.default_rng(seed))
    assert mask.shape == (grid * grid,)
    assert mask.dtype == np.bool_
    assert mask.sum() == count
    assert np.array_equal(mask, plain_block_mask(grid, count, least, np.random.default_rng(seed)))


def _adjacent(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of neighbouring patches that are both hidden, for every mask `[draws, grid, grid]`."""
    pairs = 2 * masks.shape[1] * (masks.shape[1] - 1)
    vertical, horizontal = masks[:, 1:] & masks[:, :-1], masks[:, :, 1:] & masks[:, :, :-1]
    return (vertical.sum((1, 2)) + horizontal.sum((1, 2))) / pairs


def _deviations(masks: NDArray[np.bool_], official: dict[str, float]) -> tuple[NDArray[np.float64], float, float]:
    """In standard errors: of every position's frequency, of the mean and of the deviation of the adjacency."""
    ours = len(masks)
    frequency = np.array(official["position_frequency"])
    both = 1 / ours + 1 / official["draws"]
    positions = (masks.mean(0) - frequency) / np.sqrt(frequency * (1 - frequency) * both)
    adjacency, spread = _adjacent(masks), official["both_neighbours_masked_std"]
    mean = (adjacency.mean() - official["both_neighbours_masked_mean"]) / (spread * math.sqrt(both))
    # Of a standard deviation the relative error is about sqrt((kurtosis - 1) / 4n); kurtosis from our own draws.
    centred = adjacency - adjacency.mean()
    kurtosis = (centred**4).mean() / (centred**2).mean() ** 2
    return positions, float(mean), float((adjacency.std() / spread - 1) / math.sqrt((kurtosis - 1) / 4 * both))


@pytest.mark.parametrize(
    ("case", "grid", "count", "least"), [("grid14_masked75_min16", 14, 75, 16), ("grid4_masked6_min2", 4, 6, 2)]
)
def test_statistics_are_the_official_ones(
    case: str, grid: int, count: int, least: int, golden: Callable[[str], Path]
) -> None:
    official = json.loads(golden("masking/stats.json").read_text())[case]
    rng = np.random.default_rng(20)
    masks = np.stack([block_mask(grid, count, least, rng) for _ in range(DRAWS)]).reshape(-1, grid, grid)
    positions, mean, deviation = _deviations(masks, official)
    assert np.abs(positions).max() < 4.5
    # Frequencies that are all right vary by 1; a small bias everywhere shows here long before it shows in any one.
    assert np.sqrt((positions**2).mean()) < 1.3
    assert abs(mean) < 4
    assert abs(deviation) < 4

    single = np.stack([rng.permutation(grid * grid) < count for _ in range(2000)]).reshape(-1, grid, grid)
    assert abs(_deviations(single, official)[1]) > 20, "the band does not tell blocks from single patches"
    smaller = np.stack([block_mask(grid, count, max(least // 2, 1), rng) for _ in range(4000)]).reshape(-1, grid, grid)
    assert abs(_deviations(smaller, official)[1]) > 4, "the band does not tell blocks of another size"


def test_all_and_none() -> None:
    rng = np.random.default_rng(0)
    assert block_mask(5, 25, 4, rng).all()
    assert not block_mask(5, 0, 4, rng).any()


@pytest.mark.parametrize(("count", "least"), [(17, 2), (-1, 2), (4, 0)])
def test_impossible_masks_are_refused(count: int, least: int) -> None:
    with pytest.raises(InputError, match=r"lower it|at least 1"):
        block_mask(4, count, least, np.random.default_rng(0))
