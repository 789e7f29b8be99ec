"""Matrices: ldmatrix, stmatrix, mma (PTX ISA 9.7.14), wgmma (9.7.15), tcgen05 (9.7.16); tiles of TMA (9.7.9.27)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .hazards import BULK, LOAD, STORE, TENSOR, Array, Shadow
from .instructions import bf16_to_fp32, half
from .machine import LOADING, POISON, UNSIGNED, Machine, form
from .memory import barrier_places, registers
from .ptx import Instruction, Operand

_U32, _U64, _F32, _BOOL = np.dtype("u4"), np.dtype("u8"), np.dtype("f4"), np.dtype(bool)
_LANE = np.arange(32)
_ROW, _COLUMN = (
    _LANE >> 2,
    2 * (_LANE & 3),
)  # of a lane's elements in a fragment of eight rows and eight columns
_TMEM_COLUMNS = 512


def _floats(bits: Array, kind: str) -> Array:
    return bf16_to_fp32(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def _matrices(m: Machine, operand: Operand, count: int) -> tuple[Array, Array]:
    """Threads that give the addresses of the eight rows of each matrix `[warps, count, 8]`, and these addresses."""
    warps = m.whole_warps()
    address = m.address(operand).reshape(-1, 32)
    return warps[:, : 8 * count].reshape(-1, count, 8), address[:, : 8 * count].reshape(
        -1, count, 8
    )


@form("ldmatrix.sync.aligned.m8n8.{x1,x2,x4}{,.trans}.shared{,::cta}.b16")
def _load_matrix(m: Machine, each: Instruction) -> None:
    targets = registers(each.operands[0])
    threads, address = _matrices(m, each.operands[1], len(targets))
    rows = m.load_shared(address.reshape(-1), 2, 8, threads.reshape(-1)).reshape(
        -1, len(targets), 8, 8
    )
    rows = rows.swapaxes(2, 3) if ".trans" in each.form else rows
    pairs = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, len(targets), 32)
    for number, target in enumerate(targets):
        m.write(target, pairs[:, number].reshape(-1))


@form("stmatrix.sync.aligned.m8n8.{x1,x2,x4}{,.trans}.shared{,::cta}.b16")
def _store_matrix(m: Machine, each: Instruction) -> None:
    sources = registers(each.operands[1])
    threads, address = _matrices(m, each.operands[0], len(sources))
    pairs = np.stack([m.array(source, _U32).reshape(-1, 32) for source in sources], 1)
    rows = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, len(sources), 8, 8)
    rows = np.ascontiguousarray(rows.swapaxes(2, 3) if ".trans" in each.form else rows)
    m.store_shared(address.reshape(-1), rows.reshape(-1, 8), threads.reshape(-1))


@form(
    "mma.sync.aligned.m16n8k16.row.col.f32.{bf16.bf16,f16.f16}.f32",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
)
def _multiply(m: Machine, each: Instruction) -> None:
    to, *sources = (registers(operand) for operand in each.operands)
    warps, kind = len(m.whole_warps()), each.form.split(".")[7]
    a, b, c = ([m.array(part, _U32).reshape(warps, 32) for part in source] for source in sources)
    depth = 8 if kind == "tf32" else 16
    x, y = np.empty((warps, 16, depth), np.float32), np.empty((warps, 8, depth), np.float32)
    for matrix, parts, tall in ((x, a, 2), (y, b, 1)):
        for number, bits in enumerate(parts):
            row, column = _ROW + 8 * (number % tall), number // tall
            if kind == "tf32":
                matrix[:, row, (_LANE & 3) + 4 * column] = (bits & np.uint32(0xFFFFE000)).view(
                    np.float32
                )
            else:
                for i in (0, 1):
                    matrix[:, row, _COLUMN + 8 * column + i] = _floats(half(bits, i), kind)
    product = x @ y.swapaxes(1, 2)
    incomplete = [
        m.partial[part][m.threads()] for source in sources for part in source if part in m.partial
    ]
    known = (
        np.logical_and.reduce(incomplete).reshape(-1, 32).all(1).repeat(32)
        if incomplete
        else np.ones(1, bool)
    )
    for number, target in enumerate(to):
        found = product[:, _ROW + 8 * (number >> 1), _COLUMN + (number & 1)] + c[number].view(
            np.float32
        )
        m.write(target, found.reshape(-1))
        m.mark(target, known)


def _field(descriptor: int, first: int, bits: int) -> int:
    return (descriptor >> first) & ((1 << bits) - 1)


class _Product(NamedTuple):
    """Tensor cores that work for warps of a CTA: what reads, as `Shadow.read` takes it."""

    cta: int
    agent: int
    at: int  # the number of the product
    warps: Any

    @classmethod
    def of(cls, m: Machine, cta: int, warps: Any, first: int) -> _Product:
        """Those of a warp, or of the warpgroup that begins with it, for their next product."""
        agent = m.agent(TENSOR, first)
        return cls(cta, agent, int(m.flight_numbers[cta, agent]) + 1, warps)


def _tile(
    m: Machine,
    descriptor: int,
    product: _Product,
    rows: int,
    kind: str,
    *,
    transposed: bool,
    wide: bool,
) -> Array:
    """A matrix `[rows, 16]` in shared memory, at a descriptor, and its read recorded.

    `wide`: a descriptor of tcgen05, with three bits for the swizzle.
    """
    start, leading, stride = (_field(descriptor, first, 14) << 4 for first in (0, 16, 32))
    mode = (
        {2: 128, 4: 64, 6: 32}.get(_field(descriptor, 61, 3))
        if wide
        else {1: 128, 2: 64, 3: 32}.get(descriptor >> 62)
    )
    if mode is None or _field(descriptor, 49, 3):
        m.fault(
            f"matrix descriptor {descriptor:#x} has no swizzle or a base offset, which are not emulated"
        )
    row, column = np.arange(rows)[:, None], np.arange(16)[None, :]
    if transposed:
        across = mode // 2
        place = (
            row // across * leading + column // 8 * stride + column % 8 * mode + row % across * 2
        )
    else:
        place = row // 8 * stride + row % 8 * mode + column * 2
    address = start + place
    address ^= ((address >> 7) & (mode // 16 - 1)) << 4
    physical = m.physical(address.reshape(-1), 2, product.cta)
    granules = np.unique(physical // m.granule)
    m.note(m.shadow.read(granules, *product[:3], warps=product.warps, proxy=True), len(granules))
    return _floats(m.shared.view(np.uint16)[physical // 2].reshape(rows, 16), kind)


def _fragments(count: int) -> tuple[Array, Array]:
    """Rows and columns `[count, 4 warps, 32]` that registers of accumulators of 64 rows hold."""
    number, warp = np.arange(count)[:, None, None], np.arange(4)[None, :, None]
    return 16 * warp + _ROW + 8 * ((number >> 1) & 1), 8 * (number >> 2) + _COLUMN + (number & 1)


@form(
    *(
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{{bf16.bf16,f16.f16}}"
        for n in range(8, 257, 8)
    )
)
def _multiply_warpgroup(m: Machine, each: Instruction) -> None:
    """The product of a warpgroup: computed here, in flight until its group is waited for."""
    to, a, b, scale, *flags = each.operands
    targets, kind = registers(to), each.form.rpartition(".")[2]
    width, threads = 2 * len(targets), m.whole_warps().reshape(-1)
    if len(threads) % 128 or (threads.reshape(-1, 128)[:, 0] % 128).any():
        m.fault("some warps of a warpgroup do not execute an instruction that all must")
    groups = threads.reshape(-1, 128)
    row, column = _fragments(len(targets))
    add = m.use(scale, _BOOL).reshape(-1, 128)[:, 0]
    if m.unfenced and not m.unfenced.isdisjoint((*targets, *(a if isinstance(a, tuple) else ()))):
        m.hazard("wgmma uses registers that were accessed after wgmma.fence", len(threads))
    # Products may follow each other in the same registers.
    busy, m.busy, unfenced, m.unfenced = m.busy, {}, m.unfenced, None
    previous = np.stack(
        [
            m.array(target, _F32) if add.any() else np.zeros(len(threads), np.float32)
            for target in targets
        ]
    )
    m.busy = busy
    parts = [m.array(part, _U32).reshape(-1, 4, 32) for part in a] if isinstance(a, tuple) else []
    left = m.use(a, _U64) if not parts else None
    right = m.use(b, _U64).reshape(-1, 128)[:, 0]
    transposed = [bool(flag) for flag in flags[2:]]
    if flags[:2] != [1, 1]:
        m.fault("factors of -1 are not emulated")
    found = np.empty_like(previous)
    for number, members in enumerate(groups):
        warps = m.warp[members[::32], None]
        product = _Product.of(m, int(m.cta[members[0]]), warps, int(warps[0, 0]))
        if left is None:
            x = np.empty((64, 16), np.float32)
            for place, part in enumerate(parts):
                for i in (0, 1):
                    rows = 16 * np.arange(4)[:, None] + _ROW + 8 * (place & 1)
                    x[rows, _COLUMN + 8 * (place >> 1) + i] = _floats(half(part[number], i), kind)
        else:
            x = _tile(
                m, int(left[128 * number]), product, 64, kind, transposed=transposed[0], wide=False
            )
        y = _tile(
            m, int(right[number]), product, width, kind, transposed=transposed[-1], wide=False
        )
        total = (x @ y.T)[row, column].reshape(len(targets), 128)
        chosen = slice(128 * number, 128 * number + 128)
        found[:, chosen] = total + (previous[:, chosen] if add[number] else 0)
    m.busy = {}
    m.write_all(targets, found)
    m.busy, m.unfenced = busy, unfenced
    for uses, names in ((m.busy, targets), (m.read_in_flight, a if parts else ())):
        for name in names:
            uses.setdefault(name, np.zeros(m.size, np.int64))[threads] = _flights(m, threads) + 1


def _warpgroup(m: Machine, threads: Array) -> tuple[Array, Array]:
    """CTA and tensor cores of each thread's warpgroup."""
    return m.cta[threads], m.agent(TENSOR, m.warp[threads] & ~3)


def _flights(m: Machine, threads: Array) -> Array:
    """How many groups of products the warpgroup of each thread has committed."""
    return m.flight_numbers[_warpgroup(m, threads)]


@form("wgmma.fence.sync.aligned")
def _fence_registers(m: Machine, each: Instruction) -> None:
    if m.unfenced is not None:
        m.unfenced.clear()


@form("wgmma.commit_group.sync.aligned")
def _commit_products(m: Machine, each: Instruction) -> None:
    m.flight_numbers[_warpgroup(m, m.threads()[::128])] += 1


@form("wgmma.wait_group.sync.aligned")
def _wait_for_products(m: Machine, each: Instruction) -> None:
    pending, threads = each.operands[0], m.threads()
    done = _flights(m, threads) - pending
    m.release(lambda groups: groups <= done)
    cta, agent = _warpgroup(m, threads)
    m.clocks.learn(cta, m.warp[threads], agent, done)


@form(
    "cp.async.bulk.tensor.{2d,3d,4d,5d}.shared::{cta,cluster}.global.mbarrier::complete_tx::bytes"
)
def _copy_tile(m: Machine, each: Instruction) -> None:
    """A tile of a tensor by its descriptor; elements beyond the tensor are zeros."""
    to, (source, coordinates), barrier = each.operands[:3]
    places = m.address(to)
    names = m.array(source.base if hasattr(source, "base") else source, _U64)
    start = [m.array(part, np.dtype("i4")) for part in coordinates][::-1]
    for number, (cta, address, warp) in enumerate(barrier_places(m, barrier)):
        tile = m.descriptors.get(int(names[number]))
        if tile is None:
            m.fault(f"{int(names[number]):#x} is not a tensor descriptor of this launch")
        size, box = tile.element_bytes, tile.box
        ranges = (np.arange(n) + int(first[number]) for n, first in zip(box, start, strict=True))
        index = np.meshgrid(*ranges, indexing="ij")
        inside = np.all(
            [(i >= 0) & (i < n) for i, n in zip(index, tile.shape, strict=True)], 0
        ).reshape(-1)
        offset = np.add.reduce([i * s for i, s in zip(index, tile.strides, strict=True)]).reshape(
            -1
        )
        data = np.zeros(len(inside), UNSIGNED[size])
        data[inside] = m.load(tile.address + size * offset[inside], size, what="bulk copy")[:, 0]
        first, element = int(places[number]), np.arange(len(data))
        if first % (8 * max(tile.swizzle, 2)):
            m.fault(
                f"a tile with a swizzle of {tile.swizzle} bytes begins at {first}, which is not aligned"
            )
        place = first + size * element
        place ^= ((place >> 7) & (max(tile.swizzle, 16) // 16 - 1)) << 4
        physical = m.physical(place, size, cta)
        granules, agent = np.unique(physical // m.granule), m.agent(BULK, warp)

        def land(physical: Array = physical, data: Array = data, size: int = size) -> None:
            m.shared.view(UNSIGNED[size])[physical // size] = data

        at = m.fly(
            cta, agent, m.barrier(cta, address, warp), land=land, transferred=len(data) * size
        )
        m.note(m.shadow.write(granules, cta, agent, at, warps=warp), len(granules))


# tcgen05: tensor memory has 128 lanes of 512 columns of 32 bits; each warp of four sees a quarter of the lanes.


@form("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32")
def _allocate(m: Machine, each: Instruction) -> None:
    threads = m.whole_warps()[:, 0]
    columns = int(m.use(each.operands[1], _U32)[0])
    if m.tensor_memory is None:
        m.tensor_memory = np.full((m.cta_count, 128, 2 * _TMEM_COLUMNS), POISON, np.uint16).view(
            np.uint32
        )
        m.tensor_shadow = Shadow(m.clocks, m.cta_count, 8 * _TMEM_COLUMNS)
        m.tensor_columns = np.zeros(m.cta_count, np.int64)
    first = m.tensor_columns[m.cta[threads]].astype(np.uint32)
    m.tensor_columns[m.cta[threads]] += columns
    if (m.tensor_columns > _TMEM_COLUMNS).any():
        m.fault(f"more than {_TMEM_COLUMNS} columns of tensor memory are allocated")
    m.store_shared(m.address(each.operands[0])[::32], first[:, None], threads)


@form(
    "tcgen05.dealloc.cta_group::1.sync.aligned.b32",
    "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned",
)
def _deallocate(m: Machine, each: Instruction) -> None:
    if "dealloc." in each.form:
        m.tensor_columns[m.cta[m.threads()[::32]]] -= int(m.use(each.operands[1], _U32)[0])
        if (m.tensor_columns < 0).any():
            m.fault("more columns of tensor memory are deallocated than were allocated")


def _tensor_places(
    m: Machine, each: Instruction, operand: Operand, count: int, split: int
) -> tuple[Array, Array, Array]:
    """CTA `[threads]`, lane `[threads]` and columns `[threads, count]` of a load or store of tensor memory."""
    threads, address = m.whole_warps().reshape(-1), m.address(operand)
    lane, column = address >> 16, address & 0xFFFF
    quarter = m.warp[threads] % 4 * 32
    if (lane // 32 * 32 != quarter).any():
        m.fault("a warp accesses lanes of tensor memory that belong to another")
    own = m.lane[threads].astype(np.int64)
    if "16x32bx2" in each.form:
        lane, column = lane + own % 16, column + own // 16 * split
    else:
        lane = lane + own
    columns = column[:, None] + np.arange(count)
    if (columns >= m.tensor_columns[m.cta[threads], None]).any():
        m.fault("access of tensor memory that is not allocated")
    return m.cta[threads], lane, columns


def _tensor_granules(cta: Array, lane: Array, columns: Array) -> Array:
    # Matrices of 64 rows share columns: one in the lower 16 lanes of each quarter, one in the upper.
    return ((cta * 8 + lane // 16)[:, None] * _TMEM_COLUMNS + columns).reshape(-1)


@form("tcgen05.ld.sync.aligned.{32x32b,16x32bx2}.{x1,x2,x4,x8,x16,x32,x64,x128}.b32")
def _load_tensor(m: Machine, each: Instruction) -> None:
    """In flight until `wait::ld`: no instruction may touch the registers."""
    targets, threads = registers(each.operands[0]), m.threads()
    split = (*each.operands, 0)[2]
    cta, lane, columns = _tensor_places(m, each, each.operands[1], len(targets), split)
    granules, warp = _tensor_granules(cta, lane, columns), np.repeat(m.warp[threads], len(targets))
    # Loads of what was never written are common where a loop may have no iteration: the registers are incomplete.
    written = m.tensor_shadow.writer[granules] >= 0
    warp, of_cta = warp[written], np.repeat(cta, len(targets))[written]
    agent = m.agent(LOAD, warp)
    at = m.flight_numbers[of_cta, agent] + 1
    m.note(m.tensor_shadow.read(granules[written], of_cta, agent, at, warps=warp), len(threads))
    loaded = m.tensor_memory[cta[:, None], lane[:, None], columns]
    for target, values, known in zip(
        targets, loaded.T, written.reshape(loaded.shape).T, strict=True
    ):
        m.write(target, values)
        m.mark(target, known)
        m.busy.setdefault(target, np.zeros(m.size, np.int64))[threads] = LOADING


@form("tcgen05.st.sync.aligned.{32x32b,16x32bx2}.{x1,x2,x4,x8,x16,x32,x64,x128}.b32")
def _store_tensor(m: Machine, each: Instruction) -> None:
    """In flight until `wait::st`, as an asynchronous copy of the warp."""
    places = [*each.operands]
    sources = places.pop()
    values = np.stack([m.array(source, _U32) for source in registers(sources)], 1)
    split = (*places, 0)[1]
    cta, lane, columns = _tensor_places(m, each, places[0], values.shape[1], split)
    warp = np.repeat(m.warp[m.threads()], values.shape[1])
    agent, cta_of = m.agent(STORE, warp), np.repeat(cta, values.shape[1])
    at = m.flight_numbers[cta_of, agent] + 1
    granules = _tensor_granules(cta, lane, columns)
    _forget_own(m.tensor_shadow, granules, agent)
    m.note(m.tensor_shadow.write(granules, cta_of, agent, at, warps=warp), len(cta))
    m.tensor_memory[cta[:, None], lane[:, None], columns] = values


@form("tcgen05.wait::ld.sync.aligned", "tcgen05.wait::st.sync.aligned")
def _wait_for_tensor(m: Machine, each: Instruction) -> None:
    threads = m.threads()
    cta, warp = m.cta[threads[::32]], m.warp[threads[::32]]
    stores = "::st" in each.form
    agent = m.agent(STORE if stores else LOAD, warp)
    m.flight_numbers[cta, agent] += 1
    m.clocks.known[cta, warp, agent] = m.flight_numbers[cta, agent]
    if not stores:
        m.settle()


@form("tcgen05.mma.cta_group::1.kind::f16")
def _multiply_tensor(m: Machine, each: Instruction) -> None:
    """By one thread: the product is in flight until a commit arrives at its barrier."""
    to, a, b, description, add = each.operands[:5]
    threads, target = m.threads(), m.address(to)
    right, what = m.use(b, _U64), m.use(description, _U32)
    adds = m.use(add, _BOOL)
    left = m.address(a) if hasattr(a, "base") else m.use(a, _U64)
    for number, thread in enumerate(threads):
        cta, warp, bits = int(m.cta[thread]), int(m.warp[thread]), int(what[number])
        product = _Product.of(m, cta, warp, warp)
        # fp32 sums, two operands of one type, and none of them negated, sparse or saturated.
        if (
            bits & 0x607F != 0x10
            or _field(bits, 7, 3) != _field(bits, 10, 3)
            or _field(bits, 7, 3) > 1
        ):
            m.fault(f"products described by {bits:#x} are not emulated")
        rows, width = _field(bits, 24, 5) << 4, _field(bits, 17, 6) << 3
        kind = ("f16", "bf16")[_field(bits, 7, 3)]
        lane, column = int(target[number]) >> 16, int(target[number]) & 0xFFFF
        # 64 rows lie in 16 lanes of each quarter.
        lanes = lane + (
            np.arange(rows) if rows == 128 else np.arange(64) // 16 * 32 + np.arange(64) % 16
        )
        if hasattr(a, "base"):
            first = int(left[number]) & 0xFFFF
            words = m.tensor_memory[
                cta, (int(left[number]) >> 16) + lanes - lane, first : first + 8
            ]
            x = _floats(np.ascontiguousarray(words).view(np.uint16), kind)
            _use_tensor(m, product, lanes, first, 8, write=False)
        else:
            x = _tile(
                m,
                int(left[number]),
                product,
                rows,
                kind,
                transposed=bool(bits >> 15 & 1),
                wide=True,
            )
        y = _tile(
            m, int(right[number]), product, width, kind, transposed=bool(bits >> 16 & 1), wide=True
        )
        view = m.tensor_memory.view(np.float32)[cta]
        found = x @ y.T
        if adds[number]:
            found = found + view[lanes, column : column + width]
        _use_tensor(m, product, lanes, column, width, write=True)
        view[lanes, column : column + width] = found


def _forget_own(shadow: Shadow, granules: Array, agent: Any) -> None:
    """Stores of one warp, and products of one thread, follow each other."""
    shadow.written[granules[shadow.writer[granules] == agent]] = 0


def _use_tensor(
    m: Machine, product: _Product, lanes: Array, column: int, width: int, *, write: bool
) -> None:
    """Record a product's access to tensor memory."""
    halves = np.unique(lanes // 16) * 16
    places = _tensor_granules(
        np.full(len(halves), product.cta), halves, column + np.arange(width)[None]
    )
    _forget_own(m.tensor_shadow, places, product.agent)
    use = m.tensor_shadow.write if write else m.tensor_shadow.read
    m.note(use(places, *product[:3], warps=product.warps), len(places))


@form("tcgen05.commit.cta_group::1.mbarrier::arrive::one{,.shared::cluster}.b64")
def _commit_tensor(m: Machine, each: Instruction) -> None:
    """All products of the thread so far arrive at a barrier when they are done."""
    for cta, address, warp in barrier_places(m, each.operands[0]):
        m.fly(cta, m.agent(TENSOR, warp), m.barrier(cta, address, warp), arrivals=1)
