"""Exponents that are known are found, with intervals that hold them; percentiles and bootstraps of known samples."""

from __future__ import annotations

import random
import statistics

import pytest

from xfm_fast.benchmarks.measuring import bootstrap, percentile
from xfm_fast.benchmarks.scaling import fit_power_law


def test_an_exact_law_is_found_exactly() -> None:
    law = fit_power_law([1, 2, 5, 9], [3 * x**1.7 for x in (1, 2, 5, 9)])
    assert law is not None
    assert law.exponent == pytest.approx(1.7)
    assert (law.low, law.high) == (pytest.approx(1.7), pytest.approx(1.7))
    assert law.r2 == pytest.approx(1)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(400):
        x = [1, 2, 4, 8, 16]
        law = fit_power_law(x, [value**0.8 * draw.lognormvariate(0, 0.1) for value in x])
        assert law is not None
        assert law.low is not None
        assert law.high is not None
        held += law.low <= 0.8 <= law.high
    assert 0.91 <= held / 400 <= 0.985


def test_two_points_have_an_exponent_and_no_interval() -> None:
    law = fit_power_law([1, 4], [1, 2])
    assert law is not None
    assert law.exponent == pytest.approx(0.5)
    assert law.low is None
    assert fit_power_law([3, 3, 3], [1, 2, 3]) is None


def test_percentiles_were_measured() -> None:
    values = [float(v) for v in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert percentile([7.0], 0.99) == 7.0


def test_bootstrap_brackets_the_median() -> None:
    draw = random.Random(1)
    values = [draw.gauss(10, 1) for _ in range(200)]
    bounds = bootstrap(values, statistics.median)
    assert bounds is not None
    assert bounds[0] < statistics.median(values) < bounds[1]
    # The standard error of a median is 1.25 σ / √n.
    assert bounds[1] - bounds[0] == pytest.approx(2 * 1.96 * 1.25 / 200**0.5, rel=0.35)
    assert bootstrap(values[:2], statistics.median) is None
