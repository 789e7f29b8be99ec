"""Other launch configurations of a kernel than its own: what the compiler makes of them, and their predicted time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from xfm_fast.errors import InputError

from ..triton.launch import KernelSpec, LaunchConfig
from .architectures import ARCHITECTURES
from .rows import Form, Row, compile_rows, describe

_MOST = 64


def what_if(
    settings: Iterable[str],
    specs: Iterable[KernelSpec],
    arches: Iterable[int] = ARCHITECTURES,
    *,
    jobs: int | None = None,
    cache_dir: Path | None = None,
) -> list[tuple[bool, Row]]:
    """(whether it is the shipped configuration, row) of every configuration asked for, quickest first an architecture.

    Args:
        settings: `kernel=relpos_forward`, a tile such as `BLOCK_M=64`, `num_warps=8` or `num_stages=2`; `dtype=fp16`;
            properties of the form, `head_dim=128`, which take the first that fits. Several values, as in
            `BLOCK_M=64,128`, stand for every one. What is not given stays as it is shipped.
        specs: the shipped kernels.
        arches: such as `(90,)`.
        jobs, cache_dir: of the audit.

    Raises:
        InputError: a setting that is not `name=value`, that the kernel does not have, or whose value it cannot take.
    """
    given = _parse(settings)
    spec = _kernel(given, {spec.name: spec for spec in specs})
    dtype = ",".join(given.pop("dtype", ["bf16" if "bf16" in spec.dtypes else spec.dtypes[0]]))
    if dtype not in spec.dtypes:
        raise InputError(f"kernel {spec.name} is not shipped in {dtype}; it is in {', '.join(spec.dtypes)}")
    variant = _variant(spec, given)
    found: list[tuple[bool, Row]] = []
    for arch in arches:
        shipped = spec.config(variant, dtype, arch)
        asked = [config for config in _configurations(spec, shipped, given) if config != shipped]
        forms = [Form(spec, variant, arch, dtype, config) for config in (shipped, *asked)]
        rows = compile_rows(forms, jobs=jobs, cache_dir=cache_dir)
        own = describe(shipped)
        found += sorted(((row.config == own, row) for row in rows), key=lambda pair: _order(pair[1]))
    return found


def _order(row: Row) -> tuple[bool, float]:
    """Rows with errors last, the quickest first."""
    return bool(row.error), row.prediction.microseconds if row.prediction else float("inf")


def _parse(settings: Iterable[str]) -> dict[str, list[str]]:
    given: dict[str, list[str]] = {}
    name = ""
    for setting in settings:
        # A command line cuts BLOCK_M=64,128 in two: what has no name is one more value of the last that had.
        before, equals, values = setting.rpartition("=")
        if equals and before in given:
            raise InputError(f"{before} is given twice; several values are written {before}=64,128")
        name = before if equals else name
        if not name or not all(values.split(",")):
            raise InputError(
                f"{setting!r} is no setting; write name=value, such as kernel=relpos_forward or BLOCK_M=64"
            )
        given.setdefault(name, []).extend(values.split(","))
    return given


def _kernel(given: dict[str, list[str]], known: Mapping[str, KernelSpec]) -> KernelSpec:
    names = given.pop("kernel", [])
    if len(names) != 1 or names[0] not in known:
        near = get_close_matches(names[0], known, n=1) if names else []
        said = f"kernel {', '.join(names)} is unknown" if names else "a kernel is missing: kernel=NAME"
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"{said}{meant}; known: {', '.join(known)}")
    return known[names[0]]


def _variant(spec: KernelSpec, given: dict[str, list[str]]) -> Mapping[str, Any]:
    """The first form with the properties that are given; of attention kernels at head dimension 64 unless one is."""
    names = {name for variant in spec.variants for name in variant}
    asked = {name: given.pop(name) for name in sorted(names & given.keys())}
    wanted = asked if "head_dim" in asked or "head_dim" not in names else {"head_dim": ["64"], **asked}
    for variant in spec.variants:
        if all(str(variant.get(name)) in values for name, values in wanted.items()):
            return variant
    forms = "; ".join(" ".join(f"{k}={v}" for k, v in variant.items()) for variant in spec.variants)
    said = " ".join(f"{name}={','.join(values)}" for name, values in asked.items())
    raise InputError(f"kernel {spec.name} has no form with {said}; it has: {forms}")


def _configurations(spec: KernelSpec, shipped: LaunchConfig, given: Mapping[str, list[str]]) -> list[LaunchConfig]:
    own = {**shipped.tiles, "num_warps": shipped.num_warps, "num_stages": shipped.num_stages}
    if unknown := sorted(given.keys() - own.keys()):
        raise InputError(f"kernel {spec.name} has no setting {', '.join(unknown)}; it has: {', '.join(own)}")
    values = {name: [_number(name, value) for value in given.get(name, [str(old)])] for name, old in own.items()}
    made = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    if len(made) > _MOST:
        raise InputError(f"these settings make {len(made)} configurations; ask for {_MOST} at most")
    return [
        LaunchConfig(
            {n: c[n] for n in shipped.tiles}, c["num_warps"], c["num_stages"], shipped.apart, fenced=shipped.fenced
        )
        for c in made
    ]


def _number(name: str, value: str) -> int:
    number = int(value) if value.isdecimal() else 0
    if not 0 < number <= 65536:
        raise InputError(f"{name}={value}: it must be a whole number from 1 to 65536")
    if name != "num_stages" and number & (number - 1):
        raise InputError(f"{name}={value}: it must be a power of two")
    if name == "num_warps" and number > 32:
        raise InputError(f"{name}={value}: a program has at most 32 warps")
    return number
