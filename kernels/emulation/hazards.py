"""Checks of memory accesses: bounds of global memory, and ordering of shared and tensor memory by vector clocks.

An agent is a kind and a warp of a CTA: its threads, the tensor cores that work for it, its asynchronous copies
(cp.async), its bulk copies (TMA), its loads and stores of tensor memory. A warp's clock holds, for every agent, the
latest access that is ordered before the warp's next one: barriers join clocks, and a wait for a copy or a GEMM adds it.
The async proxy (tensor cores, bulk copies) sees a write of threads only after a proxy fence; `fenced` holds the
accesses that are visible to it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
KINDS = 6
THREADS, TENSOR, LOAD, COPY, BULK, STORE = range(KINDS)
_READERS = 3  # the first kinds: bulk copies to global memory are not emulated
_AGENTS = (
    "another warp",
    "a GEMM in flight",
    "a load in flight",
    "an asynchronous copy in flight",
    "a bulk copy in flight",
    "a store in flight",
)
NO_WAIT = "use of a value that tcgen05.ld loads, for which nothing waits"
LATE_WAIT = "use of a value that tcgen05.ld loads, ahead of the wait"
"""A hazard of compilers: LLVM moves the wait that Triton writes, and leaves the registers to the assembler."""


class EmulationError(Exception):
    """A kernel cannot go on: an unknown instruction, an access out of bounds or misaligned, a deadlock."""


class HazardError(EmulationError):
    """A kernel ran to its end with hazards."""


class Hazard(NamedTuple):
    """Accesses that hardware may execute in another order than the kernel needs."""

    kind: str
    instruction: str
    place: str  # of the statement in the kernel's source
    granules: int  # of memory granules or threads, in the first batch of CTAs that had it


class Window(NamedTuple):
    """The memory of one argument: `size` bytes at an address of the kernel, `real` in this process.

    `elements` marks the bytes that belong to the argument, if it is a view with gaps.
    """

    address: int
    real: int
    size: int
    elements: Array | None = None


class Allocations:
    """The memory that a kernel may access, by address."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = sorted((w for w in windows if w.size), key=lambda window: window.address)
        self.bytes = []
        for window in self.windows:
            start = window.real - window.real % 16
            size = window.real + window.size - start
            self.bytes.append(np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(start)))
        self.starts = np.array([window.address for window in self.windows], np.int64)
        self.ends = np.array([window.address + window.size for window in self.windows], np.int64)

    def find(self, address: Array, size: int) -> Array:
        """Return the index of the allocation of each access of `size` bytes, -1 out of bounds."""
        if not self.windows:
            return np.full(len(address), -1)
        indices = np.searchsorted(self.starts, address, "right") - 1
        inside = (indices >= 0) & (address + size <= self.ends[indices])
        for index, window in enumerate(self.windows):
            hits = inside & (indices == index)
            if window.elements is not None and hits.any():
                first = address[hits] - window.address
                inside[hits] = window.elements[first[:, None] + np.arange(size)].all(1)
        return np.where(inside, indices, -1)

    def view(self, index: int, size: int) -> tuple[Array, int]:
        """Return an allocation as elements of `size` bytes, and the address of the first."""
        memory = self.bytes[index]
        start = self.windows[index].address
        return memory[: len(memory) // size * size].view(UNSIGNED[size]), start - start % 16


class Clocks:
    """Each warp's clock, `[CTAs, warps, kinds · warps]`: `ordered` for its threads, `fenced` for the async proxy."""

    def __init__(self, ctas: int, warps: int) -> None:
        self.warps, self.agents = warps, KINDS * warps
        self.ordered = np.zeros((ctas, warps, self.agents), np.int32)
        self.ordered[:, range(warps), range(warps)] = 1
        self.fenced = np.zeros_like(self.ordered)

    def order(self, cta: Array, warp: Array, agent: Array, time: Array) -> None:
        """Order an agent's operations up to a time before the warps' next accesses."""
        self.ordered[cta, warp, agent] = np.maximum(self.ordered[cta, warp, agent], time)

    def step(self, cta: Any, warp: Any) -> None:
        """Begin a new interval of a warp's accesses."""
        self.ordered[cta, warp, warp] += 1

    def barrier(self, cta: int, warps: Array) -> None:
        """Join the clocks of warps that wait for each other."""
        for clock in (self.ordered, self.fenced):
            clock[cta, warps] = clock[cta, warps].max(0)
        self.step(cta, warps)

    def fence(self, cta: Array, warp: Array) -> None:
        """Make the warps' writes visible to the async proxy (`fence.proxy.async`)."""
        self.fenced[cta, warp] = self.ordered[cta, warp]
        self.step(cta, warp)

    def release(self, cta: int, warp: int) -> Array:
        """Return the clock `[2, agents]` that an mbarrier takes from an arriving warp."""
        clock = np.stack([self.ordered[cta, warp], self.fenced[cta, warp]])
        self.step(cta, warp)
        return clock

    def acquire(self, cta: int, warp: int, released: Array) -> None:
        """Join an mbarrier's clock into a warp's."""
        for clock, other in zip((self.ordered, self.fenced), released, strict=True):
            clock[cta, warp] = np.maximum(clock[cta, warp], other)


class Shadow:
    """The last accesses of memory granules, `size` granules per CTA."""

    def __init__(self, clocks: Clocks, ctas: int, size: int) -> None:
        self.clocks = clocks
        self.writer = np.full(ctas * size, -1, np.int16)
        self.written = np.zeros(ctas * size, np.int32)
        self.reads = np.zeros((ctas * size, _READERS * clocks.warps), np.int32)

    def read(
        self, granules: Array, cta: Any, agent: Any, time: Any, *, warps: Any, proxy: bool = False
    ) -> list[str]:
        """Record reads of granules at a time, by warps that must be ordered after the writes; return hazards.

        `warps` issue the read: one each, or `[n, 1]` together. `proxy`: through the async proxy.
        """
        writer, written = self.writer[granules], self.written[granules]
        initialised = writer >= 0
        hazards = [] if initialised.all() else ["read of uninitialised memory"]
        unordered = _any_warp(self.clocks.ordered[cta, warps, writer] < written) & initialised
        hazards += self._name_agents("read of what is written by", writer[unordered])
        if proxy:
            # Copies by cp.async belong to the generic proxy too.
            generic = initialised & np.isin(writer // self.clocks.warps, (THREADS, COPY))
            if (generic & _any_warp(self.clocks.fenced[cta, warps, writer] < written)).any():
                hazards.append(
                    "read by the async proxy of what threads wrote, without a proxy fence"
                )
        self.reads[granules, agent] = time
        return hazards

    def write(
        self, granules: Array, cta: Any, agent: Any, time: Any, *, warps: Any, changed: Any = True
    ) -> list[str]:
        """Record writes; return hazards. Writes of one value may race, as Triton's replicated threads do."""
        writer = self.writer[granules]
        _, cta, warps = np.broadcast_arrays(granules, cta, warps)
        clock = self.clocks.ordered[cta, warps]
        ordered = np.take_along_axis(clock, writer[:, None].clip(0), 1)[:, 0]
        unordered = (ordered < self.written[granules]) & (writer >= 0)
        hazards = self._name_agents("write over what is written by", writer[unordered & changed])
        readers = np.nonzero(self.reads[granules] > clock[:, : self.reads.shape[1]])[1]
        hazards += self._name_agents("write over what is read by", readers)
        self.writer[granules], self.written[granules] = agent, time
        return hazards

    def order_agent(self, granules: Array, agent: Any) -> None:
        """Order an agent's earlier writes before its next access: stores of a warp, or GEMMs of a thread."""
        self.written[granules[self.writer[granules] == agent]] = 0

    def _name_agents(self, access: str, agents: Array) -> list[str]:
        return [f"{access} {_AGENTS[kind]}" for kind in np.unique(agents // self.clocks.warps)]


def _any_warp(unordered: Array) -> Any:
    return unordered.any(0) if unordered.ndim > 1 else unordered
