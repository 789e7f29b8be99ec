"""The machine: threads of many CTAs side by side, their registers, memory, barriers and copies.

All threads at one instruction execute it as one NumPy operation. Asynchronous copies land as late as the kernel allows.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import numpy as np

from .hazards import LATE_WAIT, NO_WAIT, Array, Clocks, EmulationError, Hazard, Shadow
from .ptx import Instruction, Operand, Program

Handler = Callable[["Machine", Instruction], None]
FORMS: dict[str, Handler] = {}
"""Every instruction that is emulated, by its opcode with all modifiers."""

UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
_BOOL = np.dtype(bool)
# What registers and shared memory hold that nothing was written to, in every 16 bits: NaN, and not the -1 of masks.
POISON = 0xFFBB
RUNNING, WAITING, DONE = range(3)
INSTRUCTIONS_LIMIT = 5_000_000
LOADING = 1 << 40  # in place of a group of products: a register that tensor memory is loaded to


def expand(pattern: str) -> list[str]:
    """`ld.{b16,b32}` → `ld.b16`, `ld.b32`."""
    parts = [part.split(",") for part in re.split(r"\{(.*?)\}", pattern)]
    parts[::2] = [[",".join(part)] for part in parts[::2]]
    return ["".join(choice) for choice in itertools.product(*parts)]


def form(*patterns: str) -> Callable[[Handler], Handler]:
    """Register a handler for these forms."""

    def register(handler: Handler) -> Handler:
        FORMS.update({name: handler for pattern in patterns for name in expand(pattern)})
        return handler

    return register


def register_dtype(kind: str) -> np.dtype[Any]:
    """How a register of a PTX type is stored: as unsigned bits."""
    return _BOOL if kind == "pred" else UNSIGNED[int(kind[1:]) // 8]


@lru_cache(4096)
def immediate(bits: int, dtype: np.dtype[Any]) -> Any:
    """A number of these bits."""
    if dtype == _BOOL:
        return np.bool_(bits)
    size = dtype.itemsize
    return np.array(bits % (1 << 8 * size), UNSIGNED[size]).view(dtype)[()]


class Window(NamedTuple):
    """The memory of one argument: `size` bytes at an address of the kernel, and where they really are.

    `elements` marks the bytes that belong to the argument, if not all do: it is a view with gaps.
    """

    address: int
    real: int
    size: int
    elements: Array | None = None


class Allocations:
    """The memory that a kernel may access, by address."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = sorted(
            (window for window in windows if window.size), key=lambda window: window.address
        )
        self.bytes = []
        for window in self.windows:
            start = window.real - window.real % 16
            size = window.real + window.size - start
            self.bytes.append(np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(start)))
        self.starts = np.array([window.address for window in self.windows], np.int64)
        self.ends = np.array([window.address + window.size for window in self.windows], np.int64)

    def find(self, address: Array, size: int) -> Array:
        """The allocation of each access of `size` bytes, -1 out of bounds."""
        number = np.searchsorted(self.starts, address, "right") - 1
        inside = (
            (number >= 0) & (address + size <= self.ends[number])
            if len(self.ends)
            else np.zeros(len(address), bool)
        )
        for index, window in enumerate(self.windows):
            if window.elements is not None and (among := inside & (number == index)).any():
                first = address[among] - window.address
                inside[among] = window.elements[first[:, None] + np.arange(size)].all(1)
        return np.where(inside, number, -1)

    def view(self, number: int, size: int) -> tuple[Array, int]:
        """An allocation as elements of `size` bytes, and the address of the first."""
        memory = self.bytes[number]
        start = self.windows[number].address
        return memory[: len(memory) // size * size].view(UNSIGNED[size]), start - start % 16


class Machine:
    """A batch of CTAs of one launch."""

    def __init__(
        self,
        program: Program,
        parameters: Mapping[str, int],
        grid: Sequence[int],
        ctas: Array,
        shared_bytes: int,
        memory: Allocations,
        *,
        schedule: str = "lockstep",
        seed: int = 0,
        descriptors: Mapping[int, Any] | None = None,
        limit: int = INSTRUCTIONS_LIMIT,
    ) -> None:
        self.program, self.parameters, self.memory = program, parameters, memory
        self.cta_count = len(ctas)
        self.warps = program.threads // 32
        self.size = self.cta_count * program.threads
        self.all_threads = np.arange(self.size)
        self.cta = np.repeat(np.arange(self.cta_count), program.threads)
        self.tid = np.tile(np.arange(program.threads, dtype=np.uint32), self.cta_count)
        self.warp = (self.tid >> 5).astype(np.int64)
        self.lane = self.tid & 31
        # Swizzled tiles begin at multiples of 1,024 bytes.
        self.shared_bytes = -(-max(shared_bytes, 16) // 1024) * 1024
        self.shared = np.full(self.cta_count * self.shared_bytes // 2, POISON, np.uint16).view(
            np.uint8
        )
        scalar = [
            each.form for each in program.code if each.form.startswith(("ld.shared", "st.shared"))
        ]
        self.granule = min([4, *(int(name.rpartition(".b")[2]) // 8 for name in scalar)])
        self.clocks = Clocks(self.cta_count, self.warps)
        self.shadow = Shadow(self.clocks, self.cta_count, self.shared_bytes // self.granule)
        self.types = {name: register_dtype(kind) for name, kind in program.registers.items()}
        self.registers: dict[str, Array] = {
            "%tid.x": self.tid,
            "%laneid": self.lane,
            "%ntid.x": np.full(self.size, program.threads, np.uint32),
            **{f"%tid.{axis}": np.zeros(self.size, np.uint32) for axis in "yz"},
            **{
                f"%ctaid.{axis}": ctas[self.cta, i].astype(np.uint32)
                for i, axis in enumerate("xyz")
            },
            **{
                f"%nctaid.{axis}": np.full(self.size, grid[i], np.uint32)
                for i, axis in enumerate("xyz")
            },
            "%cluster_ctarank": np.zeros(self.size, np.uint32),
        }
        self.partial: dict[str, Array] = {}
        # The group of products that writes a register, and that reads it, by thread; 0 for none.
        self.busy: dict[str, Array] = {}
        self.read_in_flight: dict[str, Array] = {}
        # Threads whose register was computed from one that tensor memory is still loaded to.
        self.pending: dict[str, Array] = {}
        # Uses of such values, with their threads, until it is known whether a wait follows.
        self.early: dict[str, tuple[Hazard, Array]] = {}
        # Registers accessed since `wgmma.fence`; when all threads take the same turn.
        self.unfenced: set[str] | None = set() if schedule == "lockstep" else None
        self.barriers: dict[tuple[int, int], MemoryBarrier] = {}
        self.copies: list[list[Array]] = []
        self.groups = np.zeros(self.size, np.int64)
        self.tensor_memory: Any = None
        self.tensor_shadow: Any = None
        self.tensor_columns: Any = None
        self.flights: list[Flight] = []
        self.flight_numbers = np.zeros((self.cta_count, self.clocks.agents), np.int32)
        self.descriptors = descriptors or {}
        self.pc = np.zeros(self.size, np.int64)
        self.state = np.zeros(self.size, np.int8)
        self.waits_for = np.zeros(self.size, np.int64)
        self.polling = np.zeros(self.size, bool)
        self.active: Array | None = None
        # In the random schedule one group of warps runs: instructions of a warpgroup need all of its warps.
        self.groups_of = (
            None
            if schedule == "lockstep"
            else (self.all_threads >> 5) // (4 if self.warps % 4 == 0 else 1)
        )
        self.random, self.group = np.random.default_rng(seed), -1
        self.instructions, self.limit = 0, limit
        self.instruction = program.code[0]
        self.hazards: dict[tuple[str, str], Hazard] = {}

    def read(self, operand: Operand, dtype: np.dtype[Any], *, computes: bool = False) -> Any:
        """Return the bits of a register of the executing threads, or of an immediate, as `dtype`.

        `computes`: by arithmetic between registers, which hardware delays until a load of tensor memory has arrived.
        """
        if isinstance(operand, int):
            return immediate(operand, dtype)
        values = self.registers.get(operand)
        if values is None:
            if operand in self.parameters:
                return immediate(self.parameters[operand], dtype)
            values = self.registers[operand] = self._unwritten(operand)
            self.partial[operand] = np.zeros(self.size, bool)
        if self.unfenced is not None:
            self.unfenced.add(operand)
        if operand in self.busy:
            self._check_busy(self.busy, operand, "read", computes=computes)
        if not computes and operand in self.pending:
            self._use_early(self.pending[operand][self.threads()])
        if self.active is not None:
            values = values[self.active]
        if values.dtype == dtype:
            return values
        if values.itemsize != dtype.itemsize:
            if dtype == _BOOL or values.itemsize < dtype.itemsize:
                self.fault(
                    f"register {operand} has {8 * values.itemsize} bits and is read as {dtype}"
                )
            values = values.astype(UNSIGNED[dtype.itemsize])
        return values.view(dtype)

    def write(self, operand: Operand, values: Any) -> None:
        """Store bits of the executing threads; narrower values are extended, signed ones by their sign."""
        if operand == "_":
            return
        for uses in (self.busy, self.read_in_flight):
            if operand in uses:
                self._check_busy(uses, operand, "write")
        if operand in self.pending:
            self.pending[operand][self.threads()] = False
        if self.unfenced is not None:
            self.unfenced.add(operand)
        dtype, values = self.types[operand], np.asarray(values)
        if values.itemsize < dtype.itemsize:
            values = values.astype(
                f"{values.dtype.kind if values.dtype.kind == 'i' else 'u'}{dtype.itemsize}"
            )
        values = values.view(dtype)
        if self.active is None:
            self.registers[operand] = values if values.ndim else np.full(self.size, values)
            self.partial.pop(operand, None)
            return
        old = self.registers.get(operand)
        if old is None:
            self.partial[operand] = np.zeros(self.size, bool)
        new = self._unwritten(operand) if old is None else old.copy()
        new[self.active] = values
        if operand in self.partial:
            self.partial[operand][self.active] = True
        self.registers[operand] = new

    def write_all(self, targets: Sequence[Operand], columns: Array) -> None:
        """`write` an array to each register."""
        for target, values in zip(targets, columns, strict=True):
            self.write(target, values)

    def use(self, operand: Operand, dtype: np.dtype[Any]) -> Array:
        """What is stored, an address or a condition: `read` with an element a thread, which must have been written."""
        values = self.read(operand, dtype)
        if operand in self.partial and not self.partial[operand][self.threads()].all():
            self.hazard(
                f"use of register {operand}, to which some threads wrote nothing", self.count
            )
        return np.broadcast_to(values, self.count)

    def inherit(self, operand: Operand, sources: Sequence[Operand]) -> None:
        """A result is as incomplete as what it was computed from, until it is used."""
        missing = [
            self.partial[source][self.threads()] for source in sources if source in self.partial
        ]
        if missing:
            self.mark(operand, np.logical_and.reduce(missing))
        self.delay(operand, sources)

    def delay(self, operand: Operand, sources: Sequence[Operand]) -> None:
        """Let a result be as late as the loads of tensor memory that it was computed from."""
        if not self.busy and not self.pending:
            return
        threads = self.threads()
        late = [self.busy[source][threads] == LOADING for source in sources if source in self.busy]
        late += [self.pending[source][threads] for source in sources if source in self.pending]
        if operand != "_" and late and (some := np.logical_or.reduce(late)).any():
            self.pending.setdefault(operand, np.zeros(self.size, bool))[threads] = some

    def mark(self, operand: Operand, written: Array) -> None:
        """Mark which executing threads have written a register."""
        if isinstance(operand, str) and operand != "_" and not written.all():
            known = self.partial.get(operand, np.ones(self.size, bool)).copy()
            known[self.threads()] = written
            self.partial[operand] = known

    def _unwritten(self, name: str) -> Array:
        dtype = self.types[name]
        if dtype == _BOOL:
            return np.zeros(self.size, bool)
        return np.full(self.size * max(dtype.itemsize, 2) // 2, POISON, np.uint16).view(dtype)[
            : self.size
        ]

    def _check_busy(
        self, uses: dict[str, Array], name: str, what: str, *, computes: bool = False
    ) -> None:
        groups = uses[name][self.threads()]
        if what == "read" and (loading := groups == LOADING).any():
            if not computes:
                self._use_early(loading)
            groups = np.where(loading, 0, groups)
        if (groups > 0).any():
            use = "tcgen05.ld loads" if (groups == LOADING).any() else "wgmma uses"
            self.hazard(
                f"{what} of a register that {use}, before its wait", int((groups > 0).sum())
            )

    def _use_early(self, among: Array) -> None:
        """Remember a use of what is still loaded, by some of the executing threads, until a wait follows or none."""
        if among.any():
            each = self.instruction
            hazard = Hazard("", each.text, each.place, int(among.sum()))
            _, users = self.early.setdefault(each.text, (hazard, np.zeros(self.size, bool)))
            users[self.threads()] |= among

    def resolve_early(self, kind: str) -> None:
        """Record the early uses by the executing threads as hazards of this kind."""
        threads = self.threads()
        for text, (hazard, users) in [*self.early.items()]:
            if users[threads].any():
                self.hazards.setdefault((kind, text), hazard._replace(kind=kind))
                users[threads] = False
            if not users.any():
                del self.early[text]

    def release(self, over: Callable[[Array], Array]) -> None:
        """Free the registers of asynchronous instructions that are over, for the executing threads."""
        threads = self.threads()
        for uses in (self.busy, self.read_in_flight):
            for name, groups in [*uses.items()]:
                groups[threads[over(groups[threads])]] = 0
                if not groups.any():
                    del uses[name]

    def settle(self) -> None:
        """Let all loads of tensor memory by the executing threads arrive."""
        threads = self.threads()
        self.resolve_early(LATE_WAIT)
        self.release(lambda groups: groups == LOADING)
        for name, late in [*self.pending.items()]:
            late[threads] = False
            if not late.any():
                del self.pending[name]

    def threads(self) -> Array:
        """The executing threads."""
        return self.all_threads if self.active is None else self.active

    @property
    def count(self) -> int:
        """The number of executing threads."""
        return self.size if self.active is None else len(self.active)

    def array(self, operand: Operand, dtype: np.dtype[Any], *, computes: bool = False) -> Array:
        """`read` with an element for every executing thread."""
        return np.broadcast_to(self.read(operand, dtype, computes=computes), self.count)

    def whole_warps(self) -> Array:
        """`[warps, 32]`: the executing threads, which are all threads of their warps."""
        threads = self.threads()
        if len(threads) % 32 or (threads.reshape(-1, 32) % 32 != np.arange(32)).any():
            self.fault("some threads of a warp do not execute an instruction that all must")
        return threads.reshape(-1, 32)

    def fault(self, message: str, thread: int | None = None) -> NoReturn:
        """Raise EmulationError at the current instruction."""
        where = ""
        if thread is not None:
            cta = [int(self.registers[f"%ctaid.{axis}"][thread]) for axis in "xyz"]
            where = f" by thread {int(self.tid[thread])} of CTA {cta}"
        each = self.instruction
        # A hazard may be what led here, and would be lost.
        after = next(
            (
                f", after a {hazard.kind} at {hazard.place}"
                for hazard in reversed(self.hazards.values())
            ),
            "",
        )
        raise EmulationError(
            f"kernel {self.program.name}, {each.place}: {message}{where}, in `{each.text}`{after}"
        )

    def hazard(self, kind: str, count: int) -> None:
        """Record a hazard of the current instruction, once."""
        each = self.instruction
        self.hazards.setdefault((kind, each.text), Hazard(kind, each.text, each.place, count))

    def address(self, operand: Operand) -> Array:
        """Byte addresses of the executing threads."""
        base = operand.base
        if isinstance(base, int):
            return np.full(self.count, base + operand.offset, np.int64)
        values = self.use(base, self.types[base])
        return values.astype(np.int64) + operand.offset

    def load(
        self, address: Array, size: int, count: int = 1, *, what: str = "load", align: int = 0
    ) -> Array:
        """`[threads, count]` elements of global memory."""
        out = np.empty((len(address), count), UNSIGNED[size])
        for chosen, start, view in self._global(address, size, count, what, align):
            index = (address[chosen] - start) // size
            out[chosen] = view[index[:, None] + np.arange(count)]
        return out

    def store(self, address: Array, values: Array) -> None:
        """Write elements `[threads, count]` to global memory."""
        size, count = values.itemsize, values.shape[1]
        for chosen, start, view in self._global(address, size, count, "store", 0):
            index = (address[chosen] - start) // size
            view[index[:, None] + np.arange(count)] = values[chosen]

    def _global(self, address: Array, size: int, count: int, what: str, align: int) -> Any:
        total = size * count
        self._check_alignment(address, align or total, what)
        found = self.memory.find(address, total)
        if (found < 0).any():
            first = int(np.argmax(found < 0))
            self.fault(
                f"{what} of {total} bytes at {hex(int(address[first]))}, outside of all tensors of the launch,",
                int(self.threads()[first]) if len(address) == self.count else None,
            )
        for number in np.unique(found):
            view, start = self.memory.view(int(number), size)
            yield found == number, start, view

    def _check_alignment(self, address: Array, size: int, what: str) -> None:
        if (address % size).any():
            first = int(np.argmax(address % size != 0))
            self.fault(
                f"{what} of {size} bytes at {hex(int(address[first]))}, which is not aligned"
            )

    def physical(self, address: Array, size: int, cta: Any) -> Array:
        """Indices into `shared` of accesses of `size` bytes."""
        self._check_alignment(address, size, "access of shared memory")
        if ((address < 0) | (address + size > self.shared_bytes)).any():
            self.fault(f"access of shared memory beyond its {self.shared_bytes} bytes")
        return address + cta * self.shared_bytes

    def granules(self, physical: Array, size: int) -> Array:
        """`[n, k]`: the granules of accesses of shared memory."""
        return physical[:, None] // self.granule + np.arange(max(1, size // self.granule))

    def load_shared(self, address: Array, size: int, count: int, threads: Array) -> Array:
        """`[threads, count]` elements of shared memory."""
        physical = self.physical(address, size * count, self.cta[threads])
        self._record(self.shadow.read, physical, size * count, threads)
        return self.shared.view(UNSIGNED[size])[physical[:, None] // size + np.arange(count)]

    def store_shared(self, address: Array, values: Array, threads: Array) -> None:
        """Write elements `[threads, count]` to shared memory."""
        size, count = values.itemsize, values.shape[1]
        physical = self.physical(address, size * count, self.cta[threads])
        view, index = self.shared.view(UNSIGNED[size]), physical[:, None] // size + np.arange(count)
        changed = (view[index] != values).any(1)
        self._record(self.shadow.write, physical, size * count, threads, changed=changed)
        view[index] = values
        lost = view[index] != values
        if lost.any():
            # Of one warp's lanes one wins, whichever; of several warps' another each time.
            warp = np.broadcast_to(threads[:, None] >> 5, index.shape)
            winner = dict(zip(index.reshape(-1).tolist(), warp.reshape(-1).tolist(), strict=True))
            others = sum(
                winner[place] != of
                for place, of in zip(index[lost].tolist(), warp[lost].tolist(), strict=True)
            )
            if others:
                self.hazard("warps write different values to one place", others)

    def _record(
        self, access: Any, physical: Array, size: int, threads: Array, **options: Any
    ) -> None:
        granules = self.granules(physical, size)
        repeated = {name: np.repeat(value, granules.shape[1]) for name, value in options.items()}
        warp, cta = (np.repeat(each[threads], granules.shape[1]) for each in (self.warp, self.cta))
        at = self.clocks.known[cta, warp, warp]
        self.note(access(granules.reshape(-1), cta, warp, at, warps=warp, **repeated), len(threads))

    def note(self, kinds: Sequence[str], count: int) -> None:
        """Record hazards of shared memory."""
        for kind in kinds:
            self.hazard(kind, count)

    def run(self) -> None:
        """Run all threads to their end; EmulationError for a fault."""
        with np.errstate(all="ignore"):
            while self._choose():
                self._block()
        if self.copies:
            self.hazard("asynchronous copies that nothing waits for", len(self.copies))
        if self.tensor_columns is not None and self.tensor_columns.any():
            self.hazard(
                "tensor memory that is still allocated at exit",
                int((self.tensor_columns > 0).sum()),
            )
        self.active = None
        self.resolve_early(NO_WAIT)

    def _choose(self) -> bool:
        """Activate the threads that run next: of the least program counter, of all or of a random warp group."""
        while not (ready := (self.state == RUNNING) & ~self.polling).any():
            if (self.state == DONE).all():
                return False
            if not (self._release() or self._land_flight()):
                self.fault("deadlock: no thread can go on")
        if self.groups_of is not None:
            if not ready[self.groups_of == self.group].any():
                self.group = int(self.random.choice(np.unique(self.groups_of[ready])))
            ready &= self.groups_of == self.group
        ready &= self.pc == self.pc[ready].min()
        self.active = None if ready.all() else np.flatnonzero(ready)
        return True

    def _block(self) -> None:
        """Run the active threads up to the next place where threads may part or meet."""
        threads, active = self.threads(), self.active
        number, code, leaders = int(self.pc[threads[0]]), self.program.code, self.program.leaders
        while True:
            each = self.instruction = code[number]
            number += 1
            self.instructions += 1
            if self.instructions > self.limit:
                self.fault(
                    f"more than {self.limit} instructions, as in a loop without an end; raise limit="
                )
            if each.guard is not None:
                chosen = self.use(each.guard, _BOOL) != each.negated
                if not chosen.all():
                    self.active = threads[chosen]
            if self.count:
                each.execute(self, each)
            if number in leaders:
                self.pc[threads] = number
                if each.target >= 0:
                    self.pc[self.threads()] = each.target
                self.active = active
                return
            self.active = active

    def _release(self) -> bool:
        """Let threads pass barriers that all others have reached too."""
        released = False
        state = self.state.reshape(self.cta_count, -1)
        waits_for = self.waits_for.reshape(self.cta_count, -1)
        for cta in np.flatnonzero((state == WAITING).any(1)):
            for barrier in np.unique(waits_for[cta][state[cta] == WAITING]):
                there = (state[cta] == WAITING) & (waits_for[cta] == barrier)
                needed = int(barrier) >> 8 or int((state[cta] != DONE).sum())
                if there.sum() >= needed:
                    state[cta][there] = RUNNING
                    self.clocks.barrier(int(cta), np.unique(np.flatnonzero(there) >> 5))
                    released = True
        return released

    def _land_flight(self) -> bool:
        """Let the oldest asynchronous operation arrive at its barrier; threads that poll look again."""
        if not self.flights:
            return False
        flight = self.flights.pop(0)
        flight.land()
        self.arrive(
            flight.barrier, flight.clock, transferred=flight.transferred, arrivals=flight.arrivals
        )
        return True

    def agent(self, kind: int, warp: Any) -> Any:
        """The number of a warp's agent of a kind, in clocks."""
        return kind * self.warps + warp

    def fly(self, cta: int, agent: int, barrier: MemoryBarrier, **options: Any) -> int:
        """Begin an asynchronous operation that will arrive at a barrier; returns its number."""
        self.flight_numbers[cta, agent] += 1
        number = int(self.flight_numbers[cta, agent])
        clock = np.zeros_like(barrier.clock)
        clock[:, agent] = number
        self.flights.append(Flight(barrier, clock, **options))
        return number

    def barrier(self, cta: int, address: int, warp: int) -> MemoryBarrier:
        """A barrier in shared memory that a warp uses; a fault if it was not initialised."""
        found = self.barriers.get((cta, address))
        if found is None:
            self.fault(f"the memory barrier at {address} is not initialised")
        maker, made = found.maker
        if self.clocks.known[cta, warp, maker] < made:
            self.hazard("use of a memory barrier whose initialisation is not ordered before it", 1)
        return found

    def arrive(
        self, barrier: MemoryBarrier, clock: Array, *, transferred: int = 0, arrivals: int = 1
    ) -> None:
        """Count arrivals and bytes; a phase that is complete lets polling threads look again."""
        barrier.clock = np.maximum(barrier.clock, clock)
        barrier.pending -= arrivals
        barrier.bytes -= transferred
        if not barrier.pending and not barrier.bytes:
            barrier.phase ^= 1
            barrier.pending = barrier.count
        self.polling[:] = False


@dataclass
class MemoryBarrier:
    """An mbarrier: the arrivals and bytes that its phase still needs, and what a thread that waits for it learns."""

    count: int
    pending: int
    clock: Array  # `[2, agents]`, as of `Clocks.release`
    maker: tuple[int, int]  # warp, and its time
    bytes: int = 0
    phase: int = 0


@dataclass
class Flight:
    """An asynchronous operation on its way to a barrier."""

    barrier: MemoryBarrier
    clock: Array
    land: Callable[[], None] = lambda: None
    transferred: int = 0  # bytes
    arrivals: int = 0
