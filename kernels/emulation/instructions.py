"""Arithmetic, comparison, conversion and movement of registers: a NumPy function for each form.

Sections of the PTX ISA: 9.7.1 to 9.7.5 (arithmetic), 9.7.6 to 9.7.8 (comparison, logic), 9.7.9 (movement, conversion).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np

from .hazards import UNSIGNED, Array
from .machine import FORMS, Machine, expand, form
from .ptx import Instruction

Function = Callable[..., Any]
DTYPES: dict[str, np.dtype[Any]] = {
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "pred": np.dtype(bool),
}
for _size, _unsigned in UNSIGNED.items():
    DTYPES[f"s{8 * _size}"] = np.dtype(f"i{_size}")
    DTYPES[f"u{8 * _size}"] = DTYPES[f"b{8 * _size}"] = _unsigned
_MIN_NORMAL = np.float32(2.0**-126)


def bf16_to_fp32(bits: Array) -> Array:
    """Convert bf16, stored as 16-bit integers, to fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fp32_to_bf16(values: Array) -> Array:
    """Round to bf16, stored as 16-bit integers, to nearest, ties to even; NaN is 0x7FFF."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def fp32_to_e4m3(values: Array) -> Array:
    """Round to fp8 (e4m3), stored as 8-bit integers; finite numbers saturate at 448, NaN is 0x7F."""
    magnitude = np.minimum(np.abs(values.astype(np.float64)), 448.0)
    exponent = np.maximum(np.floor(np.log2(np.where(magnitude > 0, magnitude, 2.0**-6))), -6.0)
    # In units of the last place of the three mantissa bits: 8 to 15 for normal numbers.
    steps = np.rint(magnitude * 2.0 ** (3 - exponent))
    bits = np.where(np.isnan(values), 0x7F, (exponent + 6) * 8 + steps)
    sign = np.signbit(values).astype(np.uint8) << np.uint8(7)
    return np.nan_to_num(bits).astype(np.uint8) | sign


def flush(values: Array) -> Array:
    """Flush subnormal numbers to zeros of their sign."""
    return np.where(np.abs(values) < _MIN_NORMAL, np.copysign(np.float32(0), values), values)


def fma(x: Array, y: Array, z: Array) -> Array:
    """Return `x y + z` of fp32, rounded once."""
    product = x.astype(np.float64) * y.astype(np.float64)
    wide = np.asarray(product + z)
    # Double rounding differs only midway between two fp32 numbers, and for subnormal results.
    midway = (wide.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    inexact = midway | (np.abs(wide) < 2.0**-125)
    if inexact.any():
        wide = np.where(inexact, _sum_to_odd(product, z), wide)
    return wide.astype(np.float32)


def _sum_to_odd(x: Array, y: Array) -> Array:
    """Add in fp64, rounding inexact sums to odd: rounding the result again then equals one rounding."""
    total = np.asarray(x + y.astype(np.float64))
    # The error of a sum (Knuth's two-sum).
    y_part = total - x
    error = (x - (total - y_part)) + (y - y_part)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    away = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(np.isfinite(total) & (error != 0) & even, away, total)


def _fma_half(x: Array, y: Array, z: Array) -> Array:
    """Return `x y + z` of half precision in fp32, rounded to odd, to be rounded again."""
    wide = _sum_to_odd(x.astype(np.float64) * y.astype(np.float64), z)
    narrow = wide.astype(np.float32)
    even = (narrow.view(np.uint32) & np.uint32(1)) == 0
    infinity = np.where(wide > narrow, np.inf, -np.inf).astype(np.float32)
    inexact = np.isfinite(narrow) & (narrow != wide)
    return np.where(inexact & even, np.nextafter(narrow, infinity), narrow)


def pure(
    patterns: str, function: Function, result: str = "", *arguments: str, flushes: bool = False
) -> None:
    """Register forms that apply a function to their operands.

    Types of the result and of the arguments, of which the last repeats, default to the last type of the form.
    """
    for name in expand(patterns):
        default = name.rpartition(".")[2]
        to, types = DTYPES[result or default], [DTYPES[t or default] for t in arguments or ("",)]
        FORMS[name] = partial(_apply, function=function, to=to, types=types, flushes=flushes)


def _apply(
    m: Machine, op: Instruction, *, function: Function, to: Any, types: list[Any], flushes: bool
) -> None:
    target, *sources = op.operands
    values = [
        m.read(source, types[min(i, len(types) - 1)], computes=True)
        for i, source in enumerate(sources)
    ]
    if flushes:
        values = [flush(value) for value in values]
    result = np.asarray(function(*values))
    if result.dtype != to:
        result = result.astype(to)
    m.write(target, flush(result) if flushes else result)
    m.inherit(target, sources)


def packed(function: Function, unpack: Function, pack: Function) -> Function:
    """Apply a function to both halves of 32 bits."""

    def apply(*values: Array) -> Array:
        halves = ([unpack(half(value, i)) for value in values] for i in (0, 1))
        return _join(*(pack(function(*operands)) for operands in halves))

    return apply


def half(value: Array, index: int) -> Array:
    """Return the lower or upper 16 bits of 32."""
    return ((value >> np.uint32(16 * index)) & np.uint32(0xFFFF)).astype(np.uint16)


def _pairs(function: Function) -> Function:
    """Apply a function to both fp32 numbers in 64 bits."""

    def apply(*values: Array) -> Array:
        halves = [np.stack([np.asarray(value)], -1).view(np.float32) for value in values]
        return np.ascontiguousarray(function(*halves).astype(np.float32)).view(np.uint64)[..., 0]

    return apply


def _extreme(choose: Function, combine: Function) -> Function:
    """Return the maximum or minimum of fp32 numbers; `combine` picks the sign of two zeros by their bits."""

    def apply(x: Array, y: Array) -> Array:
        equal = combine(x.view(np.uint32), y.view(np.uint32)).view(np.float32)
        return np.where(x == y, equal, choose(x, y))

    return lambda *values: reduce(apply, values)


_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def _wide(function: Function, dtype: str) -> Function:
    """Multiply integers in twice their bits and pass the product, and an addend, to a function."""
    wide = DTYPES[_WIDER[dtype]]
    return lambda x, y, *addend: function(x.astype(wide) * y.astype(wide), *addend)


def _divide(x: Array, y: Array) -> Array:
    """Divide integers, rounding toward zero; a division by zero sets all bits."""
    unsigned = UNSIGNED[x.dtype.itemsize]
    dividend, divisor = (
        np.where(value < 0, 0 - value, value).astype(x.dtype).view(unsigned) for value in (x, y)
    )
    quotient = dividend // np.maximum(divisor, unsigned.type(1))
    signed = np.where((x < 0) != (y < 0), unsigned.type(0) - quotient, quotient)
    return np.where(y == 0, ~unsigned.type(0), signed).astype(unsigned).view(x.dtype)


def _divide_approximately(x: Array, y: Array) -> Array:
    """Divide fp32; the quotient is 0 for the largest divisors, whose reciprocals are subnormal."""
    large = (np.abs(y) > 2.0**126) & np.isfinite(y)
    zero = np.copysign(np.float32(0), x) * np.sign(y)
    return np.where(large, np.where(np.isinf(x), np.float32(np.nan), zero), x / y)


def _remainder(x: Array, y: Array) -> Array:
    """Return the remainder of `_divide`; x for a division by zero."""
    return np.where(y == 0, x, np.fmod(x, np.where(y == 0, 1, y)))


def _to_integer(x: Array, *, round_: Function, to: np.dtype[Any]) -> Array:
    """Convert fp32 to a saturated integer; NaN becomes 0, or the minimum of 64 bits."""
    end = 2.0 ** (8 * to.itemsize - (to.kind == "i"))
    rounded, limits = round_(x.astype(np.float64)), np.iinfo(to)
    clipped = np.clip(np.nan_to_num(rounded), float(limits.min), np.nextafter(end, 0)).astype(to)
    saturated = np.where(rounded >= end, limits.max, clipped)
    nan = np.array(1 << 63, np.uint64).view(np.int64) if to.itemsize == 8 else 0
    return np.where(np.isnan(x), to.type(nan), saturated)


def _join(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def _join_bytes(low: Array, high: Array) -> Array:
    return low.astype(np.uint16) | (high.astype(np.uint16) << np.uint16(8))


def _shift(x: Array, count: Array, function: Function) -> Array:
    """Shift by a count that may exceed the bits."""
    bits = 8 * x.dtype.itemsize
    shifted = function(x, np.minimum(count, bits - 1).astype(x.dtype))
    return shifted if x.dtype.kind == "i" else np.where(count >= bits, x.dtype.type(0), shifted)


def _extract(x: Array, start: Array, length: Array, *, signed: bool) -> Array:
    """Extract a bit field (`bfe`)."""
    start = np.minimum(start & 0xFF, 32).astype(np.int64)
    length = np.minimum(length & 0xFF, 32).astype(np.int64)
    wide = x.view(np.int32).astype(np.int64) if signed else x.astype(np.int64)
    field = (wide >> start) & ((1 << length) - 1)
    if not signed:
        return field.astype(np.uint32)
    sign = (wide >> np.minimum(start + length - 1, 31)) & 1
    return np.where((sign == 1) & (length > 0), field | (-1 << length), field).astype(np.int32)


def _count_ones(x: Array) -> Array:
    return np.unpackbits(np.asarray(x)[..., None].view(np.uint8), axis=-1).sum(-1)


def _permute(x: Array, y: Array, selector: Array) -> Array:
    """Select four of eight bytes, or their replicated signs (`prmt`)."""
    value = x.astype(np.uint64) | (y.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(value)
    for i in range(4):
        nibble = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (value >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(nibble & np.uint64(8), sign, byte)
        result = result | (byte << np.uint64(8 * i))
    return np.asarray(result).astype(np.uint32)


_HALVES = {
    "bf16x2": (bf16_to_fp32, fp32_to_bf16),
    "f16x2": (
        lambda bits: bits.view(np.float16).astype(np.float32),
        lambda v: v.astype(np.float16).view(np.uint16),
    ),
}
_SINGLE = {dtype.removesuffix("x2"): codec for dtype, codec in _HALVES.items()}
_FLUSHES = (("", False), (".ftz", True))


def _rounded(function: Function, unpack: Function, pack: Function) -> Function:
    """Apply a function of fp32 to half precision."""
    return lambda *values: pack(function(*map(unpack, values)))


def _from_bf16(function: Function, count: int) -> Function:
    """Convert the first `count` operands of a function from bf16."""
    return lambda *values: function(*map(bf16_to_fp32, values[:count]), *values[count:])


for _name, _function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
    for _mode in ("", ".rn"):
        pure(f"{_name}{_mode}.f32", _function)
        pure(f"{_name}{_mode}.ftz.f32", _function, flushes=True)
        pure(f"{_name}{_mode}.f32x2", _pairs(_function), "b64", "b64")
        for _type, _codec in _HALVES.items():
            pure(f"{_name}{_mode}.{_type}", packed(_function, *_codec), "b32", "b32")
        for _type, _codec in _SINGLE.items():
            pure(f"{_name}{_mode}.{_type}", _rounded(_function, *_codec), "b16", "b16")
for _name, _function in (("add", np.add), ("sub", np.subtract)):
    pure(f"{_name}.{{s16,s32,s64,u32,u64}}", _function)
    pure(f"{_name}.rn.f32.bf16", _from_bf16(_function, 1), "f32", "b16", "f32")
    pure(f"{_name}.rn.f32.f16", _function, "f32", "f16", "f32")
pure("mul.lo.{s16,s32,s64,u32}", np.multiply)
pure("mul.hi.u32", lambda x, y: (x.astype(np.uint64) * y.astype(np.uint64)) >> np.uint64(32))
pure("mul.hi.s32", lambda x, y: (x.astype(np.int64) * y.astype(np.int64)) >> np.int64(32))
pure("mad.lo.{s32,s64,u32}", lambda x, y, z: x * y + z)
for _type, _result in _WIDER.items():
    pure(f"mul.wide.{_type}", _wide(lambda product: product, _type), _result)
    pure(f"mad.wide.{_type}", _wide(np.add, _type), _result, _type, _type, _result)
pure("fma.rn.f32", fma)
pure("fma.rn.ftz.f32", fma, flushes=True)
pure("fma.rn.f32x2", _pairs(fma), "b64", "b64")
for _type, _codec in _HALVES.items():
    pure(f"fma.rn.{_type}", packed(_fma_half, *_codec), "b32", "b32")
pure("fma.rn.f32.bf16", _from_bf16(fma, 2), "f32", "b16", "b16", "f32")
pure("fma.rn.f32.f16", fma, "f32", "f16", "f16", "f32")
for _type, _codec in _SINGLE.items():
    pure(f"fma.rn.{_type}", _rounded(_fma_half, *_codec), "b16", "b16")
pure("div.{s32,u32,s64}", _divide)
pure("rem.{s32,u32,s64}", _remainder)
pure("div.{rn,full}.f32", np.divide)
pure("div.approx.f32", _divide_approximately)
pure("popc.b32", _count_ones, "u32")
pure("rcp.{rn,approx}.f32", lambda x: np.float32(1) / x)
for _suffix, _flushes in _FLUSHES:
    pure(f"ex2.approx{_suffix}.f32", np.exp2, flushes=_flushes)
    pure(f"lg2.approx{_suffix}.f32", np.log2, flushes=_flushes)
    pure(
        f"rsqrt.approx{_suffix}.f32", lambda x: 1 / np.sqrt(x.astype(np.float64)), flushes=_flushes
    )
    pure(f"sqrt.{{rn,approx}}{_suffix}.f32", np.sqrt, flushes=_flushes)
    pure(f"abs{_suffix}.f32", np.abs, flushes=_flushes)
    pure(f"neg{_suffix}.f32", np.negative, flushes=_flushes)
    pure(f"max{_suffix}.f32", _extreme(np.fmax, np.bitwise_and), flushes=_flushes)
    pure(f"min{_suffix}.f32", _extreme(np.fmin, np.bitwise_or), flushes=_flushes)
    pure(f"max.NaN{_suffix}.f32", _extreme(np.maximum, np.bitwise_and), flushes=_flushes)
    pure(f"min.NaN{_suffix}.f32", _extreme(np.minimum, np.bitwise_or), flushes=_flushes)
pure("max.{s32,u32,s64}", np.maximum)
pure("min.{s32,u32,s64}", np.minimum)
pure("neg.{s16,s32,s64}", np.negative)
pure("abs.{s32,s64}", np.abs)
for _name, _function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
    pure(f"{_name}.{{b16,b32,b64,pred}}", _function)
pure("not.{b16,b32,b64,pred}", np.invert)
pure("shl.{b16,b32,b64}", partial(_shift, function=np.left_shift), "", "", "u32")
pure("shr.{s16,s32,s64,u16,u32,u64}", partial(_shift, function=np.right_shift), "", "", "u32")
pure("bfe.u32", partial(_extract, signed=False))
pure("bfe.s32", partial(_extract, signed=True), "s32", "s32", "u32", "u32")
pure("prmt.b32", _permute)
pure("cvta.{param,to.global,global,shared,to.shared}.u64", lambda x: x)

# Conversions: `cvt.<to>.<from>`.
pure("cvt.f32.bf16", bf16_to_fp32, "f32", "b16")
pure("cvt.f32.f16", lambda x: x, "f32", "f16")
pure("cvt.rn.bf16.f32", fp32_to_bf16, "b16", "f32")
pure("cvt.rn.f16.f32", lambda x: x, "f16", "f32")
for _type, (_, _pack) in _HALVES.items():
    pure(f"cvt.rn.{_type}.f32", lambda x, y, pack=_pack: _join(pack(y), pack(x)), "b32", "f32")
pure(
    "cvt.rn.satfinite.e4m3x2.f32",
    lambda x, y: _join_bytes(fp32_to_e4m3(y), fp32_to_e4m3(x)),
    "b16",
    "f32",
)
pure("cvt.rn.f32.{s32,u32,s64}", lambda x: x, "f32")
for _to in ("s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64"):
    pure(f"cvt.{_to}.{{s8,s16,s32,s64,u8,u16,u32,u64}}", lambda x: x, _to)
_ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
for _name, _function in _ROUND.items():
    pure(f"cvt.{_name}.f32.f32", _function)
    for _to in ("s32", "u32", "s64"):
        pure(
            f"cvt.{_name}.{_to}.f32",
            partial(_to_integer, round_=_function, to=DTYPES[_to]),
            _to,
            "f32",
        )


def _compare(m: Machine, op: Instruction, *, compare: Function, dtype: Any) -> None:
    """Write the result, and its negation to a second predicate if there is one."""
    target, *sources = op.operands
    result = np.asarray(compare(*(m.read(source, dtype, computes=True) for source in sources)))
    targets = target if isinstance(target, tuple) else (target,)
    for predicate, value in zip(targets, (result, ~result), strict=False):
        m.write(predicate, value)
        m.inherit(predicate, sources)


@form("selp.{b16,b32,b64,f32}")
def _select(m: Machine, op: Instruction) -> None:
    """Select by a predicate; the other operand may be partial."""
    target, x, y, predicate = op.operands
    condition = m.read(predicate, DTYPES["pred"], computes=True)
    values = (m.read(source, DTYPES[op.type], computes=True) for source in (x, y))
    m.write(target, np.where(condition, *values))
    written = np.where(condition, m.written(x), m.written(y)) & m.written(predicate)
    m.mark(target, written)
    m.delay(target, [x, y, predicate])


def _unordered(compare: Function) -> Function:
    return lambda x, y: np.isnan(x) | np.isnan(y) | compare(x, y)


_ORDERED: dict[str, Function] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_EQUAL: dict[str, Function] = {"eq": np.equal, "ne": np.not_equal}
_FLOATS = {
    **_ORDERED,
    "eq": np.equal,
    "ne": lambda x, y: (x < y) | (x > y),
    **{f"{name}u": _unordered(compare) for name, compare in (_ORDERED | _EQUAL).items()},
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}
for _types, _comparisons in (
    ("b16 b32 b64 s16 s32 s64 u16 u32 u64", _EQUAL),
    ("s16 s32 s64 u16 u32 u64", _ORDERED),
    ("f32", _FLOATS),
):
    for _type in _types.split():
        for _name, _function in _comparisons.items():
            _handler = partial(_compare, compare=_function, dtype=DTYPES[_type])
            FORMS[f"setp.{_name}.{_type}"] = _handler


@form("mov.{b16,b32,b64,u16,u32,u64,s16,s32,s64,f32,pred}")
def _move(m: Machine, op: Instruction) -> None:
    """Move a register; also unpack it to several, or pack several into it."""
    to, source = op.operands
    if isinstance(to, tuple):
        bits = np.ascontiguousarray(m.array(source, m.types[source], computes=True))
        element = UNSIGNED[bits.itemsize // len(to)]
        m.write_all(to, bits.view(element).reshape(-1, len(to)).T)
        for target in to:
            m.inherit(target, [source])
        return
    dtype = DTYPES[op.type]
    if isinstance(source, tuple):
        element = UNSIGNED[dtype.itemsize // len(source)]
        elements = [m.array(register, element, computes=True) for register in source]
        m.write(to, np.stack(elements, -1).view(UNSIGNED[dtype.itemsize])[:, 0])
        # LLVM packs one number beside an undefined one.
        written = np.broadcast_arrays(*(m.written(register) for register in source))
        m.mark(to, np.logical_or.reduce(written))
        m.delay(to, source)
        return
    # A copy of a register in use is in use as well: assemblers remove such copies.
    groups = m.busy.pop(source, None) if isinstance(source, str) else None
    m.write(to, m.read(source, dtype, computes=True))
    m.inherit(to, [source])
    if groups is not None:
        m.busy[source] = groups
        m.busy[to] = m.busy.get(to, np.zeros_like(groups)).copy()
        m.busy[to][m.threads()] = groups[m.threads()]
