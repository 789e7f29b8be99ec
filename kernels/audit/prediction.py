"""The time that a launch will take on the card of an architecture, and what takes it.

time = waves × (cycles outside the main loop + turns × cycles of a turn) / clock, unless the L2 cache or main memory
needs longer for what the programs move; plus the overhead of a launch. A wave is as many programs as all
multiprocessors hold at once; a wave that is not full takes as long as one that is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .cards import Card
from .launches import Launch
from .simulator import TENSOR, Timing

# Tensor cores that are busy for so much of a turn are what limits it.
_SATURATED = 0.7


@dataclass(frozen=True)
class Prediction:
    """What a launch takes.

    Attributes:
        microseconds: of the launch.
        tensor_busy: share of them in which the tensor cores work.
        bound_by: `"memory"`, `"L2 cache"`, `"tensor cores"`, or, of warps that wait, for what most.
        waves: of programs, the last of which may not be full.
        shape: of the launch.
    """

    microseconds: float
    tensor_busy: float
    bound_by: str
    waves: int
    shape: str


def predict(timing: Timing, launch: Launch, card: Card) -> Prediction:
    """The time of a launch.

    Args:
        timing: cycles of the machine code, with as many programs resident as the launch gives a multiprocessor.
        launch: at some shape.
        card: the one that the cycles were simulated for.
    """
    slots = card.multiprocessors * timing.resident
    waves = math.ceil(launch.programs / slots)
    hertz = card.clock_ghz * 1e9
    computing = waves * (timing.outside + launch.turns * timing.iteration) / hertz
    moved = launch.live * launch.programs * (timing.bytes_outside + launch.turns * timing.bytes_iteration)
    caching = moved / (card.multiprocessors * card.l2_bytes * hertz)
    loading = (launch.bytes or moved) / card.memory_bytes_per_s
    seconds = max(computing, caching, loading) + card.overhead_us * 1e-6
    working = launch.programs / slots * (timing.tensor_outside + launch.turns * timing.tensor_iteration) / hertz
    if computing >= max(caching, loading):
        bound = _cause(timing)
    else:
        bound = "memory" if loading >= caching else "L2 cache"
    return Prediction(seconds * 1e6, working / seconds, bound, waves, launch.shape)


def _cause(timing: Timing) -> str:
    if timing.iteration and timing.tensor_iteration >= _SATURATED * timing.iteration:
        return TENSOR
    cause = next(iter(timing.stalls), "issue")
    return "tensor core latency" if cause == TENSOR else cause
