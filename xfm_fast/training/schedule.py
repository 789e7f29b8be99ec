"""Learning-rate schedules: linear warm-up from 0, then linear or cosine decay."""

from __future__ import annotations

import math

from xfm_fast.training.recipe_fields import ScheduleRecipe


def schedule_factor(schedule: ScheduleRecipe, step: int, *, steps: int, lr: float) -> float:
    """What the learning rates are multiplied by in a step.

    Args:
        schedule: shape, warm-up and final learning rate.
        step: 0 for the first one, whose factor is 0 where there is a warm-up (the official choice).
        steps: length of the run.
        lr: the learning rate that the factor multiplies, of which `schedule.min_lr` is the end. Groups with a multiple
            of it end at the same multiple of `min_lr`.
    """
    warmup = schedule.warmup_steps(steps)
    if step < warmup:
        return step / warmup
    left = max(0.0, (steps - step) / max(1, steps - warmup))
    if schedule.kind == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    floor = schedule.min_lr / lr
    return floor + (1 - floor) * left
