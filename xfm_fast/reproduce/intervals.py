"""How sure a few seeds make us: t intervals of a mean and of a paired difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from xfm_fast.errors import InputError


@dataclass(frozen=True)
class Interval:
    """A mean with the interval that holds the true mean with some confidence, if values are normal around it.

    Attributes:
        mean: of the values.
        half: half the width of the interval; infinite for a single value.
        count: number of values.
    """

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean.

    Raises:
        InputError: no values, or a confidence outside (0, 1).
    """
    if not values or not 0 < confidence < 1:
        raise InputError(f"{len(values)} values and confidence={confidence}; give some values and a number in (0, 1)")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.inf, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = float(stats.t.ppf((1 + confidence) / 2, count - 1))
    return Interval(mean, quantile * deviation / math.sqrt(count), count)


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval of the mean of `a - b`, run by run: runs of one seed share their data and initial weights.

    Raises:
        InputError: different numbers of runs.
    """
    if len(a) != len(b):
        raise InputError(f"{len(a)} and {len(b)} runs do not pair up; compare the seeds that both have")
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], confidence)
