"""Tools for writing kernels: loops and vectors in LLVM's representation, its compiler, and PyTorch's threads."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

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


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16 = _BFloat()

Values = list[Any]
"""Values of LLVM's representation, which llvmlite leaves untyped."""


class Builder(ir.IRBuilder):
    """llvmlite's builder of one function `void name(int64 *arguments)`, with loops and vectors."""

    def __init__(
        self, name: str, pointers: Sequence[str], numbers: Sequence[str], level: Level
    ) -> None:
        module = ir.Module(name)
        module.triple = llvm.get_default_triple()
        made = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name)
        super().__init__(made.append_basic_block("entry"))
        self.lanes, self.level, self.given = level.lanes, level, dict[str, Any]()
        self._constants: dict[float, int] = {}
        names = (*_SHARED, *pointers, *numbers)
        for place, name in enumerate(names):
            kind = INT64 if name == "tasks" or name in numbers else POINTER
            self.given[name] = self.load(self.at(made.args[0], place, INT64), typ=kind)

    def number(self, value: Any) -> Any:
        """A 64-bit integer, of a Python number or as it is; `add`, `mul` and so on take Python numbers too."""
        return ir.Constant(INT64, value) if isinstance(value, int) else value

    def icmp_signed(self, cmpop: str, lhs: Any, rhs: Any, name: str = "") -> Any:
        return super().icmp_signed(cmpop, self.number(lhs), self.number(rhs), name)

    def vector(self, element: Any, count: int = 0) -> Any:
        """The type of `lanes` elements, or of the level's vectors."""
        return ir.VectorType(element, count or self.lanes)

    def splat(self, value: float, element: Any = FP32) -> Any:
        """A vector of one constant."""
        if element != FP32 or value == 0:
            return ir.Constant(self.vector(element), [value] * self.lanes)
        # LLVM would write all 64 bits of its address wherever it is read: a table has its address in a register.
        place = self._constants.setdefault(value, len(self._constants))
        return self.broadcast(self.load(self.at(self.given["constants"], place, FP32), typ=FP32))

    def broadcast(self, scalar: Any) -> Any:
        """A vector of one runtime value."""
        kind = self.vector(scalar.type)
        one = self.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(INT32, 0))
        return self.shuffle(one, one, [0] * self.lanes)

    def shuffle(self, x: Any, y: Any, places: Sequence[int]) -> Any:
        """Elements of two concatenated vectors by position."""
        return self.shuffle_vector(
            x, y, ir.Constant(ir.VectorType(INT32, len(places)), list(places))
        )

    def at(self, base: Any, index: Any, element: Any) -> Any:
        """The address of element `index` from `base`."""
        return self.gep(base, [self.number(index)], source_etype=element)

    def read(self, place: Any, element: Any, count: int = 0) -> Any:
        """A vector from an address of any alignment."""
        return self.load(place, align=_BYTES[str(element)], typ=self.vector(element, count))

    def write(self, value: Any, place: Any) -> None:
        """A vector to an address of any alignment."""
        self.store(value, place, align=_BYTES[str(value.type.element)])

    def load_masked(self, place: Any, mask: Any, element: Any = FP32) -> Any:
        """A masked load: the other elements are zeros, and their memory is not touched."""
        kind = self.vector(element)
        given = (place, *self._aligned(element), mask, ir.Constant(kind, [0] * self.lanes))
        return self.intrinsic(f"llvm.masked.load.{self._named(element)}.p0", kind, *given)

    def store_masked(self, value: Any, place: Any, mask: Any) -> None:
        """A masked store: the memory of the other elements is not touched."""
        element = value.type.element
        given = (value, place, *self._aligned(element), mask)
        self.intrinsic(f"llvm.masked.store.{self._named(element)}.p0", ir.VoidType(), *given)

    def _named(self, element: Any) -> str:
        return f"v{self.lanes}{'f32' if element == FP32 else element}"

    @staticmethod
    def _aligned(element: Any) -> tuple[Any, ...]:
        # Until LLVM 22 masked loads and stores take the alignment as an argument.
        return (
            () if llvm.llvm_version_info >= (22,) else (ir.Constant(INT32, _BYTES[str(element)]),)
        )

    def prefetch(self, place: Any, write: bool = False) -> None:
        """Prefetch an address, which may lie past the end of its memory."""
        how = (ir.Constant(INT32, number) for number in (int(write), 3, 1))
        self.intrinsic("llvm.prefetch.p0", ir.VoidType(), place, *how)

    def intrinsic(self, name: str, result: Any, *given: Any) -> Any:
        """The result of one of LLVM's own functions."""
        found = self.module.globals.get(name)
        if found is None:
            found = ir.Function(
                self.module, ir.FunctionType(result, [value.type for value in given]), name
            )
        return self.call(found, given)

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        """`x y + z` of fp32 vectors, rounded once."""
        return self.intrinsic(f"llvm.fma.v{self.lanes}f32", z.type, x, y, z)

    def load_fp32(self, place: Any, element: Any) -> Any:
        """An fp32 vector, read in fp32 or bf16."""
        if element != BF16:
            return self.read(place, FP32)
        return self.bf16_to_fp32(self.read(place, INT16))

    def bf16_to_fp32(self, halves: Any) -> Any:
        """An fp32 vector of bf16, passed as 16-bit integers."""
        upper = self.shl(self.zext(halves, self.vector(INT32)), self.splat(16, INT32))
        return self.bitcast(upper, self.vector(FP32))

    def interleave(self, x: Any, y: Any) -> Any:
        """The elements of two vectors, alternating."""
        return self.shuffle(
            x, y, [c // 2 + (self.lanes if c % 2 else 0) for c in range(2 * self.lanes)]
        )

    def polynomial(self, x: Any, coefficients: Sequence[float]) -> Any:
        """Its value at an fp32 vector; the coefficients begin with the constant."""
        *others, found = [self.splat(value) for value in coefficients]
        for value in reversed(others):
            found = self.multiply_add(found, x, value)
        return found

    def dot_bf16(self, x: Any, y: Any, z: Any) -> Any:
        """`z + x0 y0 + x1 y1` of fp32 vectors `z` and vectors of bf16 pairs, passed as 32-bit integers."""
        pairs = [self.bitcast(value, self.vector(BF16, 2 * self.lanes)) for value in (x, y)]
        return self.intrinsic(f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}", z.type, z, *pairs)

    def dot_int8(self, x: Any, y: Any, z: Any) -> Any:
        """`z + x0 y0 + … + x3 y3` of 32-bit integers `z` and groups of four int8, unsigned in `x` and signed in `y`."""
        width = 32 * self.lanes
        if llvm.llvm_version_info >= (22,):
            # Earlier it took the groups as what they lie in.
            x, y = (self.bitcast(value, self.vector(BYTE, 4 * self.lanes)) for value in (x, y))
        return self.intrinsic(f"llvm.x86.avx512.vpdpbusd.{width}", z.type, z, x, y)

    def scale_by_powers(self, x: Any, exponents: Any) -> Any:
        """`x 2^n` of fp32 vectors of 16, of which the exponents are whole."""
        every, current = ir.Constant(ir.IntType(16), -1), ir.Constant(INT32, 4)
        return self.intrinsic(
            "llvm.x86.avx512.mask.scalef.ps.512", x.type, x, exponents, x, every, current
        )

    def fp32_to_bf16(self, x: Any) -> Any:
        """An fp32 vector in bf16, rounded to nearest."""
        kind = self.vector(BF16)
        return self.intrinsic(f"llvm.x86.avx512bf16.cvtneps2bf16.{32 * self.lanes}", kind, x)

    def fp32_to_bf16_pairs(self, x: Any, y: Any) -> Any:
        """The elements of two fp32 vectors, one after the other, as pairs in bf16, which are 32-bit integers."""
        width = 32 * self.lanes
        kind = self.vector(BF16, 2 * self.lanes)
        return self.bitcast(
            self.intrinsic(f"llvm.x86.avx512bf16.cvtne2ps2bf16.{width}", kind, y, x),
            self.vector(INT32),
        )

    def reduce_add(self, x: Any) -> Any:
        """The sum of the elements of an fp32 vector, by halves."""
        width = self.lanes
        while width > 1:
            width //= 2
            x = self.fadd(
                self.shuffle(x, x, range(width)), self.shuffle(x, x, range(width, 2 * width))
            )
        return self.extract_element(x, ir.Constant(INT32, 0))

    def reduce_max(self, x: Any) -> Any:
        """The largest element of an fp32 vector."""
        return self.intrinsic(f"llvm.vector.reduce.fmax.v{self.lanes}f32", FP32, x)

    def maximum(self, x: Any, y: Any) -> Any:
        """The larger of two, element by element; of x where it is no number."""
        return self.select(self.fcmp_ordered("<", x, y), y, x)

    def minimum(self, x: Any, y: Any) -> Any:
        """The smaller of two, element by element; of x where it is no number."""
        return self.select(self.fcmp_ordered(">", x, y), y, x)

    def minimum_int(self, x: Any, y: Any) -> Any:
        """The smaller of two integers."""
        x, y = self.number(x), self.number(y)
        return self.select(self.icmp_signed("<", x, y), x, y)

    def round_up(self, x: Any, multiple: int) -> Any:
        """The next multiple of a power of two."""
        return self.and_(self.add(x, multiple - 1), -multiple)

    def is_not_null(self, pointer: Any) -> Any:
        """Whether an address is not null."""
        return self.icmp_unsigned("!=", self.ptrtoint(pointer, INT64), self.number(0))

    def where(self, condition: Any, made: Callable[[], Any], otherwise: Any) -> Any:
        """A value that is computed only where a condition holds."""
        before = self.block
        with self.if_then(condition):
            found = made()
            inside = self.block
        value = self.phi(otherwise.type)
        value.add_incoming(otherwise, before)
        value.add_incoming(found, inside)
        return value

    def transposed(self, rows: Values) -> Values:
        """A transposed square of vectors, by exchanging halves, quarters and so on between rows."""
        step = self.lanes // 2
        while step:
            turned = list(rows)
            for i in (i for i in range(self.lanes) if not i & step):
                upper = [self.lanes + c - step if c & step else c for c in range(self.lanes)]
                lower = [self.lanes + c if c & step else c + step for c in range(self.lanes)]
                pair = rows[i], rows[i + step]
                turned[i], turned[i + step] = self.shuffle(*pair, upper), self.shuffle(*pair, lower)
            rows, step = turned, step // 2
        return rows

    def lay_out(
        self,
        rows: Values,
        units: Any,
        unit: Any,
        place: Any,
        ahead: Any = None,
        *,
        narrowing: bool = False,
    ) -> None:
        """Transpose one row per lane: a unit of all rows to `place`, the next unit two vectors further, and so on.

        `ahead`: prefetch distance in 32-bit elements. `narrowing`: fp32 rows become bf16, two elements per unit.
        """
        parts = 2 if narrowing else 1

        def some(row: Any, u: Any) -> Any:
            first = self.at(row, self.mul(u, parts), unit)
            if not narrowing:
                return self.read(first, unit)
            return self.fp32_to_bf16_pairs(
                self.read(first, FP32), self.read(self.at(first, self.lanes, FP32), FP32)
            )

        def square(u: Any) -> None:
            for row in rows if ahead is not None else ():
                for n in range(parts):
                    element = self.add(self.mul(u, parts), n * self.lanes)
                    self.prefetch(self.at(row, self.add(element, ahead), unit))
            for i, column in enumerate(self.transposed([some(row, u) for row in rows])):
                self.write(column, self.at(place, self.mul(self.add(u, i), 2 * self.lanes), unit))

        self.loop(0, units, self.lanes, square)

    def tile(
        self,
        rows: Values,
        vectors: int,
        columns: Any,
        stride: Any,
        terms: Any,
        unit: Any,
        add: Callable[..., Any],
        zero: Any,
        *,
        ahead: int = 0,
        apart: int = 1,
    ) -> Values:
        """Sums of products over `terms` units of rows (addresses) and columns, `[rows · vectors]` vectors in registers.

        The columns of the next unit are `stride` units further, the next unit of a row `apart`. `add`: (a unit of a row
        in every element, a vector of columns, a sum) → the next sum; `zero`: the first sum, or one per vector of
        columns; `ahead`: prefetch distance in bytes.
        """
        starts = zero if isinstance(zero, list) else [zero] * vectors

        def term(u: Any, *sums: Any) -> Values:
            place, found = self.at(columns, self.mul(u, stride), unit), []
            for n in range(vectors if ahead else 0):
                self.prefetch(self.at(self.at(place, n * self.lanes, unit), ahead, BYTE))
            factors = [
                self.read(self.at(place, n * self.lanes, unit), unit) for n in range(vectors)
            ]
            number = u if apart == 1 else self.mul(u, apart)
            for i, row in enumerate(rows):
                x = self.broadcast(self.load(self.at(row, number, unit), align=4, typ=unit))
                found += [add(x, factors[n], sums[i * vectors + n]) for n in range(vectors)]
            return found

        return self.loop(0, terms, 1, term, *starts * len(rows))

    def sums(self, vectors: Values) -> Any:
        """The sums of as many fp32 vectors as there are lanes, in their order: halves, quarters and so on are added."""
        step = self.lanes // 2
        while step:
            first = [self.lanes + c - step if c & step else c for c in range(self.lanes)]
            second = [self.lanes + c if c & step else c + step for c in range(self.lanes)]
            pairs = zip(vectors[:step], vectors[step:], strict=True)
            vectors = [
                self.fadd(self.shuffle(x, y, first), self.shuffle(x, y, second)) for x, y in pairs
            ]
            step //= 2
        return vectors[0]

    def heights(self, most: int, rows: Any, body: Callable[[int], None]) -> None:
        """Code for tiles of one height, the least of three that makes no more tiles of some rows than the highest."""
        tiles = self.sdiv(self.add(rows, most - 1), most)
        wanted = self.sdiv(self.add(rows, self.sub(tiles, 1)), tiles)
        low, middle = -(-most // 3), -(-2 * most // 3)
        with self.if_else(self.icmp_signed("<=", wanted, low)) as (lowest, higher):
            with lowest:
                body(low)
            with higher, self.if_else(self.icmp_signed("<=", wanted, middle)) as (between, highest):
                with between:
                    body(middle)
                with highest:
                    body(most)

    def loop(
        self, start: Any, stop: Any, step: Any, body: Callable[..., Values | None], *carried: Any
    ) -> Values:
        """`for i in range(start, stop, step): carried = body(i, *carried)`; the last of what is carried."""
        head, inside, behind = (
            self.function.append_basic_block(name) for name in ("head", "inside", "behind")
        )
        before = self.block
        self.branch(head)
        self.position_at_end(head)
        index = self.phi(INT64)
        index.add_incoming(self.number(start), before)
        held = [self.phi(value.type) for value in carried]
        for place, value in zip(held, carried, strict=True):
            place.add_incoming(value, before)
        self.cbranch(self.icmp_signed("<", index, stop), inside, behind)
        self.position_at_end(inside)
        found = body(index, *held) or []
        index.add_incoming(self.add(index, step), self.block)
        for place, value in zip(held, found, strict=True):
            place.add_incoming(value, self.block)
        self.branch(head)
        self.position_at_end(behind)
        return held

    def tasks(
        self, body: Callable[[Any, Any], None], before: Callable[[Any], None] | None = None
    ) -> None:
        """The body of the function: threads call `before(thread)`, then `body(task, thread)` until no task is left."""
        following, inside, behind = (
            self.function.append_basic_block(name) for name in ("following", "task", "done")
        )
        thread = self.atomic_rmw("add", self.given["thread counter"], self.number(1), "monotonic")
        if before is not None:
            before(thread)
        self.branch(following)
        self.position_at_end(following)
        task = self.atomic_rmw("add", self.given["task counter"], self.number(1), "monotonic")
        self.cbranch(self.icmp_signed("<", task, self.given["tasks"]), inside, behind)
        self.position_at_end(inside)
        body(task, thread)
        self.branch(following)
        self.position_at_end(behind)
        self.ret_void()
        kind = ir.ArrayType(FP32, len(self._constants))
        table: Any = ir.GlobalVariable(self.module, kind, _CONSTANTS)
        table.initializer = ir.Constant(kind, list(self._constants))


def _of_numbers(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda builder, x, y, **options: operation(
        builder, builder.number(x), builder.number(y), **options
    )


for _name in ("add", "sub", "mul", "sdiv", "srem", "and_", "shl", "ashr"):
    setattr(Builder, _name, _of_numbers(getattr(ir.IRBuilder, _name)))


class Kernel:
    """A compiled function, which runs on PyTorch's threads.

    `writer` is a class with its `name`, whose objects write it with their builder `b`; `made_of` are the arguments of
    the class, the level last.
    """

    def __init__(self, writer: Any, *made_of: Any) -> None:
        name, level = writer.name, made_of[-1]
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        # Of this file, and of the classes that write the function.
        modules = [__name__, *(each.__module__ for each in writer.mro() if each is not object)]
        files = [Path(str(sys.modules[module].__file__)).read_bytes() for module in modules]
        key = (name, *_target(level), made_of, llvmlite.__version__, llvm.llvm_version_info, files)
        place = _KEPT / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.o"
        code = _read(place)
        if code is None:
            code = _compiled(writer(*made_of).b, level)
            _keep(place, code)
        # The engine owns its machine and keeps the code.
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(level))
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self._name = f"xfm_fast::compiled_{name}"
        self._address = self._engine.get_function_address(name)
        self._constants = self._engine.get_global_value_address(_CONSTANTS)
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._address)

    def __call__(self, numbers: Sequence[int], tasks: int, threads: int) -> None:
        """Run it on values for its pointers and numbers; PyTorch's profiler sees it as an operation."""
        if profiler._is_profiler_enabled:
            with profiler.record_function(self._name):
                self._run(numbers, tasks, threads)
        else:
            self._run(numbers, tasks, threads)

    def _run(self, numbers: Sequence[int], tasks: int, threads: int) -> None:
        memory = (ctypes.c_int64 * (_COUNTERS + len(_SHARED) + len(numbers)))()
        place = ctypes.addressof(memory)
        start = place + 8 * _COUNTERS
        memory[_COUNTERS:] = (tasks, place, place + 8 * _LINE, self._constants, *numbers)
        team = _team()
        if threads == 1 or tasks == 1 or team is None:
            self._function(start)
        else:
            team(self._address, start, min(threads, tasks), 0)


kernel = cache(Kernel)
"""A kernel by its writer and arguments, compiled once."""


@cache
def coefficients(
    function: Callable[[np.ndarray], np.ndarray],
    degree: int,
    domain: tuple[float, float] = (-1.0, 1.0),
) -> list[float]:
    """Of the polynomial that is a function at Chebyshev's points, from the constant on, in fp32."""
    found = np.polynomial.Chebyshev.interpolate(function, degree, domain=domain)
    return [float(np.float32(value)) for value in found.convert(kind=np.polynomial.Polynomial).coef]


_PAGE = 4096


def whole_pages(size: int) -> int:
    """Bytes that pages have room for."""
    return -(-size // _PAGE) * _PAGE


def scratch_address(name: str, size: int) -> int:
    """The page-aligned address of scratch memory of this size."""
    return whole_pages(scratch(name, (size + _PAGE,), torch.uint8).data_ptr())


def divided(rows: int, wanted: int, least: int) -> tuple[int, int]:
    """(rows per chunk, chunks): up to `wanted` chunks, of at least `least` rows."""
    chunk = rows if wanted == 1 else max(least, -(-rows // wanted))
    return chunk, -(-rows // chunk)


# What every kernel is given before its own arguments, and two counters in cache lines of their own before that.
_SHARED = ("tasks", "task counter", "thread counter", "constants")
_CONSTANTS = "constants"
_LINE = 16
_COUNTERS = 2 * _LINE


# To compile them takes longer than all else before a first caption.
_KEPT = cache_folder("kernels")


def _compiled(builder: Builder, level: Level) -> bytes:
    """The function as an object file."""
    module, machine = llvm.parse_assembly(str(builder.module)), _machine(level)
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=1))
    passes.getModulePassManager().run(module, passes)
    return machine.emit_object(module)


def _read(place: Path) -> bytes | None:
    """The content that `_keep` wrote, if it is complete and nobody else could have written it."""
    try:
        owned = all(
            os.stat(p).st_uid == os.getuid() and not os.stat(p).st_mode & 0o022
            for p in (place.parent, place)
        )
        found = place.read_bytes() if owned else b""
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    return found[size:] if hashlib.sha256(found[size:]).digest() == found[:size] else None


def _keep(place: Path, code: bytes) -> None:
    # A home that cannot be written to, or a full disk, is no reason not to compute.
    with contextlib.suppress(OSError):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Two processes may compile at once.
        write_whole(place, hashlib.sha256(code).digest() + code, mode=0o600)


def _target(level: Level) -> tuple[str, str]:
    """The processor that is compiled for and its features, as LLVM has them."""
    name, features = level.processor, ""
    if level == levels()[0]:
        name, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    # Kernels say how wide their vectors are; LLVM would halve them where wide ones once made processors slow.
    return name, f"{features},-prefer-256-bit".lstrip(",")


def _machine(level: Level) -> Any:
    name, features = _target(level)
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=name, features=features, opt=2, jit=True
    )


@cache
def _team() -> Callable[[int, int, int, int], None] | None:
    """Return the function that runs a kernel on the threads of PyTorch's OpenMP library; None without one.

    A second pool of threads would compete with the first one, whose threads spin while they wait. Packages such as
    scikit-learn load an OpenMP library of their own, so the function is looked up from PyTorch's library.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if re.search(r"/libtorch_cpu\.so[^/]*$", path):
            # LLVM's and Intel's have the entry of GNU's too.
            team = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
            if team is not None:
                team.argtypes, team.restype = (
                    [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint],
                    None,
                )
            return team
    return None
