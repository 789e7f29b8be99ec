"""The parts of an encoder under a clock: their methods are wrapped on the instances, so that models know no clocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple

from xfm_fast.benchmarks.contenders.engine import Clock, NoStages


class Part(NamedTuple):
    """A method whose calls are a stage of their own; what it calls and is a stage too is not counted with it."""

    owner: object
    method: str
    stage: str


@contextmanager
def parts_under(clock: Clock, parts: Iterable[Part], rest: str) -> Iterator[None]:
    """Time the calls of some methods as stages, and what else happens in the block as the stage `rest`.

    Without a clock nothing is wrapped, so timed runs are those of the untouched model.
    """
    if isinstance(clock, NoStages):
        yield
        return
    with ExitStack() as wrapped, clock(rest):
        for part in parts:
            wrapped.callback(_put_back, part, vars(part.owner).get(part.method))
            setattr(part.owner, part.method, _timed(getattr(part.owner, part.method), clock, part.stage))
        yield


def _timed(method: Callable[..., Any], clock: Clock, stage: str) -> Callable[..., Any]:
    @wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock(stage):
            return method(*args, **kwargs)

    return timed


def _put_back(part: Part, own: Any) -> None:
    if own is None:
        delattr(part.owner, part.method)
    else:
        setattr(part.owner, part.method, own)
