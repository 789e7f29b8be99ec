"""Bounds that several files share, for machines with and without Triton."""

HEAD_DIMS = (32, 64, 80, 96, 128)
"""Head dimensions that the Triton kernels of attention are compiled for."""

LARGEST_WIDTH = 8192
"""Elements of the widest row that one program of a Triton LayerNorm holds in registers."""

OLDEST_GPU = (8, 0)
"""Compute capability below which the Triton kernels do not run: Ampere brought bf16 and asynchronous copies."""
