"""Loads, stores, exchanges between threads, barriers and asynchronous copies (PTX ISA 9.7.9, 9.7.13)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .hazards import COPY, Array
from .instructions import DTYPES
from .machine import DONE, UNSIGNED, WAITING, Machine, MemoryBarrier, form, immediate
from .ptx import Address, Instruction, Operand

_U32, _BOOL = np.dtype("u4"), np.dtype(bool)


def registers(operand: Operand) -> tuple[Any, ...]:
    """The registers of a vector, or the one."""
    return (
        operand if isinstance(operand, tuple) and not isinstance(operand, Address) else (operand,)
    )


def _ignore(m: Machine, each: Instruction) -> None:
    """No value depends on it."""


form("griddepcontrol.{wait,launch_dependents}", "bar.warp.sync")(_ignore)


@form("ld.param.{b8,b16,b32,b64,u32,u64,s32,s64,f32}")
def _load_parameter(m: Machine, each: Instruction) -> None:
    to, source = each.operands
    m.write(
        to,
        immediate(
            m.parameters[source.base] >> (8 * source.offset), DTYPES[each.form.rpartition(".")[2]]
        ),
    )


@form("ld.global{,.v2,.v4}.{b8,b16,b32,b64}", "ld.global.v8.b32")
def _load_global(m: Machine, each: Instruction) -> None:
    targets = registers(each.operands[0])
    values = m.load(m.address(each.operands[1]), _size(each), len(targets))
    m.write_all(targets, values.T)


@form("st.global{,.v2,.v4}.{b8,b16,b32,b64}", "st.global.v8.b32")
def _store_global(m: Machine, each: Instruction) -> None:
    m.store(m.address(each.operands[0]), _columns(m, registers(each.operands[1]), _size(each)))


@form("ld.shared{,.v2,.v4}.{b8,b16,b32}", "ld.shared{,.v2}.b64")
def _load_shared(m: Machine, each: Instruction) -> None:
    targets = registers(each.operands[0])
    values = m.load_shared(m.address(each.operands[1]), _size(each), len(targets), m.threads())
    m.write_all(targets, values.T)


@form("st.shared{,.v2,.v4}.{b8,b16,b32}", "st.shared{,.v2}.b64")
def _store_shared(m: Machine, each: Instruction) -> None:
    values = _columns(m, registers(each.operands[1]), _size(each))
    m.store_shared(m.address(each.operands[0]), values, m.threads())


def _size(each: Instruction) -> int:
    return DTYPES[each.form.rpartition(".")[2]].itemsize


def _columns(m: Machine, sources: Sequence[Any], size: int) -> Array:
    return np.stack([m.use(source, UNSIGNED[size]) for source in sources], 1)


@form("shfl.sync.{bfly,idx,up,down}.b32")
def _shuffle(m: Machine, each: Instruction) -> None:
    """Among all 32 lanes; lanes beyond the clamp keep their own value."""
    to, source, distance, clamp, *_ = each.operands
    target, *predicate = registers(to)
    warps = m.whole_warps()
    lane = np.arange(32)
    by, bound = (
        m.array(operand, _U32).reshape(-1, 32).astype(np.int64) for operand in (distance, clamp)
    )
    if ((bound >> 8) & 31).any():
        m.fault("shuffles within parts of a warp are not emulated")
    mode, by = each.form.split(".")[2], by & 31
    chosen = {"bfly": lane ^ by, "idx": by, "up": lane - by, "down": lane + by}[mode]
    inside = chosen >= (bound & 31) if mode == "up" else chosen <= (bound & 31)
    chosen = np.where(inside, chosen, lane)
    values = m.array(source, _U32, computes=True).reshape(-1, 32)
    m.write(target, np.take_along_axis(values, chosen, 1).reshape(-1))
    if source in m.partial:
        written = m.partial[source][warps]
        m.mark(target, np.take_along_axis(written, chosen, 1).reshape(-1))
    m.delay(target, [source])
    if predicate:
        m.write(predicate[0], np.broadcast_to(inside, warps.shape).reshape(-1))


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "add": lambda values: values.sum(1, dtype=values.dtype),
    "min": lambda values: values.min(1),
    "max": lambda values: values.max(1),
    "and": lambda values: np.bitwise_and.reduce(values, 1),
    "or": lambda values: np.bitwise_or.reduce(values, 1),
    "xor": lambda values: np.bitwise_xor.reduce(values, 1),
}


@form(
    "redux.sync.{add,min,max}.{s32,u32}", "redux.sync.{and,or,xor}.b32", "redux.sync.{min,max}.f32"
)
def _reduce(m: Machine, each: Instruction) -> None:
    """Over a warp; for floats, NaN counts only where every lane has it."""
    m.whole_warps()
    *_, operation, kind = each.form.split(".")
    values = m.array(each.operands[1], DTYPES[kind]).reshape(-1, 32)
    if kind == "f32":
        found = {"max": np.fmax, "min": np.fmin}[operation].reduce(values, 1)
    else:
        found = _REDUCTIONS[operation](values)
    m.write(each.operands[0], np.repeat(found, 32))


@form("vote.sync.{any,all}.pred", "vote.sync.ballot.b32")
def _vote(m: Machine, each: Instruction) -> None:
    m.whole_warps()
    values = m.array(each.operands[1], _BOOL).reshape(-1, 32)
    mode = each.form.split(".")[2]
    if mode == "ballot":
        found = (values.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
    else:
        found = values.any(1) if mode == "any" else values.all(1)
    m.write(each.operands[0], np.repeat(found, 32))


@form("elect.sync")
def _elect(m: Machine, each: Instruction) -> None:
    """Lane 0."""
    m.whole_warps()
    lane, chosen = registers(each.operands[0])
    m.write(lane, np.uint32(0))
    m.write(chosen, m.lane[m.threads()] == 0)


@form("bra", "bra.uni")
def _branch(m: Machine, each: Instruction) -> None:
    """The machine follows the target."""


@form("ret")
def _return(m: Machine, each: Instruction) -> None:
    m.state[m.threads()] = DONE


@form("bar.sync", "barrier.sync")
def _barrier(m: Machine, each: Instruction) -> None:
    """Wait for all threads of the CTA, or for as many as the second operand."""
    number, *count = each.operands
    threads = m.threads()
    wait = m.array(number, _U32).astype(np.int64)
    if count:
        wait = wait | (m.array(count[0], _U32).astype(np.int64) << 8)
    m.state[threads], m.waits_for[threads] = WAITING, wait


@form("fence.proxy.async{,.shared::cta}")
def _fence(m: Machine, each: Instruction) -> None:
    cta, warp = _warps(m)
    m.clocks.fence(cta, warp)


def _warps(m: Machine) -> tuple[Array, Array]:
    """CTA and number of each warp that executes."""
    found = np.unique(m.threads() >> 5)
    return found // m.warps, found % m.warps


@form("cp.async.{ca,cg}.shared.global")
def _copy(m: Machine, each: Instruction) -> None:
    """16, 8 or 4 bytes; zeros beyond the number in the last operand."""
    to, source, size, *valid = each.operands
    threads, count = m.threads(), size if not valid else m.array(valid[0], _U32).astype(np.int64)
    read = np.broadcast_to(count, len(threads))
    data = np.zeros((len(threads), size // 4), np.uint32)
    addresses = m.address(source)
    for bytes_read in np.unique(read[read > 0]):
        if bytes_read % 4:
            m.fault(f"asynchronous copies of {bytes_read} bytes are not emulated")
        chosen = read == bytes_read
        words = m.load(
            addresses[chosen], 4, int(bytes_read) // 4, what="asynchronous copy", align=size
        )
        data[chosen, : words.shape[1]] = words
    physical = m.physical(m.address(to), size, m.cta[threads])
    granules = m.granules(physical, size)
    cta, warp = (np.repeat(part[threads], granules.shape[1]) for part in (m.cta, m.warp))
    at = np.repeat(m.groups[threads] + 1, granules.shape[1])
    agent = m.agent(COPY, warp)
    m.note(m.shadow.write(granules.reshape(-1), cta, agent, at, warps=warp), len(threads))
    m.copies.append([threads, m.groups[threads], physical, data])


@form("cp.async.commit_group")
def _commit_copies(m: Machine, each: Instruction) -> None:
    m.groups[m.threads()] += 1


@form("cp.async.wait_group", "cp.async.wait_all")
def _wait_for_copies(m: Machine, each: Instruction) -> None:
    """All groups but the last few land, and the warp knows."""
    threads = m.threads()
    if each.form.endswith("all"):
        m.groups[threads] += 1
    pending = each.operands[0] if each.operands else 0
    waiting = np.zeros(m.size, bool)
    waiting[threads] = True
    landed = m.groups - pending
    left = []
    for owners, group, physical, data in m.copies:
        lands = waiting[owners] & (group < landed[owners])
        m.shared.view(np.uint32)[physical[lands, None] // 4 + np.arange(data.shape[1])] = data[
            lands
        ]
        if not lands.all():
            left.append([part[~lands] for part in (owners, group, physical, data)])
    m.copies = left
    cta, warp = _warps(m)
    of_warp = landed.reshape(-1, 32).min(1).reshape(m.cta_count, m.warps)[cta, warp]
    m.clocks.learn(cta, warp, m.agent(COPY, warp), of_warp)


@form("mbarrier.init.shared{,::cta}.b64")
def _init_barrier(m: Machine, each: Instruction) -> None:
    count = each.operands[1]
    for cta, address, warp in barrier_places(m, each.operands[0]):
        clock, time = np.zeros((2, m.clocks.agents), np.int32), int(m.clocks.known[cta, warp, warp])
        m.barriers[cta, address] = MemoryBarrier(count, count, clock, (warp, time))


@form("mbarrier.inval.shared{,::cta}.b64")
def _invalidate_barrier(m: Machine, each: Instruction) -> None:
    for cta, address, warp in barrier_places(m, each.operands[0]):
        m.barrier(cta, address, warp)
        del m.barriers[cta, address]


@form("mbarrier.arrive{,.expect_tx}.shared{,::cta}.b64")
def _arrive(m: Machine, each: Instruction) -> None:
    place = next(
        number for number, operand in enumerate(each.operands) if isinstance(operand, Address)
    )
    expected = each.operands[place + 1] if "expect_tx" in each.form else 0
    bytes_expected = m.array(expected, _U32)
    for number, (cta, address, warp) in enumerate(barrier_places(m, each.operands[place])):
        barrier = m.barrier(cta, address, warp)
        barrier.bytes += int(bytes_expected[number])
        m.arrive(barrier, m.clocks.release(cta, warp))


@form("mbarrier.{try_wait,test_wait}.parity.shared{,::cta}.b64")
def _wait_for_barrier(m: Machine, each: Instruction) -> None:
    """True if the phase of this parity is over; threads that find it is not are run again when others cannot go on."""
    to, operand, parity = each.operands[:3]
    threads, phase = m.threads(), m.array(parity, _U32) & 1
    over = np.zeros(len(threads), bool)
    for number, (cta, address, warp) in enumerate(barrier_places(m, operand)):
        barrier = m.barrier(cta, address, warp)
        over[number] = barrier.phase != phase[number]
        if over[number]:
            m.clocks.acquire(cta, warp, barrier.clock)
    m.polling[threads[~over]] = True
    m.write(registers(to)[0], over)


def barrier_places(m: Machine, operand: Operand) -> list[tuple[int, int, int]]:
    """CTA, address of a barrier and warp of every executing thread."""
    threads = m.threads()
    address = m.physical(m.address(operand), 8, m.cta[threads]) - m.cta[threads] * m.shared_bytes
    return [*zip(m.cta[threads].tolist(), address.tolist(), m.warp[threads].tolist(), strict=True)]
