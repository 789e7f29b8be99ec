"""Toolkit for emitting kernels: LLVM IR with loops and vectors, its compiler, and a launcher on PyTorch's threads."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
import torch
from torch.autograd import profiler

from ...files import cache_folder, write_whole
from ..workspace import scratch
from . import Level, levels

BYTE, INT16, INT32, INT64, FP32 = (*(ir.IntType(n) for n in (8, 16, 32, 64)), ir.FloatType())
POINTER = ir.PointerType()
_BYTES = {"i8": 1, "i16": 2, "i32": 4, "i64": 8, "float": 4, "bfloat": 2}
# Leading arguments of every kernel. Its two counters have a cache line each, in front of them.
_SHARED = ("tasks", "task counter", "thread counter", "constants")
_CONSTANTS = "constants"
_LINE = 16
_COUNTERS = 2 * _LINE
_PAGE = 4096
# The exponent of the smallest normal fp32 number, and one safely below.
_MIN_EXPONENT, _UNDERFLOW = -126.0, -200.0
# The polynomial's relative error of powers of two is 2 · 10⁻⁷, that of fp32.
_DEGREE = 5
# Object files of compiled kernels: compilation dominates the time to a first caption.
_OBJECTS = cache_folder("kernels")


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not define."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16 = _BFloat()

Values = list[Any]
"""IR values, which llvmlite leaves untyped."""


class Index:
    """A 64-bit IR integer with Python's operators, each of which emits an instruction."""

    __slots__ = ("builder", "value")

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder, self.value = builder, value


def _define_operators() -> None:
    """Give Index its operators, signed ones throughout."""

    def arithmetic(instruction: str) -> Callable[[Index, Any], Index]:
        operation = getattr(ir.IRBuilder, instruction)
        return lambda x, y: Index(x.builder, operation(x.builder, x.value, _int64(y)))

    def comparison(predicate: str) -> Callable[[Index, Any], Any]:
        return lambda x, y: x.builder.icmp_signed(predicate, x.value, _int64(y))

    instructions = {"add": "add", "sub": "sub", "mul": "mul", "floordiv": "sdiv", "mod": "srem"}
    for operator, name in (
        instructions | {"and": "and_", "lshift": "shl", "rshift": "ashr"}
    ).items():
        setattr(Index, f"__{operator}__", arithmetic(name))
    for operator, predicate in {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
        setattr(Index, f"__{operator}__", comparison(predicate))


_define_operators()


def _int64(value: Any) -> Any:
    """Return the IR value of an index or a Python number, any other value unchanged."""
    if isinstance(value, Index):
        return value.value
    return ir.Constant(INT64, value) if isinstance(value, int) else value


class Builder(ir.IRBuilder):
    """IR builder of one function `void name(int64 *arguments)`, with loops, vectors and reductions.

    `args` holds the loaded arguments by name: an address for each of `pointers`, an Index for each of `numbers`.
    """

    def __init__(
        self, name: str, pointers: Sequence[str], numbers: Sequence[str], level: Level
    ) -> None:
        module = ir.Module(name)
        module.triple = llvm.get_default_triple()
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name)
        super().__init__(function.append_basic_block("entry"))
        self.lanes, self.level, self.args = level.lanes, level, dict[str, Any]()
        self._constants: dict[float, int] = {}
        for slot, arg in enumerate((*_SHARED, *pointers, *numbers)):
            dtype = INT64 if arg == "tasks" or arg in numbers else POINTER
            self.args[arg] = self.load_scalar(function.args[0], slot, dtype)

    def index(self, value: Any) -> Any:
        """Return an integer with operators."""
        return Index(self, _int64(value))

    def equal(self, x: Any, y: Any) -> Any:
        """Compare two integers."""
        return self.icmp_signed("==", _int64(x), _int64(y))

    def int32(self, x: Index) -> Any:
        """Truncate an integer to 32 bits."""
        return self.trunc(x.value, INT32)

    def vector(self, element: Any, count: int = 0) -> Any:
        """Return the type of a vector of `count` elements; of the level's lanes by default."""
        return ir.VectorType(element, count or self.lanes)

    def splat(self, value: float, element: Any = FP32) -> Any:
        """Return a vector of one constant."""
        if element != FP32 or value == 0:
            return ir.Constant(self.vector(element), [value] * self.lanes)
        # LLVM would materialise a constant's 64-bit address at each use; the table keeps its address in a register.
        slot = self._constants.setdefault(value, len(self._constants))
        constant = self.load_scalar(self.args["constants"], slot, FP32)
        if self.level.tiles:
            constant.set_metadata("invariant.load", self.module.add_metadata([]))
        return self.broadcast(constant)

    def broadcast(self, scalar: Any) -> Any:
        """Return a vector of one runtime value."""
        scalar = _int64(scalar)
        undefined = ir.Constant(self.vector(scalar.type), ir.Undefined)
        first = self.insert_element(undefined, scalar, ir.Constant(INT32, 0))
        return self.shuffle(first, first, [0] * self.lanes)

    def shuffle(self, x: Any, y: Any, indices: Sequence[int]) -> Any:
        """Select elements of two concatenated vectors by position."""
        mask = ir.Constant(ir.VectorType(INT32, len(indices)), list(indices))
        return self.shuffle_vector(x, y, mask)

    def at(self, base: Any, index: Any, element: Any) -> Any:
        """Return the address of element `index` from `base`."""
        return self.gep(base, [_int64(index)], source_etype=element)

    def load_scalar(self, base: Any, index: Any, element: Any) -> Any:
        """Load element `index` from `base`; 64-bit integers as Index."""
        value = self.load(self.at(base, index, element), typ=element)
        return Index(self, value) if element == INT64 else value

    def read(self, base: Any, element: Any, index: Any = None, *, count: int = 0) -> Any:
        """Load a vector from `base`, or from its element `index`; the address may have any alignment."""
        address = base if index is None else self.at(base, index, element)
        return self.load(address, align=_BYTES[str(element)], typ=self.vector(element, count))

    def write(self, value: Any, base: Any, index: Any = None) -> None:
        """Store a vector to `base`, or to its element `index`; the address may have any alignment."""
        element = value.type.element
        address = base if index is None else self.at(base, index, element)
        self.store(value, address, align=_BYTES[str(element)])

    def load_masked(self, address: Any, mask: Any, element: Any = FP32) -> Any:
        """Load the elements of a mask; the others are zero, and their memory is not touched."""
        dtype = self.vector(element)
        args = (address, *_alignment(element), mask, ir.Constant(dtype, [0] * self.lanes))
        return self.intrinsic(f"llvm.masked.load.{self._suffix(element)}.p0", dtype, *args)

    def store_masked(self, value: Any, address: Any, mask: Any) -> None:
        """Store the elements of a mask; the memory of the others is not touched."""
        element = value.type.element
        args = (value, address, *_alignment(element), mask)
        self.intrinsic(f"llvm.masked.store.{self._suffix(element)}.p0", ir.VoidType(), *args)

    def _suffix(self, element: Any) -> str:
        return f"v{self.lanes}{'f32' if element == FP32 else element}"

    def prefetch(self, address: Any, write: bool = False, cache: int = 1) -> None:
        """Prefetch an address, which may lie past the end of its buffer, into a level of cache."""
        hints = (ir.Constant(INT32, hint) for hint in (int(write), 4 - cache, 1))
        self.intrinsic("llvm.prefetch.p0", ir.VoidType(), address, *hints)

    def intrinsic(self, name: str, result: Any, *args: Any) -> Any:
        """Call one of LLVM's intrinsics, declared at its first use."""
        function = self.module.globals.get(name)
        if function is None:
            signature = ir.FunctionType(result, [value.type for value in args])
            function = ir.Function(self.module, signature, name)
        return self.call(function, args)

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        """Return `x y + z` of fp32 vectors, rounded once."""
        return self.intrinsic(f"llvm.fma.v{self.lanes}f32", z.type, x, y, z)

    def read_fp32(self, base: Any, element: Any, index: Any = None) -> Any:
        """Load a vector of fp32 or bf16 elements and return it in fp32."""
        address = base if index is None else self.at(base, index, element)
        if element != BF16:
            return self.read(address, FP32)
        return self.bf16_to_fp32(self.read(address, INT16))

    def write_fp32(self, value: Any, base: Any, element: Any, index: Any) -> None:
        """Store an fp32 vector to elements of fp32 or bf16."""
        rounded = self.fp32_to_bf16(value) if element == BF16 else value
        self.write(rounded, self.at(base, index, element))

    def bf16_to_fp32(self, halves: Any) -> Any:
        """Convert bf16, passed as 16-bit integers, to fp32."""
        upper = self.shl(self.zext(halves, self.vector(INT32)), self.splat(16, INT32))
        return self.bitcast(upper, self.vector(FP32))

    def interleave(self, x: Any, y: Any) -> Any:
        """Return a vector of twice the lanes with the elements of x and y in turn."""
        indices = [i // 2 + (self.lanes if i % 2 else 0) for i in range(2 * self.lanes)]
        return self.shuffle(x, y, indices)

    def polynomial(self, x: Any, coefficients: Sequence[float]) -> Any:
        """Evaluate a polynomial at an fp32 vector by Horner's rule; `coefficients` begin with the constant."""
        *lower, value = [self.splat(coefficient) for coefficient in coefficients]
        for coefficient in reversed(lower):
            value = self.multiply_add(value, x, coefficient)
        return value

    def dot_bf16(self, x: Any, y: Any, z: Any) -> Any:
        """Return `z + x0 y0 + x1 y1` for fp32 vectors `z` and bf16 pairs x, y, passed as 32-bit integers."""
        pairs = [self.bitcast(value, self.vector(BF16, 2 * self.lanes)) for value in (x, y)]
        return self.intrinsic(f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}", z.type, z, *pairs)

    def dot_int8(self, x: Any, y: Any, z: Any) -> Any:
        """Return `z + x0 y0 + … + x3 y3` for int32 `z` and groups of four bytes, unsigned in x, signed in y."""
        if llvm.llvm_version_info >= (22,):
            # Earlier versions take the groups as 32-bit integers.
            x, y = (self.bitcast(value, self.vector(BYTE, 4 * self.lanes)) for value in (x, y))
        return self.intrinsic(f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", z.type, z, x, y)

    def exp2(self, x: Any) -> Any:
        """Return `2^x` for x ≤ 0, by a polynomial in the distance to the nearest integer; propagates NaN."""
        integers = self.vector(INT32)
        bounded = self.maximum(x, self.splat(_UNDERFLOW))
        nearest = self.intrinsic(f"llvm.roundeven.v{self.lanes}f32", x.type, bounded)
        fraction = self.fsub(bounded, nearest)
        power = self.polynomial(fraction, coefficients(np.exp2, _DEGREE, (-0.5, 0.5)))
        if self.lanes == 16:
            # An instruction of AVX-512. Results below the smallest normal number take Intel's processors 150 cycles.
            normal = self.fcmp_unordered(">=", x, self.splat(_MIN_EXPONENT))
            return self.scale_by_powers(power, nearest, normal)
        exponent = self.shl(self.fptosi(nearest, integers), self.splat(23, INT32))
        scaled = self.bitcast(self.add(self.bitcast(power, integers), exponent), x.type)
        underflow = self.fcmp_ordered("<", x, self.splat(_MIN_EXPONENT))
        result = self.select(underflow, self.splat(0.0), scaled)
        return self.select(self.fcmp_unordered("uno", x, x), x, result)

    def scale_by_powers(self, x: Any, exponents: Any, mask: Any) -> Any:
        """Return `x 2^n` of 16 fp32 lanes, for integral exponents n in fp32; zero outside the mask."""
        bits, current_rounding = self.bitcast(mask, INT16), ir.Constant(INT32, 4)
        name = "llvm.x86.avx512.mask.scalef.ps.512"
        return self.intrinsic(name, x.type, x, exponents, self.splat(0.0), bits, current_rounding)

    def fp32_to_bf16(self, x: Any) -> Any:
        """Round an fp32 vector to bf16, to nearest."""
        name = f"llvm.x86.avx512bf16.cvtneps2bf16.{32 * self.lanes}"
        return self.intrinsic(name, self.vector(BF16), x)

    def fp32_to_bf16_pairs(self, x: Any, y: Any) -> Any:
        """Round two consecutive fp32 vectors to bf16 and return pairs of neighbours as 32-bit integers."""
        name = f"llvm.x86.avx512bf16.cvtne2ps2bf16.{32 * self.lanes}"
        halves = self.intrinsic(name, self.vector(BF16, 2 * self.lanes), y, x)
        return self.bitcast(halves, self.vector(INT32))

    def reduce_add(self, x: Any) -> Any:
        """Return the sum of an fp32 vector's elements, as a tree of halves."""
        width = self.lanes
        while width > 1:
            width //= 2
            low = self.shuffle(x, x, range(width))
            high = self.shuffle(x, x, range(width, 2 * width))
            x = self.fadd(low, high)
        return self.extract_element(x, ir.Constant(INT32, 0))

    def reduce_max(self, x: Any) -> Any:
        """Return the largest element of an fp32 vector."""
        return self.intrinsic(f"llvm.vector.reduce.fmax.v{self.lanes}f32", FP32, x)

    def maximum(self, x: Any, y: Any) -> Any:
        """Return the elementwise maximum; propagates NaN of x."""
        return self.select(self.fcmp_ordered("<", x, y), y, x)

    def minimum(self, x: Any, y: Any) -> Any:
        """Return the elementwise minimum; propagates NaN of x."""
        return self.select(self.fcmp_ordered(">", x, y), y, x)

    def minimum_int(self, x: Any, y: Any) -> Any:
        """Return the smaller of two integers."""
        x, y = _int64(x), _int64(y)
        return Index(self, self.select(self.icmp_signed("<", x, y), x, y))

    def round_up(self, x: Any, multiple: int) -> Any:
        """Round an integer up to a multiple of a power of two."""
        return (x + (multiple - 1)) & -multiple

    def is_not_null(self, pointer: Any) -> Any:
        """Compare an address with null."""
        return self.icmp_unsigned("!=", self.ptrtoint(pointer, INT64), _int64(0))

    def compute_if(self, condition: Any, compute: Callable[[], Any], default: Any) -> Any:
        """Return `compute()` if the condition holds, else `default`, by a branch."""
        before = self.block
        with self.if_then(condition):
            value = compute()
            inside = self.block
        result = self.phi(default.type)
        result.add_incoming(default, before)
        result.add_incoming(value, inside)
        return result

    def transpose(self, rows: Values) -> Values:
        """Transpose a square of vectors: rows exchange halves, then quarters, and so on."""
        step = self.lanes // 2
        while step:
            result = list(rows)
            first, second = self._exchange(step)
            for i in (i for i in range(self.lanes) if not i & step):
                x, y = rows[i], rows[i + step]
                result[i], result[i + step] = self.shuffle(x, y, first), self.shuffle(x, y, second)
            rows, step = result, step // 2
        return rows

    def _exchange(self, step: int) -> tuple[list[int], list[int]]:
        """Return the shuffles of two rows x, y that exchange x's odd with y's even groups of `step` elements."""
        lanes = self.lanes
        first = [lanes + i - step if i & step else i for i in range(lanes)]
        second = [lanes + i if i & step else i + step for i in range(lanes)]
        return first, second

    def horizontal_sums(self, vectors: Values) -> Any:
        """Return a vector of the sums of `lanes` fp32 vectors; adds halves, then quarters, and so on."""
        step = self.lanes // 2
        while step:
            first, second = self._exchange(step)
            pairs = zip(vectors[:step], vectors[step:], strict=True)
            vectors = [
                self.fadd(self.shuffle(x, y, first), self.shuffle(x, y, second)) for x, y in pairs
            ]
            step //= 2
        return vectors[0]

    def pack(
        self,
        rows: Values,
        units: Any,
        unit: Any,
        panel: Any,
        ahead: Any = None,
        *,
        narrowing: bool = False,
    ) -> None:
        """Transpose `lanes` rows (addresses) of `units` units into a panel of two vectors per unit.

        `ahead`: prefetch distance in elements of a row. `narrowing`: rows are fp32, and units pairs of bf16.
        """
        elements = 2 if narrowing else 1

        def read(row: Any, u: Any) -> Any:
            address = self.at(row, u * elements, unit)
            first = self.read(address, FP32 if narrowing else unit)
            if not narrowing:
                return first
            return self.fp32_to_bf16_pairs(first, self.read(address, FP32, self.lanes))

        def square(u: Any) -> None:
            for row in rows if ahead is not None else ():
                for n in range(elements):
                    element = u * elements + n * self.lanes
                    self.prefetch(self.at(row, element + ahead, unit))
            for i, column in enumerate(self.transpose([read(row, u) for row in rows])):
                self.write(column, self.at(panel, (u + i) * (2 * self.lanes), unit))

        self.loop(0, units, self.lanes, square)

    def microkernel(
        self,
        rows: Values,
        columns: Any,
        terms: Any,
        unit: Any,
        multiply_add: Callable[..., Any],
        start: Any,
        *,
        vectors: int = 2,
        stride: Any,
        row_step: int = 1,
        ahead: int = 0,
    ) -> Values:
        """Accumulate outer products over `terms` units in `[rows · vectors]` vector registers, and return them.

        `rows` and `columns` are addresses: of each row, and of the vectors of the first term; from term to term they
        advance by `row_step` and `stride` units. `multiply_add` takes a broadcast unit of a row, a vector of columns
        and an accumulator; `start` is the first accumulator, or one per vector. `ahead`: prefetch distance in bytes.
        """
        starts = start if isinstance(start, list) else [start] * vectors

        def term(u: Any, *sums: Any) -> Values:
            address, results = self.at(columns, u * stride, unit), []
            for n in range(vectors if ahead else 0):
                # Of the second level more lines may be on their way than of the first.
                self.prefetch(self.at(self.at(address, n * self.lanes, unit), ahead, BYTE), cache=2)
            factors = [self.read(address, unit, n * self.lanes) for n in range(vectors)]
            index = u if row_step == 1 else u * row_step
            for i, row in enumerate(rows):
                x = self.broadcast(self.load(self.at(row, index, unit), align=4, typ=unit))
                for n, factor in enumerate(factors):
                    results.append(multiply_add(x, factor, sums[i * vectors + n]))
            return results

        return self.loop(0, terms, 1, term, *starts * len(rows))

    def choose_height(
        self, highest: int, rows: Any, emit: Callable[[int], None], heights: Sequence[int] = ()
    ) -> None:
        """Emit code for tiles of some heights; the lowest runs that needs no more tiles than the highest."""
        tiles = (rows + (highest - 1)) // highest
        needed = (rows + (tiles - 1)) // tiles

        def choose(height: int, *higher: int) -> None:
            if not higher:
                emit(height)
                return
            with self.if_else(needed <= height) as (then, otherwise):
                with then:
                    emit(height)
                with otherwise:
                    choose(*higher)

        choose(*(heights or (-(-highest // 3), -(-2 * highest // 3), highest)))

    def loop(
        self, start: Any, stop: Any, step: Any, body: Callable[..., Values | None], *carried: Any
    ) -> Values:
        """Emit `for i in range(start, stop, step): carried = body(i, *carried)`; return the last `carried`."""
        head, inside, after = (self.function.append_basic_block() for _ in range(3))
        before = self.block
        self.branch(head)
        self.position_at_end(head)
        index = self.index(self.phi(INT64))
        index.value.add_incoming(_int64(start), before)
        phis = [self.phi(value.type) for value in carried]
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value, before)
        self.cbranch(index < stop, inside, after)
        self.position_at_end(inside)
        results = body(index, *phis) or []
        index.value.add_incoming((index + step).value, self.block)
        for phi, value in zip(phis, results, strict=True):
            phi.add_incoming(value, self.block)
        self.branch(head)
        self.position_at_end(after)
        return phis

    def task_loop(
        self, body: Callable[[Any, Any], None], before: Callable[[Any], None] | None = None
    ) -> None:
        """Emit the function's body: a thread runs `before(thread)`, then `body(task, thread)` while tasks are left."""
        head, inside, done = (self.function.append_basic_block() for _ in range(3))
        thread = self._fetch_add(self.args["thread counter"])
        if before is not None:
            before(thread)
        self.branch(head)
        self.position_at_end(head)
        task = self._fetch_add(self.args["task counter"])
        self.cbranch(task < self.args["tasks"], inside, done)
        self.position_at_end(inside)
        body(task, thread)
        self.branch(head)
        self.position_at_end(done)
        self.finish()

    def finish(self) -> None:
        """Emit the return and the table of constants."""
        self.ret_void()
        dtype = ir.ArrayType(FP32, len(self._constants))
        table: Any = ir.GlobalVariable(self.module, dtype, _CONSTANTS)
        table.initializer = ir.Constant(dtype, list(self._constants))

    def _fetch_add(self, counter: Any) -> Any:
        return Index(self, self.atomic_rmw("add", counter, _int64(1), "monotonic"))


def _alignment(element: Any) -> tuple[Any, ...]:
    """Return the alignment argument of masked loads and stores, which LLVM 22 dropped."""
    if llvm.llvm_version_info >= (22,):
        return ()
    return (ir.Constant(INT32, _BYTES[str(element)]),)


class Kernel:
    """A compiled function, launched on PyTorch's threads.

    `emitter` is a class with a `name` whose instances emit the function with their builder `b`; `options` are its
    arguments, the level last.
    """

    def __init__(self, emitter: Any, *options: Any) -> None:
        name, level = emitter.name, options[-1]
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
        versions = llvmlite.__version__, llvm.llvm_version_info
        key = repr((name, *_target(level), options, versions, sources)).encode()
        path = _OBJECTS / f"{hashlib.sha256(key).hexdigest()}.o"
        code = _read_object(path)
        if code is None:
            code = _compile(emitter(*options).b, level)
            _store_object(path, code)
        # The engine owns its machine and keeps the code alive.
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(level))
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self._name = f"xfm_fast::compiled_{name}"
        self._address = self._engine.get_function_address(name)
        self._constants = self._engine.get_global_value_address(_CONSTANTS)
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._address)

    def __call__(self, args: Sequence[int], tasks: int, threads: int) -> None:
        """Run `tasks` tasks on `args`, the pointers and then the numbers; PyTorch's profiler records an operation.

        Within `recorded`, the launch is appended to the list instead.
        """
        if _thread.launches is not None:
            _thread.launches.append(Launch(self, (tasks, *args)))
        elif profiler._is_profiler_enabled:
            with profiler.record_function(self._name):
                self.run(args, tasks, threads)
        else:
            self.run(args, tasks, threads)

    def run(self, args: Sequence[int], tasks: int, threads: int) -> None:
        """Run it unseen by the profiler."""
        memory = (ctypes.c_int64 * (_COUNTERS + len(_SHARED) + len(args)))()
        counters = ctypes.addressof(memory)
        start = counters + 8 * _COUNTERS
        memory[_COUNTERS:] = (tasks, counters, counters + 8 * _LINE, self._constants, *args)
        parallel = _openmp_parallel()
        if threads == 1 or tasks == 1 or parallel is None:
            self._function(start)
        else:
            parallel(self._address, start, min(threads, tasks), 0)


class Launch(NamedTuple):
    """A recorded launch: the kernel, and the number of tasks followed by its arguments."""

    kernel: Kernel
    args: tuple[int, ...]


class _Thread(threading.local):
    launches: list[Launch] | None = None


_thread = _Thread()


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record the launches of this thread within the block instead of running them."""
    launches = _thread.launches = list[Launch]()
    try:
        yield launches
    finally:
        _thread.launches = None


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Run the launches of this thread within the block, even within `recorded`."""
    launches, _thread.launches = _thread.launches, None
    try:
        yield
    finally:
        _thread.launches = launches


kernel = cache(Kernel)
"""Return the kernel of an emitter and its options, compiled once."""


@cache
def coefficients(function: Callable[..., Any], degree: int, domain: Any = (-1, 1)) -> list[float]:
    """Return the coefficients of the Chebyshev interpolant in fp32, constant first."""
    interpolant = np.polynomial.Chebyshev.interpolate(function, degree, domain=domain)
    powers = interpolant.convert(kind=np.polynomial.Polynomial).coef
    return [float(np.float32(value)) for value in powers]


def fp32_bits(value: float) -> int:
    """Return the bits of an fp32 number as an integer."""
    return struct.unpack("i", struct.pack("f", value))[0]


def whole_pages(size: int) -> int:
    """Round a number of bytes up to whole pages."""
    return -(-size // _PAGE) * _PAGE


def scratch_address(name: str, size: int) -> int:
    """Return the page-aligned address of scratch memory of this size."""
    return whole_pages(scratch(name, (size + _PAGE,), torch.uint8).data_ptr())


def split_rows(rows: int, chunks: int, minimum: int) -> tuple[int, int]:
    """Return (rows per chunk, chunks) for up to `chunks` chunks of at least `minimum` rows."""
    chunk = rows if chunks == 1 else max(minimum, -(-rows // chunks))
    return chunk, -(-rows // chunk)


def _compile(builder: Builder, level: Level) -> bytes:
    """Compile the builder's function to an object file."""
    module, machine = llvm.parse_assembly(str(builder.module)), _machine(level)
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=1))
    passes.getModulePassManager().run(module, passes)
    return machine.emit_object(module)


def _read_object(path: Path) -> bytes | None:
    """Read what `_store_object` wrote, unless it is damaged or another user could have written it."""
    try:
        for entry in (path.parent, path):
            status = os.stat(entry)
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                return None
        content = path.read_bytes()
    except OSError:
        return None
    digest = hashlib.sha256().digest_size
    code = content[digest:]
    return code if hashlib.sha256(code).digest() == content[:digest] else None


def _store_object(path: Path, code: bytes) -> None:
    # A read-only home or a full disk must not prevent the computation.
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Two processes may compile at once.
        write_whole(path, hashlib.sha256(code).digest() + code, mode=0o600)


def _target(level: Level) -> tuple[str, str]:
    """Return LLVM's name and features of the processor to compile for."""
    name, features = level.processor, ""
    if level == levels()[0]:
        name, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    if level.tiles == "registers":
        # LLVM ends the process where it does not know the features of an instruction.
        features += ",+amx-tile,+amx-bf16,+amx-int8"
    # Kernels state the width of their vectors; LLVM would halve it, as wide ones lowered the clock of early processors.
    return name, f"{features},-prefer-256-bit".lstrip(",")


def _machine(level: Level) -> Any:
    name, features = _target(level)
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=name, features=features, opt=2, jit=True)


@cache
def openmp_function(name: str) -> Any:
    """Return a function of PyTorch's OpenMP library, or None without one.

    A second pool of threads would compete with the first one, whose threads spin while they wait. Packages such as
    scikit-learn load an OpenMP library of their own, so the function is looked up from PyTorch's library.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if re.search(r"/libtorch_cpu\.so[^/]*$", path):
            return getattr(ctypes.CDLL(path), name, None)
    return None


@cache
def _openmp_parallel() -> Callable[[int, int, int, int], None] | None:
    """Return `GOMP_parallel`, which runs a function on threads; LLVM's and Intel's libraries export it too."""
    parallel = openmp_function("GOMP_parallel")
    if parallel is not None:
        address, count = ctypes.c_void_p, ctypes.c_uint
        parallel.argtypes, parallel.restype = [address, address, count, count], None
    return parallel
