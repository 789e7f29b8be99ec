"""The resources that an architecture offers a kernel, and how many of its blocks fit on one multiprocessor.

Figures: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = (80, 90, 100, 120)

_REGISTERS = 65536
_PARTITIONS = 4  # of a multiprocessor, each with a quarter of the registers
_REGISTER_UNIT = 256  # a warp's registers are a multiple of this
_MOST_REGISTERS = 255  # of a thread
_RESERVED_SHARED = 1024  # the driver's, of every block
_SHARED_UNIT = 128
_TENSOR_MEMORY = 512  # columns


@dataclass(frozen=True)
class Limits:
    """The resources of one multiprocessor; `block_shared` is the most that one block may have."""

    warps: int
    blocks: int
    shared: int
    block_shared: int
    tensor_core: str


LIMITS = {
    80: Limits(64, 32, 164 * 1024, 163 * 1024, "HMMA"),
    86: Limits(48, 16, 100 * 1024, 99 * 1024, "HMMA"),
    89: Limits(48, 24, 100 * 1024, 99 * 1024, "HMMA"),
    90: Limits(64, 32, 228 * 1024, 227 * 1024, "HGMMA"),
    100: Limits(64, 32, 228 * 1024, 227 * 1024, "UTCHMMA"),
    103: Limits(64, 32, 228 * 1024, 227 * 1024, "UTCHMMA"),
    120: Limits(48, 24, 100 * 1024, 99 * 1024, "HMMA"),
}


def limits(arch: int) -> Limits:
    """The limits of an architecture such as 90.

    Raises:
        ValueError: its limits are not known here.
    """
    if arch not in LIMITS:
        raise ValueError(f"architecture {arch} is unknown; known are {', '.join(map(str, LIMITS))}")
    return LIMITS[arch]


def occupancy(arch: int, *, registers: int, shared_bytes: int, warps: int, tensor_memory: int = 0) -> int:
    """Blocks that one multiprocessor holds at once; 0 if not even one fits.

    Args:
        arch: such as 90.
        registers: of one thread.
        shared_bytes: of one block, static and dynamic, without the driver's reserve.
        warps: of one block.
        tensor_memory: columns of Blackwell's tensor memory that one block allocates.
    """
    limit = limits(arch)
    if shared_bytes > limit.block_shared:
        return 0
    per_warp = _round_up(registers * 32, _REGISTER_UNIT)
    resident_warps = min(limit.warps, _REGISTERS // _PARTITIONS // per_warp * _PARTITIONS if per_warp else limit.warps)
    shared = _round_up(shared_bytes + _RESERVED_SHARED, _SHARED_UNIT)
    blocks = min(limit.blocks, resident_warps // warps, limit.shared // shared)
    return min(blocks, _TENSOR_MEMORY // tensor_memory) if tensor_memory else blocks


def register_limit(arch: int, *, registers: int, shared_bytes: int, warps: int, tensor_memory: int = 0) -> int:
    """The most registers that a kernel may take before fewer of its blocks fit, 255 at most.

    The arguments are those of `occupancy`. For eight warps the cliffs are 128, for four also 168 and 128.
    """

    def blocks(count: int) -> int:
        return occupancy(arch, registers=count, shared_bytes=shared_bytes, warps=warps, tensor_memory=tensor_memory)

    return max(count for count in range(registers, _MOST_REGISTERS + 1) if blocks(count) == blocks(registers))


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
