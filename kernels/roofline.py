"""Roofline of an operation: its FLOPs at the peak rate or its memory traffic, the slower of the two.

A multiplication and an addition are two FLOPs, recomputation does not count; traffic reads every operand once and
writes every result once.
"""

from __future__ import annotations

from dataclasses import dataclass

HEADS, HEAD_DIM, WIDTH, HIDDEN = 12, 64, 768, 3072
VOCABULARY = 50_265
_FP32 = 4


@dataclass(frozen=True)
class GPU:
    """Peak rates from NVIDIA's data sheets, SXM boards: dense bf16 or fp16 on the tensor cores, and memory."""

    name: str
    flops_per_s: float
    bytes_per_s: float


H100 = GPU("H100", 989e12, 3.35e12)
H200 = GPU("H200", 989e12, 4.8e12)
A100 = GPU("A100", 312e12, 2.04e12)
GPUS = (H200, H100, A100)


@dataclass(frozen=True)
class Work:
    """FLOPs and memory traffic of an operation at one shape."""

    op: str
    shape: str
    flops: float
    bytes: float

    def floor(self, gpu: GPU) -> float:
        """Return the minimum time in seconds."""
        return max(self.flops / gpu.flops_per_s, self.bytes / gpu.bytes_per_s)


def relpos_attention(batch: int, tokens: int, *, backward: bool = False, element: int = 2) -> Work:
    """Count self-attention of images with a bias `[heads, N, N]`, read once; the backward pass reads it again."""
    return _attention(
        "relpos_attention",
        f"{batch} × {tokens}",
        pairs=batch * tokens * tokens,
        operands=4 * batch * tokens * HEADS * HEAD_DIM * element,
        bias=HEADS * tokens * tokens * element,
        queries=batch * tokens,
        backward=backward,
    )


def varlen_attention(
    pairs: int, queries: int, keys: int, shape: str, *, backward: bool = False, element: int = 2
) -> Work:
    """Count attention of packed sequences with `pairs` of query and key that attend, summed over the sequences."""
    return _attention(
        "varlen_attention",
        shape,
        pairs=pairs,
        operands=2 * (queries + keys) * HEADS * HEAD_DIM * element,
        bias=0,
        queries=queries,
        backward=backward,
    )


def _attention(
    op: str, shape: str, *, pairs: int, operands: int, bias: int, queries: int, backward: bool
) -> Work:
    gemms = 5 if backward else 2  # qkᵀ again, dv, dp, dq, dk; or qkᵀ and pv
    flops = gemms * 2 * pairs * HEADS * HEAD_DIM
    statistics = queries * HEADS * _FP32
    # Backward: q, k, v, out and dout are read, dq, dk and dv written: twice the operands of the forward pass.
    traffic = 2 * operands if backward else operands
    return Work(op + (" backward" if backward else ""), shape, flops, traffic + bias + statistics)


def add_layer_norm(rows: int, *, backward: bool = False, element: int = 2) -> Work:
    """Count a residual sum and its LayerNorm: two tensors in, two out; backward, three tensors in, one gradient out."""
    flops = (14 if backward else 9) * rows * WIDTH
    traffic = 4 * rows * WIDTH * element + 2 * rows * _FP32
    name = "add_layer_norm" + (" backward" if backward else "")
    return Work(name, f"{rows} × {WIDTH}", flops, traffic)


def linear_gelu(rows: int, *, backward: bool = False, element: int = 2) -> Work:
    """Count the first linear layer of an MLP with its GELU, which saves the pre-activation for the backward pass."""
    shape, gemm = f"{rows} × {WIDTH} → {HIDDEN}", 2 * rows * WIDTH * HIDDEN
    inner, outer, weight = rows * HIDDEN * element, rows * WIDTH * element, WIDTH * HIDDEN * element
    if backward:  # dx and dw; x, w, dy and the pre-activation in, dx and dw out
        return Work("linear_gelu backward", shape, 2 * gemm, 2 * (outer + weight + inner))
    return Work("linear_gelu", shape, gemm, outer + weight + 2 * inner)


def linear_cross_entropy(rows: int, vocabulary: int, *, element: int = 2) -> Work:
    """Count a loss over a vocabulary with its gradients: three GEMMs, and no logits in memory."""
    flops = 3 * 2 * rows * WIDTH * vocabulary
    traffic = 2 * (rows * WIDTH + vocabulary * WIDTH + vocabulary) * element
    shape = f"{rows} × {WIDTH} → {vocabulary}"
    return Work("linear_cross_entropy and gradients", shape, flops, traffic)
