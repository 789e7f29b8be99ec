"""Cycles of a kernel on one partition of a multiprocessor, from the machine code alone.

A multiprocessor has four partitions, which issue one instruction a cycle each. Warps are dealt out evenly, so that one
partition stands for all. The compiler writes into every instruction how many cycles the warp waits before its next one,
and which of six scoreboards it sets and waits for; with those, and how long instructions keep their pipes
(`cards.json`), the order and time of every issue follow.

The kernel is walked once from entry to exit, its main loop a few times over: time is linear in its iterations. Programs
that begin together may stay in step, all at the tensor cores and then all at the exponentials, and programs that do not
may stay out of it, which is quicker: there are two simulations, one of each, and the mean counts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from .cards import Card
from .sass import Instruction, MachineCode

PARTITIONS = 4
# Of the main loop. The first fills the pipes, in the last they run empty; those between are what one more costs.
ITERATIONS = 4
_LANES = 32
_NO_SCOREBOARD = 7
_TOGETHER = 17.0  # cycles between programs that begin together
_SECTOR = 32  # bytes of the least that the second-level cache gives

# How far ahead of a busy pipe instructions are accepted: the tensor cores' queue, that of memory instructions.
_TENSOR_QUEUE = 64
_MEMORY_QUEUE = 16

TENSOR, MEMORY = "tensor cores", "memory pipe"

_ALU = frozenset(
    (
        "BMSK", "CS2R", "F2FP", "FCHK", "FMNMX", "FMNMX3", "FSEL", "FSETP", "HMNMX2", "HSETP2", "IABS", "IADD3",
        "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "P2R", "PLOP3", "PRMT", "R2P", "SEL", "SGXT", "SHF", "VIADD",
        "VIADDMNMX", "VIMNMX", "VIMNMX3", "VOTE",
    )
)  # fmt: skip
_FMA = frozenset(["FFMA", "FADD", "FMUL", "FSWZADD", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FADD2", "FMUL2"])
_SPECIAL = frozenset(["MUFU", "I2F", "F2I", "I2FP", "F2F", "POPC", "FLO", "FRND"])
_UNIFORM = re.compile(r"U[A-Z0-9]+|R2UR|S2UR")
_SHARED_ACCESS = frozenset(("LDS", "LDSM", "STS", "STSM", "LDTM", "STTM", "ATOMS"))
_GLOBAL_READS = frozenset(("LDG", "LD", "LDL"))
_GLOBAL_WRITES = frozenset(("STG", "ST", "RED", "REDG", "STL"))
_TILE_COPIES = frozenset(("UTMALDG", "UBLKCP"))
_GLOBAL_BOTH = frozenset(("ATOMG", "ATOM"))
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_LEFT = re.compile(r"(?:gsb\d|SB\d), (0x[0-9a-f]+)")
_SIZES = re.compile(r"(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Timing:
    """Cycles of one partition that runs as many programs at once as the multiprocessor holds.

    Attributes:
        resident: programs that the multiprocessor runs at once.
        outside: cycles before and after the main loop; `iteration`: of one turn of it, 0 where there is none.
        tensor_outside, tensor_iteration: cycles of these in which the tensor cores work.
        bytes_outside, bytes_iteration: that one program moves to and from the second-level cache.
        stalls: share of the warps' waiting time in a turn of the loop, or of the whole kernel, by cause.
    """

    resident: int
    outside: float
    iteration: float
    tensor_outside: float
    tensor_iteration: float
    bytes_outside: int
    bytes_iteration: int
    stalls: dict[str, float]


@dataclass(frozen=True)
class Step:
    """An instruction as the simulator needs it.

    Attributes:
        stall: cycles before the warp's next one. `sets`, `frees`: scoreboards that it sets until its result is there,
            and until its operands were read, 7 being none. `waits`: those that it waits for.
        pipe: that it occupies for `busy` cycles, and shared memory for `shared` cycles of the whole multiprocessor.
        latency: from the beginning to the result; 0 where the compiler's stall counts cover it.
        cause: of a stall, for those who wait for the result.
        role: what it does beyond that, see `_role`.
        left: groups that may stay open behind it, of one that waits for groups.
    """

    stall: int
    sets: int
    frees: int
    waits: tuple[int, ...]
    pipe: str
    busy: float
    latency: float
    shared: float
    cause: str = ""
    role: str = ""
    left: int = 0


def simulate(
    code: MachineCode,
    card: Card,
    *,
    warps: int,
    resident: int,
    rows: Iterable[tuple[str, int]] = (),
    products: Sequence[tuple[int, int]] = (),
    tile_bytes: float = 0.0,
) -> Timing:
    """Cycles of a kernel.

    Args:
        code: with encodings.
        warps: of one program.
        resident: programs that a multiprocessor runs at once, at least 1.
        rows: source lines that load one value a row, of which a warp's threads share sectors.
        products: (M, N) of what Blackwell's tensor cores multiply.
        tile_bytes: of a copy that one thread asks for by a descriptor.
    """
    before, body, after = walk(code)
    known: dict[int, Step] = {}

    def steps(instructions: list[Instruction]) -> list[Step]:
        return [
            known.get(i.address) or known.setdefault(i.address, step(i, card, products, tile_bytes))
            for i in instructions
        ]

    heads, loop, tails = steps(before), steps(body), steps(after)
    parts = [heads, *[loop] * (ITERATIONS if loop else 0), tails]
    partition = partial(_Partition, parts, card, programs=resident, warps=max(1, warps // PARTITIONS))
    together = partition(_TOGETHER)
    together.finish()
    runs = [together]
    if loop and resident > 1:
        apart = partition(together.turn / resident)
        apart.finish()
        runs.append(apart)
    single = frozenset(rows)

    def traffic(part: Sequence[Instruction]) -> int:
        tiles = sum(i.opcode in _TILE_COPIES for i in part)
        return warps * sum(moved(i, single) for i in part) + round(tile_bytes * tiles)

    return Timing(
        resident=resident,
        outside=round(fmean(run.outside for run in runs), 1),
        iteration=round(fmean(run.turn for run in runs), 1),
        tensor_outside=round(together.tensor_outside, 1),
        tensor_iteration=round(together.tensor_turn, 1),
        bytes_outside=traffic((*before, *after)) - _ahead(before, body, traffic),
        bytes_iteration=traffic(body),
        stalls=_shares([run.stalls for run in runs]),
    )


def _ahead(before: list[Instruction], body: list[Instruction], traffic: Callable[[Sequence[Instruction]], int]) -> int:
    """Bytes that copies before the loop fetch for its first turns; its last turns have nothing to fetch in return."""
    copies = ("LDGSTS", *_TILE_COPIES)
    early, each = (traffic([i for i in part if i.opcode in copies]) for part in (before, body))
    return early // each * each if each else 0


def _shares(stalls: list[dict[str, float]]) -> dict[str, float]:
    """Cause → share of all that is waited, the most first; what hardly counts is left out."""
    summed: dict[str, float] = defaultdict(float)
    for part in stalls:
        for cause, amount in part.items():
            summed[cause] += amount
    total = sum(summed.values())
    ordered = sorted(summed.items(), key=lambda item: -item[1])
    return {cause: round(amount / total, 3) for cause, amount in ordered if amount >= 0.005 * total}


def walk(code: MachineCode) -> tuple[list[Instruction], list[Instruction], list[Instruction]]:
    """The instructions before, in and after the main loop, as a program with work to do goes through them.

    Conditional branches forward are not taken: they leave out work. Loops other than the main one turn once.
    """
    main = code.main_loop
    first = main.start if main else -1
    path = _path(code, first)
    begin = next((n for n, i in enumerate(path) if i.address == first), len(path))
    inside = {i.address for i in main.instructions} if main else set[int]()
    end = next((n for n in range(begin, len(path)) if path[n].address not in inside), len(path))
    return path[:begin], path[begin:end], path[end:]


def _path(code: MachineCode, first: int) -> list[Instruction]:
    """One way from entry to exit that passes an address or, where that is -1, half of the kernel at least."""
    instructions = code.instructions
    places = {i.address: n for n, i in enumerate(instructions)}
    path: list[Instruction] = []
    # Branches that were not taken: if the way ends too early, the last of them was the way to the work.
    other: list[tuple[int, int]] = []
    place, seen = 0, set[int]()
    while place < len(instructions) and place not in seen:
        instruction = instructions[place]
        seen.add(place)
        path.append(instruction)
        target = places.get(instruction.target) if instruction.target is not None else None
        place += 1
        if instruction.opcode == "BRA" and target is not None:
            if not instruction.predicate and target not in seen:
                place = target
            elif instruction.predicate and target >= place:
                other.append((len(path), target))
        elif instruction.opcode in ("EXIT", "RET") and not instruction.predicate:
            there = any(i.address == first for i in path) if first >= 0 else 2 * len(path) >= len(instructions)
            if there or not other:
                break
            length, place = other.pop()
            del path[length:]
    return path


def moved(instruction: Instruction, rows: frozenset[tuple[str, int]]) -> int:
    """Bytes that an instruction of one warp moves between the multiprocessor and the second-level cache."""
    name = instruction.opcode
    if name not in ("LDG", "LD", "LDGSTS", "STG", "ST", "RED", "REDG", "ATOMG"):
        return 0
    bits = _bits(instruction)
    # A thread that reads two values at least has a part of a row of its own.
    return _SECTOR if instruction.line in rows and bits <= 32 else bits // 8 * _LANES


def step(
    instruction: Instruction, card: Card, products: Sequence[tuple[int, int]] = (), tile_bytes: float = 0.0
) -> Step:
    """What the scheduler is told by an instruction's encoding, and what its pipe takes."""
    word = instruction.encoding
    waits = word >> 52 & 0x3F
    pipe, busy, latency, shared = _demand(instruction, card, products)
    role = _role(instruction)
    if role == "tile copy":
        shared = tile_bytes / card.shared_bytes
    found = _LEFT.search(instruction.operands) if role in ("wgmma wait", "copy wait") else None
    return Step(
        stall=max(1, word >> 41 & 0xF),
        sets=word >> 46 & 7 if word else _NO_SCOREBOARD,
        frees=word >> 49 & 7 if word else _NO_SCOREBOARD,
        waits=tuple(b for b in range(6) if waits >> b & 1),
        pipe=pipe,
        busy=busy,
        latency=latency,
        shared=shared,
        cause=_cause(instruction, pipe),
        role=role,
        left=int(found[1], 16) if found else 0,
    )


def _role(instruction: Instruction) -> str:
    """Beyond pipe and scoreboards: groups of asynchronous products and copies, and barriers."""
    name, modifiers = instruction.opcode, instruction.modifiers
    if name == "HGMMA":
        return "wgmma end" if "gsb0" in instruction.operands else "wgmma"
    if name == "WARPGROUP":
        return "wgmma wait" if "DEPBAR" in modifiers else ""
    if name == "SYNCS":
        return "phase wait" if "TRYWAIT" in modifiers else "tile copies" if "ARRIVE" in modifiers else ""
    if name.startswith("UTC") and name.endswith("MMA"):
        return "tcgen05"
    roles = {
        "LDGSTS": "copy", "LDGDEPBAR": "copy end", "DEPBAR": "copy wait", "BAR": "barrier", "UTCBAR": "phase",
        **dict.fromkeys(_TILE_COPIES, "tile copy"),
    }  # fmt: skip
    return roles.get(name, "")


def _cause(instruction: Instruction, pipe: str) -> str:
    name = instruction.opcode
    if pipe is not MEMORY:
        return pipe
    if name == "SHFL":
        return "shuffles"
    if name in ("LDC", "ULDC", "LDCU"):
        return "constants"
    return "shared memory" if name in _SHARED_ACCESS else "async copies" if name == "LDGSTS" else "global memory"


def _demand(
    instruction: Instruction, card: Card, products: Sequence[tuple[int, int]]
) -> tuple[str, float, float, float]:
    """Pipe, cycles that it is kept, latency, and cycles of the multiprocessor's shared memory."""
    name, cycles, latency = instruction.opcode, card.cycles, card.latency
    if name == "HGMMA":
        return _wgmma(instruction, card)
    if name.startswith("UTC") and name.endswith("MMA"):
        # M × N products over 16 elements, on tensor cores that all partitions share.
        area = sum(m * n for m, n in products) / len(products) if products else 128 * 64
        return TENSOR, area * 16 / (card.tcgen05_products or 4096), latency["hmma"], 0.0
    if instruction.tensor_core:
        deep = next((m for m in instruction.modifiers if m.isdigit()), "16816")
        return TENSOR, cycles["hmma"] * {"1688": 0.5, "16832": 2.0}.get(deep, 1.0), latency["hmma"], 0.0
    if name in _FMA:
        return "fma", cycles["fma"], 0.0, 0.0
    if name == "IMAD":
        return "imad", cycles["imad"], 0.0, 0.0
    if name in _SPECIAL:
        return "special functions", cycles["special"], latency["special"], 0.0
    if name in _ALU:
        return "alu", cycles["alu"], 0.0, 0.0
    if name == "SHFL":
        return MEMORY, cycles["shuffle"], latency["shuffle"], 1.0
    if name in _SHARED_ACCESS:
        bits = _bits(instruction)
        if name.endswith("M"):  # matrices of 8 × 8 halves, 128 bytes each
            bits = 32 * int(next((m for m in instruction.modifiers if m in ("2", "4")), "1"))
        took = bits / 32 * 128 / card.shared_bytes
        return MEMORY, cycles["shared"], latency["shared"] + (bits // 16 if name.startswith("LD") else 0), took
    if name == "LDGSTS":
        return MEMORY, cycles["global"], latency["copy"], _bits(instruction) / 32 * 128 / card.shared_bytes
    if name in _GLOBAL_READS or name in _GLOBAL_BOTH:
        return MEMORY, cycles["global"], latency["load"], _bits(instruction) / 32 * 128 / card.shared_bytes
    if name in _GLOBAL_WRITES:
        return MEMORY, cycles["global"], latency["shared"], 0.0
    if name in ("LDC", "ULDC", "LDCU"):
        return MEMORY, cycles["shared"], latency["constant"], 0.0
    if _UNIFORM.fullmatch(name):
        return "uniform", cycles["uniform"], 12.0 if name in ("R2UR", "S2UR") else 0.0, 0.0
    return "control", 1.0, 0.0, 0.0


def _wgmma(instruction: Instruction, card: Card) -> tuple[str, float, float, float]:
    sizes = next((found for m in instruction.modifiers if (found := _SIZES.fullmatch(m))), None)
    m, n, k = map(int, sizes.groups()) if sizes else (64, 64, 16)
    busy = m * n * k / PARTITIONS / (card.wgmma_products or 512)
    # One descriptor stands for both operands in shared memory; a register before it, for one.
    operands = [operand.strip() for operand in instruction.operands.split(",")]
    both = len(operands) > 1 and operands[1].startswith("gdesc")
    read = 2 * (n * k + (m * k if both else 0))
    return TENSOR, busy, busy + 32, read / card.shared_bytes


def _bits(instruction: Instruction) -> int:
    return next((_BITS[m] for m in instruction.modifiers if m in _BITS), 32)


class _Warp:
    """The state of one warp: where it is, when it may go on, and what it has under way."""

    __slots__ = (
        "arrived", "cause", "causes", "copies", "copying", "groups", "instruction", "leader", "part", "phases",
        "program", "ready", "scoreboards", "since",
    )  # fmt: skip

    def __init__(self, program: int, ready: float, *, leader: bool) -> None:
        self.program, self.ready, self.leader = program, ready, leader
        self.part = self.instruction = 0
        self.since, self.cause = ready, "fixed latencies"
        self.scoreboards = [0.0] * 6
        self.causes = [""] * 6
        self.groups: list[float] = []
        self.copies: list[float] = []
        self.copying = 0.0
        self.arrived = False
        self.phases = 0


def _set(warp: _Warp, scoreboard: int, until: float, cause: str) -> None:
    if until > warp.scoreboards[scoreboard]:
        warp.scoreboards[scoreboard], warp.causes[scoreboard] = until, cause


class _Partition:
    """Warps of several programs that go through the same parts, and the pipes that they share."""

    def __init__(self, parts: list[list[Step]], card: Card, apart: float, *, programs: int, warps: int) -> None:
        """`apart`: cycles between the beginnings of two programs."""
        self._parts = parts
        self._card = card
        self._delay = apart * (programs - 1)
        self._warps = [
            _Warp(program, apart * program + 5.0 * warp, leader=warp == 0)
            for program in range(programs)
            for warp in range(warps)
        ]
        self._members = [[w for w in self._warps if w.program == p] for p in range(programs)]
        self._phases: list[list[tuple[float, str]]] = [[] for _ in range(programs)]
        self._free: dict[str, float] = {}
        self._shared_free = 0.0
        self._starts = [0.0] * (len(parts) + 1)
        self._tensor = [0.0] * len(parts)
        self._stalls: list[dict[str, float]] = [defaultdict(float) for _ in parts]
        self.end = 0.0

    @property
    def turn(self) -> float:
        """Cycles of one turn of the loop: the mean of the warps' turns but the first, which fills the pipes, and the
        last, in which programs that began later have the partition to themselves.
        """
        turns = len(self._parts) - 2
        begun = [start / len(self._warps) for start in self._starts]
        return (begun[turns] - begun[2]) / (turns - 2) if turns else 0.0

    @property
    def outside(self) -> float:
        """Cycles of the whole, but for the turns and the time by which the last program began later than the first."""
        return self.end - (len(self._parts) - 2) * self.turn - self._delay

    @property
    def tensor_turn(self) -> float:
        """Cycles of tensor cores that a turn asks for."""
        return self._tensor[2] if len(self._parts) > 2 else 0.0

    @property
    def tensor_outside(self) -> float:
        """Cycles of tensor cores that is asked for before and behind the loop."""
        return self._tensor[0] + self._tensor[-1]

    @property
    def stalls(self) -> dict[str, float]:
        """Cause → cycles that warps wait, in the loop's later turns or, without a loop, in all parts."""
        summed: dict[str, float] = defaultdict(float)
        for part in self._stalls[2:-1] if len(self._parts) > 2 else self._stalls:
            for cause, amount in part.items():
                summed[cause] += amount
        return summed

    def finish(self) -> None:
        """Lets every warp run to its end.

        Raises:
            RuntimeError: warps wait for each other for ever: the walk went past what they wait for.
        """
        for warp in self._warps:
            self._enter(warp, 0.0)
        active = [warp for warp in self._warps if warp.part < len(self._parts)]
        clock, last = 0.0, 0
        free = self._free
        while active:
            # The warp that can issue first; of several, the next in turn.
            best, earliest, why = -1, float("inf"), ""
            count = len(active)
            for offset in range(1, count + 1):
                number = (last + offset) % count
                warp = active[number]
                if warp.arrived:
                    continue
                current = self._parts[warp.part][warp.instruction]
                pipe, at, cause = current.pipe, warp.since, warp.cause
                room = free.get(pipe, 0.0)
                if pipe is TENSOR:
                    room -= _TENSOR_QUEUE
                elif pipe is MEMORY:
                    room -= _MEMORY_QUEUE
                if room > at:
                    at, cause = room, pipe
                if at < clock:
                    at = clock
                if at < earliest:
                    best, earliest, why = number, at, cause
                    if at == clock:
                        break
            if best < 0:
                raise RuntimeError("the simulated warps wait for each other at a barrier")
            warp = active[best]
            if earliest > warp.ready:
                self._stalls[warp.part][why] += earliest - warp.ready
            self._issue(warp, earliest)
            clock = earliest + 1
            last = best
            if warp.part >= len(self._parts):
                active.remove(warp)
                self._release(warp.program, earliest)
                last -= 1
        self.end = max(self.end, clock)

    def _issue(self, warp: _Warp, now: float) -> None:
        current = self._parts[warp.part][warp.instruction]
        role, pipe, busy = current.role, current.pipe, current.busy
        shared = current.shared
        if role in ("tcgen05", "tile copy") and not warp.leader:
            busy = shared = 0.0  # one thread of the program issues for all
        start = max(now, self._free.get(pipe, 0.0)) if pipe is TENSOR or pipe is MEMORY else now
        finish = start + busy
        if shared:
            # An access of this partition comes with one of each of the others; tensor cores read for all at once.
            share = shared if pipe is TENSOR or role == "tile copy" else PARTITIONS * shared
            self._shared_free = max(self._shared_free, start) + share
            if pipe is TENSOR:
                finish = max(finish, self._shared_free)
        self._free[pipe] = finish
        if pipe is TENSOR:
            self._tensor[warp.part] += busy
        result = max(finish, self._shared_free if shared else 0.0) + max(0.0, current.latency - busy)
        if role:
            self._asynchronous(warp, current, now, finish)
        if current.sets != _NO_SCOREBOARD:
            _set(warp, current.sets, result if current.latency else now + self._card.latency["other"], current.cause)
        if current.frees != _NO_SCOREBOARD:
            read = finish if pipe is TENSOR or pipe is MEMORY else now
            _set(warp, current.frees, read + self._card.latency["other"], current.cause)
        if result > self.end and "copy" not in current.role:
            self.end = result
        self._advance(warp, now + current.stall)
        if role == "barrier":
            warp.arrived = True
            self._release(warp.program, now)

    def _asynchronous(self, warp: _Warp, current: Step, now: float, finish: float) -> None:
        role, latency = current.role, self._card.latency
        phases = self._phases[warp.program]
        if role == "wgmma end":
            warp.groups = [*warp.groups[-15:], finish + 32]
        elif role == "copy":
            warp.copying = max(warp.copying, now + latency["copy"])
        elif role == "copy end":
            warp.copies = [*warp.copies[-15:], warp.copying]
            warp.copying = 0.0
        elif role == "phase" and warp.leader:
            phases.append((max(self._free.get(TENSOR, 0.0), now) + latency["hmma"], TENSOR))
        elif role == "tile copies" and warp.leader:
            phases.append((now, "async copies"))  # those that follow, whose bytes the barrier is told to expect
        elif role == "tile copy" and warp.leader and phases:
            phases[-1] = max(phases[-1], (finish + latency["copy"], "async copies"))
        elif role == "phase wait":
            warp.phases += 1

    def _release(self, program: int, now: float) -> None:
        """Opens the barrier of a program if every warp that still runs is there."""
        members = [w for w in self._members[program] if w.part < len(self._parts)]
        if members and all(w.arrived for w in members):
            opened = now + self._card.latency["barrier"]
            for warp in members:
                warp.arrived = False
                if opened > warp.since:
                    warp.since, warp.cause = opened, "barriers"

    def _advance(self, warp: _Warp, ready: float) -> None:
        warp.instruction += 1
        if warp.instruction < len(self._parts[warp.part]):
            self._await(warp, ready)
        else:
            warp.part += 1
            self._enter(warp, ready)

    def _enter(self, warp: _Warp, ready: float) -> None:
        """Brings a warp to the first part from where it is that is not empty."""
        warp.instruction = 0
        while warp.part < len(self._parts) and not self._parts[warp.part]:
            self._starts[warp.part] += ready
            warp.part += 1
        if warp.part < len(self._parts):
            self._starts[warp.part] += ready
            self._await(warp, max(ready, warp.ready))
        else:
            warp.ready = ready

    def _await(self, warp: _Warp, ready: float) -> None:
        """Finds when the next instruction may issue, but for its pipe, and what it waits for longest."""
        current = self._parts[warp.part][warp.instruction]
        since, cause = ready, "fixed latencies"
        scoreboards = warp.scoreboards
        for number in current.waits:
            if scoreboards[number] > since:
                since, cause = scoreboards[number], warp.causes[number]
        if current.role == "wgmma wait" and len(warp.groups) > current.left:
            done = sorted(warp.groups)[len(warp.groups) - current.left - 1]
            if done > since:
                since, cause = done, TENSOR
        elif current.role == "copy wait" and len(warp.copies) > current.left:
            done = warp.copies[len(warp.copies) - current.left - 1]
            if done > since:
                since, cause = done, "async copies"
        elif current.role == "phase wait":
            phases = self._phases[warp.program]
            if warp.phases < len(phases) and phases[warp.phases][0] > since:
                since, cause = phases[warp.phases]
        warp.ready, warp.since, warp.cause = ready, since, cause
