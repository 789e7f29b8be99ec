"""Emulated instructions against scalar definitions from the PTX ISA; programs of several threads; every check.

Sections are those of PTX ISA 8.8. A definition returns None where the ISA leaves the result open.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import random
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("triton")

from xfm_fast.kernels.emulation import EmulationError
from xfm_fast.kernels.emulation.hazards import Allocations, Window
from xfm_fast.kernels.emulation.launch import _Tile
from xfm_fast.kernels.emulation.machine import FORMS, Machine, expand
from xfm_fast.kernels.emulation.ptx import Program

_PTX = """.version 8.8
.target sm_100a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k({parameters})
.reqntid {threads}
{{
	.reg .pred 	%p<20>; .reg .b16 	%rs<20>; .reg .b32 	%r<400>; .reg .b64 	%rd<60>;
	.loc	1 7 0                           // k.py:7:0
{body}
	ret;
$L__func_end0:
}}
	.file	1 "/tmp/k.py"
"""
_executed: set[str] = set()
_tested: set[str] = set()


def execute(
    body: str, *arguments: Any, threads: int = 32, ctas: int = 1, shared: int = 0, **options: Any
) -> Machine:
    """Run PTX. `%r0` is a thread, `%rd<i>` argument i, `%rd<10 + i>` the address of the thread's row of an array."""
    start = [f"mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mad.lo.s32 %r1, %r1, {threads}, %r0;"]
    values, copies = {f"k_param_{i}": each for i, each in enumerate(arguments)}, []
    for i, (name, each) in enumerate(values.items()):
        start.append(f"ld.param.b64 %rd{i}, [{name}];")
        if isinstance(each, np.ndarray):
            memory = np.empty(each.nbytes + 128, "u1")
            copy = (
                memory[-memory.ctypes.data % 128 :][: each.nbytes]
                .view(each.dtype)
                .reshape(each.shape)
            )
            copy[...], values[name] = each, copy.ctypes.data
            copies.append((each, copy))
            start.append(f"mad.wide.u32 %rd{10 + i}, %r1, {each.nbytes // len(each)}, %rd{i};")
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 {name}" for name in values)
    program = Program(
        _PTX.format(parameters=parameters, threads=threads, body="\n".join((*start, body))), FORMS
    )
    assert program.parameters == [*values]
    _executed.update(each.form for each in program.code)
    places = np.stack([np.arange(ctas), np.zeros(ctas, int), np.zeros(ctas, int)], 1)
    memory = Allocations(
        [Window(copy.ctypes.data, copy.ctypes.data, copy.nbytes) for _, copy in copies]
    )
    if tile := options.pop("tile", None):
        options["descriptors"] = {4096: tile._replace(address=values["k_param_0"])}
    machine = Machine(program, values, (ctas, 1, 1), places, shared, memory, **options)
    machine.run()
    for each, copy in copies:
        each[...] = copy
    return machine


def ordered(*arguments: Any, **options: Any) -> None:
    """Run PTX in both schedules without a hazard."""
    for schedule in ("lockstep", "random"):
        found = execute(*arguments, **options, schedule=schedule).hazards
        assert not found, [*found.values()]


def each_form(*patterns: str) -> pytest.MarkDecorator:
    """A test of each of these forms."""
    forms = [name for pattern in patterns for name in expand(pattern)]
    _tested.update(forms)
    return pytest.mark.parametrize("form", forms)


def covers(*patterns: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test whose programs contain all these forms."""
    forms = {name for pattern in patterns for name in expand(pattern)}
    _tested.update(forms)

    def run(test: Callable[..., None], *arguments: Any, **options: Any) -> None:
        _executed.clear()
        test(*arguments, **options)
        assert forms <= _executed, forms - _executed

    return lambda test: functools.wraps(test)(
        lambda *arguments, **options: run(test, *arguments, **options)
    )


# Numbers are exact: floats, or Fractions other than zero.

Number = Fraction | float
_FORMATS = {"f32": (8, 23), "f16": (5, 10), "bf16": (8, 7), "e4m3": (4, 3)}
_LEAST_NORMAL = Fraction(1, 2**126)


def bits_of(kind: str) -> int:
    if kind.endswith("x2"):
        return 2 * bits_of(kind[:-2])
    return 1 + sum(_FORMATS[kind]) if kind in _FORMATS else 1 if kind == "pred" else int(kind[1:])


def register(kind: str) -> str:
    return "%p" if kind == "pred" else {16: "%rs", 32: "%r", 64: "%rd"}[max(bits_of(kind), 16)]


def decode(bits: int, kind: str) -> Any:
    if kind.endswith("x2"):
        size = bits_of(kind[:-2])
        return tuple(decode(bits >> at & (1 << size) - 1, kind[:-2]) for at in (0, size))
    if kind in ("f32", "bf16"):
        return struct.unpack("f", struct.pack("I", bits << (16 if kind == "bf16" else 0)))[0]
    if kind == "f16":
        return struct.unpack("e", struct.pack("H", bits))[0]
    size = bits_of(kind)
    bits &= (1 << size) - 1
    return bits - (1 << size) if kind[0] == "s" and bits >> (size - 1) else bits


def exponent_of(size: Fraction) -> int:
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    return exponent - (size < Fraction(2) ** exponent) if size else -(10**4)


def encode(value: Number, kind: str) -> int:
    """The nearest number of a format; of two, the even one (`.rn`). e4m3 is cut off (`.satfinite`)."""
    exponent_bits, mantissa_bits = _FORMATS[kind]
    sign = (math.copysign(1, value) < 0) << (exponent_bits + mantissa_bits)
    most = 0x7E if kind == "e4m3" else ((1 << exponent_bits) - 1) << mantissa_bits
    if math.isinf(value):
        return sign | most
    size, bias = abs(Fraction(value)), (1 << exponent_bits - 1) - 1
    exponent = max(exponent_of(size), 1 - bias)
    steps = round(size / Fraction(2) ** (exponent - mantissa_bits))
    return sign | min((exponent + bias - 1 << mantissa_bits) + steps, most)


class Near(NamedTuple):
    value: Fraction
    within: Fraction


def near(value: Number, *, ulps: int = 0, relative: float = 0) -> Number | Near:
    if not value or not math.isfinite(value):
        return value
    size = abs(Fraction(value))
    ulp = Fraction(2) ** (max(exponent_of(size), -126) - 23)
    return Near(Fraction(value), ulps * ulp + size * Fraction(relative))


def agrees(found: int, expected: Any, kind: str, *, flushes: bool = False) -> bool:
    """Whether a register holds what its definition allows."""
    if expected is None:
        return True
    if isinstance(expected, Near):
        number, (value, within) = decode(found, kind), expected
        if math.isinf(number):
            return (number > 0) == (value > 0) and abs(value) + within >= 2**128 - 2**103
        if flushes and not number:
            return abs(value) - within < _LEAST_NORMAL
        return (
            number == number
            and abs(Fraction(number) - value) <= within
            and not (flushes and subnormal(number))
        )
    if kind.endswith("x2"):
        size = bits_of(kind[:-2])
        halves = (found >> at & (1 << size) - 1 for at in (0, size))
        return all(
            agrees(each, value, kind[:-2]) for each, value in zip(halves, expected, strict=True)
        )
    if kind not in _FORMATS:
        # A register that is wider than the type holds its sign, or zeros (9.4.1).
        return found == decode(int(expected), kind) % (1 << max(bits_of(kind), 16))
    if math.isnan(expected):
        return found & 0x7F == 0x7F if kind == "e4m3" else math.isnan(decode(found, kind))
    bits = encode(expected, kind)
    if flushes and subnormal(expected):
        # Whether a number is subnormal before it is rounded or after is open.
        return found == bits & 1 << 31 or bits << 1 & 0xFFFFFFFF == 1 << 24
    return found == bits


def subnormal(value: Number) -> bool:
    return 0 < abs(value) < _LEAST_NORMAL


# Definitions.

DEFINITIONS: dict[str, tuple[str, list[str], Callable[..., Any]]] = {}


def define(patterns: str, function: Callable[..., Any], types: str = "") -> None:
    """`types`: of the result and the operands, by default the last of the form."""
    count = len(inspect.signature(function).parameters)
    for name in (name for pattern in patterns.split() for name in expand(pattern)):
        to, *sources = types.split() or [name.rpartition(".")[2]] * (1 + count)
        DEFINITIONS[name] = to, sources, function


def plus(x: Number, y: Number) -> Number:
    like = x + y
    return Fraction(x) + Fraction(y) or like if math.isfinite(like) else like


def times(x: float, y: float) -> Number:
    like = x * y
    return Fraction(x) * Fraction(y) or like if math.isfinite(like) else like


def quotient(x: float, y: float) -> Number:
    if y:
        return (
            Fraction(x) / Fraction(y) or x / y if math.isfinite(x) and math.isfinite(y) else x / y
        )
    return math.copysign(math.inf, x) * math.copysign(1, y) if x and x == x else math.nan


def fast_quotient(x: float, y: float) -> Number | Near | None:
    if 2.0**126 < abs(y) < math.inf:
        return math.nan if math.isinf(x) else None if x != x else x * math.copysign(0.0, y)
    return near(quotient(x, y), ulps=2) if 2.0**-126 <= abs(y) < math.inf else None


def root(x: float) -> Number:
    if not 0 < x < math.inf:
        return math.nan if x < 0 else x
    n, d = Fraction(x).as_integer_ratio()
    return Fraction(
        math.isqrt(n * d << 400), d << 200
    )  # closer to the root than any tie of rounding


def logarithm(x: float) -> Number | Near:
    if not 0 < x < math.inf:
        return math.inf if x == math.inf else math.nan if x else -math.inf
    value = Fraction(math.log2(x))
    return Near(value, Fraction(2) ** -22 * (1 if 0.5 <= x <= 2 else abs(value)))


def larger(x: float, y: float) -> float:
    if x != x or y != y:
        return y if x != x else x
    return max(x, y, key=lambda each: (each, math.copysign(1, each)))


def divided(x: int, y: int) -> tuple[int | None, int | None]:
    """Cut off, and the remainder; open for a divisor of zero, and for what does not fit."""
    if not y or (y == -1 and x in (-(1 << 31), -(1 << 63))):
        return None, None
    found = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
    return found, x - found * y


def field(x: int, place: int, length: int, signed: bool = False) -> int:
    place, length, bits = place & 255, length & 255, x & 0xFFFFFFFF
    sign = bits >> min(place + length - 1, 31) & 1 if signed and length else 0
    return sum(
        (bits >> place + i & 1 if i < length and place + i < 32 else sign) << i for i in range(32)
    )


def permuted(x: int, y: int, selector: int) -> int:
    data, out = (y << 32 | x).to_bytes(8, "little"), 0
    for i, choice in enumerate(selector >> 4 * i & 15 for i in range(4)):
        out |= (data[choice & 7] >> 7) * 255 << 8 * i if choice & 8 else data[choice & 7] << 8 * i
    return out


def integer(round_: Callable[[Fraction], int], kind: str) -> Callable[[float], int]:
    """Clamped; NaN is zero, but for 64 bits the least number."""
    size = bits_of(kind)
    least, most = (
        (-(1 << size - 1), (1 << size - 1) - 1) if kind[0] == "s" else (0, (1 << size) - 1)
    )

    def convert(x: float) -> int:
        if math.isfinite(x):
            return min(max(round_(Fraction(x)), least), most)
        return (1 << 63 if size == 64 else 0) if x != x else most if x > 0 else least

    return convert


# 9.7.3 to 9.7.5: floating point.
for _name, _function in (("add", plus), ("sub", lambda x, y: plus(x, -y)), ("mul", times)):
    define(f"{_name}{{,.rn}}.{{f32,ftz.f32,f32x2,bf16,f16,bf16x2,f16x2}}", _function)
    for _kind in ("f16", "bf16") if _name != "mul" else ():
        define(f"{_name}.rn.f32.{_kind}", _function, f"f32 {_kind} f32")
# The product of two fp32 numbers is exact in fp64.
define("fma.rn.{f32,ftz.f32,f32x2,bf16,f16,bf16x2,f16x2}", lambda x, y, z: plus(x * y, z))
for _kind in ("f16", "bf16"):
    define(f"fma.rn.f32.{_kind}", lambda x, y, z: plus(x * y, z), f"f32 {_kind} {_kind} f32")
define("div.rn.f32", quotient)
define("div.full.f32", lambda x, y: near(quotient(x, y), ulps=2))
define("div.approx.f32", fast_quotient)
define("rcp.rn.f32", lambda x: quotient(1.0, x))
define("rcp.approx.f32", lambda x: near(quotient(1.0, x), ulps=1))
define("sqrt.rn{,.ftz}.f32", root)
define("sqrt.approx{,.ftz}.f32", lambda x: near(root(x), relative=2.0**-23))
_inverse = lambda x: 1 / math.sqrt(x) if x > 0 else math.nan if x else math.copysign(math.inf, x)  # noqa: E731
define("rsqrt.approx{,.ftz}.f32", lambda x: near(_inverse(x), relative=2.0**-22.9))
define("lg2.approx{,.ftz}.f32", logarithm)
_power = lambda x: math.inf if x >= 128 else 0.0 if x == -math.inf else 2.0 ** max(x, -300.0)  # noqa: E731
define("ex2.approx{,.ftz}.f32", lambda x: near(_power(x), ulps=2) if x == x else x)
define("abs{,.ftz}.f32", abs)
define("neg{,.ftz}.f32", lambda x: -x)
for _name, _function in (("min", lambda x, y: -larger(-x, -y)), ("max", larger)):
    define(f"{_name}{{,.ftz}}.f32", _function)
    _function = lambda x, y, of=_function: of(x, y) if x == x and y == y else math.nan  # noqa: E731
    define(f"{_name}.NaN{{,.ftz}}.f32", _function, "f32 f32 f32")
# 9.7.1: integers.
define("add.{s16,s32,s64,u32,u64}", lambda x, y: x + y)
define("sub.{s16,s32,s64,u32,u64}", lambda x, y: x - y)
define("mul.lo.{s16,s32,s64,u32}", lambda x, y: x * y)
define("mul.hi.{s32,u32}", lambda x, y: x * y >> 32)
define("mad.lo.{s32,s64,u32}", lambda x, y, z: x * y + z)
for _from, _to in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")):
    define(f"mul.wide.{_from}", lambda x, y: x * y, f"{_to} {_from} {_from}")
    define(f"mad.wide.{_from}", lambda x, y, z: x * y + z, f"{_to} {_from} {_from} {_to}")
define("div.{s32,u32,s64}", lambda x, y: divided(x, y)[0])
define("rem.{s32,u32,s64}", lambda x, y: divided(x, y)[1])
define("abs.{s32,s64}", abs)
define("neg.{s16,s32,s64}", lambda x: -x)
define("min.{s32,u32,s64}", lambda x, y: min(x, y))
define("max.{s32,u32,s64}", lambda x, y: max(x, y))
define("popc.b32", lambda x: x.bit_count())
define("bfe.u32", lambda x, place, length: field(x, place, length))
define("bfe.s32", lambda x, place, length: field(x, place, length, signed=True), "s32 s32 u32 u32")
# 9.7.6 to 9.7.8: selection, comparison, logic, shifts.
define("and.{b16,b32,b64,pred}", lambda x, y: x & y)
define("or.{b16,b32,b64,pred}", lambda x, y: x | y)
define("xor.{b16,b32,b64,pred}", lambda x, y: x ^ y)
define("not.{b16,b32,b64,pred}", lambda x: ~x)
for _size in ("16", "32", "64"):
    define(f"shl.b{_size}", lambda x, y: x << min(y, 64), f"b{_size} b{_size} u32")
    for _kind in (f"s{_size}", f"u{_size}"):
        define(f"shr.{_kind}", lambda x, y: x >> min(y, 64), f"{_kind} {_kind} u32")
for _kind in ("b16", "b32", "b64", "f32"):
    define(f"selp.{_kind}", lambda x, y, p: x if p else y, f"{_kind} {_kind} {_kind} pred")
_COMPARE = {
    "eq": operator.eq,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
for _name, _function in (_COMPARE | {"ne": lambda x, y: x < y or x > y}).items():
    define(
        f"setp.{_name}u.f32",
        lambda x, y, of=_function: x != x or y != y or of(x, y),
        "pred f32 f32",
    )
    for _kind in ("f32", *map("".join, product("sub", ("16", "32", "64")))):
        if _kind[0] != "b" or _name in ("eq", "ne"):
            define(
                f"setp.{_name}.{_kind}",
                lambda x, y, of=_function: of(x, y),
                f"pred {_kind} {_kind}",
            )
define("setp.num.f32", lambda x, y: x == x and y == y, "pred f32 f32")
define("setp.nan.f32", lambda x, y: x != x or y != y, "pred f32 f32")
# 9.7.9: movement and conversion. Addresses of all spaces are generic here.
define("prmt.b32", permuted)
define("mov.{b16,b32,b64,u16,u32,u64,s16,s32,s64,f32,pred}", lambda x: x)
define("cvta.{param,to.global,global,shared,to.shared}.u64", lambda x: x)
for _to, _from in product(("s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64"), repeat=2):
    define(f"cvt.{_to}.{_from}", lambda x: x, f"{_to} {_from}")
for _kind in ("bf16", "f16"):
    define(f"cvt.f32.{_kind}", lambda x: x, f"f32 {_kind}")
    define(f"cvt.rn.{_kind}.f32", lambda x: x, f"{_kind} f32")
    define(f"cvt.rn.{_kind}x2.f32", lambda x, y: (y, x), f"{_kind}x2 f32 f32")
define("cvt.rn.satfinite.e4m3x2.f32", lambda x, y: (y, x), "e4m3x2 f32 f32")
for _kind in ("s32", "u32", "s64"):
    define(f"cvt.rn.f32.{_kind}", lambda x: Fraction(x) or 0.0, f"f32 {_kind}")
for _name, _round in (("rzi", math.trunc), ("rni", round), ("rmi", math.floor), ("rpi", math.ceil)):
    _function = lambda x, to=_round: math.copysign(to(Fraction(x)), x) if math.isfinite(x) else x  # noqa: E731
    define(f"cvt.{_name}.f32.f32", _function, "f32 f32")
    for _to in ("s32", "u32", "s64"):
        define(f"cvt.{_name}.{_to}.f32", integer(_round, _to), f"{_to} f32")

_SMALL = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256]
_EDGES = {
    "f32": """0 1 7fffff 800000 800001 3f800000 3f800001 3f7fffff 3f800800 3f801000 3f803000 3f808000 3f818000
        3f000000 3fc00000 40200000 40600000 4b000001 4effffff 4f000000 4f800000 5f000000 5f800000 43e00000 43e80000
        43e7ffff 43f00000 3b000000 3a800000 3a800001 477fe000 477fefff 477ff000 33800000 33000000 33000001 7e800000
        7e800001 7effffff 7f7fffff 7f7f8000 7f7f7fff 7f800000 7f800001 43000000 42fdffff 43150000 7fc00000""",
    "f16": "0 1 3ff 400 401 3c00 3c01 3bff 3c10 3e00 4400 7bff 7800 7c00 7c01 2400 1000 3c20 3c40 7e00",
    "bf16": "0 1 7f 80 81 3f80 3f81 3f7f 3f88 3f90 3fc0 4040 7f7f 7e80 7f00 7f80 7f81 1000 2000 4b00 7fc0",
}
_SPECIAL = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf)


def edges(kind: str) -> list[int]:
    if kind in _EDGES:
        bits = [int(each, 16) for each in _EDGES[kind].split()]
        return [*bits, *(each | 1 << bits_of(kind) - 1 for each in bits)]
    most = (1 << bits_of(kind)) - 1
    return sorted(
        {
            each & most
            for each in (*_SMALL, most, most - 1, most >> 1, (most >> 1) + 1, (most >> 1) - 1)
        }
    )


def chosen(kind: str, at: random.Random) -> int:
    """A random operand: any bits, or a number not far from one, its last bits often zeros."""
    if kind not in _FORMATS or at.random() < 0.3:
        return at.getrandbits(bits_of(kind))
    exponent_bits, mantissa_bits = _FORMATS[kind]
    mantissa = (
        at.getrandbits(mantissa_bits) >> (shift := at.choice((0, 0, mantissa_bits // 2))) << shift
    )
    exponent = (1 << exponent_bits - 1) - 1 + at.randint(-13, 13)
    return at.getrandbits(1) << exponent_bits + mantissa_bits | exponent << mantissa_bits | mantissa


def rows(sources: list[str], at: random.Random, count: int) -> list[tuple[int, ...]]:
    """Operands: edges with each other, and random ones."""
    scalars = [kind.removesuffix("x2") for kind in sources]
    every = [edges(kind) for kind in scalars]
    special = [
        [*(encode(x, kind) for x in _SPECIAL), edges(kind)[-1]] if kind in _FORMATS else [0, 1]
        for kind in scalars
    ]
    few = every if math.prod(map(len, every)) < 700 else special
    # (1 + 2^-12)^2 is amid two numbers: the third operand decides.
    ties = [
        (0x3F800800, 0x3F800800, z)
        for z in (1, 0x80000001, 0, 0x10000000)
        if scalars == ["f32"] * 3
    ]
    found: list[tuple[int, ...]] = [*ties, *product(*few)]
    found += [tuple(at.choice(each) for each in every) for _ in range(count // 2 - len(found))]
    found += [tuple(chosen(kind, at) for kind in scalars) for _ in range(count - len(found))]
    if sources[0] == scalars[0]:
        return found
    size = bits_of(scalars[0])
    return [
        tuple(x | y << size for x, y in zip(*pair, strict=True))
        for pair in zip(found, found[::-1], strict=True)
    ]


@pytest.mark.parametrize("form", DEFINITIONS)
def test_definition(form: str) -> None:
    to, sources, function = DEFINITIONS[form]
    at, ctas, flushes = random.Random(form), 8, ".ftz" in form
    table, body, arrays, names = rows(sources, at, 128 * ctas), [], [], []
    for i, (kind, column) in enumerate(zip(sources, zip(*table, strict=True), strict=True)):
        size = max(16, bits_of(kind))
        # What a wider register holds beyond the type does not matter.
        bits = [x | at.getrandbits(8) << 8 for x in column] if bits_of(kind) == 8 else column
        arrays.append(np.array(bits, f"u{size // 8}"))
        names.append(f"{register(kind)}{i + 2}")
        loaded = f"%rs{i + 2}" if kind == "pred" else names[-1]
        body.append(f"ld.global.b{size} {loaded}, [%rd{10 + i}];")
        body += [f"setp.ne.b16 {names[-1]}, {loaded}, 0;"] if kind == "pred" else []
    size, stored = max(16, bits_of(to)), "%rs9" if to == "pred" else f"{register(to)}9"
    body.append(f"{form} {', '.join((f'{register(to)}9', *names))};")
    body += ["selp.b16 %rs9, 1, 0, %p9;"] if to == "pred" else []
    body.append(f"st.global.b{size} [%rd{10 + len(sources)}], {stored};")
    found, wrong = np.zeros(len(table), f"u{size // 8}"), []
    execute("\n".join(body), *arrays, found, threads=128, ctas=ctas)
    for row, bits in zip(table, found.tolist(), strict=True):
        values = [decode(each, kind) for each, kind in zip(row, sources, strict=True)]
        values = (
            [math.copysign(0.0, x) if subnormal(x) else x for x in values] if flushes else values
        )
        paired = to.endswith("x2") and sources[0].endswith("x2")
        expected = (
            tuple(function(*each) for each in zip(*values, strict=True))
            if paired
            else function(*values)
        )
        if not agrees(bits, expected, to, flushes=flushes):
            wrong.append(
                f"{form} {' '.join(map(hex, row))} ({values}) is {bits:#x} and not {expected}"
            )
    assert not wrong, f"{len(wrong)} of {len(table)}\n" + "\n".join(wrong[:8])


# Programs. Sums of small integers are exact in every order.

_WAIT = "wait{0}: mbarrier.try_wait.parity.shared::cta.b64 %p9, [{1}], {2}; @!%p9 bra.uni wait{0};"
_PLACE = np.arange(128)
_GROUP, _PAIR = _PLACE % 32 // 4, _PLACE % 4  # of a lane in fragments


def random_bits(*shape: int, kind: str = "u4") -> Any:
    return np.random.default_rng(len(shape)).integers(
        0, 1 << 8 * np.dtype(kind).itemsize, shape, kind
    )


def small(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).integers(-4, 5, shape).astype(np.float32)


def halves(values: Any, kind: str) -> Any:
    """Bits of values of 16 bits."""
    return (
        (values.astype("f4").view("u4") >> 16).astype("u2")
        if kind == "bf16"
        else values.astype("f2").view("u2")
    )


def pairs(matrix: Any, row: Any, column: Any, kind: str) -> Any:
    """Registers that hold two elements of a row."""
    return np.stack([halves(matrix[row, column + i], kind) for i in (0, 1)], -1).view("u4")[..., 0]


def vector(first: int, count: int, name: str = "%r") -> str:
    return "{" + ", ".join(f"{name}{first + i}" for i in range(count)) + "}"


def loads(first: int, count: int, pointer: str) -> str:
    return "\n".join(f"ld.global.b32 %r{first + i}, [{pointer}+{4 * i}];" for i in range(count))


def stores(first: int, count: int, pointer: str) -> str:
    return "\n".join(f"st.global.b32 [{pointer}+{4 * i}], %r{first + i};" for i in range(count))


def fill(row_bytes: int) -> str:
    """Rows of the first array to shared memory, one a thread."""
    four = vector(391, 4)
    return f"mul.lo.s32 %r390, %r0, {row_bytes};" + "".join(
        f"ld.global.v4.b32 {four}, [%rd10+{at}]; st.shared.v4.b32 [%r390+{at}], {four};"
        for at in range(0, row_bytes, 16)
    )


@each_form(
    *(
        name
        for name in FORMS
        if name.startswith(("ld.global", "st.global", "ld.shared", "st.shared"))
    )
)
def test_load_and_store(form: str) -> None:
    """9.7.9.8, 9.7.9.11."""
    _, space, *several, kind = form.split(".")
    count, size, suffix = (
        int(several[0][1:]) if several else 1,
        int(kind[1:]) // 8,
        ".".join(("", *several, kind)),
    )
    x = random_bits(32, count, kind=f"u{size}")
    out, names = (
        np.zeros_like(x),
        vector(40 if size == 8 else 3, count, register(kind)).strip("" if several else "{}"),
    )
    through = f"mul.lo.s32 %r2, %r0, {x[0].nbytes}; st.shared{suffix} [%r2], {names}; ld.shared{suffix} {names}, [%r2];"
    through = through if space == "shared" else ""
    ordered(
        f"ld.global{suffix} {names}, [%rd10]; {through} st.global{suffix} [%rd11], {names};",
        x,
        out,
        shared=1024,
    )
    assert (out == x).all()


@each_form("ld.param.{b8,b16,b32,b64,u32,u64,s32,s64,f32}")
def test_parameters(form: str) -> None:
    """9.7.9.8: a register wider than the type holds its sign or zeros."""
    kind, out, value = (
        form.rpartition(".")[2].replace("f", "u"),
        np.zeros((32, 1), "u8"),
        0x8192A3B4C5D6E7F8,
    )
    at = 8 - int(kind[1:]) // 8
    to = "%r30; cvt.u64.u32 %rd30, %r30;" if "f32" in form else "%rd30;"
    ordered(
        f"{form} {to.replace(';', f', [k_param_1+{at}];', 1)} st.global.b64 [%rd10], %rd30;",
        out,
        value,
    )
    assert (out == decode(value >> 8 * at, kind) % (1 << 64)).all()


@each_form("shfl.sync.{bfly,idx,up,down}.b32")
def test_shuffle(form: str) -> None:
    """9.7.9.6: lanes, distances beyond 31, clamps, and the predicate."""
    mode, at = form.split(".")[2], np.random.default_rng(1)
    x, by, clamp = (
        random_bits(32, 1),
        at.integers(0, 40, (32, 1), "u4"),
        at.integers(0, 32, (32, 1), "u4"),
    )
    out, inside = np.zeros_like(x), np.zeros_like(x)
    body = f"""ld.global.b32 %r2, [%rd10]; ld.global.b32 %r3, [%rd11]; ld.global.b32 %r4, [%rd12];
        {form} %r5|%p1, %r2, %r3, %r4, -1; selp.b32 %r6, 1, 0, %p1;
        st.global.b32 [%rd13], %r5; st.global.b32 [%rd14], %r6;"""
    ordered(body, x, by, clamp, out, inside)
    for lane in range(32):
        distance, most = int(by[lane, 0]) & 31, int(clamp[lane, 0])
        source = {
            "bfly": lane ^ distance,
            "idx": distance,
            "up": lane - distance,
            "down": lane + distance,
        }[mode]
        there = source >= most if mode == "up" else source <= most
        assert (bool(inside[lane, 0]), out[lane, 0]) == (there, x[source if there else lane, 0]), (
            lane
        )


@each_form(
    "redux.sync.{add,min,max}.{s32,u32}", "redux.sync.{and,or,xor}.b32", "redux.sync.{min,max}.f32"
)
def test_reduction(form: str) -> None:
    """9.7.13.12: floats leave NaN out, as `min` and `max` do."""
    *_, name, kind = form.split(".")
    x, out = random_bits(64, 1), np.zeros((64, 1), "u4")
    if kind == "f32":
        x[:3, 0], x[32:, 0] = (0x7FC00000, 0x80000000, 0), 0x7FC00000
    ordered(
        f"ld.global.b32 %r2, [%rd10]; {form} %r3, %r2, -1; st.global.b32 [%rd11], %r3;",
        x,
        out,
        threads=64,
    )
    for warp in (slice(0, 32), slice(32, 64)):
        expected = functools.reduce(
            DEFINITIONS[f"{name}.{kind}"][2], (decode(int(each), kind) for each in x[warp, 0])
        )
        assert all(agrees(int(each), expected, kind) for each in out[warp, 0])


@covers("vote.sync.{any.pred,all.pred,ballot.b32}", "elect.sync", "bar.warp.sync")
@covers("griddepcontrol.{wait,launch_dependents}")
def test_votes() -> None:
    """9.7.13.9, 9.7.13.14: a ballot, whether any and all threads of a warp agree, and one leader."""
    x, out = random_bits(96, 1) & 1, np.zeros((96, 4), "u4")
    x[32:64], x[64:] = 0, 1
    body = """griddepcontrol.wait; ld.global.b32 %r2, [%rd10]; setp.ne.b32 %p1, %r2, 0; bar.warp.sync -1;
        vote.sync.ballot.b32 %r3, %p1, -1; vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1;
        elect.sync %r7|%p4, -1; selp.b32 %r4, 1, 0, %p2; selp.b32 %r5, 1, 0, %p3; selp.b32 %r6, 1, 0, %p4;
        st.global.v4.b32 [%rd11], {%r3, %r4, %r5, %r6}; griddepcontrol.launch_dependents;"""
    ordered(body, x, out, threads=96)
    ballots = [sum(int(bit) << lane for lane, bit in enumerate(warp)) for warp in x.reshape(3, 32)]
    assert (out[:, :3].reshape(3, 32, 3) == [[[b, b > 0, b == 2**32 - 1]] for b in ballots]).all()
    assert (out[:, 3].reshape(3, 32).sum(1) == 1).all()


@covers("bra", "bra.uni", "ret", "mov.{b32,b64,pred}", "setp.lt.s32", "add.f32", "selp.f32")
def test_control_and_operands() -> None:
    """9.3, 9.7.9.3-4, 9.7.12: divergent loops, guards, immediates, packed registers, both results of a comparison."""
    x, out, t = random_bits(64, 2), np.zeros((64, 8), "u4"), np.arange(64)
    body = """ld.global.v2.b32 {%r2, %r3}, [%rd10]; mov.b64 %rd30, {%r2, %r3};
        mov.b64 {%r4, _}, %rd30; mov.b64 {_, %r5}, %rd30; mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r6, {%rs2, %rs1};
        mov.b32 %r7, 0; mov.u32 %r8, %r0;
        $loop: setp.lt.s32 %p1|%p2, %r8, 1; @%p1 bra $done; add.s32 %r7, %r7, 3; add.s32 %r8, %r8, -2; bra.uni $loop;
        $done: @!%p2 add.s32 %r7, %r7, 0x1000; @%p2 add.s32 %r7, %r7, 0x2000;
        setp.lt.s32 %p3, %r0, 40; mov.pred %p4, -1; xor.pred %p3, %p3, %p4; mov.b32 %r9, 0f3FC00000;
        add.f32 %r9, %r9, 0fC0000000; selp.f32 %r9, %r9, 0f40490FDB, %p3;
        { .reg .b32 local; mov.b32 local, -7; { .reg .b32 local; mov.b32 local, 9; } mov.u32 %r10, local; }
        st.global.v4.b32 [%rd11], {%r4, %r5, %r6, %r7}; st.global.v2.b32 [%rd11+16], {%r9, %r10}; @%p3 ret;
        st.global.b32 [%rd11+24], 5;"""
    ordered(body, x, out, threads=64)
    swapped, picked = x[:, 0] >> 16 | x[:, 0] << 16, np.where(t < 40, 0x40490FDB, 0xBF000000)
    expected = [
        *x.T,
        swapped,
        3 * ((t + 1) // 2) + 0x1000,
        picked,
        0 * t + 2**32 - 7,
        5 * (t < 40),
        0 * t,
    ]
    assert (out == np.stack(expected, 1)).all()


@covers("bar.sync", "barrier.sync")
def test_barriers() -> None:
    """9.7.13.1: two warps of four, counted, and all of a CTA."""
    out, t = np.zeros((256, 1), "u4"), np.arange(128)
    body = """shl.b32 %r2, %r0, 2; st.shared.b32 [%r2], %r0; setp.gt.u32 %p1, %r0, 63; @%p1 bra $after;
        bar.sync 1, 64; xor.b32 %r3, %r2, 252; ld.shared.b32 %r4, [%r3]; st.global.b32 [%rd10], %r4;
        $after: barrier.sync 0; @!%p1 ret; bar.sync 0; xor.b32 %r3, %r2, 508; ld.shared.b32 %r4, [%r3];
        st.global.b32 [%rd10], %r4;"""
    ordered(body, out, threads=128, ctas=2, shared=512)
    assert (out.reshape(2, 128) == np.where(t < 64, 63 - t, 127 - t)).all()


@covers("cp.async.{ca,cg}.shared.global", "cp.async.{commit_group,wait_group,wait_all}")
def test_asynchronous_copies() -> None:
    """9.7.9.25: 16, 8 and 4 bytes, the rest zeros, and groups that land in order."""
    x, out = random_bits(32, 8), np.zeros((32, 8), "u4")
    count = np.arange(32, dtype="u4")[:, None] % 5 * 4
    body = """ld.global.b32 %r2, [%rd12]; shl.b32 %r3, %r0, 5;
        cp.async.cg.shared.global [ %r3 + 0 ], [ %rd10 + 0 ], 0x10, %r2; cp.async.commit_group;
        cp.async.ca.shared.global [%r3+16], [%rd10+24], 8; cp.async.commit_group;
        cp.async.ca.shared.global [%r3+24], [%rd10+16], 4; cp.async.ca.shared.global [%r3+28], [%rd10+20], 4, 0;
        cp.async.commit_group; cp.async.wait_group 2; ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3];
        cp.async.wait_group 1; ld.shared.v2.b32 {%r8, %r9}, [%r3+16]; cp.async.wait_all;
        ld.shared.v2.b32 {%r10, %r11}, [%r3+24]; st.global.v4.b32 [%rd11], {%r4, %r5, %r6, %r7};
        st.global.v4.b32 [%rd11+16], {%r8, %r9, %r10, %r11};"""
    ordered(body, x, out, count, shared=1024)
    assert (out[:, :4] == np.where(4 * np.arange(4) < count, x[:, :4], 0)).all()
    assert (out[:, 4:] == np.concatenate([x[:, [6, 7, 4]], 0 * count], 1)).all()


@each_form("{ld,st}matrix.sync.aligned.m8n8.{x1,x2,x4}{,.trans}.shared{,::cta}.b16")
def test_matrices(form: str) -> None:
    """9.7.14.5.15-16: eight rows of 16 bytes a matrix, in any place."""
    count, lane = int(form.split(".")[4][1]), np.arange(32)
    x, where = (
        random_bits(32, 8, kind="u2"),
        np.random.default_rng(3).permutation(32).astype("u4")[:, None],
    )
    used = where[: 8 * count, 0]
    matrices = x[used].reshape(count, 8, 8)
    matrices = matrices.swapaxes(1, 2) if ".trans" in form else matrices
    fragments = np.stack([matrices[:, lane // 4, lane % 4 * 2 + i] for i in (0, 1)], -1).swapaxes(
        0, 1
    )
    fragments = np.ascontiguousarray(fragments).view("u4")[..., 0]
    start = f"ld.global.b32 %r2, [%rd11]; shl.b32 %r2, %r2, 4; {fill(16)} bar.sync 0;"
    if form.startswith("ld"):
        out = np.zeros_like(fragments)
        body = f"{start} {form} {vector(4, count)}, [%r2]; {stores(4, count, '%rd12')}"
        ordered(body, x, where, out, shared=512)
        assert (out == fragments).all()
        return
    out, expected = np.zeros_like(x), np.zeros_like(x)
    back = f"bar.sync 0; ld.shared.v4.b32 {vector(8, 4)}, [%r390]; {stores(8, 4, '%rd13')}"
    body = f"{start} {loads(4, count, '%rd12')} {form} [%r2], {vector(4, count)}; {back}"
    ordered(body, np.zeros_like(x), where, fragments, out, shared=512)
    expected[used] = x[used]
    assert (out == expected).all()


def left_registers(x: Any, kind: str) -> Any:
    """`[threads, 4]` of a matrix `[16 · warps, 16]` (9.7.14.5.8, 9.7.15.5.1)."""
    t, j = np.arange(2 * len(x))[:, None], np.arange(4)
    return pairs(x, t // 32 * 16 + t % 32 // 4 + j % 2 * 8, t % 4 * 2 + j // 2 * 8, kind)


@each_form(
    "mma.sync.aligned.{m16n8k16.row.col.f32.bf16.bf16,m16n8k16.row.col.f32.f16.f16,m16n8k8.row.col.f32.tf32.tf32}.f32"
)
def test_product(form: str) -> None:
    """9.7.14.5.7-8."""
    kind, group, pair, i = form.split(".")[7], _GROUP[:32, None], _PAIR[:32, None], np.arange(4)
    depth = 8 if kind == "tf32" else 16
    x, y, z = small(16, depth), small(8, depth), small(16, 8)
    if kind == "tf32":  # thirteen bits are not read
        a = x[group + i % 2 * 8, pair + i // 2 * 4].view("u4") | 0x155
        b = y[group, pair + np.arange(2) * 4].view("u4") | 0xFFF
    else:
        a, b = left_registers(x, kind), pairs(y, group, 2 * pair + np.arange(2) * 8, kind)
    places = group + i // 2 * 8, 2 * pair + i % 2
    out = np.zeros((32, 4), "f4")
    start = f"{loads(2, 4, '%rd10')} {loads(6, 2, '%rd11')} {loads(8, 4, '%rd12')}"
    run = f"{form} {vector(12, 4)}, {vector(2, 4)}, {vector(6, 2)}, {vector(8, 4)};"
    ordered(f"{start} {run} {stores(12, 4, '%rd13')}", a, b, z[places], out)
    assert (out == (x @ y.T + z)[places]).all()


def tiles(image: Any, at: int, matrix: Any, swizzle: int, across: bool, mode: int) -> list[int]:
    """Put a matrix `[rows, depth]` into shared memory; descriptors of 16 columns each (9.7.15.5.1).

    `across`: its rows are contiguous (M- or N-major), else its columns.
    """
    size, depth = matrix.shape
    row, k, wide = np.arange(size)[:, None], np.arange(depth), swizzle // 2
    leading, stride = (swizzle * depth if across else 16), 8 * swizzle
    down = row % 8 * swizzle + row // 8 * stride + k * 2
    place = (
        row % wide * 2 + row // wide * leading + k % 8 * swizzle + k // 8 * stride
        if across
        else down
    )
    place = at + (place ^ (place >> 7 & swizzle // 16 - 1) << 4)
    image.view("u2")[place // 2] = matrix
    step = 2 * stride if across else 32
    return [
        at + step * i >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode
        for i in range(depth // 16)
    ]


def wgmma(
    form: str, swizzle: int, left: str, across: bool, edit: Callable[[str], str] = str
) -> Any:
    """A product of a warpgroup: hazards, what it is and must be."""
    width, kind, depth = (
        int(form.split(".")[4][4:-3]),
        form.rpartition(".")[2],
        16 if swizzle == 32 else 32,
    )
    count, mode, x, y = (
        width // 2,
        {128: 1, 64: 2, 32: 3}[swizzle] << 62,
        small(64, depth),
        small(width, depth),
    )
    image = np.zeros(8192 - width * swizzle // -2048 * 2048, "u1")
    a = tiles(image, 0, halves(x, kind), swizzle, left == "across", mode)
    b = tiles(image, 8192, halves(y, kind), swizzle, across, mode)
    held = np.concatenate([left_registers(x[:, k : k + 16], kind) for k in range(0, depth, 16)], 1)
    flags, run = (
        f"{int(across)}" if left == "registers" else f"{int(left == 'across')}, {int(across)}",
        "",
    )
    for i, (each, other) in enumerate(zip(a, b, strict=True)):
        first = vector(4 + 4 * i, 4) if left == "registers" else "%rd30"
        run += f"mov.b64 %rd30, {each}; mov.b64 %rd31, {other};\n"
        run += f"{form} {vector(100, count)}, {first}, %rd31, {'%p5' if i else 0}, 1, 1, {flags};\n"
    body = f"""{fill(len(image) // 128)} fence.proxy.async.shared::cta; bar.sync 0; {loads(4, 4 * len(a), "%rd11")}
    setp.eq.b32 %p5, %r0, %r0; wgmma.fence.sync.aligned; {run}
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; {stores(100, count, "%rd12")}"""
    out, i = np.zeros((128, count), "f4"), np.arange(count)
    machine = execute(edit(body), image.reshape(128, -1), held, out, threads=128, shared=len(image))
    row, column = _PLACE // 32 * 16 + _GROUP, 2 * _PAIR
    return (
        machine.hazards,
        out,
        (x @ y.T)[row[:, None] + i // 2 % 2 * 8, column[:, None] + i // 4 * 8 + i % 2],
    )


@each_form(
    f"wgmma.mma_async.sync.aligned.m64n{{{','.join(map(str, range(8, 257, 8)))}}}k16.f32.{{bf16.bf16,f16.f16}}"
)
def test_warpgroup_product(form: str) -> None:
    """9.7.15: A in registers or shared memory, each major, each swizzle."""
    width = int(form.split(".")[4][4:-3])
    every = [*product((32, 64, 128), ("registers", "shared", "across"), (False, True))]
    for swizzle, left, across in every if width in (8, 64) else every[width // 8 * 5 % 18 :: 18]:
        if not across or 2 * width % swizzle == 0:
            hazards, found, expected = wgmma(form, swizzle, left, across)
            assert not hazards
            assert (found == expected).all(), (swizzle, left, across)


@covers("fence.proxy.async{,.shared::cta}", "wgmma.{fence,commit_group,wait_group}.sync.aligned")
def test_proxy_fences() -> None:
    for fence in ("", ".shared::cta"):
        edit = functools.partial(re.sub, r"(fence\.proxy\.async)\.shared::cta", rf"\1{fence}")
        assert not wgmma(
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16", 64, "shared", False, edit
        )[0]


@covers("mbarrier.{init,inval,arrive,try_wait.parity,test_wait.parity}.shared{,::cta}.b64")
def test_memory_barrier() -> None:
    """9.7.13.15: two phases pass data between two warps."""
    out, t = np.zeros((64, 2), "u4"), np.arange(64)
    body = f"""setp.eq.b32 %p1, %r0, 0; mov.b32 %r9, 1024; @%p1 mbarrier.init.shared::cta.b64 [%r9], 64; bar.sync 0;
        shl.b32 %r2, %r0, 2; xor.b32 %r3, %r2, 252; st.shared.b32 [%r2], %r0; mbarrier.arrive.shared::cta.b64 _, [%r9];
        {_WAIT.format(0, "%r9", 0)} ld.shared.b32 %r4, [%r3]; mbarrier.arrive.shared::cta.b64 %rd30, [%r9];
        {_WAIT.format(1, "%r9", 1).replace("try", "test")} st.shared.b32 [%r3+256], %r4; bar.sync 0;
        ld.shared.b32 %r5, [%r2+256]; {stores(4, 2, "%rd10")} @%p1 mbarrier.inval.shared::cta.b64 [%r9];"""
    for space in ("shared", "shared::cta"):
        ordered(body.replace("shared::cta", space), out, threads=64, shared=1100)
    assert (out == np.stack([63 - t, t], 1)).all()


_COPIES = (
    "cp.async.bulk.tensor.{2d,3d,4d,5d}.shared::{cta,cluster}.global.mbarrier::complete_tx::bytes"
)


@covers("mbarrier.arrive.expect_tx.shared{,::cta}.b64")
@each_form(_COPIES)
def test_tile_copy(form: str) -> None:
    """9.7.9.27: a tile that begins before a tensor or ends beyond it has zeros there; its swizzle."""
    more = int(form.split(".")[4][0]) - 2
    shape, start = (3,) * more + (7, 80), (2,) * more + (-1, 40)
    for swizzle in (0, 32, 64, 128):
        box = (2,) * more + (8, swizzle // 2 or 24)
        x, count = random_bits(*shape, kind="u2"), math.prod(box) // 64
        out, tile = (
            np.zeros((32, count), "u4"),
            _Tile(0, 2, shape, tuple(n // 2 for n in x.strides), box, swizzle),
        )
        reads = "".join(f"ld.shared.b32 %r{5 + i}, [%r4+{128 * i}];" for i in range(count))
        body = f"""setp.eq.b32 %p1, %r0, 0; mov.b32 %r2, 8192; mov.b32 %r3, 1024; mov.b64 %rd30, 4096;
            shl.b32 %r4, %r0, 2;
            @%p1 mbarrier.init.shared::cta.b64 [%r2], 1; add.s32 %r4, %r4, %r3; bar.sync 0;
            @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], {128 * count};
            @%p1 {form} [%r3], [%rd30, {{{", ".join(map(str, start[::-1]))}}}], [%r2]; {_WAIT.format(0, "%r2", 0)}
            {reads} {stores(5, count, "%rd11")}"""
        body = body.replace("shared::cta.b64", "shared.b64") if swizzle == 32 else body
        early = re.sub(r"wait0:.*bra.uni wait0;", "", body)
        check(
            "by a bulk copy in flight",
            lambda: execute(early, x, out, shared=8200, tile=tile).hazards,  # noqa: B023
        )
        ordered(body, x, out, shared=8200, tile=tile)
        expected = np.zeros(box, "u2")
        for index in np.ndindex(*box):
            place = tuple(i + j for i, j in zip(index, start, strict=True))
            if all(0 <= i < n for i, n in zip(place, shape, strict=True)):
                expected[index] = x[place]
        at = 2 * np.arange(expected.size)
        at ^= (at >> 7 & max(swizzle, 16) // 16 - 1) << 4
        assert (
            np.ascontiguousarray(out.T).view("u2").reshape(-1)[at // 2] == expected.reshape(-1)
        ).all(), swizzle


_ALLOCATE = """setp.lt.u32 %p1, %r0, 32; mov.b32 %r2, {at};
@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2], 512;
bar.sync 0; ld.shared.b32 %r3, [%r2]; bar.sync 0; @%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
and.b32 %r4, %r0, 96; shl.b32 %r4, %r4, 16; add.s32 %r4, %r4, %r3;"""
_FREE = "bar.sync 0; @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 512;"


@each_form("tcgen05.{ld,st}.sync.aligned.{32x32b,16x32bx2}.{x1,x2,x4,x8,x16,x32,x64,x128}.b32")
def test_tensor_memory(form: str) -> None:
    """9.7.16.8: written or read as 32 lanes, the other way in the shape of the form."""
    halved, writes, t = "16x32bx2" in form, ".st." in form, _PLACE
    count = int(form.split(".")[5][1:])
    wide, split = (2 * count, f", {count}") if halved else (count, "")
    x, out = (
        random_bits(128, count if writes else wide),
        np.zeros((128, wide if writes else count), "u4"),
    )
    n, own = min(wide, 16), vector(100, count)
    name = f"tcgen05.{{}}.sync.aligned.32x32b.x{n}.b32"
    parts = [(f"[%r4 + {at}]", vector(100 + at, n)) for at in range(0, wide, n)]
    first = "".join(f"{name.format('st')} {place}, {part};" for place, part in parts)
    last = "".join(f"{name.format('ld')} {part}, {place};" for place, part in parts)
    if writes:  # over what all lanes hold
        same = "{" + ", ".join(n * ["%r100"]) + "}"
        first = (
            "".join(f"{name.format('st')} {place}, {same};" for place, _ in parts)
            + f"{form} [%r4 + 0]{split}, {own};"
        )
    else:
        last = f"{form} {own}, [%r4 + 0]{split};"
    body = f"""{_ALLOCATE.format(at=0)} {loads(100, x.shape[1], "%rd10")} {first} tcgen05.wait::st.sync.aligned;
        {last} tcgen05.wait::ld.sync.aligned; {stores(100, out.shape[1], "%rd11")} {_FREE}"""
    ordered(body, x, out, threads=128, shared=16)
    # Threads 16 to 31 have lanes 0 to 15 of their warp, too, from the split on.
    inner, outer = (x, out) if writes else (out, x)
    lane, column = (t // 32 * 32 + t % 16, t % 32 // 16 * count) if halved else (t, 0 * t)
    assert (inner == outer[lane[:, None], column[:, None] + np.arange(count)]).all()


def tcgen05(size: int, kind: str, left: str, across: bool, edit: Callable[[str], str] = str) -> Any:
    """A product of `size` rows of tensor memory: hazards, what it is and must be."""
    x, y, z, image, bf16 = (
        small(size, 32),
        small(32, 32),
        small(size, 32),
        np.zeros(16384, "u1"),
        kind == "bf16",
    )
    a = tiles(image, 0, halves(x, kind), 64, left == "across", 1 << 46 | 4 << 61)
    b = tiles(image, 8192, halves(y, kind), 64, across, 1 << 46 | 4 << 61)
    what = (
        1 << 4
        | bf16 << 7
        | bf16 << 10
        | (left == "across") << 15
        | across << 16
        | 4 << 17
        | size >> 4 << 24
    )
    lane = _PLACE if size == 128 else np.arange(64) // 16 * 32 + np.arange(64) % 16
    start, out, run = np.zeros((128, 48), "u4"), np.zeros((128, 32), "f4"), ""
    start[lane, :32], start[lane, 32:] = z.view("u4"), halves(x, kind).view("u4")
    for i, (each, other) in enumerate(zip(a, b, strict=True)):
        run += f"mov.b64 %rd30, {each}; mov.b64 %rd31, {other}; add.s32 %r7, %r3, {64 + 8 * i}; mov.b32 %r6, {what};\n"
        first = "[ %r7 + 0 ]" if left == "tensor" else "%rd30"
        run += f"@%p2 tcgen05.mma.cta_group::1.kind::f16 [ %r3 + 0 ], {first}, %rd31, %r6, %p3;\n"
    body = f"""{_ALLOCATE.format(at=16384)} {fill(128)} setp.eq.b32 %p2, %r0, 0; mov.b32 %r5, 16392; mov.pred %p3, -1;
    {loads(100, 48, "%rd11")} tcgen05.st.sync.aligned.32x32b.x32.b32 [%r4 + 0], {vector(100, 32)};
    tcgen05.st.sync.aligned.32x32b.x16.b32 [%r4 + 64], {vector(132, 16)}; tcgen05.wait::st.sync.aligned;
    @%p2 mbarrier.init.shared::cta.b64 [%r5], 1; fence.proxy.async.shared::cta; bar.sync 0; {run}
    @%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r5]; {_WAIT.format(0, "%r5", 0)}
    tcgen05.ld.sync.aligned.32x32b.x32.b32 {vector(100, 32)}, [%r4 + 0]; tcgen05.wait::ld.sync.aligned;
    {stores(100, 32, "%rd12")} bar.sync 0; @%p2 mbarrier.inval.shared::cta.b64 [%r5]; {_FREE}"""
    machine = execute(edit(body), image.reshape(128, -1), start, out, threads=128, shared=16400)
    return machine.hazards, out[lane], x @ y.T + z


@covers(
    "tcgen05.{alloc.cta_group::1.sync.aligned.shared::cta.b32,dealloc.cta_group::1.sync.aligned.b32}"
)
@covers(
    "tcgen05.{relinquish_alloc_permit.cta_group::1.sync.aligned,wait::ld.sync.aligned,wait::st.sync.aligned}"
)
@covers(
    "tcgen05.mma.cta_group::1.kind::f16",
    "tcgen05.commit.cta_group::1.mbarrier::arrive::one{,.shared::cluster}.b64",
)
@pytest.mark.parametrize("left", ["tensor", "shared", "across"])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("size", [64, 128])
def test_tensor_product(size: int, kind: str, left: str) -> None:
    """9.7.16.10."""
    for across, space in ((False, ".shared::cluster"), (True, "")):
        edit = functools.partial(re.sub, r"one\.shared::cluster", f"one{space}")
        hazards, found, expected = tcgen05(size, kind, left, across, edit)
        assert not hazards
        assert (found == expected).all()


def test_every_form_is_defined() -> None:
    assert not sorted(FORMS.keys() - DEFINITIONS.keys() - _tested)


# Checks: a program, and the hazard or the error that must be found; no hazard where it is empty.

_BARRIER = "mov.b32 %r2, 64; setp.eq.b32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;"
_CROSS = "shl.b32 %r2, %r0, 2; xor.b32 %r3, %r2, 252; st.shared.b32 [%r2], %r0; {} ld.shared.b32 %r4, [%r3];"
_COPY = "shl.b32 %r2, %r0, 4; cp.async.cg.shared.global [%r2], [{}], 16; cp.async.commit_group;"
_COPIED = f"{_COPY.format('%rd10')} cp.async.wait_group {{}}; ld.shared.b32 %r3, [%r2];"
_ROW = f"{_COPY.format('%rd10')} cp.async.wait_group 0; {{}} xor.b32 %r2, %r2, 512; ld.shared.b32 %r3, [%r2];"
_SOME = "setp.lt.u32 %p1, %r0, 5; @%p1"
_SUM = f"{_SOME} mov.b32 %r5, 1; add.s32 %r6, %r5, 1;"
_WARP = "by another warp"
CHECKS = {
    "load beyond": (
        "ld.global.b32 %r2, [%rd10+1024];",
        r"of 4 bytes .* outside .*by thread (0|32) of CTA \[0, 0, 0\]",
    ),
    "load before": ("ld.global.b32 %r2, [%rd0+-4];", "outside of all tensors"),
    "store beyond": ("st.global.v4.b32 [%rd10+1008], {%r0, %r0, %r0, %r0};", "by thread (1|32) of"),
    "copy beyond": (_COPY.format("%rd10+1024"), "asynchronous copy of 16 bytes .* outside"),
    "misaligned load": ("ld.global.v2.b32 {%r2, %r3}, [%rd10+4];", "not aligned"),
    "misaligned shared": ("mov.b32 %r2, 2; st.shared.b32 [%r2], %r0;", "not aligned"),
    "shared beyond": ("mov.b32 %r2, 4096; st.shared.b32 [%r2], %r0;", "beyond its"),
    "unknown form": (
        "frob.rn.f32 %r2, %r0;",
        r"frob\.rn\.f32 is not emulated, in `frob\.rn\.f32 %r2, %r0`",
    ),
    "part of a warp": (
        f"{_SOME} shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;",
        "some threads of a warp",
    ),
    "not initialised": (
        f"mov.b32 %r9, 64; {_WAIT.format(0, '%r9', 0)}",
        "barrier at 64 is not initialised",
    ),
    "initialised too late": (f"{_BARRIER} mbarrier.arrive.shared::cta.b64 _, [%r2];", "initialis"),
    "no arrival": (f"{_BARRIER} bar.sync 0; {_WAIT.format(0, '%r2', 0)}", "deadlock"),
    "barrier of more": ("bar.sync 1, 128;", "deadlock"),
    "unwritten": (
        "add.s32 %r3, %r99, 1; st.global.b32 [%rd10], %r3;",
        "register %r(3|99), to which .* nothing",
    ),
    "unwritten address": ("ld.global.b32 %r3, [%rd39];", "%rd39"),
    "written by some": (
        f"{_SOME} mov.b32 %r5, 1; st.global.b32 [%rd10], %r5;",
        "register %r5, to which some",
    ),
    "of what some wrote": (f"{_SUM} st.global.b32 [%rd10], %r6;", "register %r6, to which some"),
    "used by who wrote": (f"{_SUM} @%p1 st.global.b32 [%rd10], %r6;", ""),
    "uninitialised": ("shl.b32 %r2, %r0, 2; ld.shared.b32 %r3, [%r2];", "uninitialised"),
    "no barrier": (_CROSS.format(""), f"read of what is written {_WARP}"),
    "barrier": (_CROSS.format("bar.sync 0;"), ""),
    "barrier of a warp": (_CROSS.format("bar.warp.sync -1;"), f"read of what is written {_WARP}"),
    "overwritten": (
        f"{_CROSS.format('bar.sync 0;')} st.shared.b32 [%r2], %r4;",
        f"write over what is read {_WARP}",
    ),
    "written twice": (
        "mov.b32 %r2, 0; st.shared.b32 [%r2], %r0;",
        "warps write different|write over what is written",
    ),
    "copy": (_COPIED.format(0), ""),
    "copy in flight": (_COPIED.format(1), "asynchronous copy in flight"),
    "copy of another warp": (_ROW.format(""), "asynchronous copy in flight"),
    "copy after a barrier": (_ROW.format("bar.sync 0;"), ""),
    "copy overwritten": (
        f"{_COPY.format('%rd10')} st.shared.b32 [%r2], %r0;",
        "over what is written by an asynchronous copy",
    ),
    "copy without wait": (_COPY.format("%rd10"), "copies that nothing waits for"),
}


def check(message: str, run: Callable[[], Any]) -> None:
    try:
        found = [f"{each.place}: {each.kind}" for each in run().values()]
    except EmulationError as error:
        found = [str(error)]
    assert (
        any(re.search(rf"k\.py:7.*({message})", each) for each in found) if message else not found
    ), found


@pytest.mark.parametrize("schedule", ["lockstep", "random"])
@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, schedule: str) -> None:
    body, message = CHECKS[name]
    options: dict[str, Any] = {"threads": 64, "shared": 1024, "schedule": schedule}
    check(message, lambda: execute(body, np.zeros((64, 4), "u4"), **options).hazards)


_STORE = f"tcgen05.st.sync.aligned.32x32b.x1.b32 [%r4 + 0], {vector(390, 1)}; tcgen05.wait::st.sync.aligned;"
_WAIT_LD = "tcgen05.wait::ld.sync.aligned;"
_FENCE, _PRODUCT = "fence.proxy.async.shared::cta;", "@%p2 tcgen05.mma"


@pytest.mark.parametrize(
    ("run", "left", "old", "new", "message"),
    [
        (wgmma, "shared", _FENCE, "", "without a proxy fence"),
        (wgmma, "shared", f"{_FENCE} bar.sync 0;", f"bar.sync 0; {_FENCE}", ""),
        (wgmma, "shared", f"{_FENCE} bar.sync 0;", _FENCE, f"read of what is written {_WARP}"),
        (wgmma, "shared", "aligned 0;", "aligned 1;", "read of .*register .*before its wait"),
        (
            wgmma,
            "shared",
            "wgmma.wait",
            "st.shared.b32 [%r390], %r0; wgmma.wait",
            "over what is read by a GEMM in flight",
        ),
        (
            wgmma,
            "shared",
            "wgmma.wait",
            "mov.b32 %r101, 0; wgmma.wait",
            "write of .*register .*before its wait",
        ),
        (
            wgmma,
            "registers",
            "wgmma.wait",
            "mov.b32 %r5, 0; wgmma.wait",
            "write of .*register .*before its wait",
        ),
        (wgmma, "registers", "1, 1, 0;", "-1, 1, 0;", "not emulated"),
        (
            wgmma,
            "shared",
            "wgmma.mma",
            "setp.lt.u32 %p6, %r0, 96; @%p6 wgmma.mma",
            "some warps of a warpgroup",
        ),
        (tcgen05, "shared", _FENCE, "", "without a proxy fence"),
        (tcgen05, "shared", "tcgen05.wait::ld.sync.aligned;", "", "for which nothing waits"),
        (
            tcgen05,
            "shared",
            _WAIT_LD,
            f"add.f32 %r101, %r101, %r101; mov.b32 %r102, 0; {_WAIT_LD}",
            "write of",
        ),
        (
            tcgen05,
            "shared",
            _WAIT_LD,
            f"neg.f32 %r390, %r101; neg.f32 %r391, %r390; {_WAIT_LD}",
            "",
        ),
        (
            tcgen05,
            "shared",
            _WAIT_LD,
            f"shfl.sync.bfly.b32 %r390, %r101, 1, 31, -1; {_WAIT_LD}",
            "",
        ),
        (
            tcgen05,
            "shared",
            _WAIT_LD,
            f"neg.f32 %r390, %r101; st.shared.b32 [16384], %r390; {_WAIT_LD}",
            "ahead of the wait",
        ),
        (
            tcgen05,
            "shared",
            _WAIT_LD,
            f"setp.lt.u32 %p9, %r101, 5; @%p9 mov.b32 %r390, 1; {_WAIT_LD}",
            "ahead of the wait",
        ),
        (tcgen05, "shared", _FREE, "", "still allocated at exit"),
        (
            tcgen05,
            "shared",
            _WAIT_LD,
            f"{_STORE} {_WAIT_LD}",
            "over what is read by a load in flight",
        ),
        (tcgen05, "shared", _WAIT_LD, f"{_WAIT_LD} {_STORE}", ""),
        (tcgen05, "shared", "%r3, 512;", "%r3, 1024;", "more columns"),
        (
            tcgen05,
            "shared",
            "mov.b64 %rd30,",
            "mov.b64 %rd40,",
            "register %rd30, to which some threads wrote nothing",
        ),
        (
            wgmma,
            "shared",
            "mov.b64 %rd31,",
            "mov.b64 %rd41,",
            "register %rd31, to which some threads wrote nothing",
        ),
        (
            wgmma,
            "shared",
            "aligned; mov.b64 %rd30",
            "aligned; mov.b32 %r390, %r101; mov.b64 %rd30",
            "after wgmma.fence",
        ),
        (
            tcgen05,
            "tensor",
            "tcgen05.wait::st.sync.aligned;",
            "",
            "read of what is written by .* in flight",
        ),
        (
            tcgen05,
            "shared",
            _WAIT.format(0, "%r5", 0),
            "",
            "read of what is written by a GEMM in flight",
        ),
        (
            tcgen05,
            "shared",
            "wait0:",
            "st.shared.b32 [%r390], %r0; wait0:",
            "over what is read by a GEMM in flight",
        ),
        (tcgen05, "shared", "x16.b32 [%r4 + 64]", "x16.b32 [%r4 + 504]", "not allocated"),
        (tcgen05, "shared", "%r4, %r4, %r3;", "%r4, %r3, 0;", "belong to another"),
        (tcgen05, "shared", _PRODUCT, f"or.b32 %r6, %r6, 8192; {_PRODUCT}", "not emulated"),
        (tcgen05, "shared", _PRODUCT, f"xor.b32 %r6, %r6, 16; {_PRODUCT}", "not emulated"),
    ],
)
def test_product_check(
    run: Callable[..., Any], left: str, old: str, new: str, message: str
) -> None:
    form = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"
    which = (form, 128) if run is wgmma else (128, "bf16")
    check(message, lambda: run(*which, left, False, lambda body: body.replace(old, new))[0])


@pytest.mark.parametrize(("fence", "message"), [("", "without a proxy fence"), (_FENCE, "")])
def test_fence_after_copies(fence: str, message: str) -> None:
    """What cp.async writes is not visible to the async proxy either."""

    def edit(body: str) -> str:
        copy = r"cp.async.cg.shared.global [%r390+\1], [%rd10+\1], 16;"
        body = re.sub(
            r"ld\.global\.v4\.b32 {[^}]*}, \[%rd10\+(\d+)\]; st\.shared[^;]*;", copy, body
        )
        return body.replace(_FENCE, f"cp.async.commit_group; cp.async.wait_group 0; {fence}")

    check(
        message,
        lambda: wgmma(
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16", 64, "shared", False, edit
        )[0],
    )


def test_each_argument_has_memory_of_its_own() -> None:
    """A view has gaps, and a neighbour in memory is another argument."""
    memory = np.arange(64, dtype="u4")
    marks = np.zeros(64, bool)
    marks[::2] = True
    address = memory.ctypes.data
    windows = [Window(1 << 40, address, 128), Window(2 << 40, address, 256, marks.repeat(4))]
    allowed = Allocations(windows)
    accesses = np.array(
        [1 << 40, (1 << 40) + 124, (1 << 40) + 128, 2 << 40, (2 << 40) + 4, (2 << 40) + 8]
    )
    assert allowed.find(accesses, 4).tolist() == [0, 0, -1, 1, -1, 1]
    assert allowed.find(accesses, 8).tolist() == [0, -1, -1, -1, -1, -1]
