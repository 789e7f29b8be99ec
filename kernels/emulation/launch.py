"""Triton launches on CPU tensors: compiled for a GPU, executed here."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from . import memory as _memory  # noqa: F401 registers instructions
from . import tensor_cores as _tensor_cores  # noqa: F401
from .hazards import LATE_WAIT, Allocations, EmulationError, Hazard, HazardError, Window
from .machine import FORMS, INSTRUCTIONS_LIMIT, Machine
from .ptx import Program

_SWIZZLES = (0, 32, 64, 128)
_DESCRIPTORS = 0x7000_0000
# Each argument has its own range of addresses, so far from the others that no index leads from one into another.
_WINDOW_BITS = 40
_TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
_SCHEDULES = ("lockstep", "random")
# Threads of a batch of CTAs, and bytes of their shared memory.
_THREADS, _SHARED_BYTES = 8192, 1 << 20


@dataclass(frozen=True)
class Launch:
    """Statistics and hazards of a launch."""

    kernel: str
    grid: tuple[int, ...]
    threads: int  # of a CTA
    instructions: int  # of batches of CTAs, in all schedules
    seconds: float
    hazards: tuple[Hazard, ...]


class _Tile(NamedTuple):
    """A tensor descriptor, in elements, and the box of it that a bulk copy moves."""

    address: int
    element_bytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int  # bytes


class _Driver:
    """The driver interface that Triton's compiler needs."""

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
    schedules: tuple[str, ...]
    seed: int
    strict: bool
    allow: tuple[str, ...]
    edit: Callable[[str, str], str] | None
    limit: int
    launches: list[Launch] = field(default_factory=list)


_current: list[_Emulation] = []
_compile: Any = JITFunction.run
_tune: Any = Autotuner.run


@contextmanager
def emulated(
    target: str = "sm_90",
    *,
    schedule: str = "both",
    seed: int = 0,
    strict: bool = True,
    allow: tuple[str, ...] = (LATE_WAIT,),
    edit: Callable[[str, str], str] | None = None,
    limit: int = INSTRUCTIONS_LIMIT,
) -> Iterator[list[Launch]]:
    """Within the block, Triton compiles launches on CPU tensors for an NVIDIA GPU and executes their PTX in NumPy.

    An autotuned kernel runs with its first configuration.

    Args:
        target: `sm_80`, `sm_90`, `sm_100` or `sm_120`.
        schedule: `lockstep`; `random`, where CTAs come in random order and one warp (or warpgroup, if the CTA has
            whole ones) runs until it waits; or `both` in turn on the same memory, whose results must agree.
        seed: Seed of the random schedule.
        strict: raise HazardError after a launch with hazards.
        allow: kinds of hazards that do not raise, or substrings of them.
        edit: (kernel, PTX) → PTX, called before it is executed.
        limit: maximum of instructions of a batch of CTAs.

    Yields:
        A list that grows by one `Launch` each.

    Raises:
        EmulationError: an instruction that is not emulated, PTX that ptxas refuses, an access outside of the tensors of
            a launch or misaligned, a deadlock, or a loop without an end.
    """
    if knobs.runtime.interpret:
        raise EmulationError(
            "Triton interprets kernels in this process; unset TRITON_INTERPRET before it is imported"
        )
    triton_driver: Any = driver
    if target not in _TARGETS or schedule not in (*_SCHEDULES, "both"):
        raise EmulationError(
            f"target {target!r}, schedule {schedule!r}: must be one of {_TARGETS} and of"
            f" {(*_SCHEDULES, 'both')}"
        )
    previous = triton_driver._active
    schedules = _SCHEDULES if schedule == "both" else (schedule,)
    emulation = _Emulation(
        int(target.removeprefix("sm_")), schedules, seed, strict, allow, edit, limit
    )
    _current.append(emulation)
    triton_driver.set_active(_Driver(emulation.architecture))
    setattr(JITFunction, "run", _run)  # noqa: B010
    setattr(Autotuner, "run", _run_first_configuration)  # noqa: B010
    try:
        yield emulation.launches
    finally:
        _current.pop()
        triton_driver.set_active(previous)
        if not _current:
            setattr(JITFunction, "run", _compile)  # noqa: B010
            setattr(Autotuner, "run", _tune)  # noqa: B010


def _run_first_configuration(tuner: Any, *args: Any, **options: Any) -> Any:
    """Run an autotuned kernel without timing its configurations, which emulation cannot."""
    configurations = tuner.configs
    tuner.configs = configurations[:1]
    try:
        return _tune(tuner, *args, **options)
    finally:
        tuner.configs = configurations


def _run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
    compiled = _compile(kernel, *args, grid=grid, warmup=True, **options)
    if warmup:
        return compiled
    emulation, name = _current[-1], kernel.fn.__name__
    ptx = compiled.asm["ptx"]
    if emulation.edit is not None:
        ptx = emulation.edit(name, ptx)
        _assemble(ptx, name, emulation.architecture)
    program = _program(ptx)
    bound = {p.name: p.default for p in kernel.params} | dict(
        zip(kernel.arg_names, args, strict=False)
    )
    bound |= {key: value for key, value in options.items() if key in kernel.arg_names}
    dimensions: Any = grid(bound) if callable(grid) else grid
    grid_size = [*dimensions, 1, 1][:3]
    arguments = _Arguments()
    arguments.bind(kernel, compiled, bound)
    parameters = arguments.parameters(program)
    ctas = np.indices(grid_size[::-1]).reshape(3, -1)[::-1].T  # x first
    shared = compiled.metadata.shared
    batch = max(1, min(_THREADS // program.threads, _SHARED_BYTES // max(shared, 1)))
    memory = Allocations(arguments.windows)
    start, instructions, hazards, results = time.perf_counter(), 0, {}, []
    before = arguments.snapshot() if len(emulation.schedules) > 1 else []
    for schedule in emulation.schedules:
        if results:
            arguments.restore(before)
        order = ctas
        if schedule == "random":
            order = np.random.default_rng(emulation.seed).permutation(ctas)
        for first in range(0, len(order), batch):
            machine = Machine(
                program,
                parameters,
                grid_size,
                order[first : first + batch],
                shared,
                memory,
                schedule=schedule,
                seed=emulation.seed + first,
                descriptors=arguments.descriptors,
                limit=emulation.limit,
            )
            try:
                machine.run()
            except _MALFORMED as error:
                machine.fault(
                    f"the instruction cannot be executed ({type(error).__name__}: {error})"
                )
            instructions += machine.instructions
            hazards |= machine.hazards
        if before:
            results.append(arguments.snapshot())
    if results and not all(map(torch.equal, *results)):
        kind = "results that depend on the order of warps and CTAs"
        hazards["order", ""] = Hazard(kind, "", name, 1)
    seconds = time.perf_counter() - start
    launch = Launch(
        name, tuple(grid_size), program.threads, instructions, seconds, tuple(hazards.values())
    )
    emulation.launches.append(launch)
    if emulation.strict:
        _raise_hazards(launch, emulation)
    return compiled


def _raise_hazards(launch: Launch, emulation: _Emulation) -> None:
    serious = [
        hazard
        for hazard in launch.hazards
        if not any(kind in hazard.kind for kind in emulation.allow)
    ]
    if serious:
        lines = [f"{h.place}: {h.kind}, in `{h.instruction[:120]}`" for h in serious[:10]]
        raise HazardError(
            f"kernel {launch.kernel} on sm_{emulation.architecture}: {len(serious)} hazards\n"
            + "\n".join(lines)
        )


# Errors that malformed PTX raises in the parser or in a handler.
_MALFORMED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    StopIteration,
    TypeError,
    ValueError,
)


@lru_cache(256)
def _program(ptx: str) -> Program:
    try:
        return Program(ptx, FORMS)
    except _MALFORMED as error:
        raise EmulationError(f"the PTX cannot be read ({type(error).__name__}: {error})") from error


@lru_cache(256)
def _assemble(ptx: str, kernel: str, architecture: int) -> None:
    """Raise `EmulationError` for PTX that the assembler refuses."""
    target = re.search(r"\.target\s+(\w+)", ptx)
    name = target.group(1) if target else f"sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(architecture).path, f"--gpu-name={name}", source, "-o", f"{source}.o"]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        reason = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[0]
        raise EmulationError(f"ptxas refuses the PTX of kernel {kernel}: {reason}")


class _Arguments:
    """The arguments of a launch as a GPU sees them: bits of its parameters, memory and tensor descriptors."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.windows: list[Window] = []
        self.descriptors: dict[int, _Tile] = {}
        self._tensors: list[Tensor] = []

    def bind(self, kernel: Any, compiled: Any, bound: Mapping[str, Any]) -> None:
        """Read the values of all parameters that are not constants."""
        layouts = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        for index, name in enumerate(kernel.arg_names):
            self._bind(
                compiled.src.signature[name], bound[name], (index,), compiled.src.constants, layouts
            )

    def _bind(
        self, dtype: Any, value: Any, path: tuple[int, ...], constants: Any, layouts: Iterator[Any]
    ) -> None:
        if dtype == "constexpr" or path in constants:
            return
        if isinstance(dtype, tuple):
            for index, (element, inner) in enumerate(zip(dtype, value, strict=True)):
                self._bind(element, inner, (*path, index), constants, layouts)
        elif hasattr(value, "block_shape"):
            self._bind_descriptor(value, next(layouts, None))
        elif hasattr(value, "data_ptr"):
            self.values.append(self._window(getattr(value, "base", value)))
        elif dtype.startswith("fp"):
            self.values.append(int(np.float32(value).view(np.uint32)))
        else:
            self.values.append(0 if value is None else int(value))

    def _bind_descriptor(self, value: Any, layout: Any) -> None:
        sizes, base = [*map(int, value.shape), *map(int, value.strides)], self._window(value.base)
        if layout is None:  # without TMA, a pointer
            flags = [value.padding == "nan"]
            if hasattr(value, "round_f32_to_tf32"):
                flags.append(value.round_f32_to_tf32)
            self.values += [base, *sizes, *map(int, flags), *sizes]
            return
        address = _DESCRIPTORS + 128 * len(self.descriptors)
        self.descriptors[address] = _tile(value, layout, base)
        self.values += [address, *sizes]

    def _window(self, tensor: Tensor) -> int:
        """Return the address of a tensor's first element, in a range of addresses of its own."""
        self._tensors.append(tensor)
        real, size = tensor.data_ptr(), tensor.element_size()
        # The low bits are kept, since kernels are compiled for the alignment of the address.
        address = (len(self._tensors) << _WINDOW_BITS) + real % (1 << 16)
        spans = [(n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        count = sum(spans) + 1 if tensor.numel() else 0
        elements = None
        if count > tensor.numel():
            marks = torch.zeros(count, dtype=torch.bool)
            marks.as_strided(tensor.shape, tensor.stride()).fill_(True)
            elements = marks.numpy().repeat(size)
        self.windows.append(Window(address, real, count * size, elements))
        return address

    def parameters(self, program: Program) -> dict[str, int]:
        """Return the bits of a program's parameters by name."""
        # Addresses of scratch memory, which these kernels do not use, come last.
        names, values = program.parameters, self.values
        spare = len(names) - len(values)
        if spare not in (0, 1, 2):
            raise EmulationError(
                f"kernel {program.name} has {len(names)} parameters for {len(values)} values"
            )
        return dict(zip(names, [*values, *[0] * spare], strict=True))

    def snapshot(self) -> list[Tensor]:
        """Copy the bytes of every storage."""
        return [content.clone() for content in self._contents()]

    def _contents(self) -> Iterator[Tensor]:
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
            for tensor in self._tensors
        }
        for storage in storages.values():
            yield torch.empty(0, dtype=torch.uint8).set_(storage)

    def restore(self, contents: Iterable[Tensor]) -> None:
        """Write a snapshot back to every storage."""
        for content, earlier in zip(self._contents(), contents, strict=True):
            content.copy_(earlier)


def _tile(descriptor: Any, layout: Mapping[str, Any], address: int) -> _Tile:
    """Return the tile of a `TensorDescriptor` in the layout that the kernel was compiled for."""
    size = descriptor.base.element_size()
    if address % 16 or any(stride * size % 16 for stride in descriptor.strides[:-1]):
        raise EmulationError(
            "the address or a stride of a tensor descriptor is not a multiple of 16 bytes"
        )
    sizes = tuple(descriptor.shape), tuple(descriptor.strides), tuple(layout["block_size"])
    return _Tile(address, size, *sizes, _SWIZZLES[layout["swizzle"]])
