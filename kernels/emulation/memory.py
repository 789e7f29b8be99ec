"""Loads, stores, exchanges between threads, barriers and asynchronous copies (PTX ISA 9.7.9, 9.7.13)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .hazards import COPY, UNSIGNED, Array
from .instructions import DTYPES
from .machine import DONE, WAITING, Machine, MemoryBarrier, form, immediate
from .ptx import Address, Instruction, Operand

_U32, _BOOL = np.dtype("u4"), np.dtype(bool)


def registers(operand: Operand) -> tuple[Any, ...]:
    """Return the registers of an operand, a vector or a scalar."""
    is_vector = isinstance(operand, tuple) and not isinstance(operand, Address)
    return operand if is_vector else (operand,)


def _ignore(m: Machine, op: Instruction) -> None:
    """Do nothing: no value depends on it."""


form("griddepcontrol.{wait,launch_dependents}", "bar.warp.sync")(_ignore)


@form("ld.param.{b8,b16,b32,b64,u32,u64,s32,s64,f32}")
def _load_parameter(m: Machine, op: Instruction) -> None:
    target, source = op.operands
    bits = m.parameters[source.base] >> (8 * source.offset)
    m.write(target, immediate(bits, DTYPES[op.type]))


@form("ld.global{,.v2,.v4}.{b8,b16,b32,b64}", "ld.global.v8.b32")
def _load_global(m: Machine, op: Instruction) -> None:
    targets = registers(op.operands[0])
    m.write_all(targets, m.load(m.address(op.operands[1]), _size(op), len(targets)).T)


@form("st.global{,.v2,.v4}.{b8,b16,b32,b64}", "st.global.v8.b32")
def _store_global(m: Machine, op: Instruction) -> None:
    m.store(m.address(op.operands[0]), _columns(m, registers(op.operands[1]), _size(op)))


@form("ld.shared{,.v2,.v4}.{b8,b16,b32}", "ld.shared{,.v2}.b64")
def _load_shared(m: Machine, op: Instruction) -> None:
    targets = registers(op.operands[0])
    values = m.load_shared(m.address(op.operands[1]), _size(op), len(targets), m.threads())
    m.write_all(targets, values.T)


@form("st.shared{,.v2,.v4}.{b8,b16,b32}", "st.shared{,.v2}.b64")
def _store_shared(m: Machine, op: Instruction) -> None:
    values = _columns(m, registers(op.operands[1]), _size(op))
    m.store_shared(m.address(op.operands[0]), values, m.threads())


def _size(op: Instruction) -> int:
    return DTYPES[op.type].itemsize


def _columns(m: Machine, sources: Sequence[Any], size: int) -> Array:
    return np.stack([m.use(source, UNSIGNED[size]) for source in sources], 1)


@form("shfl.sync.{bfly,idx,up,down}.b32")
def _shuffle(m: Machine, op: Instruction) -> None:
    """Exchange among all 32 lanes; lanes beyond the clamp keep their own value."""
    to, source, distance, clamp, *_ = op.operands
    target, *predicate = registers(to)
    warps = m.whole_warps()
    lane = np.arange(32)
    offset = m.array(distance, _U32).reshape(-1, 32).astype(np.int64) & 31
    bound = m.array(clamp, _U32).reshape(-1, 32).astype(np.int64)
    if ((bound >> 8) & 31).any():
        m.fault("shuffles within parts of a warp are not emulated")
    bound &= 31
    mode = op.form.split(".")[2]
    if mode == "bfly":
        source_lane = lane ^ offset
    elif mode == "idx":
        source_lane = offset
    else:
        source_lane = lane - offset if mode == "up" else lane + offset
    inside = source_lane >= bound if mode == "up" else source_lane <= bound
    source_lane = np.where(inside, source_lane, lane)
    values = m.array(source, _U32, computes=True).reshape(-1, 32)
    m.write(target, np.take_along_axis(values, source_lane, 1).reshape(-1))
    if source in m.partial:
        written = m.partial[source][warps]
        m.mark(target, np.take_along_axis(written, source_lane, 1).reshape(-1))
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
def _reduce(m: Machine, op: Instruction) -> None:
    """Reduce over a warp; the result of floats is NaN only if every lane has NaN."""
    m.whole_warps()
    operation = op.form.split(".")[2]
    values = m.array(op.operands[1], DTYPES[op.type]).reshape(-1, 32)
    if op.type == "f32":
        result = {"max": np.fmax, "min": np.fmin}[operation].reduce(values, 1)
    else:
        result = _REDUCTIONS[operation](values)
    m.write(op.operands[0], np.repeat(result, 32))


@form("vote.sync.{any,all}.pred", "vote.sync.ballot.b32")
def _vote(m: Machine, op: Instruction) -> None:
    m.whole_warps()
    votes = m.array(op.operands[1], _BOOL).reshape(-1, 32)
    mode = op.form.split(".")[2]
    if mode == "ballot":
        bits = votes.astype(np.uint32) << np.arange(32, dtype=np.uint32)
        result = bits.sum(1, dtype=np.uint32)
    else:
        result = votes.any(1) if mode == "any" else votes.all(1)
    m.write(op.operands[0], np.repeat(result, 32))


@form("elect.sync")
def _elect(m: Machine, op: Instruction) -> None:
    """Elect lane 0."""
    m.whole_warps()
    lane, elected = registers(op.operands[0])
    m.write(lane, np.uint32(0))
    m.write(elected, m.lane[m.threads()] == 0)


@form("bra", "bra.uni")
def _branch(m: Machine, op: Instruction) -> None:
    """Do nothing: the machine follows the target."""


@form("ret")
def _return(m: Machine, op: Instruction) -> None:
    m.state[m.threads()] = DONE


@form("bar.sync", "barrier.sync")
def _barrier(m: Machine, op: Instruction) -> None:
    """Wait for all threads of the CTA, or for as many as the second operand."""
    barrier, *count = op.operands
    threads = m.threads()
    wait = m.array(barrier, _U32).astype(np.int64)
    if count:
        wait = wait | (m.array(count[0], _U32).astype(np.int64) << 8)
    m.state[threads], m.waits_for[threads] = WAITING, wait


@form("fence.proxy.async{,.shared::cta}")
def _fence(m: Machine, op: Instruction) -> None:
    m.clocks.fence(*_warps(m))


def _warps(m: Machine) -> tuple[Array, Array]:
    """Return CTA and index of each executing warp."""
    warps = np.unique(m.threads() >> 5)
    return warps // m.warps, warps % m.warps


@form("cp.async.{ca,cg}.shared.global")
def _copy(m: Machine, op: Instruction) -> None:
    """Copy 16, 8 or 4 bytes; zeros beyond the count in the last operand."""
    to, source, size, *valid = op.operands
    threads = m.threads()
    count = m.array(valid[0], _U32).astype(np.int64) if valid else np.full(len(threads), size)
    data = np.zeros((len(threads), size // 4), np.uint32)
    addresses = m.address(source)
    for bytes_read in np.unique(count[count > 0]):
        if bytes_read % 4:
            m.fault(f"asynchronous copies of {bytes_read} bytes are not emulated")
        readers, words = count == bytes_read, int(bytes_read) // 4
        data[readers, :words] = m.load(
            addresses[readers], 4, words, access="asynchronous copy", align=size
        )
    physical = m.physical(m.address(to), size, m.cta[threads])
    granules = m.granules(physical, size)
    repeats = granules.shape[1]
    cta, warp = np.repeat(m.cta[threads], repeats), np.repeat(m.warp[threads], repeats)
    time = np.repeat(m.copy_groups[threads] + 1, repeats)
    hazards = m.shadow.write(granules.reshape(-1), cta, m.agent(COPY, warp), time, warps=warp)
    m.note(hazards, len(threads))
    m.copies.append([threads, m.copy_groups[threads], physical, data])


@form("cp.async.commit_group")
def _commit_copies(m: Machine, op: Instruction) -> None:
    m.copy_groups[m.threads()] += 1


@form("cp.async.wait_group", "cp.async.wait_all")
def _wait_for_copies(m: Machine, op: Instruction) -> None:
    """Complete all groups but the last few, and order them before the warps' next accesses."""
    threads = m.threads()
    if op.form.endswith("all"):
        m.copy_groups[threads] += 1
    pending = op.operands[0] if op.operands else 0
    waiting = np.zeros(m.size, bool)
    waiting[threads] = True
    complete = m.copy_groups - pending
    shared, in_flight = m.shared.view(np.uint32), []
    for copy in m.copies:
        owners, group, physical, data = copy
        lands = waiting[owners] & (group < complete[owners])
        shared[physical[lands, None] // 4 + np.arange(data.shape[1])] = data[lands]
        if not lands.all():
            in_flight.append([field[~lands] for field in copy])
    m.copies = in_flight
    cta, warp = _warps(m)
    time = complete.reshape(-1, 32).min(1).reshape(m.cta_count, m.warps)[cta, warp]
    m.clocks.order(cta, warp, m.agent(COPY, warp), time)


@form("mbarrier.init.shared{,::cta}.b64")
def _init_barrier(m: Machine, op: Instruction) -> None:
    count = op.operands[1]
    for cta, address, warp in barrier_addresses(m, op.operands[0]):
        clock = np.zeros((2, m.clocks.agents), np.int32)
        time = int(m.clocks.ordered[cta, warp, warp])
        m.barriers[cta, address] = MemoryBarrier(count, count, clock, (warp, time))


@form("mbarrier.inval.shared{,::cta}.b64")
def _invalidate_barrier(m: Machine, op: Instruction) -> None:
    for cta, address, warp in barrier_addresses(m, op.operands[0]):
        m.barrier(cta, address, warp)
        del m.barriers[cta, address]


@form("mbarrier.arrive{,.expect_tx}.shared{,::cta}.b64")
def _arrive(m: Machine, op: Instruction) -> None:
    # A state token may come before the address.
    index = next(i for i, operand in enumerate(op.operands) if isinstance(operand, Address))
    expected_bytes = m.array(op.operands[index + 1] if "expect_tx" in op.form else 0, _U32)
    addresses = barrier_addresses(m, op.operands[index])
    for (cta, address, warp), expected in zip(addresses, expected_bytes, strict=True):
        barrier = m.barrier(cta, address, warp)
        barrier.bytes += int(expected)
        m.arrive(barrier, m.clocks.release(cta, warp))


@form("mbarrier.{try_wait,test_wait}.parity.shared{,::cta}.b64")
def _wait_for_barrier(m: Machine, op: Instruction) -> None:
    """Test whether the phase of this parity is complete; otherwise the thread polls when no other can go on."""
    to, operand, parity = op.operands[:3]
    threads, phase = m.threads(), m.array(parity, _U32) & 1
    complete = np.zeros(len(threads), bool)
    for i, (cta, address, warp) in enumerate(barrier_addresses(m, operand)):
        barrier = m.barrier(cta, address, warp)
        complete[i] = barrier.phase != phase[i]
        if complete[i]:
            m.clocks.acquire(cta, warp, barrier.clock)
    m.polling[threads[~complete]] = True
    m.write(registers(to)[0], complete)


def barrier_addresses(m: Machine, operand: Operand) -> Iterator[tuple[int, int, int]]:
    """Iterate over CTA, address of an mbarrier and warp of every executing thread."""
    threads = m.threads()
    cta = m.cta[threads]
    address = m.physical(m.address(operand), 8, cta) - cta * m.shared_bytes
    return zip(cta.tolist(), address.tolist(), m.warp[threads].tolist(), strict=True)
