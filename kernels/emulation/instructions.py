"""Arithmetic, comparison, conversion and movement of registers: a function of arrays for each form.

Sections of the PTX ISA: 9.7.1 to 9.7.5 (arithmetic), 9.7.6 to 9.7.8 (comparison, logic), 9.7.9 (movement, conversion).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np

from .hazards import Array
from .machine import FORMS, UNSIGNED, Machine, expand, form
from .ptx import Instruction

Function = Callable[..., Any]
DTYPES = {
    **{
        f"{kind}{8 * size}": np.dtype(f"{letter}{size}")
        for kind, letter in (("s", "i"), ("u", "u"), ("b", "u"))
        for size in UNSIGNED
    },
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "pred": np.dtype(bool),
}
_LEAST_NORMAL = np.float32(2.0**-126)


def bf16_to_fp32(bits: Array) -> Array:
    """fp32 of bf16, which are 16-bit integers."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fp32_to_bf16(values: Array) -> Array:
    """bf16 as 16-bit integers, rounded to nearest, ties to even; NaN is 0x7FFF."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def fp32_to_e4m3(values: Array) -> Array:
    """fp8 as 8-bit integers: finite numbers are cut off at 448, NaN is 0x7F."""
    magnitude = np.minimum(np.abs(values.astype(np.float64)), 448.0)
    exponent = np.maximum(np.floor(np.log2(np.where(magnitude > 0, magnitude, 2.0**-6))), -6.0)
    # In units of the last of three bits of the mantissa: 8 to 15 for normal numbers.
    steps = np.rint(magnitude * 2.0 ** (3 - exponent))
    bits = np.where(np.isnan(values), 0x7F, (exponent + 6) * 8 + steps)
    return np.nan_to_num(bits).astype(np.uint8) | (
        np.signbit(values).astype(np.uint8) << np.uint8(7)
    )


def flush(values: Array) -> Array:
    """fp32 with subnormal numbers as zeros of their sign."""
    return np.where(np.abs(values) < _LEAST_NORMAL, np.copysign(np.float32(0), values), values)


def fma(x: Array, y: Array, z: Array) -> Array:
    """`x y + z` of fp32, rounded once."""
    product = x.astype(np.float64) * y.astype(np.float64)
    wide = np.asarray(product + z)
    # Rounding to fp64 first can go wrong only amid two fp32 numbers and among subnormal ones.
    amid = ((wide.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)) | (
        np.abs(wide) < 2.0**-125
    )
    return (np.where(amid, _sum_to_odd(product, z), wide) if amid.any() else wide).astype(
        np.float32
    )


def _sum_to_odd(x: Array, y: Array) -> Array:
    """An fp64 sum with an odd last bit where it is inexact: rounding it again gives what one rounding would."""
    found = np.asarray(x + y.astype(np.float64))
    other = found - x
    error = (x - (found - other)) + (y - other)
    inexact = np.isfinite(found) & (error != 0) & ((found.view(np.uint64) & np.uint64(1)) == 0)
    return np.where(inexact, np.nextafter(found, np.where(error > 0, np.inf, -np.inf)), found)


def _fma_half(x: Array, y: Array, z: Array) -> Array:
    """`x y + z` of half precision in fp32, to be rounded again."""
    wide = _sum_to_odd(x.astype(np.float64) * y.astype(np.float64), z)
    found = wide.astype(np.float32)
    inexact = np.isfinite(found) & (found != wide) & ((found.view(np.uint32) & np.uint32(1)) == 0)
    return np.where(
        inexact,
        np.nextafter(found, np.where(wide > found, np.inf, -np.inf).astype(np.float32)),
        found,
    )


def pure(
    patterns: str, function: Function, result: str = "", *arguments: str, flushes: bool = False
) -> None:
    """Register forms that compute a function of their operands; types default to the last of the form."""
    for name in expand(patterns):
        kind = name.rpartition(".")[2]
        to, types = DTYPES[result or kind], [DTYPES[each or kind] for each in arguments or ("",)]
        FORMS[name] = partial(_apply, function=function, to=to, types=types, flushes=flushes)


def _apply(
    m: Machine, each: Instruction, *, function: Function, to: Any, types: list[Any], flushes: bool
) -> None:
    sources = each.operands[1:]
    values = [
        m.read(operand, types[min(i, len(types) - 1)], computes=True)
        for i, operand in enumerate(sources)
    ]
    if flushes:
        values = [flush(value) for value in values]
    found = np.asarray(function(*values))
    found = found if found.dtype == to else found.astype(to)
    m.write(each.operands[0], flush(found) if flushes else found)
    m.inherit(each.operands[0], sources)


def packed(function: Function, unpack: Function, pack: Function) -> Function:
    """A function of both halves of 32 bits."""

    def apply(*values: Array) -> Array:
        return _join(
            *(pack(function(*(unpack(half(value, i)) for value in values))) for i in (0, 1))
        )

    return apply


def half(value: Array, number: int) -> Array:
    """The lower or upper 16 bits of 32."""
    return ((value >> np.uint32(16 * number)) & np.uint32(0xFFFF)).astype(np.uint16)


def _pairs(function: Function) -> Function:
    """A function of both fp32 numbers in 64 bits."""

    def apply(*values: Array) -> Array:
        halves = [np.stack([np.asarray(value)], -1).view(np.float32) for value in values]
        return np.ascontiguousarray(function(*halves).astype(np.float32)).view(np.uint64)[..., 0]

    return apply


def _extreme(choose: Function, combine: Function) -> Function:
    """The extreme of numbers, without NaN; `combine` picks the sign of two zeros."""

    def apply(x: Array, y: Array) -> Array:
        equal = combine(x.view(np.uint32), y.view(np.uint32)).view(np.float32)
        return np.where(x == y, equal, choose(x, y))

    return lambda *values: reduce(apply, values)


_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def _wide(function: Function, kind: str) -> Function:
    """A product of integers in twice their bits, with what is added to it."""
    wide = DTYPES[_WIDER[kind]]
    return lambda x, y, *rest: function(x.astype(wide) * y.astype(wide), *rest)


def _divide(x: Array, y: Array) -> Array:
    """The quotient of integers, cut off toward zero; all bits are set where the divisor is zero."""
    unsigned = UNSIGNED[x.dtype.itemsize]
    size = [
        np.where(value < 0, 0 - value, value).astype(x.dtype).view(unsigned) for value in (x, y)
    ]
    quotient = size[0] // np.maximum(size[1], unsigned.type(1))
    signed = np.where((x < 0) != (y < 0), unsigned.type(0) - quotient, quotient)
    return np.where(y == 0, ~unsigned.type(0), signed).astype(unsigned).view(x.dtype)


def _divide_approximately(x: Array, y: Array) -> Array:
    """A quotient that is 0 for the largest divisors: their reciprocals are subnormal."""
    large = (np.abs(y) > 2.0**126) & np.isfinite(y)
    return np.where(
        large,
        np.where(np.isinf(x), np.float32(np.nan), np.copysign(np.float32(0), x) * np.sign(y)),
        x / y,
    )


def _remainder(x: Array, y: Array) -> Array:
    """The remainder of the quotient cut off toward zero; x where the divisor is zero."""
    return np.where(y == 0, x, np.fmod(x, np.where(y == 0, 1, y)))


def _to_integer(x: Array, *, round_: Function, to: np.dtype[Any]) -> Array:
    """An integer of fp32; numbers beyond its range are its ends; NaN is 0, or the least of 64 bits."""
    end = 2.0 ** (8 * to.itemsize - (to.kind == "i"))
    rounded = round_(x.astype(np.float64))
    inside = np.clip(np.nan_to_num(rounded), float(np.iinfo(to).min), np.nextafter(end, 0)).astype(
        to
    )
    invalid = np.array(1 << 63, np.uint64).view(np.int64) if to.itemsize == 8 else 0
    return np.where(
        np.isnan(x), to.type(invalid), np.where(rounded >= end, np.iinfo(to).max, inside)
    )


def _join(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def _join_bytes(low: Array, high: Array) -> Array:
    return low.astype(np.uint16) | (high.astype(np.uint16) << np.uint16(8))


def _shift(x: Array, count: Array, function: Function) -> Array:
    """A shift, by more than all bits if need be."""
    bits = 8 * x.dtype.itemsize
    by = np.minimum(count, bits - 1).astype(x.dtype)
    shifted = function(x, by)
    return shifted if x.dtype.kind == "i" else np.where(count >= bits, x.dtype.type(0), shifted)


def _extract(x: Array, place: Array, length: Array, *, signed: bool) -> Array:
    """A field of bits (`bfe`)."""
    place, length = (
        np.minimum(place & 0xFF, 32).astype(np.int64),
        np.minimum(length & 0xFF, 32).astype(np.int64),
    )
    wide = x.view(np.int32).astype(np.int64) if signed else x.astype(np.int64)
    found = (wide >> place) & ((1 << length) - 1)
    if not signed:
        return found.astype(np.uint32)
    sign = (wide >> np.minimum(place + length - 1, 31)) & 1
    return np.where((sign == 1) & (length > 0), found | (-1 << length), found).astype(np.int32)


def _count_ones(x: Array) -> Array:
    return np.unpackbits(np.asarray(x)[..., None].view(np.uint8), axis=-1).sum(-1)


def _permute(x: Array, y: Array, selector: Array) -> Array:
    """Four bytes of eight (`prmt`), or their signs."""
    value, found = x.astype(np.uint64) | (y.astype(np.uint64) << np.uint64(32)), np.uint64(0)
    for number in range(4):
        choice = (selector.astype(np.uint64) >> np.uint64(4 * number)) & np.uint64(15)
        byte = (value >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        found = found | (np.where(choice & np.uint64(8), sign, byte) << np.uint64(8 * number))
    return np.asarray(found).astype(np.uint32)


_HALVES = {
    "bf16x2": (bf16_to_fp32, fp32_to_bf16),
    "f16x2": (
        lambda bits: bits.view(np.float16).astype(np.float32),
        lambda v: v.astype(np.float16).view(np.uint16),
    ),
}
_SINGLE = {kind.removesuffix("x2"): both for kind, both in _HALVES.items()}
_FLUSHES = (("", False), (".ftz", True))


def _rounded(function: Function, unpack: Function, pack: Function) -> Function:
    """A function of half precision in fp32."""
    return lambda *values: pack(function(*map(unpack, values)))


for _name, _function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
    for _mode in ("", ".rn"):
        pure(f"{_name}{_mode}.f32", _function)
        pure(f"{_name}{_mode}.ftz.f32", _function, flushes=True)
        pure(f"{_name}{_mode}.f32x2", _pairs(_function), "b64", "b64")
        for _kind, _both in _HALVES.items():
            pure(f"{_name}{_mode}.{_kind}", packed(_function, *_both), "b32", "b32")
        for _kind, _both in _SINGLE.items():
            pure(f"{_name}{_mode}.{_kind}", _rounded(_function, *_both), "b16", "b16")
for _name, _function in (("add", np.add), ("sub", np.subtract)):
    pure(f"{_name}.{{s16,s32,s64,u32,u64}}", _function)
    pure(
        f"{_name}.rn.f32.bf16",
        lambda x, y, run=_function: run(bf16_to_fp32(x), y),
        "f32",
        "b16",
        "f32",
    )
    pure(
        f"{_name}.rn.f32.f16",
        lambda x, y, run=_function: run(x.astype(np.float32), y),
        "f32",
        "f16",
        "f32",
    )
pure("mul.lo.{s16,s32,s64,u32}", np.multiply)
pure("mul.hi.u32", lambda x, y: (x.astype(np.uint64) * y.astype(np.uint64)) >> np.uint64(32))
pure("mul.hi.s32", lambda x, y: (x.astype(np.int64) * y.astype(np.int64)) >> np.int64(32))
pure("mad.lo.{s32,s64,u32}", lambda x, y, z: x * y + z)
for _kind, _result in _WIDER.items():
    pure(f"mul.wide.{_kind}", _wide(lambda product: product, _kind), _result)
    pure(f"mad.wide.{_kind}", _wide(np.add, _kind), _result, _kind, _kind, _result)
pure("fma.rn.f32", fma)
pure("fma.rn.ftz.f32", fma, flushes=True)
pure("fma.rn.f32x2", _pairs(fma), "b64", "b64")
for _kind, _both in _HALVES.items():
    pure(f"fma.rn.{_kind}", packed(_fma_half, *_both), "b32", "b32")
pure(
    "fma.rn.f32.bf16",
    lambda x, y, z: fma(bf16_to_fp32(x), bf16_to_fp32(y), z),
    "f32",
    "b16",
    "b16",
    "f32",
)
pure(
    "fma.rn.f32.f16",
    lambda x, y, z: fma(x.astype(np.float32), y.astype(np.float32), z),
    "f32",
    "f16",
    "f16",
    "f32",
)
for _kind, _both in _SINGLE.items():
    pure(f"fma.rn.{_kind}", _rounded(_fma_half, *_both), "b16", "b16")
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
for _kind, (_, _pack) in _HALVES.items():
    pure(f"cvt.rn.{_kind}.f32", lambda x, y, pack=_pack: _join(pack(y), pack(x)), "b32", "f32")
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


def _compare(m: Machine, each: Instruction, *, compare: Function, dtype: Any) -> None:
    destination, *sources = each.operands
    found = np.asarray(compare(*(m.read(operand, dtype, computes=True) for operand in sources)))
    targets = destination if isinstance(destination, tuple) else (destination,)
    for target, value in zip(targets, (found, ~found), strict=False):
        m.write(target, value)
        m.inherit(target, sources)


@form("selp.{b16,b32,b64,f32}")
def _select(m: Machine, each: Instruction) -> None:
    """What is not chosen may be incomplete."""
    to, *sources, condition = each.operands
    chosen = m.read(condition, DTYPES["pred"], computes=True)
    x, y = (
        m.read(source, DTYPES[each.form.rpartition(".")[2]], computes=True) for source in sources
    )
    m.write(to, np.where(chosen, x, y))
    known = [
        m.partial[each][m.threads()] if each in m.partial else np.True_
        for each in (*sources, condition)
    ]
    m.mark(to, np.where(chosen, known[0], known[1]) & known[2])
    m.delay(to, [*sources, condition])


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
for _kinds, _comparisons in (
    ("b16 b32 b64 s16 s32 s64 u16 u32 u64", _EQUAL),
    ("s16 s32 s64 u16 u32 u64", _ORDERED),
    ("f32", _FLOATS),
):
    for _kind in _kinds.split():
        for _name, _function in _comparisons.items():
            FORMS[f"setp.{_name}.{_kind}"] = partial(
                _compare, compare=_function, dtype=DTYPES[_kind]
            )


@form("mov.{b16,b32,b64,u16,u32,u64,s16,s32,s64,f32,pred}")
def _move(m: Machine, each: Instruction) -> None:
    """Also from several registers to a wider one, and back."""
    to, source = each.operands
    if isinstance(to, tuple):
        parts = m.array(source, m.types[source], computes=True)
        size = parts.itemsize // len(to)
        m.write_all(to, np.ascontiguousarray(parts).view(UNSIGNED[size]).reshape(-1, len(to)).T)
        for target in to:
            m.inherit(target, [source])
        return
    dtype = DTYPES[each.form.rpartition(".")[2]]
    if isinstance(source, tuple):
        parts = [
            m.array(part, UNSIGNED[dtype.itemsize // len(source)], computes=True) for part in source
        ]
        m.write(to, np.stack(parts, -1).view(UNSIGNED[dtype.itemsize])[:, 0])
        # LLVM packs one number beside an undefined one.
        known = [
            m.partial[part][m.threads()] if part in m.partial else np.ones(1, bool)
            for part in source
        ]
        m.mark(to, np.logical_or.reduce(np.broadcast_arrays(*known)))
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
