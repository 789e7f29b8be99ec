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
        """The minimum time in seconds."""
        return max(self.flops / gpu.flops_per_s, self.bytes / gpu.bytes_per_s)


def relpos_attention(batch: int, tokens: int, *, backward: bool = False, element: int = 2) -> Work:
    """Self-attention of images with a bias `[heads, N, N]`, read once; the backward pass reads it again."""
    operand = batch * tokens * HEADS * HEAD_DIM * element
    bias = HEADS * tokens * tokens * element
    return _attention(
        "relpos_attention", f"{batch} × {tokens}", batch * tokens * tokens, 4 * operand, bias, batch * tokens,
        backward=backward,
    )  # fmt: skip


def varlen_attention(
    pairs: int, queries: int, keys: int, shape: str, *, backward: bool = False, element: int = 2
) -> Work:
    """Attention of packed sequences with `pairs` of query and key that attend, summed over the sequences."""
    operands = 2 * (queries + keys) * HEADS * HEAD_DIM * element
    return _attention("varlen_attention", shape, pairs, operands, 0, queries, backward=backward)


def _attention(
    op: str, shape: str, pairs: int, operands: int, bias: int, queries: int, *, backward: bool
) -> Work:
    products = 5 if backward else 2  # qkᵀ again, dv, dp, dq, dk; or qkᵀ and pv
    flops = products * 2 * pairs * HEADS * HEAD_DIM
    statistics = queries * HEADS * _FP32
    # Backward: q, k, v, out and dout are read, dq, dk and dv written: twice the operands of the forward pass.
    traffic = 2 * operands if backward else operands
    return Work(op + (" backward" if backward else ""), shape, flops, traffic + bias + statistics)


def add_layer_norm(rows: int, *, backward: bool = False, element: int = 2) -> Work:
    """Residual addition and LayerNorm: two tensors in, two out; backward, three tensors in, one gradient out."""
    tensors = 4
    flops = (14 if backward else 9) * rows * WIDTH
    name = "add_layer_norm" + (" backward" if backward else "")
    return Work(
        name, f"{rows} × {WIDTH}", flops, tensors * rows * WIDTH * element + 2 * rows * _FP32
    )


def linear_gelu(rows: int, *, backward: bool = False, element: int = 2) -> Work:
    """The first linear layer of an MLP with its GELU, which saves the pre-activation for the backward pass."""
    product = 2 * rows * WIDTH * HIDDEN
    inner, outer, weight = rows * HIDDEN * element, rows * WIDTH * element, WIDTH * HIDDEN * element
    if backward:  # dx and dw; x, w, dy and the pre-activation in, dx and dw out
        traffic = 2 * (outer + weight + inner)
        return Work("linear_gelu backward", f"{rows} × {WIDTH} → {HIDDEN}", 2 * product, traffic)
    return Work("linear_gelu", f"{rows} × {WIDTH} → {HIDDEN}", product, outer + weight + 2 * inner)


def linear_cross_entropy(rows: int, vocabulary: int, *, element: int = 2) -> Work:
    """Loss over a vocabulary with its gradients: three GEMMs, and no logits in memory."""
    product = 2 * rows * WIDTH * vocabulary
    traffic = 2 * (rows * WIDTH + vocabulary * WIDTH + vocabulary) * element
    return Work(
        "linear_cross_entropy and gradients",
        f"{rows} × {WIDTH} → {vocabulary}",
        3 * product,
        traffic,
    )
