"""A GPU that is not there: launches are specialised as on it, by Triton's own binder, and none is made."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .. import backend
from .. import triton as family

# Those of an H100 with four programs for each multiprocessor.
_PROGRAMS = 528


class PretendedGPU:
    """The driver as Triton asks it, for a device of one architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def pretend(arch: int, ask: Callable[..., bool] | None = None) -> Callable[..., Any]:
    """Specialise every later launch of this process for an architecture, compile it unless `ask` returns True, no more.

    The operations take tensors in main memory by the backend `triton`. `ask` gets the arguments of Triton's
    `jit_cache_hook`. Returns what launches go through, to be wrapped in its turn.
    """
    driver.set_active(PretendedGPU(arch))  # pyright: ignore[reportArgumentType]
    facts = {
        "architecture": lambda device: arch,
        "multiprocessors": lambda device: _PROGRAMS // 4,
        "first_stage_programs": lambda steps, device: max(1, min(steps, _PROGRAMS)),
    }
    for name in (info.name for info in pkgutil.iter_modules(family.__path__)):
        module = importlib.import_module(f"{family.__name__}.{name}")
        for fact in facts.keys() & vars(module).keys():
            setattr(module, fact, facts[fact])
    backend._why_not = lambda name, device, index: None
    launch, changed = JITFunction.run, JITFunction

    def run(kernel: Any, *given: Any, **named: Any) -> Any:
        return launch(kernel, *given, **{**named, "warmup": True})

    changed.run = run  # type: ignore[method-assign]
    if ask is not None:
        knobs.runtime.jit_cache_hook = ask
    return run
