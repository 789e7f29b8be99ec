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

ZERO_BYTE, GELU_ZERO_BYTE = 128, 32
"""The bytes that stand for 0 in products on a CPU, which are fast of unsigned with signed ones: of any rows, and of a
GELU, which has its minimum at -0.17, so that most levels can be for positive values."""

NO_FRACTIONS = 1.5 * 2**23
"""So large a number leaves no room for fractions in fp32: the sum is rounded, and its lowest byte is the level."""
