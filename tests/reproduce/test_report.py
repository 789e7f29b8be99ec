"""Intervals hold what they promise, and say so when they cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest

from xfm_fast.errors import InputError
from xfm_fast.reproduce.report import mean_interval, paired_difference


def test_the_textbook_example() -> None:
    """Three values around 10 with standard deviation 1: t(0.975, 2) = 4.3027, so 10 ± 4.3027/√3."""
    interval = mean_interval([9, 10, 11])
    assert interval.mean == 10
    assert interval.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert not interval.excludes_zero or interval.low > 0


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    draws = np.random.default_rng(0).normal(5, 2, size=(2000, 3))
    held = [interval.low <= 5 <= interval.high for interval in (mean_interval([*row]) for row in draws)]
    assert 0.935 < sum(held) / len(held) < 0.965


def test_one_value_says_nothing() -> None:
    interval = mean_interval([3.0])
    assert interval.half == math.inf
    assert not interval.excludes_zero


def test_pairs_cancel_what_they_share() -> None:
    shared = [10.0, 40.0, 90.0]
    a, b = [value + bonus for value, bonus in zip(shared, (5.1, 5.0, 4.9), strict=True)], shared
    assert paired_difference(a, b).excludes_zero
    assert paired_difference(b, a).mean == pytest.approx(-5)
    assert mean_interval(a).low < mean_interval(b).mean


def test_a_difference_within_noise_includes_zero() -> None:
    assert not paired_difference([1.0, 2, 3], [2.0, 2, 2]).excludes_zero


def test_impossible_intervals_are_refused() -> None:
    with pytest.raises(InputError):
        mean_interval([])
    with pytest.raises(InputError):
        mean_interval([1.0, 2.0], confidence=1)
    with pytest.raises(InputError, match=r"2 .* 1 "):
        paired_difference([1.0, 2.0], [1.0])
