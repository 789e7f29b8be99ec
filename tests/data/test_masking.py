"""Masks of texts and of patches: exact counts, plain twins, and the statistics of the official generators."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.conftest import load_json
from xfm_fast.data.masking import ATTEMPTS, EncodedText, MaskingOptions, block_mask, mask_tokens

VOCABULARY, MASK = 50_265, 50_264
OFFICIAL_DRAWS = 2000
"""Fewer draws than this would not give shares as close to 80/10/10 as the official ones are."""
DRAWS = 10_000


def _mask(
    length: int, options: MaskingOptions, rng: np.random.Generator, starts: list[bool] | None = None
) -> EncodedText:
    ids = list(range(1000, 1000 + length))
    return mask_tokens(
        ids, options, rng, vocab_size=VOCABULARY, mask_token_id=MASK, word_starts=starts
    )


@given(
    length=st.integers(2, 140),
    probability=st.floats(0.01, 1),
    max_masked=st.integers(1, 40),
    skipgrams=st.floats(0, 1),
    size=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_exactly_that_many(
    length: int, probability: float, max_masked: int, skipgrams: float, size: int, seed: int
) -> None:
    options = MaskingOptions(probability, max_masked, skipgrams, size)
    masked = _mask(length, options, np.random.default_rng(seed))
    assert len(masked.positions) == min(max_masked, max(1, round(length * probability)), length - 1)
    assert masked.positions == sorted(set(masked.positions))
    assert masked.positions[0] >= 1
    assert masked.positions[-1] < length
    assert masked.labels == [1000 + position for position in masked.positions]
    unmasked = set(range(length)) - set(masked.positions)
    assert all(masked.masked_ids[position] == 1000 + position for position in unmasked)
    assert len(masked.masked_ids) == length
    assert all(0 <= token < VOCABULARY for token in masked.masked_ids)
    assert masked == _mask(length, options, np.random.default_rng(seed))


def _statistics(
    length: int, options: MaskingOptions, draws: int, seed: int
) -> tuple[np.ndarray, int, int]:
    """Shares <mask>/random/kept, right neighbour masked, second and last position masked; number of masked tokens."""
    rng = np.random.default_rng(seed)
    fates, neighbours, second, last, total = np.zeros(3), 0, 0, 0, 0
    counts = set()
    for _ in range(draws):
        _, ids, positions, labels = _mask(length, options, rng)
        counts.add(len(positions))
        total += len(positions)
        for position, label in zip(positions, labels, strict=True):
            fates[0 if ids[position] == MASK else 2 if ids[position] == label else 1] += 1
            neighbours += position + 1 in positions
        second += 1 in positions
        last += length - 1 in positions
    (count,) = counts
    return (
        np.array([*(fates / total), neighbours / total, second / draws, last / draws]),
        total,
        count,
    )


def _band(expected: np.ndarray, count: int, draws: int) -> np.ndarray:
    """4.5 standard errors of the difference, and the rounding of the official numbers to 3 digits."""
    variance = expected * (1 - expected)
    per_token = np.array([1, 1, 1, 1, 0, 0], dtype=bool)
    ours, official_draws = (np.where(per_token, n * count, n) for n in (draws, OFFICIAL_DRAWS))
    # Neighbours of one text depend on each other: their variance is counted by texts.
    ours[3], official_draws[3] = draws, OFFICIAL_DRAWS
    return 4.5 * np.sqrt(variance * (1 / ours + 1 / official_draws)) + 0.0005


def test_statistics_are_the_official_ones() -> None:
    draws = 2000
    for seed, (case, official) in enumerate(load_json("masking/text_masking_stats").items()):
        probability, most, length = re.search(r"_p([\d.]+)_max(\d+)_len(\d+)", case).groups()
        ours, _, count = _statistics(
            int(length), MaskingOptions(float(probability), int(most)), draws, seed
        )
        assert [count] == official["n_masked"], case
        expected = np.array(
            [
                *official["share_mask_random_kept"],
                official["share_of_masked_whose_right_neighbour_is_masked"],
                official["freq_second"],
                official["freq_last"],
            ]
        )
        assert (np.abs(ours - expected) <= _band(expected, count, draws)).all(), (
            case,
            ours,
            expected,
        )


@given(
    words=st.lists(st.integers(1, 5), min_size=1, max_size=20),
    probability=st.floats(0.05, 1),
    max_masked=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
)
def test_whole_words_stay_whole(
    words: list[int], probability: float, max_masked: int, seed: int
) -> None:
    starts = [True] + [position == 0 for word in words for position in range(word)]
    options = MaskingOptions(probability, max_masked, whole_word=True)
    masked = _mask(len(starts), options, np.random.default_rng(seed), starts)
    begins = [position for position, start in enumerate(starts) if start and position]
    spans = [set(range(a, b)) for a, b in zip(begins, [*begins[1:], len(starts)], strict=True)]
    hidden = [span for span in spans if span & set(masked.positions)]
    complete = [span for span in hidden if span <= set(masked.positions)]
    count = options.count(len(starts))
    assert masked.positions
    assert len(masked.positions) <= max_masked
    if len(hidden) > 1 or len(hidden[0]) <= max_masked:
        assert complete == hidden
    assert len(masked.positions) <= count or len(hidden) == 1
    assert len(masked.positions) > count - max(words)


def plain_block_mask(
    grid: int, count: int, min_area: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Draw by the documented rule, on an array."""
    mask = np.zeros((grid, grid), dtype=bool)
    while mask.sum() < count:
        remaining = count - int(mask.sum())
        accepted = False
        for area, aspect, top, left in rng.random((ATTEMPTS, 4)):
            target = min_area + area * (remaining - min_area)
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


@given(
    grid=st.integers(1, 16),
    share=st.floats(0, 1),
    min_area=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_exactly_that_many_and_the_same_as_the_plain_generator(
    grid: int, share: float, min_area: int, seed: int
) -> None:
    count = round(share * grid * grid)
    mask = block_mask(grid, count, min_area, np.random.default_rng(seed))
    assert mask.sum() == count
    assert np.array_equal(
        mask, plain_block_mask(grid, count, min_area, np.random.default_rng(seed))
    )


def _deviations(
    masks: NDArray[np.bool_], official: dict[str, float]
) -> tuple[NDArray[np.float64], float]:
    """In standard errors: of every position's frequency, and of the mean share of neighbours that are both hidden."""
    frequency = np.array(official["position_frequency"])
    inverse_draws = 1 / len(masks) + 1 / official["draws"]
    positions = (masks.reshape(len(masks), -1).mean(0) - frequency.flatten()) / np.sqrt(
        (frequency * (1 - frequency)).flatten() * inverse_draws
    )
    pairs = 2 * masks.shape[1] * (masks.shape[1] - 1)
    vertical, horizontal = masks[:, 1:] & masks[:, :-1], masks[:, :, 1:] & masks[:, :, :-1]
    adjacency = (vertical.sum((1, 2)) + horizontal.sum((1, 2))) / pairs
    spread = official["both_neighbours_masked_std"] * math.sqrt(inverse_draws)
    return positions, float((adjacency.mean() - official["both_neighbours_masked_mean"]) / spread)


@pytest.mark.parametrize(
    ("case", "grid", "count", "min_area"),
    [("grid14_masked75_min16", 14, 75, 16), ("grid4_masked6_min2", 4, 6, 2)],
)
def test_block_statistics_are_the_official_ones(
    case: str, grid: int, count: int, min_area: int
) -> None:
    official = load_json("masking/stats")[case]
    rng = np.random.default_rng(20)
    masks = np.stack([block_mask(grid, count, min_area, rng) for _ in range(DRAWS)]).reshape(
        -1, grid, grid
    )
    positions, mean = _deviations(masks, official)
    assert np.abs(positions).max() < 4.5
    assert abs(mean) < 4
    smaller = np.stack(
        [block_mask(grid, count, max(min_area // 2, 1), rng) for _ in range(4000)]
    ).reshape(-1, grid, grid)
    assert abs(_deviations(smaller, official)[1]) > 4, (
        "the band does not tell blocks of another size"
    )
