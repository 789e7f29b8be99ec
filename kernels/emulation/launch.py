"""Triton launches on CPU tensors: compiled for a GPU, executed here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import memory as _memory  # noqa: F401 registers instructions
from . import tensor_cores as _tensor_cores  # noqa: F401
from .hazards import EmulationError, Hazard, HazardError
from .machine import FORMS, Allocations, Machine
from .ptx import Program

_SWIZZLES = (0, 32, 64, 128)
_DESCRIPTORS = 0x7000_0000
# Threads of a batch of CTAs, and bytes of their shared memory with all that is known of it.
_THREADS, _SHARED_BYTES = 8192, 1 << 20


@dataclass(frozen=True)
class Launch:
    """What a launch did."""

    kernel: str
    grid: tuple[int, ...]
    threads: int  # of a CTA
    instructions: int  # of batches of CTAs
    seconds: float
    hazards: tuple[Hazard, ...]


class _Tile(NamedTuple):
    """A tensor descriptor in elements, and the tile of it that a bulk copy moves."""

    address: int
    element_bytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int  # bytes


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # compiled kernels are cached by device

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@dataclass
class _Emulation:
    architecture: int
    schedule: str
    seed: int
    strict: bool
    allow: tuple[str, ...]
    edit: Callable[[str, str], str] | None
    launches: list[Launch] = field(default_factory=list)


_current: list[_Emulation] = []
_compile: Any = JITFunction.run


@contextmanager
def emulated(
    target: str = "sm_90",
    *,
    schedule: str = "lockstep",
    seed: int = 0,
    strict: bool = True,
    allow: tuple[str, ...] = (),
    edit: Callable[[str, str], str] | None = None,
) -> Iterator[list[Launch]]:
    """Within the block, Triton compiles launches on CPU tensors for an NVIDIA GPU and executes their PTX in NumPy.

    Args:
        target: `sm_80`, `sm_90`, `sm_100` or `sm_120`.
        schedule: `lockstep`, or `random`: one warp, or warpgroup where there are several, runs until it waits.
        seed: of the random schedule.
        strict: raise HazardError after a launch with hazards.
        allow: parts of kinds of hazards that do not raise.
        edit: (kernel, PTX) → PTX, called before it is executed.

    Yields:
        A list that grows by one `Launch` each.

    Raises:
        EmulationError: an instruction that is not emulated, an access outside of the tensors of a launch or misaligned,
            or a deadlock.
    """
    if knobs.runtime.interpret:
        raise EmulationError("Triton interprets kernels in this process; unset TRITON_INTERPRET before it is imported")
    triton_driver: Any = driver
    known = ("sm_80", "sm_90", "sm_100", "sm_120"), ("lockstep", "random")
    if target not in known[0] or schedule not in known[1]:
        raise EmulationError(f"target {target!r}, schedule {schedule!r}: must be one of {known[0]} and of {known[1]}")
    previous = triton_driver._active
    emulation = _Emulation(int(target.removeprefix("sm_")), schedule, seed, strict, allow, edit)
    _current.append(emulation)
    triton_driver.set_active(_Driver(emulation.architecture))
    setattr(JITFunction, "run", _run)  # noqa: B010
    try:
        yield emulation.launches
    finally:
        _current.pop()
        triton_driver.set_active(previous)
        if not _current:
            setattr(JITFunction, "run", _compile)  # noqa: B010


def _run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
    compiled = _compile(kernel, *args, grid=grid, warmup=True, **options)
    if warmup:
        return compiled
    emulation, name = _current[-1], kernel.fn.__name__
    ptx = compiled.asm["ptx"]
    program = _program(ptx if emulation.edit is None else emulation.edit(name, ptx))
    bound = {p.name: p.default for p in kernel.params} | dict(zip(kernel.arg_names, args, strict=False))
    bound |= {key: value for key, value in options.items() if key in kernel.arg_names}
    dimensions: Any = grid(bound) if callable(grid) else grid
    sizes = [*dimensions, 1, 1][:3]
    parameters, ranges, descriptors = _bind(kernel, compiled, program, bound)
    ctas = np.indices(sizes[::-1]).reshape(3, -1)[::-1].T  # x first
    shared = compiled.metadata.shared
    batch = max(1, min(_THREADS // program.threads, _SHARED_BYTES // max(shared, 1)))
    memory = Allocations(ranges)
    start, instructions, hazards = time.perf_counter(), 0, {}
    for first in range(0, len(ctas), batch):
        some, seed = ctas[first : first + batch], emulation.seed + first
        machine = Machine(
            program, parameters, sizes, some, shared, memory,
            schedule=emulation.schedule, seed=seed, descriptors=descriptors,
        )  # fmt: skip
        machine.run()
        instructions += machine.instructions
        hazards |= machine.hazards
    seconds = time.perf_counter() - start
    found = tuple(hazards.values())
    emulation.launches.append(Launch(name, tuple(sizes), program.threads, instructions, seconds, found))
    serious = [each for each in found if not any(kind in each.kind for kind in emulation.allow)]
    if serious and emulation.strict:
        shown = "\n".join(f"{each.place}: {each.kind}, in `{each.instruction[:120]}`" for each in serious[:10])
        raise HazardError(f"kernel {name} on sm_{emulation.architecture}: {len(serious)} hazards\n{shown}")
    return compiled


@lru_cache(256)
def _program(ptx: str) -> Program:
    return Program(ptx, FORMS)


def _bind(
    kernel: Any, compiled: Any, program: Program, bound: Mapping[str, Any]
) -> tuple[dict[str, int], list[tuple[int, int]], dict[int, _Tile]]:
    """Bits of the parameters, the memory that the launch may access, and its tensor descriptors by their address."""
    values: list[int] = []
    ranges: list[tuple[int, int]] = []
    descriptors: dict[int, _Tile] = {}
    layouts = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    for number, name in enumerate(kernel.arg_names):
        kind, value = compiled.src.signature[name], bound[name]
        if kind == "constexpr" or (number,) in compiled.src.constants:
            continue
        if hasattr(value, "block_shape"):
            sizes, layout = [*map(int, value.shape), *map(int, value.strides)], next(layouts, None)
            ranges.append(_extent(value.base))
            if layout is None:  # without TMA, a pointer
                flags = [
                    value.padding == "nan",
                    *([value.round_f32_to_tf32] if hasattr(value, "round_f32_to_tf32") else ()),
                ]
                values += [value.base.data_ptr(), *sizes, *map(int, flags), *sizes]
                continue
            address = _DESCRIPTORS + 128 * len(descriptors)
            descriptors[address] = _tile(value, layout)
            values += [address, *sizes]
        elif isinstance(value, Tensor):
            ranges.append(_extent(value))
            values.append(value.data_ptr())
        elif kind.startswith("fp"):
            values.append(int(np.float32(value).view(np.uint32)))
        else:
            values.append(0 if value is None else int(value))
    # Addresses of scratch memory, which these kernels do not use, come last.
    spare = len(program.parameters) - len(values)
    if spare not in (0, 1, 2):
        raise EmulationError(f"kernel {program.name} has {len(program.parameters)} parameters for {len(values)} values")
    return dict(zip(program.parameters, [*values, *[0] * spare], strict=True)), ranges, descriptors


def _extent(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _tile(descriptor: Any, layout: Mapping[str, Any]) -> _Tile:
    """The tile of a `TensorDescriptor`, in the layout that the kernel was compiled for."""
    base, size = descriptor.base, descriptor.base.element_size()
    if base.data_ptr() % 16 or any(stride * size % 16 for stride in descriptor.strides[:-1]):
        raise EmulationError("the address or a stride of a tensor descriptor is not a multiple of 16 bytes")
    sizes = tuple(descriptor.shape), tuple(descriptor.strides), tuple(layout["block_size"])
    return _Tile(base.data_ptr(), size, *sizes, _SWIZZLES[layout["swizzle"]])
