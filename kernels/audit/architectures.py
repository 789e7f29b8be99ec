"""Limits of one multiprocessor per architecture, and the occupancy that they allow.

Figures: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = (80, 90, 100, 120)
RESERVED_SHARED = 1024  # of every block, for the driver

_REGISTERS = 65536
_PARTITIONS = 4  # of a multiprocessor, each with a quarter of the registers
_REGISTER_UNIT = 256  # a warp's registers are a multiple of this
_MOST_REGISTERS = 255  # of a thread
_SHARED_UNIT = 128
_TENSOR_MEMORY = 512  # columns


@dataclass(frozen=True)
class Limits:
    """The resources of one multiprocessor; `block_shared` is the maximum of one block."""

    warps: int
    blocks: int
    shared: int
    block_shared: int


LIMITS = {
    80: Limits(64, 32, 164 * 1024, 163 * 1024),
    86: Limits(48, 16, 100 * 1024, 99 * 1024),
    89: Limits(48, 24, 100 * 1024, 99 * 1024),
    90: Limits(64, 32, 228 * 1024, 227 * 1024),
    100: Limits(64, 32, 228 * 1024, 227 * 1024),
    103: Limits(64, 32, 228 * 1024, 227 * 1024),
    120: Limits(48, 24, 100 * 1024, 99 * 1024),
}


def occupancy(arch: int, *, registers: int, shared_bytes: int, warps: int, tensor_memory: int = 0) -> int:
    """Resident blocks of one multiprocessor, from registers per thread and shared memory, warps and columns per block.

    `shared_bytes` is static plus dynamic, without the driver's reserve. 0 if no block fits.
    """
    limit = LIMITS[arch]
    if shared_bytes > limit.block_shared:
        return 0
    per_warp = _round_up(registers * 32, _REGISTER_UNIT)
    resident_warps = min(limit.warps, _REGISTERS // _PARTITIONS // per_warp * _PARTITIONS if per_warp else limit.warps)
    shared = _round_up(shared_bytes + RESERVED_SHARED, _SHARED_UNIT)
    blocks = min(limit.blocks, resident_warps // warps, limit.shared // shared)
    return min(blocks, _TENSOR_MEMORY // tensor_memory) if tensor_memory else blocks


def register_limit(arch: int, *, registers: int, **usage: int) -> int:
    """The most registers per thread at the same occupancy; with eight warps the cliff is 128, with four also 168."""
    blocks = occupancy(arch, registers=registers, **usage)
    return max(n for n in range(registers, _MOST_REGISTERS + 1) if occupancy(arch, registers=n, **usage) == blocks)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
