"""Bounds that several files share, for machines with and without Triton."""

HEAD_DIMS = (32, 64, 80, 96, 128)
"""Head dimensions that the Triton kernels of attention are compiled for."""

LARGEST_WIDTH = 8192
"""Elements of the widest row that one program of a Triton LayerNorm holds in registers."""

OLDEST_GPU = (8, 0)
"""Compute capability below which the Triton kernels do not run: Ampere brought bf16 and asynchronous copies."""

BIAS_HEAD_DIMS = (16, 32, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256)
"""Head dimensions that the Triton kernels of attention with a general bias are compiled for."""

HIDDEN = -1e30
"""A bias of this or less hides a key: -inf, and the least numbers of fp32 and bf16, which masks are often made of."""
