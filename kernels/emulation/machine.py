"""The machine: threads of many CTAs side by side, their registers, memory, barriers and copies.

All threads at one instruction execute it as one NumPy operation. Asynchronous copies land as late as the kernel allows.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np

from .hazards import (
    LATE_WAIT,
    NO_WAIT,
    UNSIGNED,
    Allocations,
    Array,
    Clocks,
    EmulationError,
    Hazard,
    Shadow,
)
from .ptx import Instruction, Operand, Program

Handler = Callable[["Machine", Instruction], None]
FORMS: dict[str, Handler] = {}
"""The handler of every emulated instruction, by its opcode with all modifiers."""

_BOOL = np.dtype(bool)
# Initial content of registers and shared memory, in every 16 bits: NaN, and not the -1 of masks.
POISON = 0xFFBB
RUNNING, WAITING, DONE = range(3)
INSTRUCTIONS_LIMIT = 5_000_000
LOADING = 1 << 40  # in place of a group of GEMMs: tcgen05.ld writes the register


def expand(pattern: str) -> list[str]:
    """Expand alternatives: `ld.{b16,b32}` → `ld.b16`, `ld.b32`."""
    # Every second piece was in braces.
    pieces = re.split(r"\{(.*?)\}", pattern)
    choices = [piece.split(",") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def form(*patterns: str) -> Callable[[Handler], Handler]:
    """Register a handler for these forms."""

    def register(handler: Handler) -> Handler:
        for pattern in patterns:
            FORMS.update(dict.fromkeys(expand(pattern), handler))
        return handler

    return register


def register_dtype(ptx_type: str) -> np.dtype[Any]:
    """Return the dtype that stores a register of a PTX type: unsigned bits."""
    return _BOOL if ptx_type == "pred" else UNSIGNED[int(ptx_type[1:]) // 8]


@lru_cache(4096)
def immediate(bits: int, dtype: np.dtype[Any]) -> Any:
    """Return the number that these bits encode."""
    if dtype == _BOOL:
        return np.bool_(bits)
    size = dtype.itemsize
    return np.array(bits % (1 << 8 * size), UNSIGNED[size]).view(dtype)[()]


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
        halves = self.cta_count * self.shared_bytes // 2
        self.shared = np.full(halves, POISON, np.uint16).view(np.uint8)
        # The smallest access of shared memory, at most 4 bytes.
        self.granule = 4
        for op in program.code:
            if op.form.startswith(("ld.shared", "st.shared")):
                self.granule = min(self.granule, int(op.type[1:]) // 8)
        self.clocks = Clocks(self.cta_count, self.warps)
        self.shadow = Shadow(self.clocks, self.cta_count, self.shared_bytes // self.granule)
        self.types = {name: register_dtype(kind) for name, kind in program.registers.items()}
        zeros = np.zeros(self.size, np.uint32)
        self.registers: dict[str, Array] = {
            "%tid.x": self.tid,
            "%tid.y": zeros,
            "%tid.z": zeros,
            "%laneid": self.lane,
            "%ntid.x": np.full(self.size, program.threads, np.uint32),
            "%cluster_ctarank": zeros,
        }
        for i, axis in enumerate("xyz"):
            self.registers[f"%ctaid.{axis}"] = ctas[self.cta, i].astype(np.uint32)
            self.registers[f"%nctaid.{axis}"] = np.full(self.size, grid[i], np.uint32)
        # Of registers that some threads have not written: the threads that have.
        self.partial: dict[str, Array] = {}
        # The group of GEMMs in flight that writes a register, and that reads it, by thread; 0 for none.
        self.busy: dict[str, Array] = {}
        self.read_in_flight: dict[str, Array] = {}
        # Threads whose register was computed from one that tcgen05.ld still writes.
        self.pending: dict[str, Array] = {}
        # Uses of such values, with their threads, until it is known whether a wait follows.
        self.early: dict[str, tuple[Hazard, Array]] = {}
        # Registers accessed since `wgmma.fence`; in the lockstep schedule only.
        self.unfenced: set[str] | None = set() if schedule == "lockstep" else None
        self.barriers: dict[tuple[int, int], MemoryBarrier] = {}
        self.copies: list[list[Array]] = []
        self.copy_groups = np.zeros(self.size, np.int64)
        self.tensor_memory: Any = None
        self.tensor_shadow: Any = None
        self.tensor_columns: Any = None
        self.flights: list[Flight] = []
        self.flight_counts = np.zeros((self.cta_count, self.clocks.agents), np.int32)
        self.descriptors = descriptors or {}
        self.pc = np.zeros(self.size, np.int64)
        self.state = np.zeros(self.size, np.int8)
        self.waits_for = np.zeros(self.size, np.int64)
        self.polling = np.zeros(self.size, bool)
        self.active: Array | None = None
        # The random schedule runs one warp at a time, or warpgroup, whose instructions need all of its warps.
        self.turns = None
        if schedule != "lockstep":
            self.turns = (self.all_threads >> 5) // (4 if self.warps % 4 == 0 else 1)
        self.random, self.turn = np.random.default_rng(seed), -1
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
                bits = 8 * values.itemsize
                self.fault(f"register {operand} has {bits} bits and is read as {dtype}")
            values = values.astype(UNSIGNED[dtype.itemsize])
        return values.view(dtype)

    def write(self, operand: Operand, values: Any) -> None:
        """Write a register of the executing threads; narrower values are extended, signed ones by their sign."""
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
            sign = "i" if values.dtype.kind == "i" else "u"
            values = values.astype(f"{sign}{dtype.itemsize}")
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
        """Write one array to each register."""
        for target, values in zip(targets, columns, strict=True):
            self.write(target, values)

    def use(self, operand: Operand, dtype: np.dtype[Any]) -> Array:
        """Read a value to store, an address or a condition: an element a thread, which must have been written."""
        values = self.read(operand, dtype)
        if operand in self.partial and not self.partial[operand][self.threads()].all():
            kind = f"use of register {operand}, to which some threads wrote nothing"
            self.hazard(kind, self.count)
        return np.broadcast_to(values, self.count)

    def inherit(self, operand: Operand, sources: Sequence[Operand]) -> None:
        """Let a result be as incomplete, and as late, as the registers that it was computed from."""
        written = [self.written(source) for source in sources if source in self.partial]
        if written:
            self.mark(operand, np.logical_and.reduce(written))
        self.delay(operand, sources)

    def written(self, operand: Operand) -> Array:
        """Return which executing threads have written a register; one element if all have."""
        if operand in self.partial:
            return self.partial[operand][self.threads()]
        return np.ones(1, bool)

    def delay(self, operand: Operand, sources: Sequence[Operand]) -> None:
        """Let a result be as late as the loads of tensor memory that it was computed from."""
        if not self.busy and not self.pending:
            return
        threads = self.threads()
        late = [self.busy[source][threads] == LOADING for source in sources if source in self.busy]
        late += [self.pending[source][threads] for source in sources if source in self.pending]
        if operand != "_" and late and (is_late := np.logical_or.reduce(late)).any():
            self.pending.setdefault(operand, np.zeros(self.size, bool))[threads] = is_late

    def mark(self, operand: Operand, written: Array) -> None:
        """Mark which executing threads have written a register."""
        if isinstance(operand, str) and operand != "_" and not written.all():
            partial = self.partial.get(operand, np.ones(self.size, bool)).copy()
            partial[self.threads()] = written
            self.partial[operand] = partial

    def _unwritten(self, name: str) -> Array:
        dtype = self.types[name]
        if dtype == _BOOL:
            return np.zeros(self.size, bool)
        halves = np.full(self.size * max(dtype.itemsize, 2) // 2, POISON, np.uint16)
        return halves.view(dtype)[: self.size]

    def _check_busy(
        self, uses: dict[str, Array], name: str, access: str, *, computes: bool = False
    ) -> None:
        groups = uses[name][self.threads()]
        if access == "read" and (loading := groups == LOADING).any():
            if not computes:
                self._use_early(loading)
            groups = np.where(loading, 0, groups)
        if (groups > 0).any():
            use = "tcgen05.ld loads" if (groups == LOADING).any() else "wgmma uses"
            kind = f"{access} of a register that {use}, before its wait"
            self.hazard(kind, int((groups > 0).sum()))

    def _use_early(self, users: Array) -> None:
        """Remember a use of a register that is still loaded, by `users` among the executing threads."""
        if users.any():
            op = self.instruction
            hazard = Hazard("", op.text, op.place, int(users.sum()))
            _, early = self.early.setdefault(op.text, (hazard, np.zeros(self.size, bool)))
            early[self.threads()] |= users

    def resolve_early(self, kind: str) -> None:
        """Record the early uses by the executing threads as hazards of this kind."""
        threads = self.threads()
        for text, (hazard, users) in [*self.early.items()]:
            if users[threads].any():
                self.hazards.setdefault((kind, text), hazard._replace(kind=kind))
                users[threads] = False
            if not users.any():
                del self.early[text]

    def release(self, complete: Callable[[Array], Array]) -> None:
        """Free the registers of complete groups, for the executing threads."""
        threads = self.threads()
        for uses in (self.busy, self.read_in_flight):
            for name, groups in [*uses.items()]:
                groups[threads[complete(groups[threads])]] = 0
                if not groups.any():
                    del uses[name]

    def settle(self) -> None:
        """Complete all loads of tensor memory by the executing threads."""
        threads = self.threads()
        self.resolve_early(LATE_WAIT)
        self.release(lambda groups: groups == LOADING)
        for name, late in [*self.pending.items()]:
            late[threads] = False
            if not late.any():
                del self.pending[name]

    def threads(self) -> Array:
        """Return the executing threads."""
        return self.all_threads if self.active is None else self.active

    @property
    def count(self) -> int:
        """The number of executing threads."""
        return self.size if self.active is None else len(self.active)

    def array(self, operand: Operand, dtype: np.dtype[Any], *, computes: bool = False) -> Array:
        """Read an element for every executing thread."""
        return np.broadcast_to(self.read(operand, dtype, computes=computes), self.count)

    def whole_warps(self) -> Array:
        """Return the executing threads `[warps, 32]`; a fault unless they are all threads of their warps."""
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
        op = self.instruction
        # The last hazard may be the cause, and would be lost.
        after = ""
        if self.hazards:
            last = [*self.hazards.values()][-1]
            after = f", after a {last.kind} at {last.place}"
        raise EmulationError(
            f"kernel {self.program.name}, {op.place}: {message}{where}, in `{op.text}`{after}"
        )

    def hazard(self, kind: str, count: int) -> None:
        """Record a hazard of the current instruction, once."""
        op = self.instruction
        self.hazards.setdefault((kind, op.text), Hazard(kind, op.text, op.place, count))

    def address(self, operand: Operand) -> Array:
        """Return the byte addresses of the executing threads."""
        base = operand.base
        if isinstance(base, int):
            return np.full(self.count, base + operand.offset, np.int64)
        values = self.use(base, self.types[base])
        return values.astype(np.int64) + operand.offset

    def load(
        self, address: Array, size: int, count: int = 1, *, access: str = "load", align: int = 0
    ) -> Array:
        """Load elements `[threads, count]` of global memory."""
        out = np.empty((len(address), count), UNSIGNED[size])
        for threads, start, view in self._global(address, size, count, access, align):
            index = (address[threads] - start) // size
            out[threads] = view[index[:, None] + np.arange(count)]
        return out

    def store(self, address: Array, values: Array) -> None:
        """Store elements `[threads, count]` to global memory."""
        size, count = values.itemsize, values.shape[1]
        for threads, start, view in self._global(address, size, count, "store", 0):
            index = (address[threads] - start) // size
            view[index[:, None] + np.arange(count)] = values[threads]

    def _global(self, address: Array, size: int, count: int, access: str, align: int) -> Any:
        """Yield, for each allocation accessed: mask of its accesses, address of its first element, elements."""
        total = size * count
        self._check_alignment(address, align or total, access)
        allocations = self.memory.find(address, total)
        if (allocations < 0).any():
            first = int(np.argmax(allocations < 0))
            self.fault(
                f"{access} of {total} bytes at {hex(int(address[first]))}, outside of all tensors of the launch,",
                int(self.threads()[first]) if len(address) == self.count else None,
            )
        for allocation in np.unique(allocations):
            view, start = self.memory.view(int(allocation), size)
            yield allocations == allocation, start, view

    def _check_alignment(self, address: Array, size: int, access: str) -> None:
        misaligned = address % size != 0
        if misaligned.any():
            first = hex(int(address[np.argmax(misaligned)]))
            self.fault(f"{access} of {size} bytes at {first}, which is not aligned")

    def physical(self, address: Array, size: int, cta: Any) -> Array:
        """Return the indices into `shared` of accesses of `size` bytes."""
        self._check_alignment(address, size, "access of shared memory")
        if ((address < 0) | (address + size > self.shared_bytes)).any():
            self.fault(f"access of shared memory beyond its {self.shared_bytes} bytes")
        return address + cta * self.shared_bytes

    def granules(self, physical: Array, size: int) -> Array:
        """Return the granules `[n, k]` of n accesses of shared memory."""
        return physical[:, None] // self.granule + np.arange(max(1, size // self.granule))

    def load_shared(self, address: Array, size: int, count: int, threads: Array) -> Array:
        """Load elements `[threads, count]` of shared memory."""
        physical = self.physical(address, size * count, self.cta[threads])
        self._record(self.shadow.read, physical, size * count, threads)
        return self.shared.view(UNSIGNED[size])[physical[:, None] // size + np.arange(count)]

    def store_shared(self, address: Array, values: Array, threads: Array) -> None:
        """Store elements `[threads, count]` to shared memory."""
        size, count = values.itemsize, values.shape[1]
        physical = self.physical(address, size * count, self.cta[threads])
        view, index = self.shared.view(UNSIGNED[size]), physical[:, None] // size + np.arange(count)
        changed = (view[index] != values).any(1)
        self._record(self.shadow.write, physical, size * count, threads, changed=changed)
        view[index] = values
        lost = view[index] != values
        if lost.any():
            # One lane of a warp wins, whichever it is; between warps the winner depends on their schedule.
            warp = np.broadcast_to(threads[:, None] >> 5, index.shape)
            winner = dict(zip(index.reshape(-1).tolist(), warp.reshape(-1).tolist(), strict=True))
            losers = zip(index[lost].tolist(), warp[lost].tolist(), strict=True)
            conflicts = sum(winner[address] != loser for address, loser in losers)
            if conflicts:
                self.hazard("warps write different values to one place", conflicts)

    def _record(
        self, access: Any, physical: Array, size: int, threads: Array, **options: Any
    ) -> None:
        granules = self.granules(physical, size)
        repeats = granules.shape[1]
        repeated = {name: np.repeat(value, repeats) for name, value in options.items()}
        warp, cta = np.repeat(self.warp[threads], repeats), np.repeat(self.cta[threads], repeats)
        time = self.clocks.ordered[cta, warp, warp]
        hazards = access(granules.reshape(-1), cta, warp, time, warps=warp, **repeated)
        self.note(hazards, len(threads))

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
            kind = "tensor memory that is still allocated at exit"
            self.hazard(kind, int((self.tensor_columns > 0).sum()))
        self.active = None
        self.resolve_early(NO_WAIT)

    def _choose(self) -> bool:
        """Activate the threads of the lowest program counter, among all or in a random warp or warpgroup."""
        while not (ready := (self.state == RUNNING) & ~self.polling).any():
            if (self.state == DONE).all():
                return False
            if not (self._release() or self._land_flight()):
                self.fault("deadlock: no thread can go on")
        if self.turns is not None:
            if not ready[self.turns == self.turn].any():
                self.turn = int(self.random.choice(np.unique(self.turns[ready])))
            ready &= self.turns == self.turn
        ready &= self.pc == self.pc[ready].min()
        self.active = None if ready.all() else np.flatnonzero(ready)
        return True

    def _block(self) -> None:
        """Run the active threads to the end of their basic block."""
        threads, active = self.threads(), self.active
        pc, code, leaders = int(self.pc[threads[0]]), self.program.code, self.program.leaders
        while True:
            op = self.instruction = code[pc]
            pc += 1
            self.instructions += 1
            if self.instructions > self.limit:
                self.fault(
                    f"more than {self.limit} instructions, as in a loop without an end; raise limit="
                )
            if op.guard is not None:
                enabled = self.use(op.guard, _BOOL) != op.negated
                if not enabled.all():
                    self.active = threads[enabled]
            if self.count:
                op.execute(self, op)
            if pc in leaders:
                self.pc[threads] = pc
                if op.target >= 0:
                    self.pc[self.threads()] = op.target
                self.active = active
                return
            self.active = active

    def _release(self) -> bool:
        """Release the threads of barriers that all expected threads have reached."""
        released = False
        state = self.state.reshape(self.cta_count, -1)
        waits_for = self.waits_for.reshape(self.cta_count, -1)
        for cta in np.flatnonzero((state == WAITING).any(1)):
            for barrier in np.unique(waits_for[cta][state[cta] == WAITING]):
                arrived = (state[cta] == WAITING) & (waits_for[cta] == barrier)
                expected = int(barrier) >> 8 or int((state[cta] != DONE).sum())
                if arrived.sum() >= expected:
                    state[cta][arrived] = RUNNING
                    self.clocks.barrier(int(cta), np.unique(np.flatnonzero(arrived) >> 5))
                    released = True
        return released

    def _land_flight(self) -> bool:
        """Complete the oldest asynchronous operation; threads that poll its barrier run again."""
        if not self.flights:
            return False
        flight = self.flights.pop(0)
        flight.land()
        self.arrive(
            flight.barrier, flight.clock, transferred=flight.transferred, arrivals=flight.arrivals
        )
        return True

    def agent(self, kind: int, warp: Any) -> Any:
        """Return the index in clocks of a warp's agent of a kind."""
        return kind * self.warps + warp

    def fly(self, cta: int, agent: int, barrier: MemoryBarrier, **options: Any) -> int:
        """Begin an asynchronous operation that will arrive at an mbarrier; return its time in the agent's clock."""
        self.flight_counts[cta, agent] += 1
        time = int(self.flight_counts[cta, agent])
        clock = np.zeros_like(barrier.clock)
        clock[:, agent] = time
        self.flights.append(Flight(barrier, clock, **options))
        return time

    def barrier(self, cta: int, address: int, warp: int) -> MemoryBarrier:
        """Return the mbarrier that a warp uses; a fault if it was not initialised."""
        barrier = self.barriers.get((cta, address))
        if barrier is None:
            self.fault(f"the memory barrier at {address} is not initialised")
        initialiser, time = barrier.initialised
        if self.clocks.ordered[cta, warp, initialiser] < time:
            self.hazard("use of a memory barrier whose initialisation is not ordered before it", 1)
        return barrier

    def arrive(
        self, barrier: MemoryBarrier, clock: Array, *, transferred: int = 0, arrivals: int = 1
    ) -> None:
        """Count arrivals and bytes; the end of a phase lets polling threads run again."""
        barrier.clock = np.maximum(barrier.clock, clock)
        barrier.pending -= arrivals
        barrier.bytes -= transferred
        if not barrier.pending and not barrier.bytes:
            barrier.phase ^= 1
            barrier.pending = barrier.count
        self.polling[:] = False


@dataclass
class MemoryBarrier:
    """An mbarrier: the arrivals and bytes that its phase still expects, and the clock that it passes on."""

    count: int
    pending: int
    clock: Array  # `[2, agents]`, as of `Clocks.release`
    initialised: tuple[int, int]  # by a warp, at its time
    bytes: int = 0
    phase: int = 0


@dataclass
class Flight:
    """An asynchronous operation that will arrive at an mbarrier."""

    barrier: MemoryBarrier
    clock: Array
    land: Callable[[], None] = lambda: None
    transferred: int = 0  # bytes
    arrivals: int = 0
