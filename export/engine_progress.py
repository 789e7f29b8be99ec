"""How far a builder is, told to whoever shows it; an interruption stops the builder instead of crashing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class BuildProgress(Protocol):
    """Is told what is built. Phases nest: `Building engine` holds the others."""

    def graph(self, name: str, number: int, count: int) -> None:
        """The build of a graph, `number` of `count` from 1, begins."""

    def phase(self, name: str, done: int, steps: int, depth: int) -> None:
        """A phase of the builder has done so many of its steps; depth 0 is the whole build."""


class Silent:
    """Shows nothing."""

    def graph(self, name: str, number: int, count: int) -> None:
        pass

    def phase(self, name: str, done: int, steps: int, depth: int) -> None:
        pass


class Interruption:
    """Whether the user interrupted a build, and during which phase it was."""

    def __init__(self) -> None:
        self.raised: BaseException | None = None
        self.phase = ""


def monitor(trt: Any, tell: Callable[[str, int, int, int], None]) -> tuple[Any, Interruption]:
    """An `IProgressMonitor` of a TensorRT module that passes everything on to `tell`.

    The builder calls it from its own code, which no exception may cross: an exception, such as Ctrl-C, is kept in the
    second result and the builder is asked to stop.
    """
    state = Interruption()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, tuple[int, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            depth = self._steps[parent_phase][1] + 1 if parent_phase in self._steps else 0
            self._steps[phase_name] = (num_steps, depth)
            state.phase = phase_name
            self._guarded(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self._steps:
                self._guarded(phase_name, self._steps[phase_name][0])

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                self._guarded(phase_name, min(step + 1, self._steps[phase_name][0]))
            return state.raised is None

        def _guarded(self, phase_name: str, done: int) -> None:
            try:
                tell(phase_name, done, *self._steps[phase_name])
            except BaseException as error:  # Ctrl-C too
                state.raised = state.raised or error

    return Monitor(), state
