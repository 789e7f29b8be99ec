"""Matrices: ldmatrix, stmatrix, mma (PTX ISA 9.7.14), wgmma (9.7.15), tcgen05 (9.7.16); tiles of TMA (9.7.9.27)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .hazards import BULK, LOAD, STORE, TENSOR, UNSIGNED, Array, Shadow
from .instructions import bf16_to_fp32, half
from .machine import LOADING, POISON, Machine, form
from .memory import barrier_addresses, registers
from .ptx import Address, Instruction, Operand

_U32, _U64, _F32, _BOOL = np.dtype("u4"), np.dtype("u8"), np.dtype("f4"), np.dtype(bool)
_LANE = np.arange(32)
# Row and first column of a lane's elements in a fragment of eight rows and eight columns.
_ROW, _COLUMN = _LANE >> 2, 2 * (_LANE & 3)
_TMEM_COLUMNS = 512


def _to_fp32(bits: Array, dtype: str) -> Array:
    return bf16_to_fp32(bits) if dtype == "bf16" else bits.view(np.float16).astype(np.float32)


def _row_addresses(m: Machine, operand: Operand, matrices: int) -> tuple[Array, Array]:
    """Return threads and addresses of the rows of eight-by-eight matrices, flat `[warps · matrices · 8]`."""
    warps = m.whole_warps()
    address = m.address(operand).reshape(-1, 32)
    return warps[:, : 8 * matrices].reshape(-1), address[:, : 8 * matrices].reshape(-1)


@form("ldmatrix.sync.aligned.m8n8.{x1,x2,x4}{,.trans}.shared{,::cta}.b16")
def _load_matrix(m: Machine, op: Instruction) -> None:
    targets = registers(op.operands[0])
    threads, address = _row_addresses(m, op.operands[1], len(targets))
    rows = m.load_shared(address, 2, 8, threads).reshape(-1, len(targets), 8, 8)
    if ".trans" in op.form:
        rows = rows.swapaxes(2, 3)
    pairs = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, len(targets), 32)
    for i, target in enumerate(targets):
        m.write(target, pairs[:, i].reshape(-1))


@form("stmatrix.sync.aligned.m8n8.{x1,x2,x4}{,.trans}.shared{,::cta}.b16")
def _store_matrix(m: Machine, op: Instruction) -> None:
    sources = registers(op.operands[1])
    threads, address = _row_addresses(m, op.operands[0], len(sources))
    pairs = np.stack([m.array(source, _U32).reshape(-1, 32) for source in sources], 1)
    rows = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, len(sources), 8, 8)
    if ".trans" in op.form:
        rows = np.ascontiguousarray(rows.swapaxes(2, 3))
    m.store_shared(address, rows.reshape(-1, 8), threads)


@form(
    "mma.sync.aligned.m16n8k16.row.col.f32.{bf16.bf16,f16.f16}.f32",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
)
def _multiply(m: Machine, op: Instruction) -> None:
    targets, *sources = (registers(operand) for operand in op.operands)
    warps, dtype = len(m.whole_warps()), op.form.split(".")[7]
    a, b, c = (
        [m.array(register, _U32).reshape(warps, 32) for register in source] for source in sources
    )
    depth = 8 if dtype == "tf32" else 16
    x, y = np.empty((warps, 16, depth), np.float32), np.empty((warps, 8, depth), np.float32)
    _unpack_fragments(x, a, dtype, fragments_down=2)
    _unpack_fragments(y, b, dtype, fragments_down=1)
    product = x @ y.swapaxes(1, 2)
    # A lane's result depends on operands of all lanes of its warp.
    partial = [m.written(name) for source in sources for name in source if name in m.partial]
    written = np.ones(1, bool)
    if partial:
        written = np.logical_and.reduce(partial).reshape(-1, 32).all(1).repeat(32)
    for i, (target, addend) in enumerate(zip(targets, c, strict=True)):
        elements = product[:, _ROW + 8 * (i >> 1), _COLUMN + (i & 1)]
        m.write(target, (elements + addend.view(np.float32)).reshape(-1))
        m.mark(target, written)


def _unpack_fragments(
    matrix: Array, fragments: list[Array], dtype: str, *, fragments_down: int
) -> None:
    """Write fragments, one register a lane, to matrices `[warps, rows, columns]` in fp32."""
    for i, bits in enumerate(fragments):
        row, column = _ROW + 8 * (i % fragments_down), i // fragments_down
        if dtype == "tf32":
            truncated = (bits & np.uint32(0xFFFFE000)).view(np.float32)
            matrix[:, row, (_LANE & 3) + 4 * column] = truncated
        else:
            for n in (0, 1):
                matrix[:, row, _COLUMN + 8 * column + n] = _to_fp32(half(bits, n), dtype)


def _field(descriptor: int, first: int, bits: int) -> int:
    return (descriptor >> first) & ((1 << bits) - 1)


class _Gemm(NamedTuple):
    """Tensor cores at work for warps of a CTA: the agent and time of their accesses, as for `Shadow.read`."""

    cta: int
    agent: int
    time: int
    warps: Any

    @classmethod
    def next(cls, m: Machine, cta: int, warps: Any, first: int) -> _Gemm:
        """Return the next GEMM of a warp, or of the warpgroup that begins with it."""
        agent = m.agent(TENSOR, first)
        return cls(cta, agent, int(m.flight_counts[cta, agent]) + 1, warps)


_WGMMA_SWIZZLES = {1: 128, 2: 64, 3: 32}
_TCGEN05_SWIZZLES = {2: 128, 4: 64, 6: 32}


def _read_matrix(
    m: Machine,
    descriptor: int,
    swizzle: int | None,
    gemm: _Gemm,
    rows: int,
    dtype: str,
    *,
    transposed: bool,
) -> Array:
    """Read a matrix `[rows, 16]` in shared memory by its descriptor, with a swizzle of so many bytes."""
    start, leading, stride = (_field(descriptor, first, 14) << 4 for first in (0, 16, 32))
    if swizzle is None or _field(descriptor, 49, 3):
        m.fault(
            f"matrix descriptor {descriptor:#x} has no swizzle or a base offset, which are not emulated"
        )
    row, column = np.arange(rows)[:, None], np.arange(16)[None, :]
    if transposed:
        across = swizzle // 2
        offset = row // across * leading + row % across * 2
        offset = offset + column // 8 * stride + column % 8 * swizzle
    else:
        offset = row // 8 * stride + row % 8 * swizzle + column * 2
    address = _swizzle(start + offset, swizzle)
    physical = m.physical(address.reshape(-1), 2, gemm.cta)
    granules = np.unique(physical // m.granule)
    hazards = m.shadow.read(granules, gemm.cta, gemm.agent, gemm.time, warps=gemm.warps, proxy=True)
    m.note(hazards, len(granules))
    return _to_fp32(m.shared.view(np.uint16)[physical // 2].reshape(rows, 16), dtype)


def _swizzle(address: Array, swizzle: int) -> Array:
    """Exchange 16-byte chunks of an address within spans of 32, 64 or 128 bytes; 16 for none."""
    return address ^ (((address >> 7) & (swizzle // 16 - 1)) << 4)


def _accumulator_elements(count: int) -> tuple[Array, Array]:
    """Return rows and columns `[count, 4 warps, 32]` that a warpgroup's accumulators of 64 rows hold."""
    register, warp = np.arange(count)[:, None, None], np.arange(4)[None, :, None]
    row = 16 * warp + _ROW + 8 * ((register >> 1) & 1)
    return row, 8 * (register >> 2) + _COLUMN + (register & 1)


@form(
    *(
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{{bf16.bf16,f16.f16}}"
        for n in range(8, 257, 8)
    )
)
def _multiply_warpgroup(m: Machine, op: Instruction) -> None:
    """Multiply at once; the accumulators stay in flight until their group is waited for."""
    to, a, b, scale, *flags = op.operands
    targets, fragments = registers(to), a if isinstance(a, tuple) else ()
    width, threads = 2 * len(targets), m.whole_warps().reshape(-1)
    if len(threads) % 128 or (threads.reshape(-1, 128)[:, 0] % 128).any():
        m.fault("some warps of a warpgroup do not execute an instruction that all must")
    groups = threads.reshape(-1, 128)
    row, column = _accumulator_elements(len(targets))
    accumulate = m.use(scale, _BOOL).reshape(-1, 128)[:, 0]
    if m.unfenced and not m.unfenced.isdisjoint((*targets, *fragments)):
        m.hazard("wgmma uses registers that were accessed after wgmma.fence", len(threads))
    # GEMMs may follow each other in the same accumulators.
    busy, m.busy, unfenced, m.unfenced = m.busy, {}, m.unfenced, None
    previous = np.zeros((len(targets), len(threads)), np.float32)
    if accumulate.any():
        previous = np.stack([m.array(target, _F32) for target in targets])
    m.busy = busy
    left_registers = [m.array(register, _U32).reshape(-1, 4, 32) for register in fragments]
    left = None if fragments else m.use(a, _U64)
    right = m.use(b, _U64).reshape(-1, 128)[:, 0]
    transposed = [bool(flag) for flag in flags[2:]]
    if flags[:2] != [1, 1]:
        m.fault("factors of -1 are not emulated")
    results = np.empty_like(previous)
    for i, group in enumerate(groups):
        warps = m.warp[group[::32], None]
        gemm = _Gemm.next(m, int(m.cta[group[0]]), warps, int(warps[0, 0]))
        x = np.empty((4, 16, 16), np.float32)
        if left is None:
            group_registers = [bits[i] for bits in left_registers]
            _unpack_fragments(x, group_registers, op.type, fragments_down=2)
            x = x.reshape(64, 16)
        else:
            descriptor = int(left[128 * i])
            swizzle = _WGMMA_SWIZZLES.get(descriptor >> 62)
            x = _read_matrix(m, descriptor, swizzle, gemm, 64, op.type, transposed=transposed[0])
        descriptor = int(right[i])
        swizzle = _WGMMA_SWIZZLES.get(descriptor >> 62)
        y = _read_matrix(m, descriptor, swizzle, gemm, width, op.type, transposed=transposed[-1])
        product = (x @ y.T)[row, column].reshape(len(targets), 128)
        lanes = slice(128 * i, 128 * i + 128)
        results[:, lanes] = product + (previous[:, lanes] if accumulate[i] else 0)
    m.busy = {}
    m.write_all(targets, results)
    m.busy, m.unfenced = busy, unfenced
    in_flight = _committed_groups(m, threads) + 1
    for uses, names in ((m.busy, targets), (m.read_in_flight, fragments)):
        for name in names:
            uses.setdefault(name, np.zeros(m.size, np.int64))[threads] = in_flight


def _warpgroup_agents(m: Machine, threads: Array) -> tuple[Array, Array]:
    """Return CTA and tensor-core agent of each thread's warpgroup."""
    return m.cta[threads], m.agent(TENSOR, m.warp[threads] & ~3)


def _committed_groups(m: Machine, threads: Array) -> Array:
    """Return the number of groups of GEMMs that each thread's warpgroup has committed."""
    return m.flight_counts[_warpgroup_agents(m, threads)]


@form("wgmma.fence.sync.aligned")
def _fence_registers(m: Machine, op: Instruction) -> None:
    if m.unfenced is not None:
        m.unfenced.clear()


@form("wgmma.commit_group.sync.aligned")
def _commit_gemms(m: Machine, op: Instruction) -> None:
    m.flight_counts[_warpgroup_agents(m, m.threads()[::128])] += 1


@form("wgmma.wait_group.sync.aligned")
def _wait_for_gemms(m: Machine, op: Instruction) -> None:
    pending, threads = op.operands[0], m.threads()
    complete = _committed_groups(m, threads) - pending
    m.release(lambda groups: groups <= complete)
    cta, agent = _warpgroup_agents(m, threads)
    m.clocks.order(cta, m.warp[threads], agent, complete)


@form(
    "cp.async.bulk.tensor.{2d,3d,4d,5d}.shared::{cta,cluster}.global.mbarrier::complete_tx::bytes"
)
def _copy_tile(m: Machine, op: Instruction) -> None:
    """Copy a tile of a tensor by its descriptor; elements beyond the tensor are zeros."""
    to, (source, coordinates), barrier = op.operands[:3]
    destinations = m.address(to)
    descriptors = m.array(source.base if isinstance(source, Address) else source, _U64)
    start = [m.array(coordinate, np.dtype("i4")) for coordinate in coordinates][::-1]
    for i, (cta, address, warp) in enumerate(barrier_addresses(m, barrier)):
        tile = m.descriptors.get(int(descriptors[i]))
        if tile is None:
            m.fault(f"{int(descriptors[i]):#x} is not a tensor descriptor of this launch")
        size = tile.element_bytes
        data = _load_tile(m, tile, [int(coordinate[i]) for coordinate in start])
        first = int(destinations[i])
        if first % (8 * max(tile.swizzle, 2)):
            m.fault(
                f"a tile with a swizzle of {tile.swizzle} bytes begins at {first}, which is not aligned"
            )
        addresses = _swizzle(first + size * np.arange(len(data)), max(tile.swizzle, 16))
        physical = m.physical(addresses, size, cta)

        def land(physical: Array = physical, data: Array = data, size: int = size) -> None:
            m.shared.view(UNSIGNED[size])[physical // size] = data

        granules, agent = np.unique(physical // m.granule), m.agent(BULK, warp)
        mbarrier = m.barrier(cta, address, warp)
        time = m.fly(cta, agent, mbarrier, land=land, transferred=len(data) * size)
        m.note(m.shadow.write(granules, cta, agent, time, warps=warp), len(granules))


def _load_tile(m: Machine, tile: Any, start: list[int]) -> Array:
    """Load the elements of a tile, flat; zeros beyond the tensor."""
    ranges = (np.arange(n) + first for n, first in zip(tile.box, start, strict=True))
    offset, inside = np.zeros(tile.box, np.int64), np.ones(tile.box, bool)
    indices = np.meshgrid(*ranges, indexing="ij")
    for index, n, stride in zip(indices, tile.shape, tile.strides, strict=True):
        offset += index * stride
        inside &= (index >= 0) & (index < n)
    data = np.zeros(tile.box, UNSIGNED[tile.element_bytes])
    addresses = tile.address + tile.element_bytes * offset[inside]
    data[inside] = m.load(addresses, tile.element_bytes, access="bulk copy")[:, 0]
    return data.reshape(-1)


# tcgen05: tensor memory has 128 lanes of 512 columns of 32 bits; each warp of four accesses a quarter of the lanes.


@form("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32")
def _allocate(m: Machine, op: Instruction) -> None:
    threads = m.whole_warps()[:, 0]
    columns = int(m.use(op.operands[1], _U32)[0])
    if m.tensor_memory is None:
        content = np.full((m.cta_count, 128, 2 * _TMEM_COLUMNS), POISON, np.uint16)
        m.tensor_memory = content.view(np.uint32)
        m.tensor_shadow = Shadow(m.clocks, m.cta_count, 8 * _TMEM_COLUMNS)
        m.tensor_columns = np.zeros(m.cta_count, np.int64)
    first = m.tensor_columns[m.cta[threads]].astype(np.uint32)
    m.tensor_columns[m.cta[threads]] += columns
    if (m.tensor_columns > _TMEM_COLUMNS).any():
        m.fault(f"more than {_TMEM_COLUMNS} columns of tensor memory are allocated")
    m.store_shared(m.address(op.operands[0])[::32], first[:, None], threads)


@form(
    "tcgen05.dealloc.cta_group::1.sync.aligned.b32",
    "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned",
)
def _deallocate(m: Machine, op: Instruction) -> None:
    if "dealloc." in op.form:
        m.tensor_columns[m.cta[m.threads()[::32]]] -= int(m.use(op.operands[1], _U32)[0])
        if (m.tensor_columns < 0).any():
            m.fault("more columns of tensor memory are deallocated than were allocated")


def _tensor_elements(
    m: Machine, op: Instruction, operand: Operand, count: int, split: int
) -> tuple[Array, Array, Array]:
    """Return CTA `[threads]`, lane `[threads]` and columns `[threads, count]` that a load or store accesses."""
    threads, address = m.whole_warps().reshape(-1), m.address(operand)
    lane, column = address >> 16, address & 0xFFFF
    quarter = m.warp[threads] % 4 * 32
    if (lane // 32 * 32 != quarter).any():
        m.fault("a warp accesses lanes of tensor memory that belong to another")
    thread_lane = m.lane[threads].astype(np.int64)
    if "16x32bx2" in op.form:
        lane, column = lane + thread_lane % 16, column + thread_lane // 16 * split
    else:
        lane = lane + thread_lane
    columns = column[:, None] + np.arange(count)
    if (columns >= m.tensor_columns[m.cta[threads], None]).any():
        m.fault("access of tensor memory that is not allocated")
    return m.cta[threads], lane, columns


def _tensor_granules(cta: Array, lane: Array, columns: Array) -> Array:
    # Two matrices of 64 rows may share columns: in the lower 16 lanes of each quarter, and in the upper.
    return ((cta * 8 + lane // 16)[:, None] * _TMEM_COLUMNS + columns).reshape(-1)


@form("tcgen05.ld.sync.aligned.{32x32b,16x32bx2}.{x1,x2,x4,x8,x16,x32,x64,x128}.b32")
def _load_tensor(m: Machine, op: Instruction) -> None:
    """Load to registers that are in flight until `wait::ld`: no instruction may access them."""
    to, source, *split = op.operands
    targets, threads = registers(to), m.threads()
    cta, lane, columns = _tensor_elements(m, op, source, len(targets), split[0] if split else 0)
    granules = _tensor_granules(cta, lane, columns)
    # Loads of what was never written are common where a loop may have no iteration: they leave registers partial.
    written = m.tensor_shadow.writer[granules] >= 0
    warp = np.repeat(m.warp[threads], len(targets))[written]
    granule_cta = np.repeat(cta, len(targets))[written]
    agent = m.agent(LOAD, warp)
    time = m.flight_counts[granule_cta, agent] + 1
    hazards = m.tensor_shadow.read(granules[written], granule_cta, agent, time, warps=warp)
    m.note(hazards, len(threads))
    loaded = m.tensor_memory[cta[:, None], lane[:, None], columns]
    written = written.reshape(loaded.shape)
    for i, target in enumerate(targets):
        m.write(target, loaded[:, i])
        m.mark(target, written[:, i])
        m.busy.setdefault(target, np.zeros(m.size, np.int64))[threads] = LOADING


@form("tcgen05.st.sync.aligned.{32x32b,16x32bx2}.{x1,x2,x4,x8,x16,x32,x64,x128}.b32")
def _store_tensor(m: Machine, op: Instruction) -> None:
    """Store to tensor memory; in flight until `wait::st`, like an asynchronous copy of the warp."""
    to, *split, sources = op.operands
    values = np.stack([m.array(source, _U32) for source in registers(sources)], 1)
    count = values.shape[1]
    cta, lane, columns = _tensor_elements(m, op, to, count, split[0] if split else 0)
    warp, granule_cta = np.repeat(m.warp[m.threads()], count), np.repeat(cta, count)
    agent = m.agent(STORE, warp)
    time = m.flight_counts[granule_cta, agent] + 1
    granules = _tensor_granules(cta, lane, columns)
    m.tensor_shadow.order_agent(granules, agent)
    m.note(m.tensor_shadow.write(granules, granule_cta, agent, time, warps=warp), len(cta))
    m.tensor_memory[cta[:, None], lane[:, None], columns] = values


@form("tcgen05.wait::ld.sync.aligned", "tcgen05.wait::st.sync.aligned")
def _wait_for_tensor(m: Machine, op: Instruction) -> None:
    threads = m.threads()
    cta, warp = m.cta[threads[::32]], m.warp[threads[::32]]
    stores = "::st" in op.form
    agent = m.agent(STORE if stores else LOAD, warp)
    m.flight_counts[cta, agent] += 1
    m.clocks.ordered[cta, warp, agent] = m.flight_counts[cta, agent]
    if not stores:
        m.settle()


@form("tcgen05.mma.cta_group::1.kind::f16")
def _multiply_tensor(m: Machine, op: Instruction) -> None:
    """Multiply for one thread; the result is in flight until a commit arrives at its mbarrier."""
    to, a, b, description, add = op.operands[:5]
    threads, target = m.threads(), m.address(to)
    right, descriptions = m.use(b, _U64), m.use(description, _U32)
    accumulate = m.use(add, _BOOL)
    in_tensor_memory = isinstance(a, Address)
    left = m.address(a) if in_tensor_memory else m.use(a, _U64)
    for i, thread in enumerate(threads):
        cta, warp, bits = int(m.cta[thread]), int(m.warp[thread]), int(descriptions[i])
        gemm = _Gemm.next(m, cta, warp, warp)
        # fp32 sums of two operands of one type; none of them negated, sparse or saturated.
        dtype = _field(bits, 7, 3)
        if bits & 0x607F != 0x10 or dtype != _field(bits, 10, 3) or dtype > 1:
            m.fault(f"products described by {bits:#x} are not emulated")
        dtype = ("f16", "bf16")[dtype]
        rows, width = _field(bits, 24, 5) << 4, _field(bits, 17, 6) << 3
        lane, column = int(target[i]) >> 16, int(target[i]) & 0xFFFF
        # 64 rows are in 16 lanes of each quarter.
        row = np.arange(rows)
        lanes = lane + (row if rows == 128 else row // 16 * 32 + row % 16)
        if in_tensor_memory:
            first = int(left[i]) & 0xFFFF
            left_lanes = (int(left[i]) >> 16) + lanes - lane
            words = m.tensor_memory[cta, left_lanes, first : first + 8]
            x = _to_fp32(np.ascontiguousarray(words).view(np.uint16), dtype)
            _access_tensor(m, gemm, m.tensor_shadow.read, lanes, first, 8)
        else:
            x = _read_tcgen05(m, int(left[i]), gemm, rows, dtype, transposed=bool(bits >> 15 & 1))
        y = _read_tcgen05(m, int(right[i]), gemm, width, dtype, transposed=bool(bits >> 16 & 1))
        accumulators = m.tensor_memory.view(np.float32)[cta]
        result = x @ y.T
        if accumulate[i]:
            result = result + accumulators[lanes, column : column + width]
        _access_tensor(m, gemm, m.tensor_shadow.write, lanes, column, width)
        accumulators[lanes, column : column + width] = result


def _read_tcgen05(
    m: Machine, descriptor: int, gemm: _Gemm, rows: int, dtype: str, *, transposed: bool
) -> Array:
    swizzle = _TCGEN05_SWIZZLES.get(_field(descriptor, 61, 3))
    return _read_matrix(m, descriptor, swizzle, gemm, rows, dtype, transposed=transposed)


def _access_tensor(
    m: Machine, gemm: _Gemm, access: Any, lanes: Array, column: int, width: int
) -> None:
    """Record a GEMM's read or write of tensor memory."""
    halves = np.unique(lanes // 16) * 16
    columns = column + np.arange(width)[None]
    granules = _tensor_granules(np.full(len(halves), gemm.cta), halves, columns)
    m.tensor_shadow.order_agent(granules, gemm.agent)
    hazards = access(granules, gemm.cta, gemm.agent, gemm.time, warps=gemm.warps)
    m.note(hazards, len(granules))


@form("tcgen05.commit.cta_group::1.mbarrier::arrive::one{,.shared::cluster}.b64")
def _commit_tensor(m: Machine, op: Instruction) -> None:
    """Let all GEMMs of the thread so far arrive at an mbarrier when they are complete."""
    for cta, address, warp in barrier_addresses(m, op.operands[0]):
        m.fly(cta, m.agent(TENSOR, warp), m.barrier(cta, address, warp), arrivals=1)
