"""Launch configurations of attention with a general bias, chosen with the compiler's report."""

from __future__ import annotations

from .launch import LaunchConfig, tuned_config

# (rows of the tile that a program owns, rows of the tiles that it loops over, warps, stages) for head dimensions up to
# 64, 72 (the masks of whose second piece take registers), 96, 128, 192 and 256. Programs of the forward, dq and dbias
# kernels own queries, those of the dkdv kernel keys.
_Row = tuple[int, int, int, int]
_Rows = tuple[_Row, _Row, _Row, _Row, _Row, _Row]
_HALF: dict[str, dict[int, _Rows]] = {
    "bias_attention_forward": {
        80: ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        90: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        100: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
        120: ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    },
    "bias_attention_dkdv": {
        80: ((64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 1), (32, 16, 8, 1)),
        90: ((64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 16, 4, 2)),
        100: ((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 1), (128, 16, 8, 1)),
        120: ((64, 16, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2), (64, 16, 8, 1), (32, 16, 8, 1)),
    },
    "bias_attention_dq": {
        80: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 1)),
        90: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        100: ((128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 1), (128, 32, 8, 1)),
        120: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 1)),
    },
    "bias_attention_dbias": {
        80: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
        90: ((64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
        100: ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
        120: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
    },
}
_WIDTHS = (64, 72, 96, 128, 192, 256)


def bias_config(kernel: str, head_dim: int, dtype: str, arch: int, dropout: bool) -> LaunchConfig:
    """The configuration of a `bias_attention_*` kernel: tuned for the GPU, or free of spills in half precision.

    The tuned table is for kernels without dropout, whose random bits take registers; fp32 is for exactness, not speed.
    """
    tuned = None if dropout else tuned_config(kernel, head_dim, dtype, arch)
    if tuned is not None:
        return tuned
    if dtype == "fp32":
        own, other, warps, stages = (32, 32, 4, 1) if head_dim > 64 else (32, 64, 4, 1)
    else:
        rows = _HALF[kernel][_nearest(arch)]
        own, other, warps, stages = rows[next(i for i, width in enumerate(_WIDTHS) if head_dim <= width)]
    if dropout and dtype != "fp32":
        other = min(other, 32)
    block_m, block_n = (other, own) if kernel == "bias_attention_dkdv" else (own, other)
    widest = {"bias_attention_dkdv": 64, "bias_attention_dq": 192}.get(kernel, 0)
    hopper = dtype != "fp32" and _nearest(arch) == 90
    # Wider heads have no registers for products apart. Unfenced, those of 96 and 128 are serialised, and 256 spills.
    apart, fenced = hopper and head_dim <= widest, hopper and 0 < widest < head_dim
    return LaunchConfig({"BLOCK_M": block_m, "BLOCK_N": block_n}, warps, stages, apart, fenced=fenced)


def _nearest(arch: int) -> int:
    """The table's architecture that fits in the shared memory."""
    if arch < 90:
        return 80 if arch == 80 else 120
    return 90 if arch < 100 else 100 if arch < 120 else 120
