"""The targets of the kernels, checked on the rows of an audit and reported as met or missed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .architectures import limits
from .rows import Row
from .sass import load_bits

BIAS_OVERHEAD = 0.12
# Waits of one product in three let the others run behind each other.
WAITS = 0.35


@dataclass(frozen=True)
class Verdict:
    """A target: how many rows it applies to, and a line for each that misses it."""

    target: str
    checked: int
    missed: list[str]

    @property
    def met(self) -> bool:
        """True if every row meets it. A target that no row tests is not met."""
        return self.checked > 0 and not self.missed


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Every target, for rows that compiled."""
    rows = [row for row in rows if not row.error]
    return [
        _each("no spills", rows, lambda row: row.stack_bytes and f"{row.stack_bytes} B of stack"),
        _each("fits the shared memory", rows, _shared_excess),
        _each("registers to spare", rows, lambda row: row.registers >= 255 and f"{row.registers}, the most there are"),
        _each(
            f"at most {WAITS} waits per product of Hopper's tensor cores",
            [row for row in rows if row.waits_per_tensor_core is not None],
            lambda row: (row.waits_per_tensor_core or 0) > WAITS and f"{row.waits_per_tensor_core:.2f}",
        ),
        _each(
            "products of the tensor cores are not serialised, by the assembler's word",
            [row for row in rows if row.multiplies],
            lambda row: ", ".join(row.serialised),
        ),
        _each(
            "tiles of inner loops reach shared memory without going through registers",
            [row for row in rows if row.multiplies],
            lambda row: row.staged_tiles and f"{row.staged_tiles} loads",
        ),
        _each(
            "fences between asynchronous copies and Hopper's tensor cores",
            [row for row in rows if row.tensor_core.get("HGMMA")],
            lambda row: row.unfenced_copies and f"{row.unfenced_copies} products without one",
        ),
        _each(
            "operands in registers only by an assembler that keeps them, ptxas 13.3 or newer",
            [row for row in rows if row.tensor_core.get("HGMMA")],
            lambda row: row.unsafe_operands and f"{row.unsafe_operands} products",
        ),
        _each("the architecture's own tensor cores", [row for row in rows if row.multiplies], _wrong_tensor_core),
        _each(
            "128-bit loads of tiles in every inner loop",
            [row for row in rows if row.wide_loads is not None],
            lambda row: not row.wide_loads and f"{_narrow(row)}; {row.wide_share:.0%} of the bytes are wide",
        ),
        _each(
            "two blocks a multiprocessor at head dimension 64",
            [row for row in rows if row.variant.get("head_dim") == 64],
            lambda row: (
                row.occupancy < 2 and f"{row.occupancy}: {row.registers} registers, {row.shared_bytes} B shared"
            ),
        ),
        _bias_overhead(rows),
    ]


def _each(target: str, rows: list[Row], fault: Callable[[Row], object]) -> Verdict:
    """`fault` gives what is wrong with a row, or something false."""
    found = [(row, fault(row)) for row in rows]
    return Verdict(target, len(rows), [f"{row.key}: {what}" for row, what in found if what])


def _shared_excess(row: Row) -> object:
    return row.shared_bytes > row.shared_limit and f"{row.shared_bytes} B of {row.shared_limit}"


def _wrong_tensor_core(row: Row) -> object:
    wanted = limits(row.arch).tensor_core
    return wanted not in row.tensor_core and f"{', '.join(row.tensor_core) or 'none'} instead of {wanted}"


def _narrow(row: Row) -> str:
    """Loads of fewer than 128 bits, as `2 LDG.32`."""
    narrow = {load: n for load, n in row.tile_loads.items() if load_bits(load) < 128}
    return ", ".join(f"{n} {load}" for load, n in sorted(narrow.items()))


def _bias_overhead(rows: list[Row]) -> Verdict:
    """The loop of a kernel with its bias against the same kernel without: the variant that says `bias=False`."""
    plain = {
        (row.kernel, row.arch, row.dtype, row.config, _without_bias(row)): row
        for row in rows
        if row.variant.get("bias") is False and row.loop_instructions
    }
    checked, missed = 0, []
    for row in rows:
        other = plain.get((row.kernel, row.arch, row.dtype, row.config, _without_bias(row)))
        if other is None or other is row:
            continue
        checked += 1
        more = row.loop_instructions / other.loop_instructions - 1
        if row.loop_instructions > other.loop_instructions * (1 + BIAS_OVERHEAD):
            missed.append(
                f"{row.key}: {row.loop_instructions} instructions in the loop, {other.loop_instructions} without bias:"
                f" {more:+.0%}"
            )
    return Verdict(f"the bias costs at most {BIAS_OVERHEAD:.0%} more instructions in the inner loop", checked, missed)


def _without_bias(row: Row) -> tuple[tuple[str, object], ...]:
    return tuple((name, value) for name, value in row.variant.items() if name != "bias")
