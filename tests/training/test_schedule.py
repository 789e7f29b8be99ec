"""Learning rates over a run, and their resuming."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from xfm_fast.training.optimizer import AdamW
from xfm_fast.training.recipe_fields import ScheduleRecipe
from xfm_fast.training.schedule import make_schedule, schedule_factor


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


def test_groups_keep_their_ratio_and_state_resumes() -> None:
    def make() -> tuple[AdamW, torch.optim.lr_scheduler.LambdaLR]:
        parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
        optimizer = AdamW([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 2.0}])
        return optimizer, make_schedule(optimizer, ScheduleRecipe(warmup=2), steps=8, lr=1.0)

    def rates(optimizer: AdamW) -> list[float]:
        return [group["lr"] for group in optimizer.param_groups]

    optimizer, scheduler = make()
    assert rates(optimizer) == [0, 0]
    seen = []
    for _ in range(3):
        optimizer.step()
        scheduler.step()
        seen.append(rates(optimizer))
    assert seen == [[0.5, 1], [1, 2], pytest.approx([5 / 6, 10 / 6])]
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    resumed, other = make()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for pair in ((optimizer, scheduler), (resumed, other)):
        pair[0].step()
        pair[1].step()
    assert rates(optimizer) == rates(resumed) == pytest.approx([4 / 6, 8 / 6])
