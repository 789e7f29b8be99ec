"""Learning rates over a run."""

from __future__ import annotations

import math

import pytest

from xfm_fast.training.recipe_fields import ScheduleRecipe
from xfm_fast.training.schedule import schedule_factor


def factors(steps: int, lr: float = 1.0, **fields: object) -> list[float]:
    schedule = ScheduleRecipe.model_validate(fields)
    return [schedule_factor(schedule, step, steps=steps, lr=lr) for step in range(steps + 2)]


def test_linear_is_the_official_one() -> None:
    """0 at step 0, up over 2 steps, down to 0 at the last and staying there."""
    expected = [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0]
    assert factors(8, warmup=2) == pytest.approx(expected)
    assert factors(8, warmup=0.25) == pytest.approx(expected)
    assert factors(2) == [1, 0.5, 0, 0]


def test_linear_ends_at_the_least_rate() -> None:
    found = factors(10, lr=0.5, warmup=2, min_lr=0.1)
    assert found[0] == 0
    assert found[2] == 1
    assert found[6] == pytest.approx(0.6)
    assert found[10] == found[11] == pytest.approx(0.2)


def test_cosine() -> None:
    found = factors(12, kind="cosine", warmup=4, min_lr=0.2)
    assert found[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert found[6] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert found[8] == pytest.approx(0.6)
    assert found[12] == found[13] == pytest.approx(0.2)


def test_a_run_of_warm_up_alone() -> None:
    assert factors(3, warmup=3)[:3] == pytest.approx([0, 1 / 3, 2 / 3])
