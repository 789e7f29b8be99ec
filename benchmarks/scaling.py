"""How cost grows with the work: a power law through measured points, by least squares of the logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from scipy import stats


class PowerLaw(NamedTuple):
    """`seconds ∝ x^exponent`.

    Attributes:
        low, high: interval of the exponent; None where two points leave nothing to estimate it from.
        r2: share of the variance of the logarithm that the line explains.
    """

    exponent: float
    low: float | None
    high: float | None
    r2: float


def fit_power_law(x: Sequence[float], seconds: Sequence[float], level: float = 0.95) -> PowerLaw | None:
    """Fit an exponent with Student's interval for the slope of a line.

    Args:
        x: amounts of work, above zero.
        seconds: what each took, above zero.

    Returns:
        None for fewer than two different amounts.
    """
    if len(set(x)) < 2:
        return None
    logs = [math.log(value) for value in x], [math.log(value) for value in seconds]
    line: Any = stats.linregress(*logs)
    slope, error, r2 = float(line.slope), float(line.stderr), float(line.rvalue) ** 2
    free = len(x) - 2
    if free < 1:
        return PowerLaw(slope, None, None, r2)
    reach = float(stats.t.ppf((1 + level) / 2, free)) * error
    return PowerLaw(slope, slope - reach, slope + reach, r2)
