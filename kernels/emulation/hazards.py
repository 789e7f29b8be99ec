"""Ordering of accesses to shared and tensor memory: vector clocks, and hazards, which they do not order.

An agent is a kind and a warp of a CTA: its threads, the tensor cores that work for it, its asynchronous copies
(cp.async), its bulk copies (TMA), its loads and stores of tensor memory. A warp's clock holds the accesses of every
agent that it knows to be over: barriers join clocks, and a wait for a copy or a GEMM adds it. The async proxy (tensor
cores, bulk copies) sees a write of threads only after a proxy fence; `fenced` is the part of a clock that it sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
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
    """Why a kernel cannot go on: an unknown instruction, an access out of bounds or misaligned, a deadlock."""


class HazardError(EmulationError):
    """A kernel that ran to its end with hazards."""


class Hazard(NamedTuple):
    """Accesses that hardware may execute in another order than the kernel needs."""

    kind: str
    instruction: str
    place: str  # of the statement in the kernel's source
    granules: int  # of memory granules or threads, in the first batch of CTAs that had it


class Clocks:
    """What each warp of each CTA knows of each agent `[CTAs, warps, kinds · warps]`."""

    def __init__(self, ctas: int, warps: int) -> None:
        self.warps, self.agents = warps, KINDS * warps
        self.known = np.zeros((ctas, warps, self.agents), np.int32)
        self.known[:, range(warps), range(warps)] = 1
        self.fenced = np.zeros_like(self.known)

    def learn(self, cta: Array, warp: Array, agent: Array, time: Array) -> None:
        """Let warps know that an agent's operations up to a time are over."""
        self.known[cta, warp, agent] = np.maximum(self.known[cta, warp, agent], time)

    def step(self, cta: Any, warp: Any) -> None:
        """Begin a new interval of a warp's accesses."""
        self.known[cta, warp, warp] += 1

    def barrier(self, cta: int, warps: Array) -> None:
        """Warps wait for each other."""
        for clock in (self.known, self.fenced):
            clock[cta, warps] = clock[cta, warps].max(0)
        self.step(cta, warps)

    def fence(self, cta: Array, warp: Array) -> None:
        """What these warps know becomes visible to the async proxy."""
        self.fenced[cta, warp] = self.known[cta, warp]
        self.step(cta, warp)

    def release(self, cta: int, warp: int) -> Array:
        """`[2, agents]`: what a barrier passes on of a warp that arrives."""
        passed = np.stack([self.known[cta, warp], self.fenced[cta, warp]])
        self.step(cta, warp)
        return passed

    def acquire(self, cta: int, warp: int, passed: Array) -> None:
        """What a warp learns from a barrier."""
        for clock, other in zip((self.known, self.fenced), passed, strict=True):
            clock[cta, warp] = np.maximum(clock[cta, warp], other)


class Shadow:
    """The last accesses of memory granules, of `size` a CTA."""

    def __init__(self, clocks: Clocks, ctas: int, size: int) -> None:
        self.clocks = clocks
        self.writer = np.full(ctas * size, -1, np.int16)
        self.written = np.zeros(ctas * size, np.int32)
        self.reads = np.zeros((ctas * size, _READERS * clocks.warps), np.int32)

    def read(
        self, place: Array, cta: Any, agent: Any, at: Any, *, warps: Any, proxy: bool = False
    ) -> list[str]:
        """Record reads of granules at time `at`, by warps that must know of the writes; returns hazards.

        `warps` issue the read: one each, or `[n, 1]` together. `proxy`: by the async proxy.
        """
        writer = self.writer[place]
        found = []
        if (writer < 0).any():
            found.append("read of uninitialised memory")
        written = self.written[place]
        known = self.clocks.known[cta, warps, writer]
        found += self._unordered(
            "read of what is written by", writer[self._any(known < written) & (writer >= 0)]
        )
        if proxy:
            # Copies by cp.async belong to the generic proxy too.
            generic = (writer >= 0) & np.isin(writer // self.clocks.warps, (THREADS, COPY))
            if (generic & self._any(self.clocks.fenced[cta, warps, writer] < written)).any():
                found.append("read by the async proxy of what threads wrote, without a proxy fence")
        self.reads[place, agent] = at
        return found

    def write(
        self, place: Array, cta: Any, agent: Any, at: Any, *, warps: Any, changed: Any = True
    ) -> list[str]:
        """Record writes. Two writes of one value may race, as Triton's replicated threads do."""
        writer = self.writer[place]
        _, cta, warps = np.broadcast_arrays(place, cta, warps)
        known = self.clocks.known[cta, warps]
        late = (
            np.take_along_axis(known, writer[:, None].clip(0), 1)[:, 0] < self.written[place]
        ) & (writer >= 0)
        found = self._unordered("write over what is written by", writer[late & changed])
        readers = np.nonzero(self.reads[place] > known[:, : self.reads.shape[1]])[1]
        found += self._unordered("write over what is read by", readers)
        self.writer[place], self.written[place] = agent, at
        return found

    def _any(self, late: Array) -> Any:
        return late.any(0) if late.ndim > 1 else late

    def _unordered(self, what: str, agents: Array) -> list[str]:
        return [f"{what} {_AGENTS[kind]}" for kind in np.unique(agents // self.clocks.warps)]
